"""03 compress: write every text again in fewer tokens, with a local model, any OpenAI-compatible server or a teacher.

Input: RawText (02 merge). Output: Pair, in input order, ``generation`` filled. Rejected, with the reason: outputs that
are empty, truncated, a refusal, or not shorter in tokens; texts no model should see (a chat control token inside).
Source: ``generator`` in the settings. Cost: ``mlx`` a night on a 16 GB Mac for 11,000 texts and no money; ``endpoint``
whatever your server costs; ``teacher`` cents per thousand texts (``make estimate``). Runs natively: MLX needs the GPU.

    python stages/03_compress/main.py --in data/trial/compression/02_merge.jsonl \\
        --out data/trial/compression/03_compress.jsonl --config stages/03_compress/trial.toml --track compression
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field

from shared.errors import SettingsError
from shared.generate import (
    Ask,
    GenerationStore,
    MlxGenerator,
    MlxSettings,
    Outcome,
    Sampling,
    compressed_or_reason,
    in_fewer_tokens,
    served,
    store_path,
)
from shared.llm.volume import Calls, Volume, tokens_of
from shared.local_models import COMMIT, mlx_is_spared, pinned
from shared.receipts import same_apis
from shared.records import Domain, Generation, Message, Pair, RawText, Sourced
from shared.stage import Settings, Stage, run
from shared.text import Tokenizer

PROVENANCE = tuple(Sourced.model_fields)
EXPECTED_RATIO = 0.6
"""Compressed tokens / verbose tokens, for the estimate; what was measured once it has run is in the report."""


class EndpointSettings(Settings):
    """Any OpenAI-compatible server: vLLM, ``mlx_lm.server``, a hosted one."""

    model: str = Field(pattern=r"^endpoint/.")
    base_url: str = ""
    concurrency: int = Field(default=8, ge=1)


class TeacherSettings(Settings):
    """A hosted model that needs no adapter to follow the prompts."""

    model: str = Field(pattern=r"^(anthropic|openai|gemini)/.")
    concurrency: int = Field(default=8, ge=1)


class Params(Settings):
    """See the comments in the TOML."""

    generator: Literal["mlx", "endpoint", "teacher"]
    without_mlx: Literal["", "endpoint", "teacher"] = ""
    tokenizer: str
    tokenizer_revision: str = Field(default="", pattern=COMMIT)
    temperature: float = Field(default=0.2, ge=0, le=2)
    max_tokens: int = Field(default=512, ge=1)
    seed: int = 0
    mlx: MlxSettings | None = None
    endpoint: EndpointSettings | None = None
    teacher: TeacherSettings | None = None


# ---------------------------------------------------------------- the question


@dataclass(frozen=True)
class Prompt:
    """The two prompt files: ``system`` as it is, ``user`` with ``{text}`` where the text goes.

    Raises:
        SettingsError: ``user`` does not hold ``{text}`` exactly once.
    """

    system: str
    user: str

    def __post_init__(self) -> None:
        if self.user.count("{text}") != 1:
            raise SettingsError(
                f"prompts/user.txt must hold {{text}} exactly once, it holds it {self.user.count('{text}')} times",
                "edit stages/03_compress/prompts/user.txt",
            )

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of both prompts."""
        return hashlib.sha256(f"{self.system}\0{self.user}".encode()).hexdigest()[:16]

    def messages(self, text: str) -> tuple[Message, ...]:
        """The conversation whose answer is the compression of ``text``."""
        user = Message(role="user", content=self.user.replace("{text}", text))
        return (Message(role="system", content=self.system), user) if self.system else (user,)


def source_text(record: RawText) -> str:
    """The text to compress: as 02 merge left it, else as its source had it."""
    return record.merged.text if record.merged else record.text


# ---------------------------------------------------------------- the generators


def local(stage: Stage[Params], generator: MlxGenerator, prompt: Prompt) -> Iterator[tuple[RawText, Outcome]]:
    """Every record with what the model on this machine wrote."""
    records = list(stage.read(RawText))
    asks = [Ask(record.id, prompt.messages(source_text(record))) for record in records]
    with closing(GenerationStore(store_path(stage.cache, stage.apis))) as store:
        yield from zip(records, generator.outcomes(asks, store, stage.progress), strict=True)
    stage.summary["mlx"] = generator.summary


