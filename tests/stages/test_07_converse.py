"""07 converse: plans that meet their shares, conversations that meet their plans, near-duplicates that 11 removes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.dialogue import Turn, fault_of
from shared.stage import load_settings
from shared.standin.conversing import is_stock
from tests.conftest import ROOT, StandinLog, closed_environment, environment_of
from tests.conversations import Run, good_pairs, qa_pair, stage_module

main = stage_module("07_converse")
plans = stage_module("07_converse", "plans")


def params(run: str) -> Any:
    return load_settings(ROOT / "stages" / "07_converse" / f"{run}.toml", main.Params, "grounded")


def draw(settings: Any, pairs: list[Any], count: int, seed: int = 42) -> list[tuple[Any, Any]]:
    """Plans as the stage draws them."""
    shares = {**settings.shares, "system_prompt": dict.fromkeys(settings.system_prompts, 1.0)}
    drawn: list[tuple[Any, Any]] = plans.draw(
        pairs,
        count=count,
        per_pair=settings.per_pair,
        seed=seed,
        shares=shares,
        turns=settings.turns,
        personas=settings.personas,
    )
    return drawn


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("run", ["trial", "full"])
@pytest.mark.parametrize("count", [1, 7, 40, 200])
def test_every_planned_share_is_within_one_conversation_of_its_setting(run: str, count: int) -> None:
    settings = params(run)
    drawn = [plan for _, plan in draw(settings, good_pairs(60), count)]
    assert len(drawn) == count
    wanted: dict[str, dict[Any, float]] = {
        **settings.shares,
        "turns": settings.turns,
        "system_prompt": dict.fromkeys(settings.system_prompts, 1.0),
    }
    assert set(wanted) == {"style", "emotion", "modality", "variation", "turns", "system_prompt"}
    for attribute, shares in wanted.items():
        counts = Counter(getattr(plan, attribute) for plan in drawn)
        assert set(counts) <= set(shares)
        for value, share in shares.items():
            exact = count * share / sum(shares.values())
            assert abs(counts[value] - exact) < 1, (attribute, value, counts[value], exact)


def test_attributes_are_dealt_each_on_its_own() -> None:
    settings = params("full")
    drawn = [plan for _, plan in draw(settings, good_pairs(60), 400)]
    # Were two of them dealt alike, each emotion would have one style only.
    for emotion in settings.shares["emotion"]:
        assert {plan.style for plan in drawn if plan.emotion == emotion} == {"formal", "casual", "technical"}


def test_plans_hang_on_the_seed_alone_and_a_persona_fits_its_pair() -> None:
    settings, pairs = params("trial"), good_pairs(40)
    first = draw(settings, pairs, 200)
    assert draw(settings, pairs, 200) == first
    assert draw(settings, list(reversed(pairs)), 200) == first
    assert draw(settings, pairs, 200, seed=43) != first
    for pair, plan in first:
        assert plan.persona in {p for category in pair.categories for p in settings.personas[category]}
        assert plan.difficulty == pair.difficulty


def test_every_pair_has_a_conversation_before_any_has_two() -> None:
    settings, pairs = params("full"), good_pairs(30)
    counts = Counter(pair.id for pair, _ in draw(settings, pairs, 45))
    assert sorted(counts.values()) == [1] * 15 + [2] * 15
    assert len(draw(settings, pairs, 0)) == 30 * settings.per_pair


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        ("uaua", ""),
        ("ua", "planned 2 exchanges, got 1"),
        ("uauaua", "planned 2 exchanges, got 3"),
        ("uuaa", "roles must alternate"),
        ("auau", "roles must alternate"),
        ("uau", "roles must alternate"),
        ("", "roles must alternate"),
    ],
)
def test_a_conversation_is_checked_against_its_plan(roles: str, fault: str) -> None:
    names = {"u": "user", "a": "assistant"}
    turns = [Turn.model_validate({"role": names[role], "content": "text"}) for role in roles]
    assert fault_of(turns, 2, 2).startswith(fault) and bool(fault_of(turns, 2, 2)) == bool(fault)


def test_an_empty_turn_is_a_fault() -> None:
    turns = [Turn(role="user", content="Hello."), Turn(role="assistant", content=" \n")]
    assert fault_of(turns, 1, 1) == "a turn is empty"


def test_text_variations_keep_the_words() -> None:
    text = 'Does `make trial` (really) run 3.5 tracks, or not? "Yes!"'
    assert main.varied(text, "lowercase") == text.lower()
    bare = main.varied(text, "no punctuation")
    assert "3.5" in bare and not re.search(r"[,?!\"”]", bare)
    assert main.varied(text, "standard") == text


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def conversed(tmp_path_factory: pytest.TempPathFactory, _standin_server: tuple[str, Path]) -> Run:
    """400 conversations about 60 pairs, made through the stage's flags."""
    run = Run(tmp_path_factory.mktemp("converse"), "grounded")
    source = run.write("06_validate_qa", good_pairs(60))
    with environment_of(closed_environment() | {"STANDIN_URL": _standin_server[0]}):
        result = run.stage("07_converse", source, count=400)
    assert result.returncode == 0, result.stderr
    return run


