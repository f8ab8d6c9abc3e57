"""11 deduplicate: near-duplicates and clusters against brute force, bad vectors, the check, the stage by its flags."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import engine
from shared.errors import SettingsError, SynthmillError
from shared.records import Embedding, Generation, Pair, content_id
from shared.stage import load_settings
from tests.conftest import ROOT, run_stage

STAGE = ROOT / "stages" / "11_deduplicate"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
similar: Any = importlib.import_module("similar")
vectors_module: Any = importlib.import_module("vectors")
_spec = importlib.util.spec_from_file_location("deduplicate_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["deduplicate_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

Array = np.ndarray[Any, Any]
GENERATION = Generation(
    generator="teacher",
    model="m",
    prompt="0" * 16,
    tokenizer="t",
    verbose_tokens=9,
    compressed_tokens=3,
    compression_ratio=1 / 3,
)


def unit_vectors(count: int, dimensions: int, seed: int) -> Array:
    """Random directions; a third lie near an earlier one, at every distance from equal to unlike, some in chains."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((count, dimensions))
    for _ in range(count // 3):
        earlier, later = sorted(draw.integers(0, count, 2))
        vectors[later] = vectors[earlier] + draw.uniform(0, 0.8) * draw.standard_normal(dimensions)
    vectors[count // 2 : count // 2 + 40] = vectors[3]  # a dense group across blocks
    unit: Array = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def brute_force(unit: Array, duplicate_at: float, group_at: float) -> tuple[dict[int, int], list[int]]:
    """The match of every duplicate and the root of every row, from all cosines in float64 without BLAS."""
    exact = unit.astype(np.float64)
    cosines = np.einsum("ik,jk->ij", exact, exact, optimize=False)
    kept: list[int] = []
    match: dict[int, int] = {}
    for row in range(len(unit)):
        best, earlier = max(((cosines[row, k], -k) for k in kept), default=(-2.0, 0))
        if best >= duplicate_at - similar.ROUNDING:
            match[row] = -earlier
        else:
            kept.append(row)
    root = list(range(len(unit)))
    for i, j in np.argwhere(np.triu(cosines >= group_at - similar.ROUNDING, 1)).tolist():
        low, high = sorted((root[i], root[j]))
        root = [low if r == high else r for r in root]
    return match, root


# ---------------------------------------------------------------- the kernel


@pytest.mark.parametrize(("count", "dimensions", "block"), [(600, 24, 64), (600, 24, 2_048), (333, 8, 37), (5, 16, 2)])
def test_blocks_find_what_brute_force_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, dimensions: int, block: int
) -> None:
    monkeypatch.setattr(similar, "BLOCK", block)
    engine.start()
    unit = unit_vectors(count, dimensions, seed=count) if count > 100 else np.eye(count, dimensions, dtype=np.float32)
    np.save(tmp_path / "v.npy", unit)
    found = similar.find_similar(tmp_path / "v.npy", count, similar.Thresholds(0.95, 0.85))
    match, root = brute_force(unit, 0.95, 0.85)
    assert found.match == match
    assert found.root == root
    for later, kept in match.items():
        direct = float((unit[later].astype(np.float64) * unit[kept].astype(np.float64)).sum())
        assert found.cosine[later] == pytest.approx(direct, abs=1e-12)
    if count > 100:
        assert len(match) > 40 and 1 < len(set(root)) < count - len(match)


def test_pairs_at_the_threshold_count_and_pairs_below_do_not(tmp_path: Path) -> None:
    engine.start()
    angles = [np.arccos(c) for c in (0.95, 0.9499, 0.85, 0.8499)]
    rows = []
    for pair, angle in enumerate(angles):
        for turn in (0.0, angle):
            row = np.zeros(8, np.float64)
            row[2 * pair], row[2 * pair + 1] = np.cos(turn), np.sin(turn)
            rows.append(row)
    np.save(tmp_path / "v.npy", np.array(rows, np.float32))
    found = similar.find_similar(tmp_path / "v.npy", 8, similar.Thresholds(0.95, 0.85))
    assert found.match == {1: 0}
    assert found.root == [0, 0, 2, 2, 4, 4, 6, 7]


def test_equal_vectors_are_duplicates_at_a_threshold_of_one(tmp_path: Path) -> None:
    engine.start()
    unit = unit_vectors(50, 301, seed=4)
    np.save(tmp_path / "v.npy", np.concatenate([unit[:20], unit[:20]]))
    found = similar.find_similar(tmp_path / "v.npy", 40, similar.Thresholds(1.0, 1.0))
    assert {later: found.match[later] for later in range(20, 40)} == {later: later - 20 for later in range(20, 40)}


def test_a_product_that_is_wrong_is_noticed() -> None:
    unit = unit_vectors(300, 32, seed=9)
    a, b = unit[:200], unit[200:]
    right = a @ b.T
    assert similar.disagreement(right, a, b) < 1e-5
    similar._agree(similar.disagreement(right, a, b))
    for wrong in (right.T.copy().reshape(right.shape), right + np.float32(0.01), np.full_like(right, np.nan)):
        with pytest.raises(SynthmillError, match="not to be trusted"):
            similar._agree(similar.disagreement(wrong, a, b))


def test_a_forest_connects_the_same_with_few_edges() -> None:
    draw = np.random.default_rng(2)
    for density in (0.0, 0.01, 0.05, 1.0):
        mask = draw.random((40, 60)) < density
        edges = similar.forest(mask)
        assert len(edges) <= 99
        assert all(mask[i, j] for i, j in edges)

        def components(pairs: Array) -> list[int]:
            parent = np.arange(100)
            similar._union(parent, pairs + np.array([0, 40]))
            return [similar._root(parent, node) for node in range(100)]

        assert components(edges) == components(np.argwhere(mask))


# ---------------------------------------------------------------- the stage


def pair(number: int, key: str | None = "") -> Pair:
    text = f"text {number}"
    embedding = Embedding(key=key or f"k{number}", model="m", dimensions=4) if key is not None else None
    return Pair(
        id=content_id("prose", text),
        domain="prose",
        source="s",
        origin=f"row{number}",
        language="en",
        category="c",
        licence="MIT",
        verbose=text,
        compressed="t",
        generation=GENERATION,
        embedding=embedding,
    )


def deduplicate(data: Path, pairs: list[Pair], table: dict[str, list[Any]]) -> tuple[Any, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "10_embed.jsonl").write_bytes(b"".join(p.line() for p in pairs))
    column = pa.array(list(table.values()), pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"key": pa.array(list(table)), "vector": column}), data / "10_embed.parquet")
    return run(data)


