"""Who is measured: models with and without an adapter, and what each writes for the held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from shared.errors import SettingsError
from shared.generate import (
    Ask,
    GenerationStore,
    MlxGenerator,
    MlxSettings,
    Outcome,
    Sampling,
    served,
    store_path,
)
from shared.local_models import COMMIT
from shared.receipts import TrainReceipt, same_apis
from shared.stage import Settings, Stage, sha256_of, shown

ADAPTER = "adapter_mlx"
"""Of the run's directory: the checkpoint with the lowest validation loss."""


class ModelAlone(Settings):
    """A model; see the comments in the TOML. Where ``model`` is empty, it is the candidate's."""

    model: str = ""
    revision: str = Field(default="", pattern=COMMIT)
    served_as: str = ""


class ModelAdapted(ModelAlone):
    """A model with an adapter that is there already."""

    adapter: str
    adapter_revision: str = Field(default="", pattern=COMMIT)


class Writer(NamedTuple):
    """A contestant that is a model: its name, its specs, and how it is asked: a generator here, or a server's name."""

    name: str
    model: str
    adapter: str
    generator: MlxGenerator | None
    served_as: str


def adapter_of(receipt: TrainReceipt, directory: Path) -> Path:
    """The adapter that 14 trained, byte for byte.

    Raises:
        SettingsError: its files are not there, or not as 14 left them.
    """
    for name, sha in receipt.files.items():
        if name.partition("/")[0] == ADAPTER and not (
            (directory / name).is_file() and sha256_of(directory / name) == sha
        ):
            raise SettingsError(f"{shown(directory / name)} is not what 14 trained", "make stage14   (trains it again)")
    return directory / ADAPTER


def writers(stage: Stage[Any], receipt: TrainReceipt, directory: Path) -> list[Writer]:
    """The contestants that are models, the candidate first; all they need is here, or pinned.

    Raises:
        SettingsError: it is not.
    """
    p = stage.params
    base, _, commit = receipt.base_model.model.partition("@")
    where = {"model": p.candidate.model or base, "revision": p.candidate.revision if p.candidate.model else commit}
    trained = shown(adapter_of(receipt, directory))
    entries: list[tuple[str, ModelAlone, dict[str, str]]] = [("candidate", p.candidate, {"adapter": trained})]
    if p.baseline:
        older = {"adapter": p.baseline.adapter, "adapter_revision": p.baseline.adapter_revision}
        entries.append(("baseline", p.baseline, older))
    if p.base:
        entries.append(("base", p.base, {}))
    return [_writer(stage, name, entry, where, adapter) for name, entry, adapter in entries]


def _writer(
    stage: Stage[Any], name: str, entry: ModelAlone, candidates: dict[str, str], adapter: dict[str, str]
) -> Writer:
    p = stage.params
    if p.written_by == "endpoint":
        if not entry.served_as:
            raise SettingsError(
                f"written_by = 'endpoint', but {name}.served_as is empty",
                f"set it to the name the server knows the {name}'s model and adapter by",
            )
        return Writer(name, f"endpoint/{entry.served_as}", adapter.get("adapter", ""), None, entry.served_as)
    where = {"model": entry.model, "revision": entry.revision} if entry.model else candidates
    limits = {"batch_size": p.batch_size, "max_prompt_tokens": p.max_prompt_tokens}
    generator = MlxGenerator(
        MlxSettings.model_validate(where | adapter | limits),
        greedily(p),
        stage.services,
        table=name,
        needed_by="written_by = 'mlx'",
        otherwise="set written_by = 'endpoint' in the settings",
        without_adapter="make bootstrap; or take the table out of the settings",
    )
    same_apis(generator.adapter, stage.apis)
    return Writer(name, generator.model, generator.adapter, generator, "")


def greedily(params: Any) -> Sampling:
    """How every contestant that is a model writes."""
    return Sampling(temperature=0.0, max_tokens=params.max_tokens, seed=0)


def written(stage: Stage[Any], writer: Writer, asks: Sequence[Ask]) -> list[Outcome]:
    """What a contestant writes, greedily, in the order of the questions; nothing that is stored is written again."""
    if writer.generator is None:
        return _served(stage, writer, asks)
    with closing(GenerationStore(store_path(stage.cache, stage.apis))) as store:
        outcomes = list(writer.generator.outcomes(asks, store, stage.progress))
    stage.summary[f"mlx {writer.name}"] = writer.generator.summary
    return outcomes


def _served(stage: Stage[Any], writer: Writer, asks: Sequence[Ask]) -> list[Outcome]:
    p, models = stage.params, stage.models
    models.require(writer.model)

    async def one(ask: Ask) -> Outcome:
        return await served(models, writer.model, p.base_url, ask.messages, greedily(p))

    return [outcome for _, outcome in models.map(one, asks, p.concurrency)]
