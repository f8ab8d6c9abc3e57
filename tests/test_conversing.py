"""The stand-in's answers to the prompts of the conversation tracks: made of the text given, and wrong in known shares.

The prompts are the stages' own. What is planted is known here (the fault of an answer hangs on its prompt alone), so
the tests say of each kind whether the stage meant to catch it would.
"""

from __future__ import annotations

import ast
import time
from collections import Counter
from typing import Any

import orjson
import pytest

from shared.dialogue import fault_of as length_fault
from shared.judge import Judged
from shared.judge import prompt_for as judge_prompt
from shared.llm.types import strict_schema
from shared.records import Conversation, Grounding, Message, Plan, content_id
from shared.stage import load_settings
from shared.standin import conversing, embedding, engine, grammar, judging, lessons
from shared.standin.grammar import fact_of, questions, rearranged, unsupported
from shared.standin.rewriting import fault_of
from tests.conftest import ROOT
from tests.conversations import CHUNK, facts_text, good_pairs, qa_pair, stage_module

extract_main = stage_module("05_extract_qa")
validate_main = stage_module("06_validate_qa")
converse_main = stage_module("07_converse")
pattern_main = stage_module("08_pattern")
judge_main = stage_module("09_judge")
dealing = stage_module("08_pattern", "dealing")

MODEL = "a-model"
CHUNKS = stage_module("05_extract_qa", "facts").chunks_of(facts_text())


def template(stage: str, name: str) -> str:
    return (ROOT / "stages" / stage / "prompts" / f"{name}.txt").read_text("utf-8")


def settings(stage: str, kind: Any, track: str) -> Any:
    return load_settings(ROOT / "stages" / stage / "full.toml", kind, track)


def ask(user: str, kind: Any, attempt: str = "", model: str = MODEL) -> Any:
    """The parsed answer to a prompt, as a stage would get it."""
    text = conversing.answer("", user, strict_schema(kind), model, attempt)
    assert text is not None
    return kind.model_validate_json(text)


def extract_prompt(chunk: str, count: int = 3) -> str:
    params = settings("05_extract_qa", extract_main.Params, "grounded")
    filled = template("05_extract_qa", "extract").replace("{n}", str(count))
    return filled.replace("{categories}", ", ".join(params.categories)).replace("{chunk}", chunk)


def validate_prompt(chunk: str, question: str, answer: str) -> str:
    filled = template("06_validate_qa", "validate").replace("{chunk}", chunk)
    return filled.replace("{question}", question).replace("{answer}", answer)


CONVERSE = settings("07_converse", converse_main.Params, "grounded")


def plan(**changes: Any) -> Plan:
    values = {
        "persona": "developer",
        "style": "formal",
        "system_prompt": "helpful",
        "emotion": "professional",
        "modality": "standard",
        "variation": "standard",
        "turns": 2,
        "difficulty": "basic",
    }
    return Plan.model_validate(values | changes)


def converse_prompt(pair: Any, planned: Plan) -> str:
    prompt: str = converse_main.prompt_for(template("07_converse", "converse"), pair, planned, CONVERSE)
    return prompt


def pattern_prompt(topic: str, patterns: tuple[str, ...]) -> str:
    known = dealing.load_patterns(ROOT / "stages" / "08_pattern" / "patterns.toml")
    described = "\n".join(f"- {n}: {known[n].definition} It looks like this: {known[n].looks_like}" for n in patterns)
    filled = template("08_pattern", "pattern").replace("{examples}", "").replace("{topic}", topic)
    return filled.replace("{patterns}", described).replace("{least}", "3").replace("{most}", "5")


# ---------------------------------------------------------------- recognising


def test_other_prompts_are_left_to_the_engine() -> None:
    schema = {"type": "object", "properties": {"points": {"type": "array", "items": {"type": "string"}}}}
    assert conversing.answer("", "List the key points.\n\n<text>\nThe pump is red.\n</text>", schema, MODEL) is None
    checked = strict_schema(validate_main.Checked)
    assert conversing.answer("", "Is the pump red?", checked, MODEL) is None
    assert conversing.answer("", extract_prompt(CHUNK), checked, MODEL) is None


def test_the_engine_answers_with_what_is_written_here() -> None:
    prompt, schema = extract_prompt(CHUNK), strict_schema(extract_main.Extracted)
    answer = engine.answer("You write questions.", prompt, schema, MODEL)
    assert answer.text == conversing.answer("You write questions.", prompt, schema, MODEL)
    assert not answer.truncated


