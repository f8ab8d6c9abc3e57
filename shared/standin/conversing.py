"""Answers the prompts of the conversation tracks: questions about a chunk, their validation, dialogues, judgements.

A task is recognised by the answer its schema asks for and by the tags its prompt holds:

- pairs of question, answer and quote, from ``<chunk>``                      -> :func:`extract`
- supported, complete, self-contained, no invention, of ``<answer>``         -> :func:`validate`
- messages about ``<text>`` after a plan in words                            -> :func:`converse`
- a conversation about a topic that applies patterns                         -> :mod:`shared.standin.lessons`
- criteria of a ``<rubric>``, passed or not, for a ``<conversation>``        -> :mod:`shared.standin.judging`

Answers are made of the words of the text given, and judged against it. A seeded share of them is wrong in one of the
ways models are wrong; which share, and in which way, is in the tables below. Failures hang on the prompt, the model and
the attempt, so that a question asked again may be answered well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from shared.standin import judging, lessons
from shared.standin.dialogues import (
    INVENTED,
    Dialogue,
    Dice,
    Order,
    Turns,
    curt,
    off_length,
    out_of_turn,
    parts_of,
    stock,
    with_digression,
    with_echo,
    with_statement,
)
from shared.standin.grammar import Asked, Fact, capital, fact_of, questions, rearranged, stems, terms, unsupported
from shared.standin.rewriting import draw, fault_of

EXTRACTION_FAULTS = {
    "quote": 0.06,  # the quote does not occur in the chunk
    "invention": 0.05,  # the answer says more than the chunk
    "future": 0.03,  # it speaks of a date years ahead
    "category": 0.02,  # none of its categories is in the list
    "vague": 0.02,  # the question needs the chunk to be understood
    "incomplete": 0.015,  # the answer leaves out what was asked
}
"""Shares of the pairs of :func:`extract`, by what is wrong with them; each pair has one fault at most."""
DIALOGUE_FAULTS = {
    "length": 0.045,  # an exchange too many or too few
    "turns": 0.02,  # one speaker twice in a row
    "statement": 0.06,  # the assistant states what the text does not
    "digression": 0.02,  # an exchange about something else
    "echo": 0.015,  # the assistant repeats itself
    "curt": 0.015,  # it says yes or no, and no more
}
"""Shares of the dialogues of :func:`converse`, by what is wrong with them."""
STUBBORN_LENGTH = 0.015
"""Share of dialogue prompts whose length is wrong whatever the attempt."""
STOCK_SHARE = 0.045
"""Share of chunks about which every dialogue is the same but for a word or two: near-duplicates."""


def answer(system: str, user: str, schema: Mapping[str, Any], model: str, attempt: str = "") -> str | None:
    """The JSON answer to a prompt of the conversation tracks; None for any other prompt.

    Args:
        system: the system prompt.
        user: the user's turn.
        schema: the JSON schema of the answer.
        model: name; another model words it differently and fails elsewhere.
        attempt: distinguishes a question asked again from the first; ``""`` for the first.
    """
    fields, tags = set(schema.get("properties", ())), tags_of(user)
    made: Any = None
    if "pairs" in fields and "chunk" in tags:
        made = {"pairs": extract(user, tags["chunk"], model, attempt)}
    elif {"supported", "self_contained"} <= fields and {"chunk", "question", "answer"} <= set(tags):
        made = validate(tags["chunk"], tags["question"], tags["answer"])
    elif "messages" in fields and {"text", "question", "answer"} <= set(tags):
        made = {"messages": converse(user, tags, model, attempt)}
    elif {"patterns_applied", "conversation"} <= fields:
        made = lessons.write(user, model, attempt)
    elif "criteria" in fields and {"rubric", "conversation"} <= set(tags):
        made = judging.judge(user, tags, model, attempt)
    return None if made is None else orjson.dumps(made).decode()


_TAG = re.compile(r"<(chunk|question|answer|text|rubric|facts|conversation|profile)>\s*(.*?)\s*</\1>", re.S)


def tags_of(user: str) -> dict[str, str]:
    """What stands in each tag of a prompt; the first of each name."""
    found: dict[str, str] = {}
    for match in _TAG.finditer(user):
        found.setdefault(match[1], match[2])
    return found


# ---------------------------------------------------------------- questions and answers about a chunk

_WORDS = "zero one two three four five six seven eight nine ten".split()
_AFFINITY = {
    "pipeline": "stage stages pipeline make makefile run runs track tracks spine flag flags order step",
    "data": "record records data file files jsonl source sources text texts dataset code prose split export id hash",
    "models": "model models adapter lora mlx teacher claude openai gemini temperature prompt sdk sdks panel embedding",
    "cost": "money price prices cost costs dollars dollar budget paid spent spends nanodollars spend pays free",
    "quality": "quality validate validates judge judges equivalence rejects reject duplicates passes criterion share",
    "operations": "operations port server listens retries retry timeout killed interrupt installed docker setup cache",
    "licensing": "licence license mit licensed copyright spdx licences",
}
"""Words that speak for a category, for the names that are common in lists of them."""
_LATER = ("March 2031", "the spring of 2029", "2030-06", "1 July 2028", "the end of 2032", "November 2033", "2031")
_PLANNED = (
    "This is planned to change in {d}.", "From {d} on another rule will hold.", "It has been promised until {d}.",
    "A review is due in {d}.",
)  # fmt: skip
_NO_CATEGORY = ("miscellaneous", "history", "trivia", "weather")
_VAGUE = (
    "What does the text say here?", "What does this chunk describe?", "What does it do?", "Why is that so?",
    "According to the passage, what is the case?", "What is meant by this?",
)  # fmt: skip
_PARTIAL = ("Yes.", "It does.", "That is the case.")


def extract(user: str, chunk: str, model: str, attempt: str = "") -> list[dict[str, Any]]:
    """Question and answer pairs about the last entry of a chunk, as many as the prompt asks for."""
    count = _count_of(user)
    section, context, entry = parts_of(chunk)
    fact = fact_of(entry)
    asked = questions(fact, section)
    first = 0 if len(asked) <= count else int(draw(chunk, model, "first") * (len(asked) - count + 1))
    pairs = []
    for number in range(count):
        question = asked[(first + number) % len(asked)]
        dice = Dice(user, model, attempt, str(number))
        pair = _pair(question, fact, entry, context, chunk, _listed(user), dice)
        if first + number >= len(asked):
            pair["question"] = f"In other words: {pair['question']}"
        fault = fault_of(EXTRACTION_FAULTS, user, model, attempt, str(number))
        pairs.append(_spoilt(pair, fault, chunk, dice))
    return pairs


def _count_of(user: str) -> int:
    match = re.search(rf"\b(\d+|{'|'.join(_WORDS)})\s+(?:different\s+)?(?:questions?|pairs?)\b", user, re.I)
    if match is None:
        return 1
    return max(1, int(match[1]) if match[1].isdigit() else _WORDS.index(match[1].lower()))


def _listed(user: str) -> list[str]:
    """The categories that a prompt offers."""
    match = re.search(r"categor(?:y|ies)[^\n]*\bof:\s*([^\n]+)", user, re.I)
    return [name.strip(" .`'\"") for name in match[1].split(",") if name.strip(" .`'\"")] if match else []


def _pair(
    asked: Asked, fact: Fact, entry: str, context: Sequence[str], chunk: str, listed: list[str], dice: Dice
) -> dict[str, Any]:
    text = dice.pick(rearranged(fact)) if asked.kind in ("why", "when") else fact.text
    if asked.yes:
        text = f"{asked.yes}. {text}"
    whole = _as_written(chunk, entry)
    difficulty = {"why": "intermediate", "when": "intermediate", "figure": "intermediate", "explain": "advanced"}
    if asked.kind == "explain" and context:
        text = f"{text} {fact_of(context[-1]).text}"
    return {
        "question": asked.text,
        "answer": text,
        "quote": whole,
        "difficulty": difficulty.get(asked.kind, "basic"),
        "categories": _categories(f"{chunk} {asked.text}", entry, listed, dice),
    }


def _as_written(chunk: str, entry: str) -> str:
    """The entry as it stands in the chunk, line breaks included."""
    place = chunk.rfind(entry)
    if place >= 0:
        return chunk[place : place + len(entry)]
    pattern = r"\s+".join(re.escape(word) for word in entry.split())
    match = re.search(pattern, chunk)
    return match[0] if match else entry


def _categories(about: str, entry: str, listed: list[str], dice: Dice) -> list[str]:
    """One to three of the categories listed, by the words of the entry, then of what stands around it."""
    near, far = {w.lower() for w in re.findall(r"\w+", entry)}, {w.lower() for w in re.findall(r"\w+", about)}
    scores = []
    for place, name in enumerate(listed):
        words = {*_AFFINITY.get(name.lower(), "").split(), name.lower(), name.lower().rstrip("s")}
        scores.append((-(3 * len(words & near) + len(words & far)), place, name))
    best = [name for score, _, name in sorted(scores) if score < 0][: 1 + int(dice.share() * 3)]
    return best or ([dice.pick(listed)] if listed else ["general"])


def _spoilt(pair: dict[str, Any], fault: str, chunk: str, dice: Dice) -> dict[str, Any]:
    """The pair with a fault; as it was for ``""``."""
    if fault == "quote":
        pair["quote"] = _misquoted(pair["quote"], chunk, dice)
    elif fault == "invention":
        invented = dice.pick(INVENTED).format(n=14 + int(dice.share() * 75), m=131 + int(dice.share() * 700))
        pair["answer"] = f"{pair['answer']} {invented}"
    elif fault == "future":
        pair["answer"] = f"{pair['answer']} {dice.pick(_PLANNED).format(d=dice.pick(_LATER))}"
    elif fault == "category":
        pair["categories"] = [dice.pick(_NO_CATEGORY)]
    elif fault == "vague":
        pair["question"] = dice.pick(_VAGUE)
    elif fault == "incomplete":
        pair["answer"] = dice.pick(_PARTIAL)
    return pair


def _misquoted(quote: str, chunk: str, dice: Dice) -> str:
    """The quote with a word left out or two in each other's place: what a model writes that quotes from memory."""
    words = quote.split()
    place = int(dice.share() * max(1, len(words) - 2)) + 1
    lacking = " ".join(words[:place] + words[place + 1 :])
    changed = " ".join([*words[: place - 1], *words[place : place + 1], words[place - 1], *words[place + 1 :]])
    flat = " ".join(chunk.split())
    wrong = [text for text in (lacking, changed) if text.strip() and text not in flat]
    return dice.pick(wrong) if wrong else f"{quote} and so on"


