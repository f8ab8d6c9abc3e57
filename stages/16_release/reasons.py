"""What stands against a release: every check, each giving all it finds and none stopping the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from card_parts import EXAMPLE
from lineage import Link, broken, missing

from shared.receipts import EvaluateReceipt, Reason, TrainReceipt
from shared.records import Example
from shared.spdx import allowed, obligation
from shared.stage import ROOT, Stage, sha256_of, shown
from shared.text import ScrubRules, scrub

SHOWN = 5
"""Of many finds of one kind, so many are named."""


def of_data(input_: Path, train: TrainReceipt) -> Iterator[Reason]:
    """The records are not those that were trained on."""
    if (now := sha256_of(input_)) != train.data.sha256:
        text = (
            f"{shown(input_)} changed since {train.run_id} was trained: its SHA-256 was {train.data.sha256[:12]}..., "
            f"it is {now[:12]}...: make stage14 stage15"
        )
        yield Reason(code="data_changed", blocks="staging", text=text)


def of_adapter(directory: Path, train: TrainReceipt) -> Iterator[Reason]:
    """A file of the training run is not the one that its receipt is about."""
    for name, sha in train.files.items():
        path = directory / name
        if not path.is_file():
            yield Reason(code="adapter_changed", blocks="staging", text=f"{shown(path)} is missing: make stage14")
        elif sha256_of(path) != sha:
            text = f"{shown(path)} is not the file that was trained: make stage14"
            yield Reason(code="adapter_changed", blocks="staging", text=text)


def of_evaluation(evaluation: EvaluateReceipt, train: TrainReceipt, train_sha256: str) -> Iterator[Reason]:
    """The evaluation is of something else, or a gate of it failed."""
    if (evaluation.run_id, evaluation.train_sha256) != (train.run_id, train_sha256):
        text = f"15 measured the adapter {evaluation.run_id}, not {train.run_id} as it is now: make stage15"
        yield Reason(code="evaluation_of_another", blocks="staging", text=text)
    if evaluation.data.sha256 != train.data.sha256:
        text = "15 measured on other records than 14 held out: make stage15"
        yield Reason(code="evaluation_of_another", blocks="staging", text=text)
    for gate in evaluation.gates:
        if not gate.passed:
            bounds = " and ".join(
                f"{word} {bound:g}"
                for word, bound in (("at least", gate.low), ("at most", gate.high))
                if bound is not None
            )
            text = f"{gate.metric} is {gate.value:.4g}, and must be {bounds}"
            yield Reason(code="gate_failed", blocks="push", text=text)
    if not evaluation.passed and all(gate.passed for gate in evaluation.gates):
        yield Reason(code="gate_failed", blocks="push", text="15 says that it did not pass, though every gate did")


def of_lineage(links: Sequence[Link], data: Path) -> Iterator[Reason]:
    """The stand-in made some of it, or it cannot be shown that it did not, or stages do not fit together."""
    if mocked := list(dict.fromkeys(link.name for link in links if link.apis == "mock")):
        text = f"a stand-in made it, so it is worth nothing to anybody: {', '.join(mocked)}"
        yield Reason(code="standin", blocks="real_hub", text=text)
    if unknown := missing(list(links), data):
        yield Reason(code="lineage_unknown", blocks="real_hub", text=f"who made it cannot be shown: {unknown}")
    for text in broken(list(links)):
        yield Reason(code="lineage_broken", blocks="push", text=text)


def of_licences(licences: Mapping[str, int], adapter: str, base: str, allow: Sequence[str]) -> Iterator[Reason]:
    """A licence is outside the allow-list; one that asks for something is named with that."""
    used = {licence: f"{count:,} examples are" for licence, count in sorted(licences.items())}
    for licence, what in [*used.items(), (adapter, "the adapter is"), (base, "the base model is")]:
        if not allowed(licence, allow):
            asks = obligation(licence)
            text = f"{what} under {licence}, which the settings do not allow" + (
                f"; it asks for {asks}" if asks else ""
            )
            yield Reason(code="licence", blocks="push", text=text)


def of_base_model(name: str) -> Iterator[Reason]:
    """The base model is a directory here: whoever downloads the adapter has nothing to put it on."""
    if (ROOT / name).is_dir():
        text = f"the base model {name} is a directory of this repository, not a repository on the Hub"
        yield Reason(code="base_model_is_local", blocks="real_hub", text=text)


def of_dataset(directory: Path, examples: Sequence[Example]) -> Iterator[Reason]:
    """The parquet files beside the records do not hold them."""
    import pyarrow.parquet as pq

    rows: list[dict[str, object]] = []
    try:
        (directory / "README.md").stat()
        for path in sorted((directory / "data").glob("*.parquet")):
            rows += [row | {"split": path.stem} for row in pq.read_table(path).to_pylist()]
    except (OSError, ValueError) as error:
        yield Reason(code="dataset_differs", blocks="staging", text=f"{shown(directory)}: {error}: make stage13")
        return
    columns = set(rows[0]) if rows else {"id", "split"}
    expected = {str(e.id): e.model_dump(include=columns, mode="json") for e in examples}
    got = {str(row["id"]): row for row in rows}
    if got != expected or len(rows) != len(examples):
        alike = sum(got.get(key) == row for key, row in expected.items())
        text = (
            f"{shown(directory)} holds {len(rows):,} rows, {alike:,} of them as in the {len(examples):,} records: "
            "make stage13, without LIMIT"
        )
        yield Reason(code="dataset_differs", blocks="staging", text=text)


def of_secrets(texts: Iterable[tuple[str, str]], rules: ScrubRules) -> Iterator[Reason]:
    """A text that would be published holds a secret or a personal contact.

    Args:
        texts: where it stands and the text; the same text is looked at once.
    """
    finds: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    clean: set[str] = set()
    for place, text in texts:
        if text in clean:
            continue
        found = scrub(text, rules)
        kind = found.rejected_by or ", ".join(found.edits)
        if not kind:
            clean.add(text)
            continue
        finds[kind] += 1
        places.setdefault(kind, []).append(f"{place} ({found.detail or kind})")
    for kind, count in sorted(finds.items()):
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        text = f"{count} with {kind}: {', '.join(places[kind][:SHOWN])}{more}"
        yield Reason(code="secret", blocks="staging", text=text)


def of_places(texts: Iterable[tuple[str, str]]) -> Iterator[Reason]:
    """A text about the release names a directory of this machine."""
    here = [re.escape(str(path)) for path in (ROOT, Path.home()) if len(path.parts) > 1]
    pattern = re.compile(rf"(?<![\w/])(?:{'|'.join(here)})(?=/)")
    for place, text in texts:
        if match := pattern.search(text):
            text = (
                f"{place} names {match[0]}, a place on this machine: that comes from the settings of an earlier stage"
            )
            yield Reason(code="local_path", blocks="staging", text=text)


# ---------------------------------------------------------------- all of them


def before(
    stage: Stage[Any],
    examples: Sequence[Example],
    train: TrainReceipt | None,
    evaluation: EvaluateReceipt | None,
    links: Sequence[Link],
) -> Iterator[Reason]:
    """What can be said before anything is laid out; without a receipt, all that does not need it."""
    assert stage.input is not None  # it has been read
    p, trained = stage.params, stage.output.with_name("14_train.json")
    if train:
        yield from of_data(stage.input, train)
        yield from of_adapter(trained.parent / train.run_id, train)
        yield from of_base_model(train.base_model.name)
    if train and evaluation:
        yield from of_evaluation(evaluation, train, sha256_of(trained))
    yield from of_lineage(links, stage.input.parent)
    yield from of_licences(Counter(e.licence for e in examples), p.licence, p.base_licence, p.allow)
    yield from of_dataset(stage.input.with_name("dataset"), examples)
    texts = ((f"{e.id[:12]}, message {n}", m.content) for e in examples for n, m in enumerate(e.messages, 1))
    yield from of_secrets(texts, p.scrub)
    origins = ((f"{e.id[:12]}, origin", e.origin) for e in examples)
    yield from of_secrets(origins, p.scrub.model_copy(update={"phone": "keep"}))  # commits and dates look like some


def after(stage: Stage[Any], directory: Path) -> Iterator[Reason]:
    """What the files themselves hold that must not be published."""
    paths = sorted(path for path in directory.rglob("*") if path.suffix in (".md", ".json", ".svg"))
    texts = {path.relative_to(directory).as_posix(): path.read_text("utf-8") for path in paths}
    rules = stage.params.scrub.model_copy(update={"phone": "keep"})  # figures of a table look like numbers of a phone
    yield from of_secrets(texts.items(), rules)
    yield from of_places((name, text) for name, text in texts.items() if not name.endswith(EXAMPLE))
