"""Who is a near-duplicate of whom, and which records belong together: exact cosines, block by block.

Memory is O(block squared); the vectors stay in their file. A block of records is compared with every block before it,
one Daft task a pair of blocks, and then with itself; what is decided about one block is known when the next begins.

A matrix is never multiplied by its own transpose: with two BLAS threads that path (``syrk``) has been seen to crash,
and to return cosines wrong by 0.35 without a word, on 28,000 vectors and more. A block meets a copy of itself, and of
every product some columns are checked against dot products that BLAS has no part in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared import engine
from shared.errors import SynthmillError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BLOCK = 2_048
"""Records a block: a product of two blocks takes 16 MB."""
CHECKED = 4
"""Columns of every product that are computed a second way."""
TOLERANCE = 1e-4
"""Largest difference between the two ways; float32 makes 1e-6, the known failure 0.35."""
BORDER = 1e-5
"""Cosines this near a threshold are computed in float64, so that no decision hangs on a BLAS kernel's rounding."""
ROUNDING = 1e-6
"""How far below a threshold still counts as at it: float32 gives a vector a cosine of 0.9999999 with itself."""

NONE = -2.0
"""Below every cosine: no duplicate."""


@dataclass
class Similar:
    """What was found, by row of the vectors.

    Attributes:
        match: row of the kept record that this one duplicates.
        cosine: the cosine of the two.
        root: first row of the cluster this row belongs to.
    """

    match: dict[int, int] = field(default_factory=dict)
    cosine: dict[int, float] = field(default_factory=dict)
    root: list[int] = field(default_factory=list)


class Product(NamedTuple):
    """One block (its records are rows) against an earlier one (columns).

    Attributes:
        best: for every row the cosine with the most similar kept column that it duplicates, or ``NONE``.
        match: row of that one in the file.
        edges: as few pairs of rows of the file as connect all that are at or above ``group_at``.
        difference: see :func:`disagreement`.
    """

    best: Array
    match: Array
    edges: Array
    difference: float


class Thresholds(NamedTuple):
    """Cosines: what is a duplicate, and what belongs together."""

    duplicate_at: float
    group_at: float


def find_similar(file: Path, rows: int, thresholds: Thresholds) -> Similar:
    """Greedy keep-first in row order, and connected components at ``group_at``.

    A row is a duplicate when its cosine with an earlier kept row is at least ``duplicate_at``; a duplicate makes no
    other one. Components count duplicates too, so a chain of them holds together what it connects.

    Args:
        file: unit vectors, see ``vectors.py``; zero rows are similar to none.
        rows: how many there are.
        thresholds: both above 0.

    Raises:
        SynthmillError: a product disagrees with the direct computation of the same cosines.
    """
    import numpy as np

    found, parent, removed = Similar(), np.arange(rows), np.zeros(rows, bool)
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        best, match = np.full(stop - start, NONE), np.full(stop - start, -1)
        for product in _earlier(file, start, stop, removed[:start], thresholds):
            _agree(product.difference)
            better = product.best > best
            best[better], match[better] = product.best[better], product.match[better]
            _union(parent, product.edges)
        product = _within(file, start, stop, thresholds, best, match)
        _agree(product.difference)
        _union(parent, product.edges)
        removed[start:stop] = product.best > NONE
        gone = np.flatnonzero(removed[start:stop])
        found.match |= zip((start + gone).tolist(), product.match[gone].tolist(), strict=True)
    vectors, pairs = np.load(file, mmap_mode="r"), list(found.match.items())
    for at in range(0, len(pairs), BLOCK):
        later, kept = np.array(pairs[at : at + BLOCK]).T
        found.cosine |= zip(later.tolist(), dot(vectors[later], vectors[kept]).tolist(), strict=True)
    found.root = [_root(parent, row) for row in range(rows)]
    return found


def _earlier(file: Path, start: int, stop: int, removed: Array, thresholds: Thresholds) -> Iterator[Product]:
    """The products of this block with every earlier one, in order: a Daft plan with one row a product."""
    import daft
    import numpy as np

    if not start:
        return
    kinds = {name: daft.DataType.binary() for name in ("best", "match", "edges")}
    kinds["difference"] = daft.DataType.float64()

    @daft.func.batch(return_dtype=daft.DataType.struct(kinds), unnest=True, use_process=False, batch_size=1)
    def compare(blocks: Any) -> Any:
        vectors = np.load(file, mmap_mode="r")
        products = [_product(vectors, start, stop, first, removed, thresholds) for first in blocks.to_pylist()]
        return [{k: v if k == "difference" else v.tobytes() for k, v in p._asdict().items()} for p in products]

    firsts = ({"first": first} for first in range(0, start, BLOCK))
    blocks = engine.frame(firsts, {"first": daft.DataType.int64()}, chunk=1)  # a chunk is what a Ray worker gets
    for result in blocks.select("first", compare(daft.col("first"))).sort("first").iter_rows():
        best, match = np.frombuffer(result["best"], np.float32), np.frombuffer(result["match"], np.int64)
        edges = np.frombuffer(result["edges"], np.int64).reshape(-1, 2)
        yield Product(best, match, edges, result["difference"])


