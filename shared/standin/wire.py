"""What the protocols share: a request as it came in, a reply as it goes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson

CREATED = 1_763_600_000
"""Seconds since 1970 in every answer that must tell a time: the same request gets the same bytes on any day."""


class RefusedError(Exception):
    """A request that the service would refuse. Each protocol puts it into its own shape.

    Attributes:
        status: HTTP status.
        kind: what is wrong in one word, where a protocol has words for it (``unsupported_value``).
        param: the field it is about.
    """

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param


@dataclass
class Request:
    """One HTTP request, read in full. ``path`` is decoded only as far as the client encoded it twice."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            RefusedError: it is none.
        """
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RefusedError(400, "the body must be a JSON object")
        return value

    @property
    def attempt(self) -> str:
        """Which repetition of an equal question this is; ``""`` for the first. Real services take no notice of it."""
        return self.headers.get("x-synthmill-attempt", "")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the body in hex; of the body and the attempt when there is one."""
        return hashlib.sha256(self.body + self.attempt.encode()).hexdigest()

    @cached_property
    def id(self) -> str:
        """24 hex digits from path and body: the same request gets the same ids."""
        return hashlib.sha256(self.path.encode() + b"\0" + self.body).hexdigest()[:24]

    @property
    def key(self) -> str:
        """The API key, from whichever header carries it; ``""`` for none."""
        return (
            self.headers.get("x-goog-api-key")
            or self.headers.get("x-api-key")
            or self.headers.get("authorization", "").removeprefix("Bearer ").strip()
            or self.query.get("key", "")
        )


@dataclass
class Reply:
    """One HTTP answer.

    Attributes:
        body: bytes, or a JSON value.
        model: the model that was asked, for the log.
        input_tokens: as billed, for the log; as are ``output_tokens``.
        answered: a model's answer (not a list of models, a token count, an error).
        fault: the fault that was put into it.
    """

    status: int
    body: bytes | dict[str, Any] | list[Any]
    headers: dict[str, str] = field(default_factory=dict)
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    answered: bool = False
    fault: str | None = None

    def bytes(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else orjson.dumps(self.body)


BAD_KEY = "bad-key"
RETIRED = "retired-"


def check_access(request: Request, model: str = "") -> None:
    """Every key is good but :data:`BAD_KEY`, every model offered but those whose name begins with :data:`RETIRED`.

    Raises:
        RefusedError: 401 without a key or with the bad one, 404 for a retired model.
    """
    if request.key in ("", BAD_KEY):
        raise RefusedError(401, "the API key is missing or not valid", "invalid_api_key")
    if model.startswith(RETIRED):
        raise RefusedError(404, f"the model {model!r} does not exist or is not offered any more", "model_not_found")


def schema_or_none(value: Any) -> dict[str, Any] | None:
    """The schema of a structured answer.

    Raises:
        RefusedError: it is no JSON object.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise RefusedError(400, "the schema of a structured answer must be an object", "invalid_schema")
    return value


def broken(text: str) -> str:
    """A JSON answer cut inside, as a model that lost count of its brackets writes it; other text comes back whole."""
    return text[: max(1, len(text) * 2 // 3)] + "…" if text[:1] in "{[" else text


def stopped(text: str, stops: list[str] | None) -> tuple[str, str | None]:
    """The text before the first stop sequence, and that sequence."""
    found = [(text.find(stop), stop) for stop in stops or [] if stop and stop in text]
    if not found:
        return text, None
    place, stop = min(found)
    return text[:place], stop
