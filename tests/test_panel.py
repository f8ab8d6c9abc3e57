"""The panel: what counts as a fact, and whether faithful compressions pass and damaged ones do not."""

from __future__ import annotations

import pytest

from shared.panel import agreement, cosine

PROSE = (
    "The cache keeps 128 entries for 30 seconds. It must not be shared between threads. "
    "Ask Grace Hopper before you change MAX_SIZE, or call cache.clear() yourself."
)


@pytest.mark.parametrize(
    "rewritten",
    [
        PROSE,
        "Ask Grace Hopper before you change MAX_SIZE, or call cache.clear() yourself. It must not be shared between "
        "threads. The cache keeps 128 entries for 30 seconds.",
        "cache keeps 128 entries 30 seconds | not shared between threads | ask Grace Hopper before changing MAX_SIZE, "
        "or cache.clear()",
        "cache: 128 entries, 30 s; never shared; Grace Hopper → MAX_SIZE, cache.clear()",
    ],
    ids=["the same", "reordered", "telegraphic", "shorter still"],
)
def test_reordering_and_telegraphic_rewriting_cost_nothing(rewritten: str) -> None:
    assert agreement(PROSE, rewritten) == agreement(rewritten, PROSE) == 1.0


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("128 entries", "entries"),
        ("128 entries", "256 entries"),
        (" for 30 seconds", ""),
        ("must not be shared", "must be shared"),
        ("Grace Hopper", "Grace Kelly"),
        ("Grace Hopper", "somebody"),
        ("MAX_SIZE", "MIN_SIZE"),
        ("cache.clear()", "cache.close()"),
        (" between threads. Ask Grace Hopper before you change MAX_SIZE, or call cache.clear() yourself.", "."),
    ],
)
def test_a_lost_or_changed_fact_costs(was: str, becomes: str) -> None:
    damaged = PROSE.replace(was, becomes)
    assert damaged != PROSE
    assert agreement(PROSE, damaged) < 0.95


def test_an_added_fact_costs_as_a_lost_one_does() -> None:
    assert agreement(PROSE, PROSE + " It was written in 1952 by COBOL_TEAM.") < 0.95


def test_the_more_is_lost_the_lower_it_is() -> None:
    sentences = PROSE.split(". ")
    scores = [agreement(PROSE, ". ".join(sentences[:kept])) for kept in (3, 2, 1)]
    assert scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("It has seven wheels.", "It has 7 wheels.", True),
        ("It has seven wheels.", "It has eight wheels.", False),
        ("The total is 1,000 units.", "The total is 1000 units.", True),
        ("Version 3.11 is needed.", "Version 3.12 is needed.", False),
        ("It does not retry.", "It doesn't retry.", True),
        ("It cannot retry.", "It never retries.", False),  # inflection counts as a change: the price of having no model
        ("Retry without waiting.", "Retry, waiting.", False),
        ("if !ready then stop", "if ready then stop", False),
        ("return isReady", "return isDone", False),
        ("The parser is fast.", "Fast parser.", True),
        ("", "", True),
    ],
)
def test_what_counts_as_a_fact(a: str, b: str, equal: bool) -> None:
    assert (agreement(a, b) == 1.0) is equal


CODE = "def load(path, retries=3):\n    if not path.exists():\n        raise MissingFile(path)\n    return read(path, 0.5)\n"


@pytest.mark.parametrize(
    ("rewritten", "kept"),
    [
        (CODE, True),
        ("fn load(path, retries=3): if not path.exists() raise MissingFile(path); ret read(path, 0.5)", False),
        ("def load(path,retries=3):\n  if not path.exists(): raise MissingFile(path)\n  return read(path,0.5)", True),
        (CODE.replace("retries=3", "retries=5"), False),
        (CODE.replace("0.5", "0.7"), False),
        (CODE.replace("retries", "attempts"), False),
        (CODE.replace("not path", "path"), False),
        (CODE.replace("        raise MissingFile(path)\n", "        return\n"), False),
    ],
)
def test_in_code_every_identifier_literal_and_negation_counts(rewritten: str, kept: bool) -> None:
    assert (agreement(CODE, rewritten, code=True) == 1.0) is kept


def test_the_cosine_of_vectors() -> None:
    from array import array

    a, b, zero = array("f", [3, 4]), array("f", [4, -3]), array("f", [0, 0])
    assert cosine(a, a) == pytest.approx(1.0) and cosine(a, b) == 0.0 and cosine(a, zero) == 0.0
    with pytest.raises(ValueError, match="longer|shorter"):
        cosine(a, array("f", [1]))