def _product(vectors: Array, start: int, stop: int, first: int, removed: Array, thresholds: Thresholds) -> Product:
    import numpy as np

    later, earlier = vectors[start:stop], vectors[first : first + BLOCK]
    cosines, difference = cosines_of(later, earlier, thresholds)
    edges = np.add(forest(cosines >= thresholds.group_at - ROUNDING), (start, first))
    cosines[:, removed[first : first + BLOCK]] = NONE
    match = cosines.argmax(axis=1)
    best = cosines[np.arange(len(later)), match]
    best[best < thresholds.duplicate_at - ROUNDING] = NONE
    return Product(best, match + first, edges, difference)


def _within(file: Path, start: int, stop: int, thresholds: Thresholds, best: Array, match: Array) -> Product:
    """The block with itself, added to what is known of the earlier ones.

    Record by record, because whether one counts depends on those before it.
    """
    import numpy as np

    block = np.array(np.load(file, mmap_mode="r")[start:stop])
    cosines, difference = cosines_of(block, block.copy(), thresholds)
    cosines = np.tril(cosines, -1)
    edges = forest(cosines >= thresholds.group_at - ROUNDING) + start
    duplicate = cosines >= thresholds.duplicate_at - ROUNDING
    for row in np.flatnonzero(duplicate.any(axis=1)):
        kept = np.flatnonzero(duplicate[row] & (best == NONE))
        if len(kept):
            nearest = kept[cosines[row, kept].argmax()]
            if cosines[row, nearest] > best[row]:
                best[row], match[row] = cosines[row, nearest], start + nearest
    return Product(best, match, edges, difference)


def cosines_of(a: Array, b: Array, thresholds: Thresholds) -> tuple[Array, float]:
    """Cosines of all rows of ``a`` with all of ``b``, which must be another array, and how far off they are."""
    import numpy as np

    cosines = a @ b.T
    difference = disagreement(cosines, a, b)
    flat = cosines.reshape(-1)
    for threshold in set(thresholds):
        border = np.flatnonzero((flat >= threshold - BORDER) != (flat >= threshold + BORDER))
        for at in range(0, len(border), BLOCK):
            some = border[at : at + BLOCK]
            i, j = np.divmod(some, len(b))
            flat[some] = dot(a[i], b[j])
    return cosines, difference


def disagreement(cosines: Array, a: Array, b: Array) -> float:
    """Largest difference between some columns of a product and the same cosines computed without BLAS; a NaN stays."""
    import numpy as np

    columns = np.unique(np.linspace(0, len(b) - 1, CHECKED).astype(int))
    direct = np.stack([np.einsum("ij,j->i", a, b[column]) for column in columns], axis=1)
    return float(np.abs(cosines[:, columns] - direct).max())


def _agree(difference: float) -> None:
    if not difference <= TOLERANCE:  # NaN does not agree either
        raise SynthmillError(
            f"cosines from the matrix product differ by {difference:.2g} from the same ones computed directly: "
            f"the linear algebra library is not to be trusted here (at most {TOLERANCE:g} was expected)",
            "run again with OPENBLAS_NUM_THREADS=1, and report this with the version of numpy",
        )


def dot(a: Array, b: Array) -> Array:
    """Dot products of rows, in float64 and without BLAS."""
    import numpy as np

    products: Array = (a.astype(np.float64) * b.astype(np.float64)).sum(axis=1)
    return products


def forest(similar: Array) -> Array:
    """As few pairs (row, column) as connect what a boolean matrix connects, so that dense groups stay small."""
    import numpy as np

    edges = [np.empty((0, 2), np.int64)]
    group = np.arange(similar.shape[1])  # of every column: columns with one number are connected by earlier rows
    for row in np.flatnonzero(similar.any(axis=1)):
        columns = np.flatnonzero(similar[row])
        groups, at = np.unique(group[columns], return_index=True)
        edges.append(np.stack([np.full(len(at), row), columns[at]], axis=1))
        if len(groups) > 1:
            group[np.isin(group, groups)] = groups[0]
    return np.concatenate(edges)


def _union(parent: Array, edges: Array) -> None:
    for i, j in edges.tolist():
        left, right = _root(parent, i), _root(parent, j)
        parent[max(left, right)] = min(left, right)


def _root(parent: Array, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = int(parent[node])
    return node