# ---------------------------------------------------------------- checking a pair

_LEANS = re.compile(
    r"\b(?:the|this|that)\s+(?:text|chunk|passage|excerpt|document|section|entry|paragraph)\s+(?:says?|states?|"
    r"describes?|mentions?|above|below)\b|\baccording to (?:the|this)\s+(?:text|chunk|passage|excerpt|document)\b|"
    r"\bthis (?:chunk|passage|excerpt)\b|\b(?:say|describe[ds]?|mean(?:t|s)?|stated?)\s+(?:here|by this)\b",
    re.I,
)


def validate(chunk: str, question: str, given: str) -> dict[str, Any]:
    """Whether a pair holds against its chunk; what is wrong is in the reason."""
    new = unsupported(given, chunk)
    supported = not new
    turned = bool(new) and all(words == ["not"] for _, words in new)
    leans = bool(_LEANS.search(question) or _LEANS.search(given)) or not stems(question)
    complete = leans or _is_complete(question, given, chunk)
    reasons = [f"the chunk does not say {', '.join(words[:4])!r}" for _, words in new if not turned]
    reasons += ["the answer turns a statement of the chunk round"] if turned else []
    reasons += ["the question cannot be understood without the chunk"] if leans else []
    reasons += ["the answer leaves out what the question asks for"] if not complete else []
    return {
        "supported": supported,
        "complete": complete,
        "self_contained": not leans,
        "no_invention": not new or turned,
        "reason": f"{capital('; '.join(reasons))}." if reasons else "The chunk says all of it, and it says it plainly.",
    }


