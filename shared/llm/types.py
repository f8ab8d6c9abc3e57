"""What goes into a call and what comes out."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.records import Message, Part

Problem = Literal["", "truncated", "refused", "invalid_json", "empty", "bad_request", "unavailable"]
Stop = Literal["stop", "length", "refusal"]


def chat(system: str, *turns: str) -> tuple[Message, ...]:
    """Messages from a system prompt and alternating user and assistant turns; an empty system prompt is left out."""
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns))  # type: ignore[arg-type]
    return (Message(role="system", content=system), *messages) if system else messages


def fill(template: str, **values: str) -> str:
    """A prompt with every ``{name}`` of ``values`` replaced, in one pass, so that a value may say ``{name}`` itself."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


class Request(BaseModel):
    """One question to one model.

    Attributes:
        model: ``provider/name``.
        messages: system first (optional), then alternating user and assistant, ending with user.
        max_tokens: the most tokens the answer may have.
        temperature: 0 to 2; sent only to models that still take one (``sampling`` in ``models.toml``, and endpoints).
        seed: sent to OpenAI-compatible endpoints only.
        response: a pydantic model the answer must be valid JSON of; None = free text.
        repeat: index of a repeated question: the same question with another index is asked again.
        base_url: of an ``endpoint/`` model; ``""`` = the OpenAI client's own default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    messages: tuple[Message, ...]
    max_tokens: int = 1024
    temperature: float | None = None
    seed: int | None = None
    response: type[BaseModel] | None = None
    repeat: int = 0
    base_url: str = ""

    @property
    def provider(self) -> str:
        return self.model.partition("/")[0]

    @property
    def name(self) -> str:
        return self.model.partition("/")[2]

    def input_tokens_bound(self) -> int:
        """At least the tokens the input has in any tokenizer: one a UTF-8 byte, and 16 a message.

        Loose for prose (about 4 bytes a token), but a bound: digits, brackets and single letters reach it.
        """
        size = sum(len(m.content.encode("utf-8", "replace")) for m in self.messages)
        if self.response is not None:
            size += len(orjson.dumps(strict_schema(self.response)))
        return size + 16 * len(self.messages)


class Usage(Part):
    """Tokens as the provider counted them; ``output`` includes thinking.

    ``cached`` and ``written`` are parts of ``input``: read from the provider's prompt cache, and written to it.
    """

    input: int = 0
    output: int = 0
    cached: int = 0
    written: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input=self.input + other.input,
            output=self.output + other.output,
            cached=self.cached + other.cached,
            written=self.written + other.written,
        )


class Answer(Part):
    """What the store keeps of an answer: enough to replay it and to bill it."""

    text: str
    stop: Stop
    detail: str = ""
    usage: Usage = Usage()
    served_by: str = ""

    @field_validator("text", "detail", "served_by", mode="before")
    @classmethod
    def _storable(cls, text: str) -> str:
        """JSON may escape half a surrogate pair, which UTF-8 cannot hold; what is paid for is never too odd to keep."""
        return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


class Reply(BaseModel):
    """What a stage gets.

    Attributes:
        key: where the reply store has it; ``""`` when nothing was answered.
        text: the answer, ``""`` when there is none.
        parsed: the answer as ``request.response``, when that was asked for and ``problem`` is empty.
        problem: ``""`` when the answer can be used, else why not; ``detail`` says it for a person.
        usage: of all tries together.
        cached: nothing was sent.
        tries: how many differently indexed requests it took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    key: str
    text: str = ""
    parsed: Any = None
    problem: Problem = ""
    detail: str = ""
    usage: Usage = Usage()
    cached: bool = False
    tries: int = 1


class Spending(BaseModel):
    """What one process did: answers paid for, answers replayed, tokens and dollars of the paid ones."""

    calls: int = 0
    cached: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    models: dict[str, int] = {}


def request_key(wire: dict[str, Any], model: str, base_url: str, repeat: int, attempt: int) -> str:
    """64 hex digits of SHA-256 over everything that can change the answer, the wire body included."""
    parts = {"model": model, "base_url": base_url, "repeat": repeat, "attempt": attempt, "wire": wire}
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def judge_answer(answer: Answer, response: type[BaseModel] | None) -> tuple[Problem, str, Any]:
    """``(problem, detail, parsed)`` of an answer; the same for a fresh and for a replayed one."""
    if answer.stop == "refusal":
        return "refused", answer.detail, None
    if answer.stop == "length":
        return "truncated", f"the answer reached its limit of {answer.usage.output} tokens", None
    if not answer.text.strip():
        return "empty", answer.detail, None
    if response is None:
        return "", "", None
    try:
        return "", "", response.model_validate_json(unfenced(answer.text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return "invalid_json", f"{place or 'answer'}: {first['msg']}", None


def unfenced(text: str) -> str:
    """The text without one Markdown fence around the whole of it."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        return stripped[stripped.index("\n") + 1 : -3].strip()
    return stripped


_SCHEMA_CACHE: dict[type[BaseModel], dict[str, Any]] = {}
_ALLOWED = {"type", "properties", "items", "enum", "const", "anyOf", "$ref", "$defs", "description"}


def strict_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema all three providers enforce: every field required, nothing else allowed, no constraints.

    Constraints belong in pydantic validators, which run on the answer: providers drop or refuse them
    (Claude's grammar has none; verified with anthropic 2.11.0 and openai 3.52.0).

    Raises:
        TypeError: the schema uses a keyword a provider refuses.
    """
    if model not in _SCHEMA_CACHE:
        _SCHEMA_CACHE[model] = _strict(model.model_json_schema(), model.__name__)
    return _SCHEMA_CACHE[model]


def _strict(schema: dict[str, Any], name: str) -> dict[str, Any]:
    schema = {key: value for key, value in schema.items() if key not in ("title", "default")}
    if unknown := set(schema) - _ALLOWED - {"required", "additionalProperties"}:
        raise TypeError(f"{name}: schema keywords {sorted(unknown)} are not enforced by every provider")
    for group in ("properties", "$defs"):
        if group in schema:
            schema[group] = {key: _strict(value, name) for key, value in schema[group].items()}
    if "items" in schema:
        schema["items"] = _strict(schema["items"], name)
    if "anyOf" in schema:
        schema["anyOf"] = [_strict(option, name) for option in schema["anyOf"]]
    if schema.get("type") == "object":
        # The class's docstring: ours to reword, while the schema is part of what an answer is stored under.
        schema.pop("description", None)
        if not isinstance(schema.get("properties"), dict):
            raise TypeError(f"{name}: free-form objects are not enforced by every provider")
        schema["required"] = list(schema["properties"])
        schema["additionalProperties"] = False
    return schema