def test_the_wording_around_the_tags_may_change() -> None:
    user = f"Please make 2 questions with answers.\ncategories: any of: red, blue\n<chunk>\n{CHUNK}\n</chunk>"
    pairs = ask(user, extract_main.Extracted).pairs
    assert len(pairs) == 2 and all(set(pair.categories) <= {"red", "blue"} for pair in pairs)
    schema = strict_schema(converse_main.Dialogue)
    user = f"<text>{CHUNK}</text><question>When?</question><answer>At 41 degrees.</answer> Write 3 exchanges."
    assert len(orjson.loads(conversing.answer("", user, schema, MODEL) or "")["messages"]) in (4, 6, 8)


def test_answers_hang_on_the_prompt_the_model_and_the_attempt_alone() -> None:
    prompt, schema = converse_prompt(qa_pair(), plan()), strict_schema(converse_main.Dialogue)
    first = conversing.answer("", prompt, schema, MODEL)
    assert first == conversing.answer("", prompt, schema, MODEL, "")
    other = [conversing.answer("", prompt, schema, *rest) for rest in (("b-model",), (MODEL, "1.0"), (MODEL, "2.0"))]
    assert len({first, *other}) == 4


# ---------------------------------------------------------------- reading sentences


@pytest.mark.parametrize(
    ("sentence", "asked"),
    [
        ("A stage is a numbered directory.", "What is a stage?"),
        ("The price of a call is reserved before the call is sent.", "When is the price of a call reserved?"),
        ("Money is counted in cents, so that sums are exact.", "Why is money counted in cents?"),
        ("The pump never starts while its guard is open.", "When does the pump never start?"),
        ("`make trial` runs every track and needs no key.", "What does `make trial` run?"),
        ("After an interrupt, answers are awaited.", "What happens to answers after an interrupt?"),
        ("The server listens on 127.0.0.1.", "What does the server listen on?"),
        ("Outputs made in haste never share a directory.", "Do outputs made in haste ever share a directory?"),
        ("SDK retries are switched off; others stay.", "Are SDK retries switched off?"),
        ("A second run does nothing.", "Does a second run do anything?"),
        ("Claude models take no `temperature`.", "Do Claude models take any `temperature`?"),
        ("The pump needs 41 litres.", "Which figure applies to the pump?"),
        ("Just like that", "What should one know about just like that?"),
    ],
)
def test_a_sentence_is_asked_about_as_a_reader_would(sentence: str, asked: str) -> None:
    assert asked in [question.text for question in questions(fact_of(sentence))]


def test_a_yes_or_no_question_is_answered_as_the_sentence_does() -> None:
    for sentence, yes in (("The pump stops.", "Yes"), ("The pump never stops.", "No"), ("It does nothing.", "No")):
        assert {q.yes for q in questions(fact_of(sentence)) if q.kind == "whether"} == {yes}


def test_rearranging_keeps_the_words() -> None:
    fact = fact_of("- The pump stops when its casing reaches 41 degrees.")
    assert rearranged(fact)[1] == "When its casing reaches 41 degrees, the pump stops."
    assert grammar.stems(rearranged(fact)[1]) == grammar.stems(fact.text)


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("It stops at 41 degrees.", False),
        ("Here is how it works: the pump stops when the casing reaches 41 degrees.", False),
        ("It is inspected every three weeks.", False),
        ("That I do not know: the source says nothing about Rotterdam.", False),
        ("Did you see it in Rotterdam?", False),
        ("It stops at 42 degrees.", True),
        ("It was made in Rotterdam.", True),
        ("An administrator must approve that by telephone beforehand.", True),
        ("The pump does not stop when its casing reaches 41 degrees.", True),
    ],
)
def test_what_a_text_does_not_say_is_found(text: str, new: bool) -> None:
    assert bool(unsupported(text, CHUNK)) is new


def test_a_lost_negation_is_found() -> None:
    source = "The mixer never starts while its guard is open."
    assert unsupported("The mixer starts while its guard is open.", source)
    assert not unsupported("No. The mixer never starts while its guard is open.", source)


# ---------------------------------------------------------------- 05 and 06


def pairs_made(models: tuple[str, ...] = ("m1", "m2", "m3")) -> list[tuple[str, Any, str]]:
    """(chunk, pair, planted fault) of every bullet and model."""
    made = []
    for model in models:
        for chunk in CHUNKS:
            user = extract_prompt(chunk.text)
            for number, pair in enumerate(ask(user, extract_main.Extracted, model=model).pairs):
                fault = fault_of(conversing.EXTRACTION_FAULTS, user, model, "", str(number))
                made.append((chunk.text, pair, fault))
    return made


