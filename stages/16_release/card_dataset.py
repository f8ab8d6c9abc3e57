"""The card of the data set repository, and its attribution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from card_parts import BANNER, TAGS, Facts, bullets, cost, licence_front, limits, obligations, sources, table, work_of

from shared.spdx import obligation


def front_of(formatted: Path) -> Any:
    """The front matter of the card that 13 wrote."""
    from huggingface_hub import DatasetCard

    return DatasetCard.load(formatted / "README.md").data


def dataset_card(facts: Facts, formatted: Path) -> str:
    """``README.md`` of the data set repository; ``formatted`` is 13's ``dataset/``."""
    data = front_of(formatted)
    licence = licence_front(next(iter(facts.licences)) if len(facts.licences) == 1 else "other")
    for name, value in licence.items():
        data[name] = value
    data["tags"] = [*TAGS, facts.train.track, *(["stand-in"] if facts.mock else [])]
    splits = Counter(example.split for example in facts.examples)
    counts = ", ".join(f"{splits[split]:,} {split}" for split in ("train", "valid", "test"))
    parts = [
        f"# {facts.title}, the data\n\n{BANNER if facts.mock else ''}{len(facts.examples):,} examples ({counts}), "
        f"answered by models and kept by checks. `{facts.repo}` was trained on those of `train`.",
        "## Columns\n\n" + table(["column", "is"], _COLUMNS),
        "## Splits\n\nFrom a hash of `group`: near-duplicates share it, so they never straddle splits. Figures about "
        f"`{facts.repo}` are on `test`, which it never saw.\n",
        f"## Sources\n\n{sources(facts)}",
        f"## How it was made\n\n{_made(facts)}",
        f"## Limitations\n\n{bullets(limits(facts))}",
        f"## Cost\n\n{cost(facts)}",
        "## Licence\n\nEach row is under the `licence` of what it was made from, and `origin` says what that is; "
        f"`ATTRIBUTION.md` lists them.\n{obligations(facts)}",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n"


_COLUMNS = [
    ["`id`", "hash of the content"],
    ["`messages`", "`role` and `content` of each turn; the last is the answer to learn"],
    ["`domain`, `category`, `language`", "kind of text"],
    ["`source`, `origin`, `licence`", "what the row was made from, to the line or row, and its SPDX licence"],
    ["`group`", "cluster of near-duplicates"],
    ["`quality`", "what the checks gave it, 0 to 1"],
    ["`compression_ratio`", "tokens of the answer / tokens of the text, where that is the task"],
]


def attribution(facts: Facts) -> str:
    """``ATTRIBUTION.md``: every work that examples were made from."""
    works: dict[tuple[str, str], Counter[str]] = {}
    for example in facts.examples:
        works.setdefault((example.source, example.licence), Counter())[work_of(example.origin)] += 1
    parts = [
        "# Attribution\n\nThe texts of this data set were made from these works; the answers by language models.\n"
    ]
    for (source, licence), found in sorted(works.items()):
        lines = [f"- {work} ({count:,})" for work, count in sorted(found.items())]
        asked = f" It asks for {obligation(licence)}." if obligation(licence) else ""
        note = f" {facts.notes[source]}" if source in facts.notes else ""
        parts.append(
            f"## {source} ({licence})\n\n{found.total():,} examples.{asked}{note}\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _made(facts: Facts) -> str:
    run = f"{facts.train.run}/{facts.train.track}/"
    rows = [
        [link.stage, f"{link.planned:,}", f"{link.kept:,}"]
        for link in facts.links
        if link.name.startswith(run) and link.stage <= "13_format"
    ]
    return table(["stage", "records in", "kept"], rows) if rows else "No stage left a report.\n"