def test_kept_conversations_follow_their_plans(conversed: Run) -> None:
    settings, kept = params("trial"), conversed.lines("07_converse")
    drawn = conversed.lines("07_converse", ".plans.jsonl")
    counts = conversed.report("07_converse")["counts"]
    assert len(drawn) == counts["planned"] == 400 and counts["kept"] == len(kept) > 380
    assert Counter(row["turns"] for row in drawn) == {1: 80, 2: 140, 3: 140, 4: 40}
    for row in kept:
        plan, messages = row["plan"], row["messages"]
        assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * plan["turns"]]
        assert messages[0]["content"] == settings.system_prompts[plan["system_prompt"]]
        users = " ".join(m["content"] for m in messages if m["role"] == "user")
        if plan["variation"] == "lowercase":
            assert users == users.lower()
        if plan["variation"] == "no punctuation":
            assert not re.search(r"[.,;:!?](?=\s|$)", users)
        assert row["grounding"][0]["chunk"] and row["parents"][0] in {pair.id for pair in good_pairs(60)}


def test_a_conversation_that_stays_off_its_plan_is_rejected_with_the_reason(conversed: Run) -> None:
    rejects = conversed.rejects("07_converse")
    assert rejects and {row["reason"] for row in rejects} <= {"off_plan", "duplicate"}
    for row in (row for row in rejects if row["reason"] == "off_plan"):
        turns = len(row["record"]["messages"]) - 1
        planned = row["record"]["plan"]["turns"]
        assert turns != 2 * planned
        assert row["detail"] == f"planned {planned} exchanges, got {turns // 2}"
    # Most that were off their plan the first time were not when asked again.
    assert conversed.report("07_converse")["spending"]["calls"] > 400 + 2 * len(rejects)


def test_users_differ_by_how_they_feel_and_type(conversed: Run) -> None:
    kept = [row for row in conversed.lines("07_converse") if not is_stock(row["grounding"][0]["chunk"])]
    texts = [" ".join(m["content"] for m in row["messages"][1:]) for row in kept]
    assert len(set(texts)) == len(texts)

    def has(words: str, **plan: str) -> float:
        some = [t for t, row in zip(texts, kept, strict=True) if all(row["plan"][k] == v for k, v in plan.items())]
        return sum(bool(re.search(words, text)) for text in some) / len(some)

    dictated, phone = (
        r"(?i)\b(um|uh|you know|i mean|let me think|well, um|okay so|right, so)\b",
        r"\b(pls|u|thx|abt|n|im)\b",
    )
    assert has(dictated, modality="dictated") > 0.6 > 0.05 > has(dictated, modality="standard", style="formal")
    assert has(phone, modality="phone") > 0.4 > 0.05 > has(phone, modality="standard")
    concise = [len(t) for t, row in zip(texts, kept, strict=True) if row["plan"]["system_prompt"] == "concise"]
    detailed = [len(t) for t, row in zip(texts, kept, strict=True) if row["plan"]["system_prompt"] == "detailed"]
    assert sum(detailed) / len(detailed) > 1.2 * sum(concise) / len(concise)


def test_the_same_seed_gives_the_same_bytes_whatever_the_concurrency(standin: StandinLog, tmp_path: Path) -> None:
    outputs = []
    for name, concurrency in (("one", 1), ("two", 16)):
        run = Run(tmp_path / name, "grounded")
        source = run.write("06_validate_qa", good_pairs(20))
        assert run.stage("07_converse", source, count=30, concurrency=concurrency).returncode == 0
        outputs.append([run.path("07_converse", s).read_bytes() for s in (".jsonl", ".plans.jsonl", ".rejects.jsonl")])
    assert outputs[0] == outputs[1]


def test_no_pairs_is_a_message_and_exit_4(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    result = run.stage("07_converse", run.write("06_validate_qa", []))
    assert result.returncode == 4
    assert "0 of 0 records go on" in result.stderr and "next:" in result.stderr
    assert not run.path("07_converse").exists()


def test_planted_near_duplicates_are_removed_at_11_with_the_match_named(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    pairs = [pair for pair in good_pairs(14) if not is_stock(pair.chunk)]
    chunk = next(
        chunk
        for n in itertools.count(100)
        if is_stock(chunk := f"# Pump\n- It is red.\n- It has a guard.\n- The pump of hall {n} stops at 41 degrees.")
    )
    answer = chunk.splitlines()[-1].removeprefix("- ")
    pairs += [qa_pair(f"{question} does the pump stop?", answer, chunk) for question in ("When", "Why", "How")]
    assert run.stage("07_converse", run.write("06_validate_qa", pairs), per_pair=3, count=0).returncode == 0
    assert run.stage("10_embed", run.path("07_converse")).returncode == 0
    assert run.stage("11_deduplicate", run.path("10_embed")).returncode == 0
    kept, rejects = run.lines("11_deduplicate"), run.rejects("11_deduplicate")
    planted = [row for row in run.lines("07_converse") if row["grounding"][0]["chunk"] == chunk]
    assert len(planted) >= 6
    removed = {row["record"]["id"]: row["match"] for row in rejects}
    assert {row["reason"] for row in rejects} == {"near_duplicate"}
    # All of the planted but the first of its kind go, none of the others, and the match is one that stays. (A curt one
    # is a kind of its own; 09, which is left out here, removes it.)
    assert set(removed) <= {row["id"] for row in planted} and len(removed) >= len(planted) - 3
    assert set(removed.values()) <= {row["id"] for row in kept} & {row["id"] for row in planted}
