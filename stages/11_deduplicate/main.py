"""11 deduplicate: any Item with ``embedding`` -> the same with ``cluster``, near-duplicates rejected.

In input order, keep-first: a record goes when its cosine with an earlier kept one is at or above ``duplicate_at``.
Records at or above ``group_at`` with each other, through however many others, share a cluster, and 13 format keeps a
cluster on one side of every split. Exact: every pair is compared, in blocks, and every product is checked.

The vectors are those that 10 embed wrote beside its records. Offline; n^2 d floating-point operations, about two
minutes for 100,000 records of 1,024 dimensions on two cores, on Daft (see ``shared/engine.py``).

    python stages/11_deduplicate/main.py --in data/trial/compression/10_embed.jsonl \\
        --out data/trial/compression/11_deduplicate.jsonl --config stages/11_deduplicate/trial.toml --track compression
"""

from __future__ import annotations

from collections import Counter
from typing import Self

from pydantic import Field, model_validator
from similar import Thresholds, find_similar
from vectors import write_unit_vectors

from shared import engine
from shared.errors import SettingsError
from shared.records import AnyItem, Cluster, Item
from shared.stage import Settings, Stage, run


class Params(Settings):
    """See the TOML files for what each key means."""

    duplicate_at: float = Field(default=0.95, ge=0.5, le=1)
    group_at: float = Field(default=0.85, ge=0.5, le=1)

    @model_validator(mode="after")
    def _duplicates_are_grouped(self) -> Self:
        if self.group_at > self.duplicate_at:
            raise ValueError(f"group_at {self.group_at} is above duplicate_at {self.duplicate_at}")
        return self


def main(stage: Stage[Params]) -> None:
    params = stage.params
    if stage.input is None:
        raise SettingsError("11_deduplicate needs --in", "make stage11")
    engine.start()

    # -- load
    records: list[Item] = list(stage.read(AnyItem))
    if not records:
        return
    keys = [record.embedding.key if record.embedding else None for record in records]
    file = stage.output.with_name(f".{stage.output.stem}.vectors.npy.part")
    try:
        dimensions, problems = write_unit_vectors(stage.input.with_suffix(".parquet"), keys, file)

        # -- process
        found = find_similar(file, len(records), Thresholds(params.duplicate_at, params.group_at))
    finally:
        file.unlink(missing_ok=True)
    sizes = Counter(root for root, problem in zip(found.root, problems, strict=True) if problem is None)

    # -- save
    for row, (record, problem) in enumerate(zip(records, problems, strict=True)):
        if problem:
            stage.reject(record, *problem)
        elif row in found.match:
            match = records[found.match[row]].id
            stage.reject(record, "near_duplicate", f"cosine {found.cosine[row]:.4f}", match)
        else:
            root = found.root[row]
            stage.keep(record.with_field(cluster=Cluster(id=records[root].id, size=sizes[root])))
    stage.summary = {
        "dimensions": dimensions,
        "clusters": len(sizes),
        "cluster_sizes": {str(size): n for size, n in sorted(Counter(sizes.values()).items())},
    }


if __name__ == "__main__":
    run(main, Params)
