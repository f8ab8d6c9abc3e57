"""13 format: any Item -> Example: chat messages and a split, and the directories trainers and the Hub read.

The split comes from a hash of the record's cluster, so near-duplicates share a split and more data moves nothing.
Beside the records, free of charge:

    training/{train,valid,test}.jsonl   {"messages": [...]} lines, as mlx_lm.lora reads them
    openai/{train,valid}.jsonl          and anthropic/, bedrock/, nanochat/: what vendors and trainers take
    dataset/                            parquet per split and a card, as datasets.load_dataset reads it

    python stages/13_format/main.py --in data/trial/compression/12_choose.jsonl \\
        --out data/trial/compression/13_format.jsonl --config stages/13_format/trial.toml --track compression
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from exports import write_dataset, write_format
from formats import FORMATS
from pydantic import Field, model_validator

from shared.errors import SettingsError
from shared.records import AnyItem, Example, Item, Split, content_id
from shared.stage import ROOT, Settings, Stage, run
from shared.stats import track_table


class Params(Settings):
    """Settings of 13; see trial.toml for the unit of each."""

    system_prompt: Path | None = None
    user_prompt: Path | None = None
    valid: float = Field(0.05, ge=0, le=0.5)
    test: float = Field(0.05, ge=0, le=0.5)
    seed: int = 0
    pretty_name: str
    languages: tuple[str, ...] = ("en",)
    exports: tuple[Literal["training", "openai", "anthropic", "bedrock", "nanochat"], ...] = ("training",)

    @model_validator(mode="after")
    def _room_for_training(self) -> Params:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must leave room for train")
        return self


def split_of(group: str, params: Params) -> Split:
    """The split of a cluster: where the hash of its id falls in [0, 1)."""
    place = int(content_id(str(params.seed), group), 16) / 2**128
    if place < params.test:
        return "test"
    return "valid" if place < params.test + params.valid else "train"


def example(record: Item, system: str, user: str, params: Params) -> Example:
    """The training example of a record."""
    group = record.cluster.id if record.cluster else record.id
    return Example(
        id=record.id,
        parents=record.parents,
        domain=record.domain,
        source=record.source,
        origin=record.origin,
        language=record.language,
        category=record.category,
        licence=record.licence,
        messages=record.chat(system, user),
        split=split_of(group, params),
        group=group,
        quality=record.quality(),
        compression_ratio=record.ratio(),
    )


def prompt(stage: Stage[Params], path: Path | None) -> str:
    """The text of a prompt file, relative to the repository; ``""`` for none."""
    if path is None:
        return ""
    try:
        return (ROOT / path).read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"the prompt {path} cannot be read: {error.strerror}", f"edit {stage.config}") from None


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    system, user = prompt(stage, p.system_prompt), prompt(stage, p.user_prompt)

    # -- process
    examples = []
    for record in stage.read(AnyItem):
        made = example(record, system, user, p)
        faults = {name: FORMATS[name].fault(FORMATS[name].line(made.messages)) for name in p.exports}
        broken = {name: fault for name, fault in faults.items() if fault}
        if any(not message.content.strip() for message in made.messages):
            stage.reject(record, "empty_message", "a turn without text would train nothing")
        elif broken:
            stage.reject(record, "format", "; ".join(f"{name}: {fault}" for name, fault in broken.items()))
        else:
            examples.append(made)
            stage.keep(made)

    # -- save
    counts = {split: sum(e.split == split for e in examples) for split in ("train", "valid", "test")}
    stage.summary["splits"] = counts
    for name in p.exports:
        write_format(stage.side_dir(name), FORMATS[name], examples)
    write_dataset(stage.side_dir("dataset"), examples, name=p.pretty_name, languages=p.languages, apis=stage.apis)
    shares = ", ".join(f"{split} {count}" for split, count in counts.items())
    stage.tables.append(
        f"\n{track_table(stage.output.parent, running=stage.name)}\n\n{len(examples)} training examples: {shares}"
    )


if __name__ == "__main__":
    run(main, Params)
