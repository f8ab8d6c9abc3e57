"""The panel: what counts as a fact, and whether faithful compressions pass and damaged ones do not."""

from __future__ import annotations

import tomllib
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.llm import Models
from shared.panel import Panel, Unjudged, agreement, carried, cosine
from shared.records import Domain, Verdicts
from tests.conftest import ROOT, StandinLog, StandinWith

STAGE = ROOT / "stages" / "04_validate"

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


CODE = (
    "def load(path, retries=3):\n    if not path.exists():\n        raise MissingFile(path)\n"
    "    return read(path, 0.5)\n"
)


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
    a, b, zero = array("f", [3, 4]), array("f", [4, -3]), array("f", [0, 0])
    assert cosine(a, a) == pytest.approx(1.0) and cosine(a, b) == 0.0 and cosine(a, zero) == 0.0
    with pytest.raises(ValueError, match="zip"):
        cosine(a, array("f", [1]))


# ---------------------------------------------------------------- the panel of the trial, through the stand-in

SETTINGS = tomllib.loads((STAGE / "trial.toml").read_text("utf-8"))

PAIRS: list[tuple[Domain, str, str, str]] = [
    (
        "prose",
        "The seed vault on Spitsbergen was opened in February 2008. It lies 130 metres above the sea, so that it stays "
        "dry even if all the ice melts. The rooms are kept at minus 18 degrees. Only the depositor may withdraw seeds.",
        "seed vault Spitsbergen opened Feb 2008 | lies 130 m above sea → stays dry even if all ice melts | rooms kept "
        "at minus 18 degrees | only depositor may withdraw seeds",
        "seed vault Spitsbergen opened | lies above sea → stays dry | rooms kept at minus 18 degrees",
    ),
    (
        "prose",
        "Please rewrite my cover letter for the position at Nordwind. Keep it under 300 words, mention the 4 years I "
        "spent at Siemens, and do not mention my salary. The tone should be formal but not stiff.",
        "rewrite cover letter, position at Nordwind | under 300 words | mention 4 years at Siemens | do not mention "
        "salary | tone formal, not stiff",
        "rewrite cover letter, position at Nordwind | mention salary | tone formal",
    ),
    (
        "prose",
        "A tide gauge records the height of the water every 6 minutes. The readings are averaged over 19 years, "
        "because "
        "the orbit of the Moon takes 18.6 years to repeat. Do not compare a single month with this mean.",
        "tide gauge records water height every 6 minutes | readings averaged over 19 years ∵ Moon orbit repeats "
        "in 18.6 "
        ""
        "years | do not compare single month with mean",
        "tide gauge records water height every 60 minutes | readings averaged ∵ Moon orbit repeats",
    ),
    (
        "prose",
        "The connection pool holds at most 20 connections. A request that cannot get one within 5 seconds fails with "
        "PoolTimeout. Idle connections are closed after 60 seconds, but never fewer than 2 are kept open.",
        "connection pool holds at most 20 connections | request that cannot get one within 5 seconds fails with "
        "PoolTimeout | idle closed after 60 seconds, never fewer than 2 kept open",
        "connection pool holds connections | request that can get one fails | idle closed",
    ),
    (
        "prose",
        "Marie Curie shared the 1903 Nobel Prize in Physics with Pierre Curie and Henri Becquerel. She received "
        "a second "
        ""
        "one, in Chemistry, in 1911. No other woman has won in two sciences.",
        "Marie Curie shared 1903 Nobel Prize Physics with Pierre Curie + Henri Becquerel | received second, Chemistry, "
        "1911 | no other woman has won in two sciences",
        "Marie Curie shared Nobel Prize with Pierre | received second, Physics, 1921 | other woman has won",
    ),
    (
        "prose",
        "Let the dough rest for 40 minutes at 24 degrees. Fold it 3 times. Bake it at 230 degrees for 35 minutes, and "
        "do not open the oven in the first 20.",
        "dough rest 40 minutes at 24 degrees | fold 3 times | bake at 230 degrees for 35 minutes, do not open oven in "
        "first 20",
        "dough rest | fold | bake at 180 degrees, open oven",
    ),
    (
        "code",
        "def clamp(value, low=0, high=255):\n    if low > high:\n        raise ValueError('low exceeds high')\n"
        "    return max(low, min(value, high))\n",
        "fn clamp(value, low=0, high=255): if low > high raise ValueError('low exceeds high'); ret max(low, min(value, "
        "high))",
        "fn clamp(value): ret min(value)",
    ),
    (
        "code",
        "async def fetch(session, url, retries=3):\n    for attempt in range(retries):\n        response = await "
        "session.get(url)\n        if response.status != 503:\n            return await response.json()\n        await "
        "sleep(2 ** attempt)\n    raise Unavailable(url)\n",
        "async fn fetch(session, url, retries=3): for attempt in range(retries): response = await session.get(url); if "
        "response.status != 503 ret await response.json(); await sleep(2 ** attempt); raise Unavailable(url)",
        "async fn fetch(session, url): response = await session.get(url); ret response",
    ),
    (
        "code",
        "func (c *Cache) Get(key string) (Entry, bool) {\n\tc.mu.RLock()\n\tdefer c.mu.RUnlock()\n\tentry, ok := "
        "c.entries[key]\n\tif !ok || entry.expires.Before(c.now()) {\n\t\treturn Entry{}, false\n\t}\n\treturn entry, "
        "true\n}\n",
        "fn (c *Cache) Get(key string) (Entry, bool): c.mu.RLock(); defer c.mu.RUnlock(); entry, ok := c.entries[key]; "
        "if !ok || entry.expires.Before(c.now()) ret Entry{}, false; ret entry, true",
        "fn Get(key): entry := entries[key]; if ok ret entry",
    ),
    (
        "code",
        "export function parseAmount(text: string): number {\n  const cleaned = text.replace(/[^0-9.-]/g, '');\n  "
        "const "
        "amount = Number(cleaned);\n  if (Number.isNaN(amount)) throw new RangeError(text);\n  return "
        "Math.round(amount "
        ""
        "* 100);\n}\n",
        "export fn parseAmount(text: string): number: const cleaned = text.replace(/[^0-9.-]/g, ''); const amount = "
        "Number(cleaned); if Number.isNaN(amount) throw new RangeError(text); ret Math.round(amount * 100)",
        "fn parseAmount(text): amount = Number(text); ret amount",
    ),
]
"""Domain, a text, a faithful compression of it, and one from which facts were dropped or in which they were changed."""