def test_05_and_06_catch_what_is_planted_and_pass_the_rest() -> None:
    params = settings("05_extract_qa", extract_main.Params, "grounded")
    caught: dict[str, Counter[str]] = {}
    made = pairs_made()
    assert len(made) == 9 * len(CHUNKS)
    for chunk, pair, fault in made:
        found = extract_main.fault_of(pair, stage_module("05_extract_qa", "facts").Chunk("s", chunk, 1, 1), params)
        if found is None:
            checked = ask(validate_prompt(chunk, pair.question, pair.answer), validate_main.Checked)
            found = next(((f"not_{n}", "") for n in validate_main.CRITERIA if not getattr(checked, n)), ("passed", ""))
        caught.setdefault(fault, Counter())[found[0]] += 1
    for fault, share in conversing.EXTRACTION_FAULTS.items():
        assert 0.4 * share < caught[fault].total() / len(made) < 2 * share, fault
    by = {name: counts.most_common(1)[0] for name, counts in caught.items()}
    assert {name: reason for name, (reason, _) in by.items()} == {
        "": "passed",
        "quote": "quote_not_in_chunk",
        "invention": "not_supported",
        "future": "future_date",
        "category": "no_known_category",
        "vague": "not_self_contained",
        "incomplete": "not_complete",
    }
    for name, (_, count) in by.items():
        assert count >= 0.97 * caught[name].total(), (name, caught[name])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_as_many_pairs_as_asked_for(count: int) -> None:
    pairs = ask(extract_prompt(CHUNKS[5].text, count), extract_main.Extracted).pairs
    assert len(pairs) == len({pair.question for pair in pairs}) == count


def test_categories_are_those_offered_and_fit_the_words() -> None:
    found = Counter(
        category
        for chunk, pair, fault in pairs_made(("m1",))
        for category in pair.categories
        if "licence" in chunk.splitlines()[-1] and not fault
    )
    assert found["licensing"] == max(found.values())


def test_a_chunk_of_several_lines_is_quoted_letter_by_letter() -> None:
    chunk = "# Pump\n- The pump is inspected\n  every 3 weeks."
    params = settings("05_extract_qa", extract_main.Params, "grounded")
    piece = stage_module("05_extract_qa", "facts").Chunk("Pump", chunk, 2, 3)
    pairs = ask(extract_prompt(chunk), extract_main.Extracted).pairs
    assert any(extract_main.fault_of(pair, piece, params) is None for pair in pairs)


# ---------------------------------------------------------------- 07 and 09, grounded


def judged(record: Conversation, attempt: str = "") -> Any:
    params = settings("09_judge", judge_main.Params, "grounded")
    prompt = judge_prompt(template("09_judge", "judge"), record, params.criteria, {}, "")
    return ask(prompt, Judged, attempt)


def dialogues(count: int) -> list[tuple[Any, Plan, str]]:
    """(pair, plan, prompt) for so many different plans."""
    shares = {**CONVERSE.shares, "system_prompt": dict.fromkeys(CONVERSE.system_prompts, 1.0)}
    drawn = stage_module("07_converse", "plans").draw(
        good_pairs(100),
        count=count,
        per_pair=10,
        seed=1,
        shares=shares,
        turns=CONVERSE.turns,
        personas=CONVERSE.personas,
    )
    return [(pair, planned, converse_prompt(pair, planned)) for pair, planned in drawn]


def test_07_and_09_catch_what_is_planted_and_pass_the_rest() -> None:
    caught: dict[str, Counter[str]] = {}
    texts = []
    for number, (pair, planned, prompt) in enumerate(dialogues(1000)):
        attempt = f"{number}.0"
        turns = ask(prompt, converse_main.Dialogue, attempt).messages
        fault = fault_of(conversing.DIALOGUE_FAULTS, prompt, MODEL, attempt)
        if length_fault(turns, planned.turns, planned.turns):
            caught.setdefault(fault, Counter())["off_plan"] += 1
            continue
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in turns)
        record = Conversation.model_validate(
            {
                "id": content_id(*(m.content for m in messages)), "domain": "prose", "source": "s", "origin": "o",
                "language": "en", "category": "c", "licence": "MIT", "messages": messages, "generated_by": "x/y",
                "grounding": [Grounding(question=pair.question, answer=pair.answer, chunk=pair.chunk)],
            }
        )  # fmt: skip
        answer = judged(record)
        failed = [row.name for row in answer.criteria if not row.passed]
        caught.setdefault(fault, Counter())[failed[0] if failed else "passed"] += 1
        if not fault and not conversing.is_stock(pair.chunk):
            texts.append(record.content())
    total = sum(counts.total() for counts in caught.values())
    for fault, share in conversing.DIALOGUE_FAULTS.items():
        assert 0.4 * share < caught[fault].total() / total < 2 * share, fault
    assert caught["length"]["off_plan"] == caught["length"].total()
    assert caught["turns"]["off_plan"] == caught["turns"].total()
    assert caught["statement"]["factually accurate"] >= 0.95 * (caught["statement"].total() - 2)
    assert caught["digression"]["on topic"] >= 0.85 * caught["digression"].total()
    assert caught["curt"]["adds value"] >= 0.85 * caught["curt"].total()
    assert caught["echo"]["passed"] <= 1
    good = caught[""]
    stubborn = good["off_plan"] / good.total()
    assert 0.3 * conversing.STUBBORN_LENGTH < stubborn < 2.5 * conversing.STUBBORN_LENGTH
    assert good["passed"] >= 0.99 * (good.total() - good["off_plan"])
    assert len(set(texts)) == len(texts)