def remote(
    stage: Stage[Params], server: EndpointSettings | TeacherSettings, prompt: Prompt, sampling: Sampling
) -> Iterator[tuple[RawText, Outcome]]:
    """Every record with what a server answered; as many under way as ``concurrency`` says, memory bounded."""
    models = stage.models
    models.require(server.model)

    async def one(record: RawText) -> Outcome:
        messages = prompt.messages(source_text(record))
        return await served(models, server.model, getattr(server, "base_url", ""), messages, sampling)

    yield from models.map(one, stage.read(RawText), concurrency=server.concurrency)


def where_there_is_no_mlx(params: Params) -> Params:
    """The settings, with generator ``without_mlx`` where mlx-lm is wanted, cannot be imported and one is named."""
    if params.generator == "mlx" and params.without_mlx and importlib.util.find_spec("mlx_lm") is None:
        return params.model_copy(update={"generator": params.without_mlx})
    return params


def table_of(params: Params) -> MlxSettings | EndpointSettings | TeacherSettings:
    """The table of the generator chosen.

    Raises:
        SettingsError: the settings have none.
    """
    table: MlxSettings | EndpointSettings | TeacherSettings | None = getattr(params, params.generator)
    if table is None:
        raise SettingsError(f"generator = {params.generator!r}, but there is no table [{params.generator}]", "add it")
    return table


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 03 asks for these texts, from an empty store; nothing when it generates on this machine."""
    table = table_of(where_there_is_no_mlx(params))
    if isinstance(table, MlxSettings):
        return []
    prompts = sum(
        tokens_of((Path(__file__).parent / "prompts" / f).read_text("utf-8")) for f in ("system.txt", "user.txt")
    )
    records = sum(volume.records for volume in volumes.values())
    tokens = sum(volume.records * volume.tokens for volume in volumes.values())
    base_url = getattr(table, "base_url", "")
    return [Calls(table.model, records, records * prompts + tokens, tokens * EXPECTED_RATIO, base_url=base_url)]


def main(stage: Stage[Params]) -> None:
    # -- load
    params = where_there_is_no_mlx(stage.params)
    table = table_of(params)
    if params is not stage.params:
        more = "; 14 to 16 train, measure and release nothing" if mlx_is_spared() else ""
        print(f"{stage.name}  mlx-lm is not installed here: {params.generator} writes instead{more}", file=sys.stderr)
    prompt = Prompt(stage.prompt("system.txt"), stage.prompt("user.txt"))
    sampling = Sampling(params.temperature, params.max_tokens, params.seed)
    spec = pinned("tokenizer", params.tokenizer, params.tokenizer_revision, "tokenizer_revision")
    model, adapter = table.model, ""
    if isinstance(table, MlxSettings):
        generator = MlxGenerator(table, sampling, stage.services)
        model, adapter = generator.model, generator.adapter
        same_apis(adapter, stage.apis)
        outcomes = local(stage, generator, prompt)
    else:
        outcomes = remote(stage, table, prompt, sampling)
    tokenizer = Tokenizer(spec)
    if params.tokenizer_revision:
        stage.services()
    tokenizer.count("")  # a tokenizer that cannot be loaded stops us before anything is generated
    ratios: dict[str, list[float]] = {}

    # -- process
    for record, outcome in outcomes:
        text = source_text(record)
        outcome = compressed_or_reason(text, outcome, by_phrase=params.generator != "teacher")
        verbose_tokens, compressed_tokens = tokenizer.counts([text, outcome.text])
        outcome = in_fewer_tokens(outcome, verbose_tokens, compressed_tokens)
        if outcome.problem:
            stage.reject(record, outcome.problem, outcome.detail)
            continue
        generation = Generation(
            generator=params.generator,
            model=model,
            adapter=adapter,
            prompt=prompt.digest,
            tokenizer=spec,
            verbose_tokens=verbose_tokens,
            compressed_tokens=compressed_tokens,
            compression_ratio=round(compressed_tokens / verbose_tokens, 6),
        )
        provenance = {name: getattr(record, name) for name in PROVENANCE}
        stage.keep(Pair(**provenance, verbose=text, compressed=outcome.text, generation=generation))
        ratios.setdefault(record.domain, []).append(generation.compression_ratio)

    # -- save
    stage.summary["mean_compression_ratio"] = {domain: round(fmean(r), 4) for domain, r in sorted(ratios.items())}


if __name__ == "__main__":
    run(main, Params)
