"""Fills a JSON schema with what a text says: every property by its type, and by what its name and description ask for.

Understands ``$ref`` into ``$defs``, ``anyOf``/``oneOf``/``allOf``, ``enum``, ``const``, arrays, numbers
and strings with bounds, nullable types as lists, and Gemini's upper-case dialect through :func:`lower_case`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.standin import answering, dialogue, reading
from shared.standin.answering import Comparison, Style
from shared.standin.brief import Brief
from shared.standin.dialogue import clean, keyword
from shared.standin.reading import Statement
from shared.standin.rewriting import draw

Schema = dict[str, Any]

MAX_OBJECTS = 8
"""Objects in an array whose length nothing says."""
MAX_DEPTH = 12
"""A schema may refer to itself; below this depth, optional properties go and arrays are as short as allowed."""

_GEMINI_KEYS = {
    "anyOf": "anyOf", "any_of": "anyOf", "minItems": "minItems", "min_items": "minItems", "maxItems": "maxItems",
    "max_items": "maxItems", "minLength": "minLength", "min_length": "minLength", "maxLength": "maxLength",
    "max_length": "maxLength", "propertyOrdering": "propertyOrdering", "property_ordering": "propertyOrdering",
    "defs": "$defs", "ref": "$ref",
}  # fmt: skip


def lower_case(schema: Schema) -> Schema:
    """Gemini's ``responseSchema`` (``"type": "STRING"``, ``nullable``, snake_case keys) as a plain JSON schema."""
    plain: Schema = {}
    for key, value in schema.items():
        key = _GEMINI_KEYS.get(key, key)
        if key == "type" and isinstance(value, str):
            plain["type"] = value.lower()
        elif key in ("properties", "$defs") and isinstance(value, dict):
            plain[key] = {name: lower_case(part) for name, part in value.items()}
        elif key == "items" and isinstance(value, dict):
            plain["items"] = lower_case(value)
        elif key == "anyOf" and isinstance(value, list):
            plain["anyOf"] = [lower_case(part) for part in value]
        else:
            plain[key] = value
    return plain


@dataclass
class Material:
    """What an answer is made from.

    Attributes:
        brief: what the instruction says about the answer.
        statements: what the text says; may be empty.
        style: how the model phrases.
        question: the question to answer, or the instruction.
        given: a question and an answer that came with the text, by name; the start of a conversation about it.
        lines: ready lines by meaning: ``points``, ``implications``, ``steps``.
        code: the text as code.
        comparison: when two texts were given to compare.
        alike: they are to say the same; else, the second is to say nothing that the first does not.
        seed: of choices nothing else decides.
    """

    brief: Brief
    statements: Sequence[Statement]
    style: Style
    question: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, list[str]] = field(default_factory=dict)
    code: str = ""
    comparison: Comparison | None = None
    alike: bool = False
    seed: str = ""


