"""The text engine behind the stand-in's protocols: what it is asked, it reads from the prompt, and answers from there.

No model, no state, no randomness: the same prompt and model name always get the same answer, and the answer hangs on
what the prompt says. A task is recognised by what its prompt asks for, never by a marker put there for the stand-in:

- to compress or rewrite a text        -> :mod:`shared.standin.rewriting`
- to compare two texts                 -> :func:`shared.standin.answering.compare`
- key points, implications, behaviour of code, the code itself, or any question about a text that the prompt holds
                                       -> :mod:`shared.standin.answering`, in the shape of the schema when one is given
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson

from shared.standin import answering, conversing, reading
from shared.standin.filling import Filler
from shared.standin.reading import Kind
from shared.standin.rewriting import rewrite

BAD_SHARE = 0.15
"""Share of texts that are compressed badly, unless ``STANDIN_BAD_SHARE`` says otherwise."""


class Answer(NamedTuple):
    """``text`` within the limit; ``truncated`` when the limit cut it; both counts by :func:`tokens`."""

    text: str
    truncated: bool
    input_tokens: int
    output_tokens: int


def tokens(text: str) -> int:
    """Tokens as every stand-in service counts them: UTF-8 bytes / 4, rounded up."""
    return (len(text.encode("utf-8", "replace")) + 3) // 4


def cut(text: str, max_tokens: int) -> str:
    """The longest start of a text that has at most ``max_tokens``."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= 4 * max_tokens else data[: 4 * max_tokens].decode("utf-8", "ignore")


def answer(
    system: str,
    user: str,
    schema: dict[str, Any] | None = None,
    model: str = "",
    max_tokens: int = 4096,
    bad_share: float = BAD_SHARE,
    attempt: str = "",
) -> Answer:
    """The answer to one prompt.

    Args:
        system: system prompt, ``""`` for none.
        user: the user's turn; of a longer conversation, all turns in order.
        schema: a JSON schema that the answer must fit; None = free text.
        model: name; decides the phrasing, nothing else.
        max_tokens: of the answer.
        bad_share: share of texts, 0 to 1, whose compression comes out bad.
        attempt: which repetition of an equal question this is; what fails once may succeed when asked again.
    """
    text = _answer(system, user, schema, model, bad_share, attempt)
    within = cut(text, max_tokens)
    return Answer(within, within != text, tokens(system) + tokens(user), tokens(within))


def _answer(system: str, user: str, schema: dict[str, Any] | None, model: str, bad_share: float, attempt: str) -> str:
    if schema is None and (source := _to_rewrite(system, user)) is not None:
        return rewrite(source, bad_share)
    if schema is not None and (written := conversing.answer(system, user, schema, model, attempt)) is not None:
        return written
    asked = _understand(system, user)
    if schema is None:
        return _plain(asked, model)
    return orjson.dumps(_filler(asked, schema, model).fill(schema)).decode()


# ---------------------------------------------------------------- understanding the prompt


class Asked(NamedTuple):
    """A prompt taken apart: what it asks for, and the texts it gives."""

    instruction: str
    texts: tuple[str, ...]
    kind: Kind


_REWRITE = re.compile(r"\s*(?:please )?(?:compress|rewrite|shorten|condense)\b[^\n:]{0,80}:\s*", re.I)
_REWRITE_SYSTEM = re.compile(r"\b(?:compress\w*|shorthand|lowest token|fewer tokens|minimal tokens)\b", re.I)
_SECTION = re.compile(r"<(\w+)(?: [^>]*)?>\s*(.*?)\s*</\1>", re.S)
_COUNT = re.compile(
    r"\b(\d{1,2}|one|two|three|four|five|six|seven|eight|nine|ten)\s+(?:[\w-]+\s+){0,3}?"
    r"(?:questions?|pairs?|items?|turns?|examples?|points?|messages?)\b",
    re.I,
)
_WORDS = "zero one two three four five six seven eight nine ten".split()


def _to_rewrite(system: str, user: str) -> str | None:
    """The text to compress, when that is what the prompt asks for."""
    if match := _REWRITE.match(user):
        return user[match.end() :]
    if _REWRITE_SYSTEM.search(system) and re.search(r"\brewrit|\bcompress", system, re.I) and not _SECTION.search(user):
        return user
    return None


