"""The directories that 13 writes beside its records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from formats import Format

from shared.records import Example

SPLITS = ("train", "valid", "test")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_format(directory: Path, format_: Format, examples: Sequence[Example]) -> None:
    """One ``<split>.jsonl`` for every split the format has."""
    for split in format_.splits:
        with open(directory / f"{split}.jsonl", "wb") as file:
            file.writelines(format_.line(example.messages) for example in examples if example.split == split)


def write_dataset(
    directory: Path, examples: Sequence[Example], *, name: str, languages: Sequence[str], apis: str
) -> None:
    """A dataset repository: ``data/<split>.parquet`` and a card made from what is in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    text = ("id", "domain", "source", "origin", "language", "category", "licence", "group")
    schema = pa.schema(
        [
            *((column, pa.string()) for column in text),
            ("messages", pa.list_(message)),
            ("quality", pa.float64()),
            ("compression_ratio", pa.float64()),
        ]
    )
    (directory / "data").mkdir()
    for split in _filled(examples):
        rows = [e.model_dump(include=set(schema.names), mode="json") for e in examples if e.split == split]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), directory / "data" / f"{split}.parquet")
    files = b"".join((directory / "data" / f"{split}.parquet").read_bytes() for split in _filled(examples))
    text = card(examples, name=name, languages=languages, apis=apis, digest=hashlib.sha256(files).hexdigest())
    (directory / "README.md").write_text(text, "utf-8")


def _filled(examples: Sequence[Example]) -> list[str]:
    """The splits that have examples: datasets 5.2.0 does not load a parquet file without rows."""
    return [split for split in SPLITS if any(e.split == split for e in examples)]


def card(examples: Sequence[Example], *, name: str, languages: Sequence[str], apis: str, digest: str) -> str:
    """The dataset card: front matter the Hub reads, then where every row came from.

    The configuration is named after ``digest``, of the data: ``load_dataset`` of a local directory (datasets 5.2.0)
    keeps what it read under a hash of the card alone, and would give the rows of another run, or old ones, for these.
    """
    from huggingface_hub import DatasetCardData

    licences = Counter(e.licence for e in examples)
    data = DatasetCardData(
        language=list(languages),
        license=next(iter(licences)).lower() if len(licences) == 1 else "other",
        task_categories=["text-generation"],
        size_categories=[next((size for most, size in SIZES if len(examples) < most), "n>1M")],
        pretty_name=name,
        tags=["synthetic", "synthmill"],
        configs=[
            {
                "config_name": f"sha256-{digest[:12]}",
                "data_files": [{"split": s, "path": f"data/{s}.parquet"} for s in _filled(examples)],
            }
        ],
    )
    made = (
        "\n> Made with a stand-in instead of real models: for trying the pipeline, not for training.\n"
        if apis == "mock"
        else ""
    )
    sources = Counter((e.source, e.licence) for e in examples)
    rows = "\n".join(f"| {source} | {licence} | {count} |" for (source, licence), count in sorted(sources.items()))
    splits = ", ".join(f"{sum(e.split == s for e in examples):,} {s}" for s in SPLITS)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n{made}\n{len(examples):,} examples ({splits}). Each row keeps its "
        "`origin` (repository, commit, path and lines, or dataset row) and the licence of what it was made from; "
        "near-duplicates share `group` and never straddle splits.\n\n"
        f"| source | licence | examples |\n|---|---|---|\n{rows}\n"
    )