def panel(models: Models) -> Panel:
    return Panel(
        models,
        SETTINGS["panel"],
        SETTINGS["tasks"],
        {path.stem: path.read_text("utf-8") for path in (STAGE / "prompts").glob("*.txt")},
        embedder=SETTINGS["embedder"],
        dimensions=SETTINGS["dimensions"],
        max_tokens=SETTINGS["max_tokens"],
        threshold=SETTINGS["threshold"],
    )


@pytest.fixture
def models(standin: StandinLog, data: Path) -> Iterator[Models]:
    with Models(data.parent.parent / "cache", "mock", "trial", "04_validate", "compression") as opened:
        yield opened


def equivalences(models: Models, pairs: list[tuple[Domain, str, str]]) -> list[float]:
    """``min_equivalence`` of every domain, text and compression."""
    judge = panel(models)

    async def one(pair: tuple[Domain, str, str]) -> Verdicts | Unjudged:
        return await judge.compare(*pair)

    found = []
    for (domain, _, _), verdicts in models.map(one, pairs, 4):
        assert isinstance(verdicts, Verdicts)
        assert verdicts.passed is (verdicts.min_equivalence >= 0.80)
        assert verdicts.min_equivalence == min(v.equivalence for v in verdicts.panel) <= verdicts.mean_equivalence
        assert [v.model for v in verdicts.panel] == SETTINGS["panel"]
        assert [t.task for t in verdicts.panel[0].tasks] == SETTINGS["tasks"][domain]
        found.append(verdicts.min_equivalence)
    return found


FAITHFUL = [(domain, verbose, faithful) for domain, verbose, faithful, _ in PAIRS]
DAMAGED = [(domain, verbose, damaged) for domain, verbose, _, damaged in PAIRS]


def one_fact_less() -> list[tuple[Domain, str, str]]:
    """Every faithful compression without one of its statements, each in turn."""
    found = []
    for domain, verbose, faithful in FAITHFUL:
        separator = " | " if domain == "prose" else "; "
        facts = faithful.split(separator)
        found += [(domain, verbose, separator.join(facts[:n] + facts[n + 1 :])) for n in range(len(facts))]
    return found


def test_most_faithful_compressions_pass_and_damaged_ones_do_not(models: Models) -> None:
    faithful, damaged = equivalences(models, FAITHFUL), equivalences(models, DAMAGED)
    passed = sum(score >= 0.80 for score in faithful) / len(faithful)
    let_through = sum(score >= 0.80 for score in damaged) / len(damaged)
    print(f"faithful: {passed:.0%} pass, {faithful}\ndamaged: {let_through:.0%} pass, {damaged}")
    assert passed >= 0.8, f"faithful compressions that fail: {faithful}"
    assert let_through == 0, f"damaged compressions that pass: {damaged}"