def _understand(system: str, user: str) -> Asked:
    """Texts are what stands in tags; without tags, the longest paragraph group after the instruction."""
    texts = tuple(match[2] for match in _SECTION.finditer(user))
    instruction = _SECTION.sub(" ", user).strip() if texts else user
    if not texts:
        head, _, rest = user.partition("\n\n")
        if rest.strip():
            last = rest.rpartition("\n\n")[2]
            if last.rstrip().endswith("?") and len(last) < len(user) / 2:  # the question comes after the text
                instruction, texts = last, (user[: len(user) - len(last)].strip(),)
            elif len(head) <= len(rest):
                instruction, texts = head, (rest.strip(),)
        if not texts and len(system) > len(user):  # the text is in the system prompt, as for a chat about a document
            sections = tuple(match[2] for match in _SECTION.finditer(system))
            texts = sections or (system,)
    # The instruction decides, not the text: a text and its shorthand must be read in the same way.
    code = re.search(r"\b(?:code|function|program)\b", instruction, re.I)
    return Asked(instruction, texts or (user,), "code" if code else "prose")


def _wanted(instruction: str) -> int:
    match = _COUNT.search(instruction)
    if match is None:
        return 0
    return int(match[1]) if match[1].isdigit() else _WORDS.index(match[1].lower())


# ---------------------------------------------------------------- answering


def _filler(asked: Asked, schema: dict[str, Any], model: str) -> Filler:
    style = answering.style_of(model)
    names = " ".join(_property_names(schema)).lower()
    low = asked.instruction.lower()
    comparison = answering.compare(asked.texts[0], asked.texts[-1]) if len(asked.texts) > 1 else None
    if comparison is not None:  # a judge compares; it does not retell
        return Filler([], style, question=asked.instruction, comparison=comparison, seed=model + asked.texts[-1])
    statements = reading.read(asked.texts[0], asked.kind)
    lines: dict[str, list[str]] = {}
    if "implication" in names or "what follows" in low or "implication" in low:
        lines["implications"] = answering.implications(statements, style)
    if "step" in names or (asked.kind == "code" and "explain" in low):
        lines["steps"] = answering.steps(statements, style)
    if "point" in names or "key point" in low:
        lines["points"] = answering.key_points(statements, style)
    return Filler(
        statements,
        style,
        question=asked.instruction,
        lines=lines,
        code=answering.code(reading.read(asked.texts[0], "code"), style) if "code" in names else "",
        wanted=_wanted(asked.instruction),
        seed=model + asked.texts[0],
    )


def _property_names(schema: Any) -> list[str]:
    names: list[str] = []
    if isinstance(schema, dict):
        names += list(schema.get("properties", {}))
        for value in schema.values():
            names += _property_names(value)
    elif isinstance(schema, list):
        for value in schema:
            names += _property_names(value)
    return names


def _plain(asked: Asked, model: str) -> str:
    """Free text: the list that was asked for, or the statements that answer the question."""
    style = answering.style_of(model)
    low = asked.instruction.lower()
    if len(asked.texts) > 1 and re.search(r"equivalent|same|compare|support", low):
        comparison = answering.compare(asked.texts[0], asked.texts[-1])
        return f"{'Yes' if comparison.equivalent else 'No'}: {comparison.reason()}."
    statements = reading.read(asked.texts[0], asked.kind)
    if "what follows" in low or "implication" in low:
        lines = answering.implications(statements, style)
    elif asked.kind == "code" and re.search(r"\bwrite\b", low):
        return answering.code(statements, style)
    elif asked.kind == "code" and "explain" in low:
        lines = answering.steps(statements, style)
    elif "key point" in low or re.search(r"\blist\b", low):
        lines = answering.key_points(statements, style)
    elif re.search(r"summar", low):
        return answering.summary(statements, style)
    else:
        found = answering.relevant(asked.instruction, statements)
        lines = [answering.sentence(s, style) for s in found]
        return " ".join(lines) or "The text says nothing about it."
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)) or "The text says nothing."