def _is_complete(question: str, given: str, chunk: str) -> bool:
    """Whether the answer says something, has a figure when one is asked for, and is about what was asked."""
    said = stems(given)
    if len(said) < 2:
        return False
    wants_figure = re.search(r"\bhow (?:many|much|long|often)\b|\bwhich figure\b|\bwhat number\b", question, re.I)
    if wants_figure and re.search(r"\d", chunk) and not any(term.stem[0].isdigit() for term in terms(given)):
        return False
    return bool(stems(question) & said)


# ---------------------------------------------------------------- dialogues


def order_of(user: str, tags: Mapping[str, str]) -> Order:
    """The plan of a dialogue as a prompt words it."""

    def found(pattern: str) -> str:
        match = re.search(pattern, user, re.I)
        return match[1].strip() if match else ""

    count = found(r"\b(\d+)\s+exchanges?\b")
    messages = found(r"\b(\d+)\s+messages\b")
    parts = [part.strip() for part in found(r"(?m)^- user:\s*(.+)$").rstrip(".").split(";")]
    manner = [p for p in parts[1:] if not re.match(r"feels|writes in an? \S+ style|asks at", p)]
    return Order(
        exchanges=int(count) if count else max(1, int(messages or 2) // 2),
        persona=parts[0],
        emotion=found(r"\bfeels\s+([^;\n]+)"),
        style=found(r"\bin an?\s+(\w+)\s+style"),
        modality="; ".join(manner),
        difficulty=found(r"\blevel that is\s+(\w+)"),
        system_prompt=found(r"system prompt:\s*\"([^\n]*)\""),
        chunk=tags["text"],
        question=tags["question"],
        answer=tags["answer"],
    )


def is_stock(chunk: str) -> bool:
    """Whether every dialogue about this chunk is the same but for a word or two."""
    return draw(chunk, "copy") < STOCK_SHARE


def converse(user: str, tags: Mapping[str, str], model: str, attempt: str = "") -> Turns:
    """A dialogue after the plan that the prompt gives."""
    plan, dice = order_of(user, tags), Dice(user, model, attempt)
    turns = stock(plan, dice) if is_stock(plan.chunk) else Dialogue(plan, dice).write()
    fault = fault_of(DIALOGUE_FAULTS, user, model, attempt)
    if fault == "length" or draw(user, model, "stubborn") < STUBBORN_LENGTH:
        return off_length(turns, dice)
    spoil = {
        "turns": out_of_turn,
        "statement": with_statement,
        "digression": with_digression,
        "echo": with_echo,
        "curt": curt,
    }.get(fault)
    return spoil(turns, dice) if spoil else turns