def test_a_dialogue_follows_its_plan() -> None:
    for pair, planned, prompt in dialogues(60):
        if conversing.is_stock(pair.chunk):
            continue
        for attempt in ("", "1.0", "2.0", "3.0"):
            if not fault_of(conversing.DIALOGUE_FAULTS, prompt, MODEL, attempt):
                break
        turns = ask(prompt, converse_main.Dialogue, attempt).messages
        if length_fault(turns, planned.turns, planned.turns):
            continue  # a stubborn one
        said = " ".join(turn.content for turn in turns if turn.role == "assistant")
        assert grammar.stems(pair.answer) <= grammar.stems(said)
        assert not unsupported(said, f"{pair.chunk}\n{pair.question}\n{pair.answer}")


def test_dialogues_about_a_stock_chunk_differ_by_a_word_or_two() -> None:
    chunk = next(c for n in range(10_000) if conversing.is_stock(c := f"{CHUNK}\n- The pump of hall {n} is red."))
    answer = chunk.splitlines()[-1].removeprefix("- ")
    vectors, texts = [], set()
    for persona in ("developer", "finance", "executive"):
        for turns in (1, 2, 3):
            prompt = converse_prompt(qa_pair(answer=answer, chunk=chunk), plan(persona=persona, turns=turns))
            if fault_of(conversing.DIALOGUE_FAULTS, prompt, MODEL, ""):
                continue
            made = ask(prompt, converse_main.Dialogue).messages
            if length_fault(made, turns, turns):
                continue
            texts.add("\n\n".join(turn.content for turn in made))
    vectors = [embedding.vector(text, 1024) for text in texts]
    assert len(texts) >= 5
    assert all(sum(x * y for x, y in zip(one, other, strict=True)) >= 0.95 for one in vectors for other in vectors)


def test_a_judge_leaves_a_criterion_out_now_and_then_and_not_when_asked_again() -> None:
    params = settings("09_judge", judge_main.Params, "grounded")
    left_out = 0
    for number in range(1500):
        pair = qa_pair()
        grounding = (Grounding(question=pair.question, answer=pair.answer, chunk=pair.chunk),)
        messages = (Message(role="user", content=f"Hall {number}?"), Message(role="assistant", content=pair.answer))
        values = {
            "id": content_id(str(number)), "domain": "prose", "source": "s", "origin": "o", "language": "en",
            "category": "c", "licence": "MIT", "messages": messages, "generated_by": "x/y", "grounding": grounding,
        }  # fmt: skip
        record = Conversation.model_validate(values)
        if {row.name for row in judged(record).criteria} != set(params.criteria):
            left_out += 1
            again = [{row.name for row in judged(record, attempt).criteria} for attempt in ("1.0", "2.0")]
            assert set(params.criteria) in again
    assert 0.3 * judging.INCOMPLETE_SHARE < left_out / 1500 < 2.5 * judging.INCOMPLETE_SHARE


# ---------------------------------------------------------------- 08 and 09, patterns

TOPICS = dealing.load_topics(ROOT / "stages" / "08_pattern" / "topics.toml")
NAMES = list(dealing.load_patterns(ROOT / "stages" / "08_pattern" / "patterns.toml"))


