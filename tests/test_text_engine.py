"""The text engine: a faithful compression is answered as its text is, a damaged one is not."""

from __future__ import annotations

import base64
import itertools
import json
import re
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field

from shared.llm.types import strict_schema
from shared.panel import TASKS, Judgement, agreement, cosine
from shared.standin import answering, embedding, engine, hub_data, reading, rewriting
from shared.standin.filling import Filler, lower_case
from shared.standin.reading import Kind
from shared.standin.rewriting import Damage

STAGES = Path(__file__).resolve().parent.parent / "stages"
PANEL = ("claude-haiku-5-5", "gpt-6-luna", "gemini-3.8-flash")
BY_KIND = {"prose": ("key_points", "implications"), "code": ("explain", "write")}
THRESHOLD = 0.80
DAMAGES: tuple[Damage, ...] = ("drop_statement", "drop_third", "change_number", "drop_negation")


def prompt(stage: str, name: str) -> str:
    return (STAGES / stage / "prompts" / f"{name}.txt").read_text("utf-8")


@cache
def texts(kind: Kind) -> tuple[str, ...]:
    """The committed texts of the stand-in Hub: passages, questions of users; functions and classes."""
    if kind == "prose":
        found = [row["context"] or row["response"] for row in hub_data.dolly_rows()]
        found += [row["text"] for row in hub_data.oasst_rows() if row["lang"] == "en" and row["role"] == "prompter"]
        return tuple(text for text in found if len(text) >= 150)
    files = hub_data.code_files("code_stack") + hub_data.code_files("code_github")
    blocks = (block for file in files for block in re.split(r"\n\n+(?=\S)", file["content"].strip()))
    return tuple(block for block in blocks if len(block) >= 150)


@cache
def compressed(text: str) -> str:
    """As 03 asks for it, from a stand-in that compresses nothing badly."""
    user = prompt("03_compress", "user").replace("{text}", text)
    return engine.answer(prompt("03_compress", "system"), user, None, "any/model", 4096, bad_share=0.0).text


@cache
def answers(kind: Kind, text: str, model: str) -> tuple[str, ...]:
    """The text of a model's answers to the panel's tasks, as 04 asks them."""
    found = []
    for task in BY_KIND[kind]:
        user = prompt("04_validate", task).replace("{text}", text)
        reply = engine.answer(prompt("04_validate", "system"), user, strict_schema(TASKS[task]), model, 4096)
        found.append(TASKS[task].model_validate_json(reply.text).text())
    return tuple(found)


def content_overlap(a: str, b: str) -> float:
    """Dice overlap of the words and numbers of two answers."""
    one, two = (set(re.findall(r"[\w.]+", text.lower())) for text in (a, b))
    return 2 * len(one & two) / (len(one) + len(two))


def panel_similarity(a: str, b: str, code: bool) -> float:
    """As shared/panel.py measures it."""
    one, two = embedding.vector(a, 512), embedding.vector(b, 512)
    return max(0.0, cosine(one, two)) * agreement(a, b, code=code)


def equivalence(kind: Kind, text: str, other: str, measure: Callable[[str, str, bool], float]) -> float:
    """The lowest over the panel of the mean over the tasks."""
    means = []
    for model in PANEL:
        pairs = zip(BY_KIND[kind], answers(kind, text, model), answers(kind, other, model), strict=True)
        scores = [measure(a, b, task == "write") for task, a, b in pairs]
        means.append(sum(scores) / len(scores))
    return min(means)


def shown(name: str, scores: list[float]) -> None:
    ranked = sorted(scores)
    cuts = [ranked[round(q * (len(ranked) - 1))] for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
    passed = sum(score >= THRESHOLD for score in scores) / len(scores)
    print(f"{name:32} n={len(scores):3} pass={passed:6.1%} " + " ".join(f"{cut:.3f}" for cut in cuts))


# ---------------------------------------------------------------- compression


@pytest.mark.parametrize("kind", get_args(Kind))
def test_there_are_enough_texts_and_their_kind_is_seen(kind: Kind) -> None:
    assert len(texts(kind)) >= 40
    assert all(reading.kind_of(text) == kind for text in texts(kind))


@pytest.mark.parametrize(("kind", "most"), [("prose", 0.75), ("code", 0.85)])
def test_compressions_are_shorter(kind: Kind, most: float) -> None:
    ratios = [engine.tokens(compressed(text)) / engine.tokens(text) for text in texts(kind)]
    print(f"\n{kind}: {min(ratios):.3f} to {max(ratios):.3f}, mean {sum(ratios) / len(ratios):.3f}")
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) <= most


