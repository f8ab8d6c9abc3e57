"""Fills a JSON schema with what a text says: every property by its type, and by what its name and description ask for.

Understands ``$ref`` into ``$defs``, ``anyOf``/``oneOf``/``allOf``, ``enum``, ``const``, arrays, numbers
and strings with bounds, nullable types as lists, and Gemini's upper-case dialect through :func:`lower_case`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from shared.standin import answering
from shared.standin.answering import Comparison, Style
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


class Filler:
    """Values for one schema from one text.

    Args:
        statements: what the text says; may be empty.
        style: how the model phrases.
        question: the instruction or question, for answers that must fit it.
        lines: ready lines by meaning: ``points``, ``implications``, ``steps``; and ``code`` as one string.
        comparison: when two texts were given to compare.
        wanted: how many objects the instruction asks for; 0 = it does not say.
        seed: of choices nothing else decides.
    """

    def __init__(
        self,
        statements: Sequence[Statement],
        style: Style,
        *,
        question: str = "",
        lines: dict[str, list[str]] | None = None,
        code: str = "",
        comparison: Comparison | None = None,
        wanted: int = 0,
        seed: str = "",
    ) -> None:
        self.statements, self.style, self.question = list(statements), style, question
        self.lines, self.code, self.comparison = lines or {}, code, comparison
        self.wanted, self.seed = wanted, seed
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
        if items.get("type", "string") == "string" and "enum" not in items and "const" not in items:
            lines = self._lines(name, meaning, index)
            if self.wanted and not self.lines:
                lines = lines[: self.wanted]
            more = max(0, low - len(lines))
            lines += [f"nothing else stated ({i + 1})" for i in range(more)]
            return [_fitted(line, items) for line in lines[:high]]
        if items.get("enum"):
            choices = list(items["enum"])
            said = [c for c in choices if any(str(c).lower() in s.source.lower() for s in self.statements)]
            return (said or choices)[: max(low, 1) if not said else high][:high]
        count = self.wanted or (low if depth >= MAX_DEPTH else max(low, min(MAX_OBJECTS, len(self.statements)), 1))
        if items.get("type") in ("number", "integer"):
            count = max(low, 1)
        elif depth > 2 and not self.wanted:
            count = min(count, max(low, 2 if depth <= 4 else 1))  # 8 objects of 8 objects of 8 would be too much
        count = max(low, count if high is None else min(count, int(high)))
        return [self._value(items, _singular(name), i, depth + 1) for i in range(count)]

    def _number(self, schema: Schema, kind: str, meaning: str, index: int) -> int | float:
        step = 1 if kind == "integer" else 1e-4
        low = schema["exclusiveMinimum"] + step if "exclusiveMinimum" in schema else schema.get("minimum", 0)
        usual = 1 if re.search(r"probability|confidence|similarity|fraction|\b0 (?:to|-) 1\b", meaning) else 10
        high = schema["exclusiveMaximum"] - step if "exclusiveMaximum" in schema else schema.get("maximum", usual)
        share = self.comparison.overlap if self.comparison else 0.5 + draw(self.seed, meaning, str(index)) / 2
        value = low + (max(low, high) - low) * share
        return round(value) if kind == "integer" else float(round(value, 4))

    def _boolean(self, name: str) -> bool:
        good = True
        if self.comparison is not None:
            strict = re.search(r"equivalent|same|identical|preserv", name)
            good = self.comparison.equivalent if strict else self.comparison.supported
        fault = _FAULT.search(name) and not re.match(r"no_|not_|non_|without_|free_of_", name)
        return good is not bool(fault)

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
        return options[int(draw(self.seed, name, str(index)) * len(options))]

    # ------------------------------------------------------------ by meaning

    def _lines(self, name: str, meaning: str, index: int) -> list[str]:
        low = name.lower()
        for key in ("implications", "steps", "points"):
            if key in self.lines and (key in low or len(self.lines) == 1):
                return list(self.lines[key])
        if re.search(r"keyword|tag|topic|term|entit|name", low):
            return list(dict.fromkeys(_keyword(s) for s in self.statements))[:MAX_OBJECTS]
        if "question" in low:
            return [_question(s) for s in self.statements[:MAX_OBJECTS]]
        if re.search(r"quote|evidence|span|sentence|citation", low):
            return [s.source for s in answering.relevant(self.question, self.statements)]
        return [answering.sentence(s, self.style) for s in self.statements]

    def _string(self, name: str, meaning: str, index: int) -> str:
        if name in ("code", "program", "source_code", "snippet") and self.code:
            return self.code
        if re.search(r"reason|rationale|explanation|justification|feedback|comment", name) and self.comparison:
            return self.comparison.reason()
        if not self.statements:
            return "The text says nothing about it."
        statement = self.statements[index % len(self.statements)]
        if name == "language":
            return "en"
        if name in ("id", "key", "identifier"):
            return f"item-{index + 1}"
        if "question" in name or name in ("query", "prompt", "instruction"):
            return _question(statement)
        if re.search(r"title|topic|subject|category|name|label|keyword|heading", name):
            return _keyword(statement)
        if re.search(r"quote|evidence|span|citation|passage|excerpt", name):
            return statement.source
        if re.search(r"summary|abstract|overview", name):
            return answering.summary(self.statements, self.style)
        if name in ("content", "message", "text") and index % 2 == 0:
            return _question(statement)
        if name in ("content", "message", "text"):
            return answering.sentence(self.statements[(index - 1) % len(self.statements)], self.style)
        if index == 0 and self.question and re.search(r"answer|response|reply|output", name):
            found = answering.relevant(self.question, self.statements)
            return " ".join(answering.sentence(s, self.style) for s in found)
        return answering.sentence(statement, self.style)


_FAULT = re.compile(r"hallucinat|contradict|unsupported|invent|leak|missing|error|refus|differ|wrong|unsafe|violat")


def _fitted(text: str, schema: Schema) -> str:
    """The string within ``minLength`` and ``maxLength``."""
    low, high = int(schema.get("minLength") or 0), schema.get("maxLength")
    while len(text) < low:
        text = f"{text} {text}" if text else "." * low
    return text if high is None else text[: int(high)]


def _question(statement: Statement) -> str:
    """A question that the statement answers, and that does not give the answer away."""
    plain = [t for t in statement.terms if t[0].isalpha() and t.lower() not in ("not", "never", "no", "cannot")]
    number = any(term[0].isdigit() for term in statement.terms)
    about = " ".join(plain[:5]) or "this"
    return f"{'How much or how many' if number else 'What'} does the text say about {about}?"


def _keyword(statement: Statement) -> str:
    """The longest word of a statement."""
    return max((t for t in statement.terms if t[0].isalpha()), key=len, default="text")


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and not name.endswith("ss") else name