def run(data: Path) -> tuple[Any, Path]:
    out = data / "11_deduplicate.jsonl"
    flags = ("--in", data / "10_embed.jsonl", "--out", out, "--config", STAGE / "trial.toml", "--track", "compression")
    return run_stage(STAGE / "main.py", *flags), out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_duplicates_go_and_the_rest_know_their_cluster(data: Path) -> None:
    table: dict[str, list[Any]] = {
        "k0": [2, 0, 0, 0],  # need not be of unit length
        "k1": [0, 1, 0, 0],
        "k2": [0.99, 0.1, 0, 0],  # a duplicate of 0
        "k3": [0.9, 0.43, 0, 0],  # 0.90 from 0: the same cluster, kept
        "k4": [0.62, 0.78, 0, 0],  # 0.90 from 3, 0.62 from 0: the same cluster by way of 3, kept
        "k5": [0, 0, 1e-30, 0],  # tiny, but a direction
        "k6": [0, 0, 3e38, 0],  # huge, and the same direction
    }
    pairs = [pair(n) for n in range(7)]
    result, out = deduplicate(data, pairs, table)
    assert result.returncode == 0, result.stderr
    kept = lines(out)
    assert [record["id"] for record in kept] == [pairs[n].id for n in (0, 1, 3, 4, 5)]
    clusters = [(record["cluster"]["id"], record["cluster"]["size"]) for record in kept]
    chain = (pairs[0].id, 4)
    assert clusters == [chain, (pairs[1].id, 1), chain, chain, (pairs[5].id, 2)]
    rejects = lines(out.with_name("11_deduplicate.rejects.jsonl"))
    assert [(r["reason"], r["match"], r["record"]["id"]) for r in rejects] == [
        ("near_duplicate", pairs[0].id, pairs[2].id),
        ("near_duplicate", pairs[5].id, pairs[6].id),
    ]
    assert rejects[0]["detail"] == f"cosine {0.99 / (0.99**2 + 0.1**2) ** 0.5:.4f}"
    assert rejects[1]["detail"] == "cosine 1.0000"
    summary = json.loads(out.with_name("11_deduplicate.report.json").read_bytes())["summary"]
    assert summary == {"dimensions": 4, "clusters": 3, "cluster_sizes": {"1": 1, "2": 1, "4": 1}}
    assert result.stderr.count("\n") == 1  # Daft says nothing
    assert not list(data.glob(".*.npy*"))