def test_a_compression_from_which_one_fact_was_dropped_fails(models: Models) -> None:
    pairs = one_fact_less()
    assert len(pairs) > 30
    scores = equivalences(models, pairs)
    let_through = [(pair[2], score) for pair, score in zip(pairs, scores, strict=True) if score >= 0.80]
    print(f"{len(let_through)} of {len(pairs)} pass: {let_through}")
    assert len(let_through) <= len(pairs) * 0.05, let_through


def test_answers_to_the_text_are_asked_once_for_all_its_compressions(models: Models, standin: StandinLog) -> None:
    equivalences(models, FAITHFUL)
    equivalences(models, DAMAGED)
    answers = [line for line in standin.requests() if line["method"] == "POST" and "embeddings" not in line["path"]]
    assert len(answers) == 3 * len(SETTINGS["panel"]) * 2 * len(PAIRS), "two tasks: once the text, twice a compression"
    standin.mark()
    equivalences(models, FAITHFUL)
    assert standin.requests() == [], "and nothing is asked when nothing is new"


def test_the_text_itself_is_its_best_compression(models: Models) -> None:
    verdicts = models.one(panel(models).compare("prose", PAIRS[0][1], PAIRS[0][1]))
    assert isinstance(verdicts, Verdicts) and verdicts.min_equivalence == 1.0


def test_a_judge_must_agree_as_well(models: Models) -> None:
    judged = panel(models)
    judged.judge = "openai/gpt-6.1-terra"
    models.require(judged.judge)
    good = models.one(judged.compare("prose", PAIRS[0][1], PAIRS[0][1]))
    bad = models.one(judged.compare("prose", PAIRS[0][1], PAIRS[0][3]))
    assert isinstance(good, Verdicts) and good.passed and all(v.judged is True for v in good.panel)
    assert isinstance(bad, Verdicts) and not bad.passed and any(v.judged is False for v in bad.panel)


def test_an_answer_that_cannot_be_used_is_no_verdict(standin_with: StandinWith, data: Path) -> None:
    standin_with(faults="refuse=1")
    with Models(data.parent.parent / "cache", "mock", "trial", "04_validate", "compression") as models:
        view = models.one(panel(models).compare("prose", PAIRS[0][1], PAIRS[0][2]))
    assert isinstance(view, Unjudged) and view.reason == "refused"
    assert "from the verbose text" in view.detail and SETTINGS["panel"][0] in view.detail


def all_verdicts(models: Models, pairs: list[tuple[Domain, str, str]], exhaustive: bool) -> list[Verdicts | Unjudged]:
    judge = panel(models)
    judge.exhaustive = exhaustive

    async def one(pair: tuple[Domain, str, str]) -> Verdicts | Unjudged:
        return await judge.compare(*pair)

    return [verdicts for _, verdicts in models.map(one, pairs, 8)]


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_panel_that_stops_early_accepts_the_same_pairs_and_asks_less(tmp_path: Path, share: float) -> None:
    """At pass rates of about 50, 70 and 90 %: which pairs pass, and every score of those, are the same."""
    damaged = [*DAMAGED, *one_fact_less()]
    count = round(len(FAITHFUL) * (1 - share) / share)
    pairs = [*FAITHFUL, *damaged[:count]]
    found, asked, paid = [], [], []
    for exhaustive in (True, False):
        with Models(tmp_path / str(exhaustive), "mock", "trial", "04_validate", "compression") as models:
            found.append(all_verdicts(models, pairs, exhaustive))
            asked.append(models.spending().calls)
            paid.append(models.spending().cost_usd)

    every, fewer = found
    for whole, stopped in zip(every, fewer, strict=True):
        assert isinstance(whole, Verdicts) and isinstance(stopped, Verdicts)
        assert stopped.passed is whole.passed
        assert stopped == whole if whole.passed else stopped.min_equivalence >= whole.min_equivalence
    passed = sum(isinstance(v, Verdicts) and v.passed for v in every) / len(every)
    print(f"{passed:.0%} pass: {asked[1]} calls of {asked[0]}, ${paid[1]:.5f} of ${paid[0]:.5f}")
    assert asked[1] < asked[0] and paid[1] < paid[0]


def test_what_is_carried_over_is_the_share_of_the_texts_facts() -> None:
    assert carried(PROSE, PROSE) == 1.0
    assert carried(PROSE, "nothing") == 0.0
    assert 0.5 < carried(PROSE, PROSE.replace("128 entries", "entries")) < 1.0
    assert carried("some words in a row", "") == 1.0