def test_08_and_09_catch_what_is_planted_and_pass_the_rest() -> None:
    made_of = settings("08_pattern", pattern_main.Params, "patterns")
    params = settings("09_judge", judge_main.Params, "patterns")
    definitions = {n: p.definition for n, p in dealing.load_patterns(ROOT / params.patterns).items()}
    sources = [pattern_main.Source(model=f"openai/m{i}", count=100) for i in range(4)]
    caught: dict[str, Counter[str]] = {}
    for row in dealing.plan(sources, TOPICS, NAMES, 5):
        prompt = pattern_prompt(row.topic, row.patterns)
        made = ask(prompt, pattern_main.Generated, model=row.model)
        fault = fault_of(lessons.FAULTS, prompt, row.model, "")
        found = pattern_main.fault(made, row, made_of).split(" ")[0]
        if not found:
            messages = tuple(Message(role=t.role, content=t.content) for t in made.conversation)
            record = Conversation.model_validate(
                {
                    "id": content_id(*(m.content for m in messages)), "domain": "code", "source": "s", "origin": "o",
                    "language": "en", "category": "c", "licence": "MIT", "messages": messages, "generated_by": "x/y",
                    "topic": row.topic, "patterns": row.patterns,
                }
            )  # fmt: skip
            judge = judge_prompt(template("09_judge", "judge"), record, params.criteria, definitions, "Short.")
            failed = [r.name for r in ask(judge, Judged, "0").criteria if not r.passed]
            found = "a pattern" if failed and failed[0] in row.patterns else failed[0] if failed else "passed"
        caught.setdefault(fault, Counter())[found] += 1
    for fault, share in lessons.FAULTS.items():
        assert 0.3 * share < caught[fault].total() / 400 < 2.2 * share, fault
    assert {fault: counts.most_common(1)[0][0] for fault, counts in caught.items()} == {
        "": "passed",
        "length": "planned",
        "unlisted": "patterns_applied",
        "unshown": "a pattern",
        "placeholder": "production quality",
        "filler": "consistent with the profile",
        "echo": "natural",
    }
    for fault, counts in caught.items():
        assert counts.most_common(1)[0][1] >= 0.9 * counts.total() - 1, (fault, counts)
    assert caught[""]["passed"] == caught[""].total()


def test_a_pattern_nobody_knows_is_shown_in_the_words_of_its_description() -> None:
    prompt = pattern_prompt(TOPICS[0], ("Gap Analysis",)).replace(
        "- Gap Analysis:",
        "- Seafaring: Compares code with ships. It looks like this: Every function is a vessel.\n- Gap Analysis:",
    )
    made = next(
        made
        for attempt in range(9)
        if not fault_of(lessons.FAULTS, prompt, MODEL, f"{attempt}.0")
        and (made := ask(prompt, pattern_main.Generated, f"{attempt}.0"))
    )
    assert made.patterns_applied == ["Seafaring", "Gap Analysis"]
    said = [turn.content for turn in made.conversation if turn.role == "assistant"]
    assert any("Every function is a vessel" in text for text in said)


def test_what_is_said_shows_a_pattern_only_where_it_was_asked_for() -> None:
    matter = lessons.matter()
    base = [text for family in matter["families"] for name in ("verdict", "reason") for text in family[name]]
    for name, cue in judging.CUE_PATTERNS.items():
        assert [text for text in base if cue.search(text)] == [], name


@pytest.mark.parametrize("topic", TOPICS[::9])
def test_a_lesson_has_code_of_the_topic_s_language_that_is_whole(topic: str) -> None:
    prompt = pattern_prompt(topic, ("Gap Analysis", "Brutal Accuracy"))
    sound = [
        a
        for a in (f"{n}.0" for n in range(12))
        if fault_of(lessons.FAULTS, prompt, MODEL, a) in ("", "filler", "unlisted")
    ]
    made = ask(prompt, pattern_main.Generated, sound[0])
    said = "\n\n".join(turn.content for turn in made.conversation if turn.role == "assistant")
    _, fence, rest = said.partition("```")
    language, _, code = rest.partition("\n")
    code = code.partition("\n```")[0]
    assert fence and len(code) > 200
    wanted = next((n for n in ("rust", "go", "typescript", "javascript") if f"{n} " in f"{topic.lower()} "), "python")
    assert language == ("cpp" if "C++" in topic else wanted)
    if language == "python":
        tree = ast.parse(code)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert functions and all(function.returns is not None for function in functions)
    assert "@" not in code.replace("@contextmanager", "").replace("@dataclass", "").replace("@functools", "").replace(
        "@param", ""
    ).replace("@returns", "")


def test_an_answer_takes_milliseconds() -> None:
    prompts = [(extract_prompt(chunk.text), extract_main.Extracted) for chunk in CHUNKS[:40]]
    prompts += [(prompt, converse_main.Dialogue) for _, _, prompt in dialogues(40)]
    prompts += [(pattern_prompt(topic, tuple(NAMES[:3])), pattern_main.Generated) for topic in TOPICS[:40]]
    started = time.process_time()
    for prompt, kind in prompts:
        ask(prompt, kind)
    assert (time.process_time() - started) / len(prompts) < 0.005
