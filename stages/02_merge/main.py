"""02 merge: RawText -> RawText with ``merged``: one canonical form, without duplicates, secrets or unusable licences.

In input order. A record goes on when it is usable text, its licence is covered by the allow-list, it has 100 to 2,500
characters once normalised and scrubbed, and no earlier source says the same: exactly, or with a Jaccard similarity of
word 3-shingles at or above the threshold.

Sources: MinHash bands as in Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, chapter 3; secrets by
detect-secrets; phone numbers by libphonenumber. Offline; about 0.6 ms a record on one core, on Daft (see
``shared/engine.py``: ``ENGINE=ray`` runs the same plan on a cluster).

    python stages/02_merge/main.py --in data/trial/compression/01_acquire.jsonl \\
        --out data/trial/compression/02_merge.jsonl --config stages/02_merge/trial.toml --track compression
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

from duplicates import exact_duplicates, near_duplicates
from pydantic import Field, model_validator

from shared import engine
from shared.records import Merged, RawText
from shared.spdx import allowed
from shared.stage import Settings, Stage, run
from shared.text import ScrubRules, normalise, scrub

INPUT_BITS = 40
"""``order`` is priority << 40 | place in the input: one number that sorts by both."""
HISTOGRAM_STEP = 200


class Params(Settings):
    """See the TOML files for what each key means."""

    min_chars: int = Field(default=100, ge=1)
    max_chars: int = Field(default=2_500, ge=1)
    near_duplicate_jaccard: float = Field(default=0.8, ge=0.5, le=1.0)
    priority: tuple[str, ...] = ()
    licences: tuple[str, ...] = Field(min_length=1)
    scrub: ScrubRules = ScrubRules()

    @model_validator(mode="after")
    def _lengths_in_order(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        return self


def rows(stage: Stage[Params], records: list[RawText]) -> Iterator[dict[str, Any]]:
    """One row a record; the record itself goes to ``records``: 2 kB each, less than as JSON lines or in the frame."""
    ranks = {source: rank for rank, source in enumerate(stage.params.priority)}
    for place, record in enumerate(stage.read(RawText)):
        records.append(record)
        rank = ranks.get(record.source, len(ranks))
        yield {"order": rank << INPUT_BITS | place, "text": record.text, "licence": record.licence}


def place_of(order: Any) -> Any:
    """The place in the input of an ``order``, number or column."""
    return order % (1 << INPUT_BITS)


def clean(text: str, licence: str, params: Params) -> dict[str, Any]:
    """The text as later stages read it, the names of the edits, and the reason to reject it (``""`` for none)."""

    def verdict(reason: str, detail: str, text: str = "", edits: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"text": text, "edits": list(edits), "reason": reason, "detail": detail}

    if "\0" in text:
        return verdict("nul_byte", f"at character {text.index(chr(0))}")
    if not allowed(licence, params.licences):
        return verdict("licence", f"{licence!r} is not covered by the allow-list")
    text, edits = normalise(text)
    # Before scrubbing, which is the expensive part, and again after it, because marks change the length.
    if problem := _length_problem(text, params):
        return verdict(*problem)
    scrubbed = scrub(text, params.scrub)
    if scrubbed.rejected_by:
        return verdict(scrubbed.rejected_by, scrubbed.detail)
    if problem := _length_problem(scrubbed.text, params):
        return verdict(*problem)
    return verdict("", "", scrubbed.text, edits + scrubbed.edits)


def _length_problem(text: str, params: Params) -> tuple[str, str] | None:
    if len(text) < params.min_chars:
        return "too_short", f"{len(text)} characters, at least {params.min_chars} are wanted"
    if len(text) > params.max_chars:
        return "too_long", f"{len(text)} characters, at most {params.max_chars} are wanted"
    return None


def cleaned(frame: Any, params: Params) -> Any:
    """``order``, ``text``, ``edits``, ``reason``, ``detail`` of every row of ``order``, ``text``, ``licence``."""
    import daft

    string = daft.DataType.string()
    fields = {"text": string, "edits": daft.DataType.list(string), "reason": string, "detail": string}

    @daft.func.batch(return_dtype=daft.DataType.struct(fields), unnest=True, use_process=False, batch_size=1_024)
    def clean_all(texts: Any, licences: Any) -> list[dict[str, Any]]:
        pairs = zip(texts.to_pylist(), licences.to_pylist(), strict=True)
        return [clean(text, licence, params) for text, licence in pairs]

    return frame.select("order", clean_all(frame["text"], frame["licence"])).collect()


def histogram(lengths: Counter[int]) -> dict[str, int]:
    """Counts of lengths in steps of 200 characters, ``"200-399": n``; empty steps inside the range are shown."""
    steps = Counter(dict.fromkeys(range(min(lengths, default=0), max(lengths, default=-1) + 1), 0))
    steps.update(lengths)
    return {f"{s * HISTOGRAM_STEP}-{(s + 1) * HISTOGRAM_STEP - 1}": n for s, n in sorted(steps.items())}


def main(stage: Stage[Params]) -> None:
    params = stage.params
    engine.start()
    import daft

    # -- load
    kinds = {"order": daft.DataType.uint64(), "text": daft.DataType.string(), "licence": daft.DataType.string()}
    records: list[RawText] = []
    frame = engine.frame(rows(stage, records), kinds)

    # -- process
    texts = cleaned(frame, params)
    unique, same = exact_duplicates(texts.where(daft.col("reason") == "").select("order", "text"))
    near = near_duplicates(unique, params.near_duplicate_jaccard)

    # -- save
    sources: dict[str, Counter[str]] = {}
    edits: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    outcomes = texts.with_column("place", place_of(daft.col("order"))).sort("place")
    for outcome, record in zip(outcomes.iter_rows(), records, strict=True):
        reason, detail = outcome["reason"], outcome["detail"]
        if match := same.get(outcome["order"]):
            reason, detail = "exact_duplicate", "the same text once normalised and scrubbed"
        elif match := near.get(outcome["order"]):
            reason, detail = "near_duplicate", f"Jaccard similarity {match.score:.4f}"
        if reason:
            stage.reject(record, reason, detail, records[place_of(match.order)].id if match else None)
        else:
            stage.keep(record.with_field(merged=Merged(text=outcome["text"], edits=tuple(outcome["edits"]))))
            lengths[len(outcome["text"]) // HISTOGRAM_STEP] += 1
            edits.update(outcome["edits"])
        sources.setdefault(record.source, Counter()).update(("read", reason or "kept"))
    stage.summary = {
        "sources": {source: dict(sorted(counts.items())) for source, counts in sorted(sources.items())},
        "characters_kept": histogram(lengths),
        "edits": dict(sorted(edits.items())),
    }


if __name__ == "__main__":
    run(main, Params)
