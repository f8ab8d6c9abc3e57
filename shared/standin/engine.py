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

from shared.standin import answering, reading
from shared.standin.brief import read_brief
from shared.standin.filling import Filler, Material
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
) -> Answer:
    """The answer to one prompt.

    Args:
        system: system prompt, ``""`` for none.
        user: the user's turn; of a longer conversation, all turns in order.
        schema: a JSON schema that the answer must fit; None = free text.
        model: name; decides the phrasing, nothing else.
        max_tokens: of the answer.
        bad_share: share of texts, 0 to 1, whose compression comes out bad.
    """
    text = _answer(system, user, schema, model, bad_share)
    within = cut(text, max_tokens)
    return Answer(within, within != text, tokens(system) + tokens(user), tokens(within))


def _answer(system: str, user: str, schema: dict[str, Any] | None, model: str, bad_share: float) -> str:
    if schema is None and (source := _to_rewrite(system, user)) is not None:
        return rewrite(source, bad_share)
    asked = _understand(system, user)
    if schema is None:
        return _plain(asked, model)
    return orjson.dumps(_filler(asked, schema, model, user).fill(schema)).decode()


# ---------------------------------------------------------------- understanding the prompt


class Asked(NamedTuple):
    """A prompt taken apart: what it asks for, and the texts it gives, by tag when they are tagged."""

    instruction: str
    texts: tuple[str, ...]
    sections: dict[str, str]
    kind: Kind


_REWRITE = re.compile(r"\s*(?:please )?(?:compress|rewrite|shorten|condense)\b[^\n:]{0,80}:\s*", re.I)
_REWRITE_SYSTEM = re.compile(r"\b(?:compress\w*|shorthand|lowest token|fewer tokens|minimal tokens)\b", re.I)
_SECTION = re.compile(r"<(\w+)(?: [^>]*)?>\s*(.*?)\s*</\1>", re.S)
_SOURCES = ("text", "chunk", "passage", "context", "document", "facts", "source", "article")
"""Tags of the text that a task is about, where other things (a question, an answer) stand in tags as well."""


def _to_rewrite(system: str, user: str) -> str | None:
    """The text to compress, when that is what the prompt asks for."""
    if match := _REWRITE.match(user):
        return user[match.end() :]
    if _REWRITE_SYSTEM.search(system) and re.search(r"\brewrit|\bcompress", system, re.I) and not _SECTION.search(user):
        return user
    return None


def _understand(system: str, user: str) -> Asked:
    """Texts are what stands in tags; without tags, the longest paragraph group after the instruction."""
    sections = {match[1]: match[2] for match in _SECTION.finditer(user)}
    texts = tuple(sections.values())
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
            texts = tuple(match[2] for match in _SECTION.finditer(system)) or (system,)
    # The instruction decides, not the text: a text and its shorthand must be read in the same way.
    code = re.search(r"\b(?:code|function|program)\b", instruction, re.I)
    return Asked(instruction, texts or (user,), sections, "code" if code else "prose")


def _source(asked: Asked) -> str:
    """The text that the task is about."""
    return next((asked.sections[tag] for tag in _SOURCES if tag in asked.sections), asked.texts[0])


# ---------------------------------------------------------------- answering


def _filler(asked: Asked, schema: dict[str, Any], model: str, user: str) -> Filler:
    names, kinds = _properties(schema)
    brief = read_brief(asked.instruction if asked.sections else user, asked.sections, names)
    material = Material(brief, (), answering.style_of(model), question=asked.instruction, seed=f"{model} {user}")
    if "boolean" in kinds and len(asked.texts) > 1:
        _judge(asked, material)
    else:
        _retell(asked, material, " ".join(names).lower())
    return Filler(material)


def _judge(asked: Asked, material: Material) -> None:
    """Prepare to compare: two answers with each other, a statement with its source, a conversation with the facts."""
    sections, texts = asked.sections, asked.texts
    if "conversation" in sections:
        said = "\n".join(_turns_of(sections["conversation"], "assistant"))
        material.statements = reading.read(said, "prose")
        facts = next((sections[tag] for tag in _SOURCES if tag in sections), "")
        material.comparison = answering.compare(facts, said) if facts else None
        return
    material.question = sections.get("question", asked.instruction)
    material.alike = not any(tag in sections for tag in _SOURCES) or len(texts) == 2 and "answer" not in sections
    material.comparison = answering.compare(texts[0] if material.alike else _source(asked), texts[-1])


def _turns_of(conversation: str, role: str) -> list[str]:
    """What one side says in a conversation written as ``role: words``."""
    parts = re.split(r"^(system|user|assistant): ", conversation, flags=re.M)
    return [words.strip() for name, words in zip(parts[1::2], parts[2::2], strict=True) if name == role]


def _retell(asked: Asked, material: Material, names: str) -> None:
    """Prepare to say what the text says."""
    source, low = _source(asked), asked.instruction.lower()
    listed = material.brief.listed
    if not asked.sections and material.brief.topic and listed:  # there is no text: what it lists is all there is to say
        source = "\n".join(f"- {meaning}" for _, meaning in listed)
    statements = reading.read(source, asked.kind if source is asked.texts[0] else "prose")
    if re.search(r"\blast (?:entry|line|bullet|sentence)\b", low):
        statements = statements[-1:]
    material.statements, material.given = statements, asked.sections
    lines: dict[str, list[str]] = {}
    if "implication" in names or "what follows" in low or "implication" in low:
        lines["implications"] = answering.implications(statements, material.style)
    if "step" in names or (asked.kind == "code" and "explain" in low):
        lines["steps"] = answering.steps(statements, material.style)
    if "point" in names or "key point" in low:
        lines["points"] = answering.key_points(statements, material.style)
    material.lines = lines
    if "code" in names:
        material.code = answering.code(reading.read(source, "code"), material.style)


def _properties(schema: Any) -> tuple[list[str], set[str]]:
    """The names of all properties in a schema, and the types that occur."""
    names: list[str] = []
    kinds: set[str] = set()
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            names += part.get("properties", {})
            if isinstance(part.get("type"), str):
                kinds.add(part["type"])
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return names, kinds


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