@pytest.mark.parametrize("kind", get_args(Kind))
def test_compressions_keep_every_number_name_and_negation(kind: Kind) -> None:
    for text in texts(kind):
        short = compressed(text)
        for number in re.findall(r"(?<![\w.])\d+(?:[.,:]\d+)*", text):
            assert number in short, (number, short)
        plain = re.findall(r"\b(?:not|never|no|cannot)\b", text)
        signs = re.findall(r"\b(?:not|never|no|cannot)\b|≤", short)  # "no more than" is ≤
        assert len(signs) >= len(plain), short


def test_a_share_of_the_texts_is_compressed_badly_and_the_same_ones_every_time() -> None:
    made_up = [
        f"Item {i} of the list is not sold before {i + 3} June, because the paint needs 9 days." for i in range(2000)
    ]
    fates = [rewriting.fate(text, engine.BAD_SHARE) for text in made_up]
    bad = [fate for fate in fates if fate]
    assert 0.12 < len(bad) / len(fates) < 0.18
    odd = [fate for fate in bad if fate not in DAMAGES]
    assert 0.01 < len(odd) / len(fates) < 0.03
    assert set(bad) == set(get_args(Damage))
    assert fates == [rewriting.fate(text, engine.BAD_SHARE) for text in made_up]
    assert not any(rewriting.fate(text, 0.0) for text in made_up)


def test_odd_outputs_are_what_a_careless_model_gives() -> None:
    text = texts("prose")[0]
    assert rewriting.damaged(text, "prose", "empty") == ""
    assert len(rewriting.damaged(text, "prose", "longer")) > len(text)
    assert rewriting.damaged(text, "prose", "fence").startswith("```\n")
    assert rewriting.damaged(text, "prose", "think").startswith("<think>")


# ---------------------------------------------------------------- the panel


