"""What the two cards say alike, from what the stages say and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lineage import Link

from shared.receipts import EvaluateReceipt, Interval, TrainReceipt
from shared.records import Example
from shared.spdx import obligation

TAGS = ("synthmill", "synthetic")
EXAMPLE = "example.json"
HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "isc", "unlicense", "zlib", "odbl",
}  # fmt: skip
"""Those that the Hub has a name of its own for, which is the SPDX identifier in lower case; all else is ``other``."""
BANNER = (
    "> **Made with a stand-in instead of real models, to try the pipeline. Worth nothing as a model or as data, and it "
    "cannot be pushed to a real Hub.**\n\n"
)


@dataclass(frozen=True)
class Facts:
    """What both cards are made from.

    Attributes:
        repo, dataset_repo: ``org/name``.
        licence: SPDX, of the adapter; ``base_licence`` of the base model.
        links: the lineage; ``costs`` are (stage, model, calls, dollars), ever paid for this run and track.
        notes: what to know about a source, by name.
        languages: ISO 639-1, of the data set's card.
        mock: a stand-in made some of it.
    """

    title: str
    description: str
    limitations: Sequence[str]
    repo: str
    dataset_repo: str
    licence: str
    base_licence: str
    max_tokens: int
    train: TrainReceipt
    evaluation: EvaluateReceipt
    examples: Sequence[Example]
    links: Sequence[Link]
    costs: Sequence[tuple[str, str, int, float]]
    notes: Mapping[str, str]
    languages: Sequence[str]
    mock: bool

    @property
    def licences(self) -> dict[str, int]:
        """Examples by licence."""
        return dict(sorted(Counter(example.licence for example in self.examples).items()))

    @property
    def obligations(self) -> dict[str, str]:
        """What the licences of examples ask for, where they do."""
        return {licence: asked for licence in self.licences if (asked := obligation(licence))}

    @property
    def cost_usd(self) -> float:
        return round(sum(usd for *_, usd in self.costs), 6)


# ---------------------------------------------------------------- sections


def limits(facts: Facts) -> list[str]:
    languages = ", ".join(sorted({example.language for example in facts.examples}))
    models = sorted({model for _, model, *_ in facts.costs})
    given = [
        f"Texts in {languages}: nothing else was trained or measured.",
        f"Every figure is on {facts.evaluation.data.test:,} examples made by the pipeline that made the training data, "
        "judged by models, not by people.",
    ]
    if models:
        given.append(
            f"The data was written or judged with {', '.join(f'`{m}`' for m in models)}: what their providers' terms "
            "say about training on answers holds for whoever trains on it."
        )
    if facts.mock:
        given.append("A stand-in answered in place of those models: neither data nor figures mean anything.")
    return [*given, *facts.limitations]


def cost(facts: Facts) -> str:
    if not facts.costs:
        return "Nothing was paid to any provider.\n"
    rows = [[stage, f"`{model}`", f"{calls:,}", f"{usd:.4f}"] for stage, model, calls, usd in facts.costs]
    what = "What real models would have cost, had a stand-in not answered" if facts.mock else "What was ever paid"
    total = ["total", "", f"{sum(row[2] for row in facts.costs):,}", f"{facts.cost_usd:.4f}"]
    shown = table(["stage", "model", "calls", "US dollars"], [*rows, total])
    return f"{what}, for the data, training and evaluation:\n\n{shown}\n"


def work_of(origin: str) -> str:
    """The work an origin is in: ``repo@commit``, ``package==1.2``, ``dataset@commit`` or a file."""
    return origin.partition("#")[0].partition(":")[0]


def sources(facts: Facts) -> str:
    counts = Counter((example.source, example.licence) for example in facts.examples)
    works = {(e.source, e.licence, work_of(e.origin)) for e in facts.examples}
    each = Counter((source, licence) for source, licence, _ in works)
    rows = [
        [source, licence, f"{each[source, licence]:,}", f"{count:,}", facts.notes.get(source, "")]
        for (source, licence), count in sorted(counts.items())
    ]
    return table(["source", "licence", "works", "examples", "note"], rows) + "\n"


def obligations(facts: Facts) -> str:
    lines = [
        f"{facts.licences[name]:,} examples are under {name}, which asks for {text}."
        for name, text in facts.obligations.items()
    ]
    return f"\n{bullets(lines)}\n" if lines else ""


def licence_front(licence: str) -> dict[str, str]:
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    name = "per-row" if licence == "other" else licence.lower().replace(" ", "-")
    return {"license": "other", "license_name": name, "license_link": "README.md"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def bound(bound: float | None) -> str:
    return "" if bound is None else f"{bound:g}"


def words(metric: str) -> str:
    return metric.replace("_", " ")


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