def test_a_record_without_a_usable_vector_is_rejected_and_touches_nothing(data: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    table: dict[str, list[Any]] = {
        "k0": [1, 0, 0, 0],
        "k1": [nan, 1, 0, 0],
        "k2": [0, infinity, 0, 0],
        "k3": [0, 0, 0, 0],
        "k4": [None, 1, 0, 0],
        "k7": [0, 1, 0, 0],
    }
    pairs = [*(pair(n) for n in range(5)), pair(5), pair(6, None), pair(7)]
    result, out = deduplicate(data, pairs, table)
    assert result.returncode == 0, result.stderr
    kept = lines(out)
    assert [record["id"] for record in kept] == [pairs[0].id, pairs[7].id]
    assert [record["cluster"]["size"] for record in kept] == [1, 1]
    rejects = lines(out.with_name("11_deduplicate.rejects.jsonl"))
    assert [reject["reason"] for reject in rejects] == ["bad_vector"] * 4 + ["no_vector"] * 2
    details = [reject["detail"] for reject in rejects]
    assert "NaN" in details[0] and "infinity" in details[1] and "zero" in details[2] and "null" in details[3]
    assert "'k5'" in details[4] and "no embedding" in details[5]
    report = json.loads(out.with_name("11_deduplicate.report.json").read_bytes())
    assert report["counts"]["reasons"] == dict(Counter(reject["reason"] for reject in rejects))


def test_missing_and_foreign_vectors_are_refused_with_the_command_that_makes_them(data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "10_embed.jsonl").write_bytes(pair(0).line())
    result, out = run(data)
    assert result.returncode == 2 and "10 embed writes them" in result.stderr and "next: rm " in result.stderr
    (data / "10_embed.parquet").write_bytes(b"not parquet")
    result, _ = run(data)
    assert result.returncode == 2 and "is not a parquet file" in result.stderr
    pq.write_table(pa.table({"key": ["a"], "embedding": [[1.0]]}), data / "10_embed.parquet")
    result, _ = run(data)
    assert result.returncode == 2 and "expected key: string, vector" in result.stderr
    deduplicate(data, [pair(0)], {"k0": [1, 0, 0, 0]})
    whole = (data / "10_embed.parquet").read_bytes()
    (data / "10_embed.parquet").write_bytes(whole[:4] + bytes(40) + whole[44:])
    out.unlink()
    result, _ = run(data)
    assert result.returncode == 2 and "cannot be read" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("duplicate_at = 0.8\ngroup_at = 0.9\n", "group_at 0.9 is above duplicate_at 0.8"),
        ("duplicate_at = 1.5\n", "duplicate_at"),
        ("duplicates_at = 0.9\n", "nearest valid key is 'duplicate_at'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: str, says: str) -> None:
    (tmp_path / "x.toml").write_text(settings, "utf-8")
    with pytest.raises(SettingsError, match=says):
        load_settings(tmp_path / "x.toml", main.Params)


def test_both_settings_files_load() -> None:
    for name in ("trial.toml", "full.toml"):
        params = load_settings(STAGE / name, main.Params)
        assert (params.duplicate_at, params.group_at) == (0.95, 0.85)