@pytest.mark.parametrize("measure", ["content overlap", "panel"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_faithful_compressions_score_high_and_damaged_ones_clearly_lower(kind: Kind, measure: str) -> None:
    score: Callable[[str, str, bool], float]
    score = panel_similarity if measure == "panel" else lambda a, b, code: content_overlap(a, b)
    print()
    faithful = {text: equivalence(kind, text, compressed(text), score) for text in texts(kind)}
    shown(f"{kind} {measure} faithful", list(faithful.values()))
    assert sum(value >= 0.9 for value in faithful.values()) >= 0.9 * len(faithful)
    for damage in DAMAGES:
        damaged = {text: equivalence(kind, text, rewriting.damaged(text, kind, damage), score) for text in texts(kind)}
        shown(f"{kind} {measure} {damage}", list(damaged.values()))
        lower = sum(damaged[text] <= faithful[text] - 0.05 for text in damaged)
        assert lower >= 0.95 * len(damaged)
        if measure == "panel":
            assert sum(value < THRESHOLD for value in damaged.values()) >= 0.95 * len(damaged)


def test_panel_models_do_not_score_alike() -> None:
    text = texts("prose")[3]
    other = rewriting.damaged(text, "prose", "drop_statement")
    found = {
        round(panel_similarity("\n".join(answers("prose", text, m)), "\n".join(answers("prose", other, m)), False), 4)
        for m in PANEL
    }
    assert len(found) == len(PANEL)


def test_the_judge_tells_a_faithful_answer_from_one_that_lost_something() -> None:
    right = wrong = 0
    sample = texts("prose")[:30]
    for text in sample:
        whole, same, less = (
            answers("prose", version, PANEL[0])[0]
            for version in (text, compressed(text), rewriting.damaged(text, "prose", "drop_statement"))
        )
        right += judged(whole, same).equivalent
        wrong += judged(whole, less).equivalent
    print(f"\njudge: {right} of {len(sample)} faithful called equivalent, {wrong} damaged")
    assert right >= 0.9 * len(sample)
    assert wrong <= 0.1 * len(sample)
    assert "only the first has" in judged("It costs 9 euros and is not sold.", "It is sold.").reason


def judged(a: str, b: str) -> Judgement:
    user = prompt("04_validate", "judge").replace("{a}", a).replace("{b}", b)
    return Judgement.model_validate_json(engine.answer("", user, strict_schema(Judgement), "claude-opus-5-5").text)


# ---------------------------------------------------------------- schemas and prompts nobody planned for


class Turn(BaseModel):
    role: str = Field(json_schema_extra={"enum": ["user", "assistant"]})
    content: str


class Node(BaseModel):
    label: str
    children: list[Node] = []


class Everything(BaseModel):
    question: str = Field(min_length=10, max_length=60)
    answer: str
    evidence: list[str] = Field(min_length=1, max_length=2)
    difficulty: int = Field(ge=1, le=5)
    confidence: float = Field(gt=0, lt=1)
    grounded: bool
    topic: str | None
    turns: list[Turn] = Field(min_length=4, max_length=4)
    tree: Node
    flags: list[bool] = Field(min_length=2)


def test_any_schema_is_filled_within_its_bounds_and_from_the_text() -> None:
    passage = texts("prose")[0]
    user = f"Write a question that the passage answers.\n\n<passage>\n{passage}\n</passage>"
    schema = Everything.model_json_schema()
    for model in PANEL:
        filled = Everything.model_validate_json(engine.answer("", user, schema, model).text)
        assert all(quote in passage for quote in filled.evidence)
        assert [turn.role for turn in filled.turns] == ["user", "assistant"] * 2
        assert set(re.findall(r"[a-z]{4,}", filled.answer.lower())) & set(re.findall(r"[a-z]{4,}", passage.lower()))


def test_geminis_dialect_is_the_same_schema() -> None:
    gemini = {
        "type": "OBJECT",
        "properties": {
            "points": {"type": "ARRAY", "items": {"type": "STRING"}, "min_items": "2"},
            "mood": {"type": "STRING", "enum": ["calm", "loud"], "nullable": True},
        },
        "required": ["points"],
        "property_ordering": ["points", "mood"],
    }
    plain = lower_case(gemini)
    assert plain["type"] == "object" and plain["properties"]["points"]["items"] == {"type": "string"}
    filled = Filler((), answering.style_of("m")).fill(plain)
    assert len(filled["points"]) == 2 and filled["mood"] in ("calm", "loud")


def test_the_number_of_objects_asked_for_is_obeyed() -> None:
    schema = {
        "type": "object",
        "properties": {
            "pairs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                },
            }
        },
    }
    passage = texts("prose")[4]
    user = f"Write three question and answer pairs about the text.\n\n<text>\n{passage}\n</text>"
    pairs = json.loads(engine.answer("", user, schema, "m").text)["pairs"]
    assert len(pairs) == 3
    assert len({pair["answer"] for pair in pairs}) == 3


def test_a_question_is_answered_with_the_statement_that_answers_it() -> None:
    user = f"{texts('prose')[0]}\n\nWho is the keeper, and for how long may the keeper hold the bridge closed?"
    said = engine.answer("", user, None, "gpt-6-luna").text
    assert "Ilse Maartens" in said and "20 min" in said
    assert "1,600 blocks" not in said and "April" not in said


def test_answers_are_cut_at_the_limit_and_counted_the_same_way() -> None:
    user = prompt("04_validate", "key_points").replace("{text}", texts("prose")[0])
    whole = engine.answer("", user, None, "m", 4096)
    short = engine.answer("", user, None, "m", 10)
    assert not whole.truncated and short.truncated
    assert short.output_tokens == 10 and whole.text.startswith(short.text)
    assert engine.tokens("äöü") == 2 and engine.tokens("") == 0


def test_odd_input_never_breaks_the_engine() -> None:
    schema = Everything.model_json_schema()
    for text in (
        "",
        " ",
        "\x00",
        "?",
        "```",
        "<text></text>",
        "日本語だけの文。",
        "a" * 50_000,
        "<a><b>" * 500,
        "1 2 3",
        "|||",
    ):
        for user in (text, f"Compress:\n{text}", f"List the key points.\n\n<text>\n{text}\n</text>"):
            engine.answer("", user, None, "m")
            Everything.model_validate_json(engine.answer("", user, schema, "m", 1_000_000).text)


# ---------------------------------------------------------------- embeddings


def test_embeddings_are_near_for_near_texts_and_far_for_others() -> None:
    sample = texts("prose")[:25] + texts("code")[:25]
    for dimensions in (256, 1024):
        vectors = [embedding.vector(text, dimensions) for text in sample]
        apart = sorted(cosine(a, b) for a, b in itertools.combinations(vectors, 2))
        near = [
            cosine(vector, embedding.vector(text.replace(" the ", " this ", 1), dimensions))
            for vector, text in zip(vectors, sample, strict=True)
        ]
        print(
            f"\n{dimensions}: unrelated median {apart[len(apart) // 2]:.3f}, most {apart[-1]:.3f}; near {min(near):.3f}"
        )
        assert min(near) > 0.97
        assert apart[len(apart) // 2] < 0.2 and apart[int(0.99 * len(apart))] < 0.5


def test_an_embedding_is_a_unit_vector_of_any_dimension_and_survives_base64() -> None:
    for dimensions in (1, 7, 1536):
        vector = embedding.vector("Boats that wait must moor on the east side.", dimensions)
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-6)
        assert array("f", base64.b64decode(embedding.base64_of(vector))) == vector
    assert sum(embedding.vector("", 8)) == 1


def test_nothing_is_read_but_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("the engine is pure")

    user = prompt("04_validate", "key_points").replace("{text}", texts("prose")[1] + " No cache knows this text.")
    before = engine.answer("", user, None, "m")
    reading.read.cache_clear()
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("time.time", refuse)
    monkeypatch.setattr("random.random", refuse)
    assert engine.answer("", user, None, "m") == before