class Filler:
    """Values for one schema from one material."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.statements, self.style, self.comparison = material.statements, material.style, material.comparison
        self._failed: list[str] = []
        self._defs: Schema = {}

    def fill(self, schema: Schema) -> Any:
        """A value that fits the schema."""
        self._defs = schema.get("$defs") or schema.get("definitions") or {}
        return self._value(schema, "answer", 0, 0)

    # ------------------------------------------------------------ by type

    def _value(self, schema: Schema, name: str, index: int, depth: int) -> Any:
        schema = self._resolved(schema, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._choice(list(schema["enum"]), name, index)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
        meaning = f"{name} {schema.get('description', '')}".lower()
        if kind == "object":
            return self._object(schema, index, depth)
        if kind == "array":
            return self._array(schema, name, meaning, index, depth)
        if kind == "boolean":
            return self._boolean(name.lower())
        if kind in ("integer", "number"):
            return self._number(schema, kind, meaning, index)
        if kind == "null":
            return None
        return _fitted(self._string(name.lower(), meaning, index), schema)

    def _resolved(self, schema: Schema, depth: int) -> Schema:
        """The schema behind ``$ref`` and the first useful alternative of ``anyOf``."""
        for _ in range(20):
            if "$ref" in schema:
                schema = self._defs.get(str(schema["$ref"]).rpartition("/")[2], {})
                continue
            options = schema.get("anyOf") or schema.get("oneOf")
            if options:
                null = next((option for option in options if option.get("type") == "null"), None)
                if null is not None and depth >= MAX_DEPTH:
                    return dict(null)
                schema = {**schema, **next((option for option in options if option is not null), {})}
                schema.pop("anyOf", None)
                schema.pop("oneOf", None)
                continue
            if "allOf" in schema:
                merged = {key: value for key, value in schema.items() if key != "allOf"}
                for part in schema["allOf"]:
                    part = self._resolved(part, depth)
                    merged = {
                        **merged,
                        **part,
                        "properties": {**merged.get("properties", {}), **part.get("properties", {})},
                        "required": [*merged.get("required", []), *part.get("required", [])],
                    }
                return merged
            break
        return schema

    def _object(self, schema: Schema, index: int, depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", list(properties))
        names = [name for name in properties if depth < MAX_DEPTH or name in required]
        return {name: self._value(properties[name], name, index, depth + 1) for name in names}

    def _array(self, schema: Schema, name: str, meaning: str, index: int, depth: int) -> list[Any]:
        low, high = int(schema.get("minItems") or 0), schema.get("maxItems")
        items = self._resolved(schema.get("items") or {}, depth)
        brief = self.material.brief
        if items.get("type", "string") == "string" and "enum" not in items and "const" not in items:
            lines = self._lines(name, meaning, index)
            more = max(0, low - len(lines))
            lines += [f"nothing else stated ({i + 1})" for i in range(more)]
            return [_fitted(line, items) for line in lines[:high]]
        if items.get("enum"):
            choices = list(items["enum"])
            said = [c for c in choices if any(str(c).lower() in s.source.lower() for s in self.statements)]
            return (said or choices)[: max(low, 1) if not said else high][:high]
        properties = items.get("properties", {})
        if {"user", "assistant"} <= set(self._resolved(properties.get("role", {}), depth).get("enum", ())):
            return self._conversation(items, low, high)
        if brief.listed and "name" in properties:
            return [self._judged(items, *row) for row in brief.listed]
        count = brief.wanted or (low if depth >= MAX_DEPTH else max(low, min(MAX_OBJECTS, len(self.statements)), 1))
        if items.get("type") in ("number", "integer"):
            count = max(low, 1)
        elif depth > 2 and not brief.wanted:
            count = min(count, max(low, 2 if depth <= 4 else 1))  # 8 objects of 8 objects of 8 would be too much
        count = max(low, count if high is None else min(count, int(high)))
        return [self._value(items, _singular(name), i, depth + 1) for i in range(count)]

    def _number(self, schema: Schema, kind: str, meaning: str, index: int) -> int | float:
        step = 1 if kind == "integer" else 1e-4
        low = schema["exclusiveMinimum"] + step if "exclusiveMinimum" in schema else schema.get("minimum", 0)
        usual = 1 if re.search(r"probability|confidence|similarity|fraction|\b0 (?:to|-) 1\b", meaning) else 10
        high = schema["exclusiveMaximum"] - step if "exclusiveMaximum" in schema else schema.get("maximum", usual)
        share = self.comparison.overlap if self.comparison else 0.5 + draw(self.material.seed, meaning, str(index)) / 2
        value = low + (max(low, high) - low) * share
        return round(value) if kind == "integer" else float(round(value, 4))

    def _boolean(self, name: str) -> bool:
        good = True
        if self.comparison is not None:
            good = self.comparison.equivalent if self.material.alike else self.comparison.supported
        elif re.search(r"self_contained|standalone", name):
            good = not re.search(r"\b(?:this|the above)\b", self.material.question, re.I)
        fault = _FAULT.search(name) and not re.match(r"no_|not_|non_|without_|free_of_", name)
        return good is not bool(fault)

    def _judged(self, items: Schema, name: str, meaning: str) -> dict[str, Any]:
        """One row of a rubric: whether a criterion holds, and the words that show it best."""
        said = {term.lower() for statement in self.statements for term in statement.terms}
        wanted = [statement for statement in reading.read(meaning, "prose") if statement.terms]
        if self.comparison is not None and re.search(r"\bfacts?\b|states nothing|contradict", meaning):
            holds = self.comparison.supported
        elif "applies" in meaning or "shows" in meaning:
            terms = {term.lower() for statement in wanted for term in statement.terms}
            holds = len(terms & said) >= 0.4 * len(terms)
        else:
            holds = draw(self.material.seed, name) >= _DOUBT
        if not holds:
            self._failed.append(name)
        best = answering.relevant(f"{name} {meaning}", self.statements, 1) if self.statements else []
        quote = best[0].source if best else ""
        values: dict[str, Any] = {"name": name, "quote": quote, "evidence": quote}
        row = {}
        for key, schema in items.get("properties", {}).items():
            kind = self._resolved(schema, 0).get("type")
            row[key] = holds if kind == "boolean" else values.get(key, quote if kind == "string" else None)
        return row

    def _conversation(self, items: Schema, low: int, high: Any) -> list[dict[str, str]]:
        """Turns of user and assistant in turn, as many as the instruction asks for."""
        material = self.material
        least, most = material.brief.messages
        if not most:
            least, most = max(low, 2), int(high or max(low, 4))
        count = least + 2 * int(draw(material.seed, "turns") * ((most - least) // 2 + 1))
        turns = dialogue.conversation(
            count - count % 2,
            self.statements,
            question=material.given.get("question", ""),
            answer=material.given.get("answer", ""),
            topic=material.brief.topic,
            apply=material.brief.listed if material.brief.topic else (),
            seed=material.seed,
        )
        other = next((key for key in items.get("properties", {}) if key != "role"), "content")
        return [{"role": ("user", "assistant")[i % 2], other: turn} for i, turn in enumerate(turns)]

    def _choice(self, options: list[Any], name: str, index: int) -> Any:
        if {"user", "assistant"} <= set(options):
            return ("user", "assistant")[index % 2]
        words = [option for option in options if isinstance(option, str)]
        if self.comparison is not None:
            verdicts = ("equivalent", "yes", "pass", "same", "supported", "correct", "true")
            faults = ("not_equivalent", "no", "fail", "different", "unsupported", "incorrect", "false")
            for option in words:
                if option.lower() in (verdicts if self.comparison.equivalent else faults):
                    return option
        if 0 <= index < len(self.statements):
            said = self.statements[index].source.lower()
            for option in words:
                if option.lower() in said:
                    return option
        return options[int(draw(self.material.seed, name, str(index)) * len(options))]

    # ------------------------------------------------------------ by meaning

    def _lines(self, name: str, meaning: str, index: int) -> list[str]:
        material, low = self.material, name.lower()
        brief = material.brief
        for key in ("implications", "steps", "points"):
            if key in material.lines and (key in low or len(material.lines) == 1):
                return list(material.lines[key])
        options, least, most = brief.options(name)
        if options:
            count = least + int(draw(material.seed, name, str(index)) * (most - least + 1)) if most else len(options)
            return self._chosen(options, max(1, count), index)
        guide = brief.guides.get(name, "")
        if "names" in guide and brief.listed:
            return [listed for listed, _ in brief.listed]
        if "empty when" in guide or re.search(r"issue|problem|error", low):
            return [f"{failed} does not hold." for failed in self._failed]
        if re.search(r"keyword|tag|topic|term|entit|name|categor", low):
            lines = list(dict.fromkeys(keyword(s) for s in self.statements))[:MAX_OBJECTS]
        elif "question" in low:
            lines = [_question(s, 0) for s in self.statements[:MAX_OBJECTS]]
        elif re.search(r"quote|evidence|span|sentence|citation", low):
            lines = [s.source for s in answering.relevant(material.question, self.statements)]
        else:
            lines = [answering.sentence(s, self.style) for s in self.statements]
        most = brief.bounds(name)[1] or brief.wanted
        return lines[:most] if most else lines

    def _chosen(self, options: list[str], count: int, index: int) -> list[str]:
        """The options that the statement at hand speaks of, then others, in the order they were given."""
        said = self._at(index).source.lower() if self.statements else ""
        order = sorted(options, key=lambda o: (o.lower() not in said, draw(self.material.seed, o, str(index))))
        chosen = order[:count]
        return [option for option in options if option in chosen]

    def _at(self, index: int) -> Statement:
        return self.statements[index % len(self.statements)]

    def _string(self, name: str, meaning: str, index: int) -> str:
        material = self.material
        if name in ("code", "program", "source_code", "snippet") and material.code:
            return material.code
        if re.search(r"reason|rationale|explanation|justification|feedback|comment", name):
            if self._failed:
                return f"Not all criteria hold: {', '.join(self._failed)}."
            if self.comparison is not None:
                return self.comparison.reason(one_way=not material.alike)
        if "as given" in material.brief.guides.get(name, "") and material.brief.topic:
            return material.brief.topic
        if not self.statements:
            return "The text says nothing about it."
        statement = self._at(index)
        if name == "language":
            return "en"
        if name in ("id", "key", "identifier"):
            return f"item-{index + 1}"
        if "question" in name or name in ("query", "prompt", "instruction"):
            return _question(statement, index)
        if re.search(r"title|topic|subject|category|name|label|keyword|heading", name):
            return keyword(statement)
        if re.search(r"quote|evidence|span|citation|passage|excerpt", name):
            return statement.source
        if re.search(r"summary|abstract|overview", name):
            return answering.summary(self.statements, self.style)
        if index == 0 and not material.brief.wanted and re.search(r"answer|response|reply|output", name):
            return " ".join(clean(s.source) for s in answering.relevant(material.question, self.statements))
        return clean(statement.source)


_FAULT = re.compile(
    r"hallucinat|contradict|unsupported|invent|leak|missing|error|refus|differ|wrong|unsafe|violat|issue"
)
_DOUBT = 0.03
"""Share of criteria nothing in the text decides that a judge calls not met."""


def _fitted(text: str, schema: Schema) -> str:
    """The string within ``minLength`` and ``maxLength``."""
    low, high = int(schema.get("minLength") or 0), schema.get("maxLength")
    while len(text) < low:
        text = f"{text} {text}" if text else "." * low
    return text if high is None else text[: int(high)]


_QUESTIONS = (
    "{what} does the text say about {about}?",
    "What should somebody know about {about}?",
    "What holds for {about}?",
    "Which facts are known about {about}?",
)


def _question(statement: Statement, index: int) -> str:
    """A question that the statement answers, and that does not give the answer away; another one for another index."""
    plain = [t for t in statement.terms if t[0].isalpha() and t.lower() not in reading.NEGATIONS]
    what = "How much or how many" if any(statement.facts) and any(map(reading.is_number, statement.terms)) else "What"
    start = index % max(1, len(plain) - 2)
    about = " ".join(plain[start : start + 4]) or "it"
    return _QUESTIONS[index % len(_QUESTIONS)].format(what=what, about=about)


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and not name.endswith("ss") else name
