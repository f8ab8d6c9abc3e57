"""The four ways to reach a model. Each turns a :class:`Request` into its wire body (pure, no SDK), sends it through the
vendor's SDK (imported on first use, its own retries off), and turns answers and errors into ours. What most calls leave
out of the SDK's work, and what they never do, is in :mod:`shared.llm.wire`: hence the two readings of every answer, one
of the SDK's types and one of the JSON, which must agree.

Verified by running anthropic 2.11.0, openai 3.52.0 and google-genai 3.4.0; what they do differently from memory:
no sampling parameters on Claude, thinking on by default and first in the content, `parse()` helpers that lose the
usage of a bad answer, google-genai without retries or time-outs that continues a cut answer by itself.

No prompt-cache markers are sent: what two of our prompts share is at most 200 tokens, the least that Haiku 5.5 caches
is 512 (release notes of 2026-10), and a write costs 1.25 times the input. OpenAI and Gemini cache without being asked.
"""

from __future__ import annotations

import array
import base64
import email.utils
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import orjson

from shared.errors import KeyMissingError, ProviderError, SettingsError
from shared.llm.catalogue import ModelCard
from shared.llm.reexports import by_name
from shared.llm.types import Answer, Request, Stop, Usage, strict_schema
from shared.llm.wire import ATTEMPT, Hear, Line, Question
from shared.records import Message

TIMEOUT_S = 180.0
"""For one call. Our longest answers (3,000 tokens) take well under a minute; a hung socket is retried after this."""

by_name()  # before an SDK is imported

Wire = dict[str, Any]
Vectors = tuple[list["array.array[float]"], Usage]


class TransientError(Exception):
    """Worth another try.

    Attributes:
        limited: the provider will not have this call now; it is no failure of the call.
        overloaded: because it has too much to do, not because we are too fast.
        after_s: when it says to come back.
    """

    def __init__(
        self, what: str, *, limited: bool = False, overloaded: bool = False, after_s: float | None = None
    ) -> None:
        super().__init__(what)
        self.limited, self.overloaded, self.after_s = limited, overloaded, after_s


class BadRequestError(Exception):
    """This request will never be answered; others may."""


class NotFoundError(ProviderError):
    """404: the provider does not know the model, or the batch, it was asked for."""


class Provider(Protocol):
    """What a provider offers the rest of the package."""

    name: str
    key_names: tuple[str, ...]

    async def rehearse(self) -> None: ...
    def wire(self, request: Request, card: ModelCard) -> Wire: ...
    async def send(self, wire: Wire, base_url: str, again: str, hear: Hear | None = None) -> Answer: ...
    async def models(self) -> set[str]: ...
    async def close(self) -> None: ...


def check_key(provider: Provider) -> None:
    """Raises:
    KeyMissingError: none of the provider's key variables is set.
    """
    if provider.key_names and not any(os.environ.get(name) for name in provider.key_names):
        raise KeyMissingError(
            f"{provider.key_names[0]} is not set",
            f"put {provider.key_names[0]}=... into .env (see env.example), or run with APIS=mock",
        )


def _headers(again: str) -> dict[str, str]:
    """Tells a repeated question from the first, whose body is equal: for logs, and for whoever answers by rule."""
    return {ATTEMPT: again} if again else {}


@contextmanager
def _readable(provider: str) -> Iterator[None]:
    """The SDKs check nothing: a 200 may hold any JSON, and its objects have whatever was in it.

    Raises:
        TransientError: not what we read from it; a proxy may have answered, and the next try may go through.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TransientError(f"{provider} answered 200 with something unreadable: {error}") from error


def _line() -> Line:
    return Line(lambda: TIMEOUT_S)


def _split(messages: tuple[Message, ...]) -> tuple[str, list[dict[str, str]]]:
    """The system prompt (``""`` for none) and the turns."""
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    return system, [{"role": m.role, "content": m.content} for m in messages if m.role != "system"]


# ---------------------------------------------------------------- Anthropic


class Anthropic:
    """Claude through the Messages API."""

    name: str = "anthropic"
    key_names: tuple[str, ...] = ("ANTHROPIC_API_KEY",)

    def __init__(self) -> None:
        self._client: Any = None
        self._line = _line()

    def wire(self, request: Request, card: ModelCard) -> Wire:
        system, turns = _split(request.messages)
        body: Wire = {"model": request.name, "max_tokens": request.max_tokens, "messages": turns}
        if system:
            body["system"] = system
        if request.response is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": strict_schema(request.response)}}
        return body | card.thinking

    def client(self) -> Any:
        if self._client is None:
            import anthropic

            http = anthropic.DefaultAsyncHttpxClient(transport=self._line.transport())
            self._client = anthropic.AsyncAnthropic(max_retries=0, timeout=TIMEOUT_S, http_client=http)
        return self._client

    async def send(self, wire: Wire, base_url: str, again: str, hear: Hear | None = None) -> Answer:
        return await self._line.ask(
            Question(
                key=(wire["model"], *sorted(wire)),
                body=lambda _: wire,
                read=_anthropic_answer,
                sdk=lambda: self._by_sdk(wire, again),
                again=again,
                hear=hear,
            )
        )

    async def rehearse(self) -> None:
        """Let the SDK load what it needs; asks nobody."""
        wire = {"model": "-", "max_tokens": 1, "messages": [{"role": "user", "content": "-"}]}
        message: Wire = {"id": "-", "type": "message", "role": "assistant", "model": "-", "stop_reason": "end_turn"}
        message |= {"content": [{"type": "text", "text": "-"}], "usage": {"input_tokens": 1, "output_tokens": 1}}
        await self._line.rehearse(lambda: self._by_sdk(wire, ""), orjson.dumps(message))

    async def _by_sdk(self, wire: Wire, again: str) -> Answer:
        with self.errors():
            message = await self.client().messages.create(**wire, extra_headers=_headers(again))
        return self.answer(message)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The SDK's errors become ours."""
        import anthropic

        try:
            yield
        except anthropic.APIConnectionError as error:
            raise TransientError(f"anthropic: {error}") from error
        except anthropic.APIStatusError as error:
            raise _status_error("anthropic", error, error.status_code, spent=_anthropic_limit(error)) from error
        except json.JSONDecodeError as error:
            raise TransientError(f"anthropic answered 200 with broken JSON: {error}") from error

    def answer(self, message: Any) -> Answer:
        """What the SDK's ``Message`` says.

        Raises:
            TransientError: it is not what we read from it.
        """
        with _readable("anthropic"):
            return self._typed(message)

    def _typed(self, message: Any) -> Answer:
        usage = message.usage
        if usage is None or message.content is None:
            raise TransientError("anthropic answered 200 without content or usage")
        cached = usage.cache_read_input_tokens or 0
        written = usage.cache_creation_input_tokens or 0
        total = (usage.input_tokens or 0) + cached + written
        stop: Stop = "stop"
        if message.stop_reason in ("max_tokens", "model_context_window_exceeded"):
            stop = "length"
        elif message.stop_reason == "refusal":
            stop = "refusal"
        return Answer(
            text=next((b.text for b in message.content if b.type == "text"), ""),
            stop=stop,
            detail=str(message.stop_reason or ""),
            usage=Usage(input=total, output=usage.output_tokens or 0, cached=cached, written=written),
            served_by=str(message.model or ""),
        )

    async def models(self) -> set[str]:
        return {model.id async for model in self.client().models.list()}

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        await self._line.close()


def _anthropic_answer(found: Any) -> Answer | None:
    """The same from the JSON; None for whatever is not as usual."""
    usage, reason = found["usage"], found["stop_reason"]
    cached = usage.get("cache_read_input_tokens") or 0
    written = usage.get("cache_creation_input_tokens") or 0
    stop: Stop = "stop"
    if reason in ("max_tokens", "model_context_window_exceeded"):
        stop = "length"
    elif reason == "refusal":
        stop = "refusal"
    return Answer(
        text=next((block["text"] for block in found["content"] if block["type"] == "text"), ""),
        stop=stop,
        detail=reason or "",
        usage=Usage(
            input=(usage["input_tokens"] or 0) + cached + written,
            output=usage["output_tokens"] or 0,
            cached=cached,
            written=written,
        ),
        served_by=found["model"] or "",
    )


def _anthropic_limit(error: Any) -> bool:
    """A 429 that is a spend limit of the account, or a 400 that is an empty one: waiting does not help."""
    said = str(getattr(error, "message", "")).lower()
    return "SpendLimit" in type(error).__name__ or (error.status_code == 400 and "credit balance" in said)


# ---------------------------------------------------------------- OpenAI, and servers that speak its protocol


class OpenAI:
    """GPT through chat completions."""

    name: str = "openai"
    key_names: tuple[str, ...] = ("OPENAI_API_KEY",)

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._line = _line()

    def wire(self, request: Request, card: ModelCard) -> Wire:
        body: Wire = {
            "model": request.name,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "max_completion_tokens": request.max_tokens,
        }
        if request.response is not None:
            body["response_format"] = self._format(request)
        if card.sampling and request.temperature is not None:
            body["temperature"] = request.temperature
        return body | card.thinking

    def _format(self, request: Request) -> Wire:
        assert request.response is not None
        schema = {"name": request.response.__name__, "strict": True, "schema": strict_schema(request.response)}
        return {"type": "json_schema", "json_schema": schema}

    def client(self, base_url: str = "") -> Any:
        if base_url not in self._clients:
            import openai

            self._clients[base_url] = openai.AsyncOpenAI(
                max_retries=0,
                timeout=TIMEOUT_S,
                http_client=openai.DefaultAsyncHttpxClient(transport=self._line.transport()),
                base_url=base_url or None,
                api_key=self._key(),
            )
        return self._clients[base_url]

    def _key(self) -> str | None:
        return None

    async def send(self, wire: Wire, base_url: str, again: str, hear: Hear | None = None) -> Answer:
        return await self._line.ask(
            Question(
                key=(base_url, wire["model"], *sorted(wire)),
                body=lambda _: wire,
                read=self._answer,
                sdk=lambda: self._by_sdk(wire, base_url, again),
                again=again,
                hear=hear,
            )
        )

    async def rehearse(self) -> None:
        """Let the SDK load what it needs for questions; asks nobody."""
        wire = {"model": "-", "messages": [{"role": "user", "content": "-"}]}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "-"}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        completion: Wire = {"id": "-", "object": "chat.completion", "created": 0, "model": "-"}
        completion |= {"choices": [choice], "usage": usage}
        await self._line.rehearse(lambda: self._by_sdk(wire, "", ""), orjson.dumps(completion))

    async def rehearse_embeddings(self) -> None:
        """Let the SDK load what it needs for embeddings; asks nobody."""
        wire = {"model": "-", "input": ["-"], "dimensions": 1}
        row = {"object": "embedding", "index": 0, "embedding": "AACAPw=="}
        found = {"object": "list", "model": "-", "data": [row], "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        await self._line.rehearse(lambda: self._embed_by_sdk(wire), orjson.dumps(found))

    async def _by_sdk(self, wire: Wire, base_url: str, again: str) -> Answer:
        with self.errors():
            completion = await self.client(base_url).chat.completions.create(**wire, extra_headers=_headers(again))
        return self.answer(completion)

    def answer(self, completion: Any) -> Answer:
        """What the SDK's ``ChatCompletion`` says.

        Raises:
            TransientError: it is not what we read from it.
        """
        with _readable(self.name):
            return self._typed(completion)

    def _typed(self, completion: Any) -> Answer:
        if not completion.choices:
            raise TransientError(f"{self.name} answered 200 without choices")
        if (
            completion.usage is None and self.name == "openai"
        ):  # a server of your own may leave it out: it costs nothing
            raise TransientError("openai answered 200 without usage")
        choice, usage = completion.choices[0], completion.usage
        stop: Stop = "stop"
        if choice.finish_reason == "length":
            stop = "length"
        elif choice.message.refusal or choice.finish_reason == "content_filter":
            stop = "refusal"
        details = getattr(usage, "prompt_tokens_details", None)
        return Answer(
            text=choice.message.content or "",
            stop=stop,
            detail=choice.message.refusal or str(choice.finish_reason or ""),
            usage=Usage(
                input=getattr(usage, "prompt_tokens", 0) or 0,
                output=getattr(usage, "completion_tokens", 0) or 0,
                cached=getattr(details, "cached_tokens", 0) or 0,
                written=getattr(details, "cache_write_tokens", 0) or 0,
            ),
            served_by=completion.model or "",
        )

    def _answer(self, found: Any) -> Answer | None:
        """The same from the JSON; None for whatever is not as usual."""
        choice, usage = found["choices"][0], found["usage"]
        message, reason = choice["message"], choice["finish_reason"]
        refusal, details = message.get("refusal"), usage.get("prompt_tokens_details") or {}
        stop: Stop = "stop"
        if reason == "length":
            stop = "length"
        elif refusal or reason == "content_filter":
            stop = "refusal"
        return Answer(
            text=message["content"] or "",
            stop=stop,
            detail=refusal or reason or "",
            usage=Usage(
                input=usage["prompt_tokens"] or 0,
                output=usage["completion_tokens"] or 0,
                cached=details.get("cached_tokens") or 0,
                written=details.get("cache_write_tokens") or 0,
            ),
            served_by=found["model"] or "",
        )

    async def embed(self, wire: Wire, hear: Hear | None = None) -> Vectors:
        """Vectors in the order of ``wire["input"]``, float32, and what they cost."""
        vectors, usage = await self._line.ask(
            Question(
                key=("embeddings", *sorted(wire)),
                body=lambda sent: wire | {"encoding_format": sent["encoding_format"]},
                read=_vectors,
                sdk=lambda: self._embed_by_sdk(wire),
                hear=hear,
            )
        )
        if len(vectors) != len(wire["input"]):
            raise TransientError(f"{self.name} answered {len(vectors)} vectors for {len(wire['input'])} texts")
        if wrong := {len(vector) for vector in vectors} - {wire["dimensions"]}:
            raise SettingsError(
                f"asked {wire['model']} for {wire['dimensions']} dimensions, got {sorted(wrong)}",
                "set `dimensions` to what the model gives",
            )
        return vectors, usage

    async def _embed_by_sdk(self, wire: Wire) -> Vectors:
        with self.errors():
            result = await self.client().embeddings.create(**wire)
        with _readable(self.name):
            vectors = [array.array("f", row.embedding) for row in sorted(result.data, key=lambda row: row.index)]
            return vectors, Usage(input=result.usage.prompt_tokens)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The SDK's errors become ours."""
        import openai

        try:
            yield
        except openai.APIConnectionError as error:
            raise TransientError(f"{self.name}: {error}") from error
        except openai.APIStatusError as error:
            raise _status_error(self.name, error, error.status_code, spent=_openai_limit(error)) from error
        except (json.JSONDecodeError, ValueError) as error:
            raise TransientError(f"{self.name} answered 200 with something unreadable: {error}") from error

    async def models(self) -> set[str]:
        return {model.id async for model in self.client().models.list()}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        await self._line.close()


_NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}


def _openai_limit(error: Any) -> bool:
    """A 429 that is an account without credit; gateways put the word into either field."""
    return not _NO_CREDIT.isdisjoint({error.code, error.type})


def _vectors(found: Any) -> Vectors:
    """Embeddings as they come, little-endian float32 in base64."""
    vectors = []
    for row in sorted(found["data"], key=lambda row: int(row["index"])):
        vector = array.array("f")
        vector.frombytes(base64.b64decode(row["embedding"], validate=True))
        if sys.byteorder == "big":
            vector.byteswap()
        vectors.append(vector)
    return vectors, Usage(input=found["usage"]["prompt_tokens"])


class Endpoint(OpenAI):
    """Any OpenAI-compatible server: vLLM, ``mlx_lm.server``, a gateway. ``max_tokens`` is the field they all know."""

    name: str = "endpoint"
    key_names: tuple[str, ...] = ()

    def wire(self, request: Request, card: ModelCard) -> Wire:
        body = super().wire(request, card)
        body["max_tokens"] = body.pop("max_completion_tokens")
        if request.seed is not None:
            body["seed"] = request.seed
        return body

    def _key(self) -> str | None:
        return os.environ.get("ENDPOINT_API_KEY") or "none"  # never OpenAI's: this server may be anybody's


# ---------------------------------------------------------------- Gemini


class Gemini:
    """Gemini through generateContent."""

    name: str = "gemini"
    key_names: tuple[str, ...] = ("GEMINI_API_KEY", "GOOGLE_API_KEY")

    def __init__(self) -> None:
        self._client: Any = None
        self._http: Any = None
        self._line = _line()

    def wire(self, request: Request, card: ModelCard) -> Wire:
        system, turns = _split(request.messages)
        config: Wire = {"max_output_tokens": request.max_tokens, "automatic_continuation": False}
        if system:
            config["system_instruction"] = system
        if request.response is not None:
            config["response_mime_type"] = "application/json"
            config["response_json_schema"] = strict_schema(request.response)
        if card.sampling and request.temperature is not None:
            config["temperature"] = request.temperature
        roles = {"user": "user", "assistant": "model"}
        contents = [{"role": roles[turn["role"]], "parts": [{"text": turn["content"]}]} for turn in turns]
        return {"model": request.name, "contents": contents, "config": config | card.thinking}

    def client(self) -> Any:
        if self._client is None:
            import httpx2
            from google import genai
            from google.genai import types

            # An injected httpx2 client keeps google-genai from switching to an aiohttp of its own.
            self._http = httpx2.AsyncClient(transport=self._line.transport())
            options = types.HttpOptions(timeout=int(TIMEOUT_S * 1000), httpx_async_client=self._http)
            self._client = genai.Client(http_options=options)
        return self._client

    async def send(self, wire: Wire, base_url: str, again: str, hear: Hear | None = None) -> Answer:
        config = wire["config"]
        fixed = {name: value for name, value in config.items() if name not in _GEMINI_OWN}
        return await self._line.ask(
            Question(
                # Everything the SDK names and nests anew must be equal; what it leaves as it is may differ.
                key=(wire["model"], *sorted(config), orjson.dumps(fixed)),
                body=lambda sent: _gemini_body(wire, sent),
                read=_gemini_answer,
                sdk=lambda: self._by_sdk(wire, again),
                again=again,
                hear=hear,
            )
        )

    async def rehearse(self) -> None:
        """Let the SDK load what it needs; asks nobody."""
        wire = {"model": "-", "contents": [{"role": "user", "parts": [{"text": "-"}]}], "config": {}}
        candidate = {"content": {"role": "model", "parts": [{"text": "-"}]}, "finishReason": "STOP"}
        usage = {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
        reply = {"candidates": [candidate], "usageMetadata": usage}
        await self._line.rehearse(lambda: self._by_sdk(wire, ""), orjson.dumps(reply))

    async def _by_sdk(self, wire: Wire, again: str) -> Answer:
        client = self.client()
        from google.genai import types

        with self.errors():
            options = types.HttpOptions(headers=_headers(again)) if again else None
            config = types.GenerateContentConfig(**wire["config"], http_options=options)
            reply = await client.aio.models.generate_content(
                model=wire["model"], contents=wire["contents"], config=config
            )
        return self.answer(reply)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The SDK's errors become ours."""
        import httpx2
        from google.genai import errors

        try:
            yield
        except httpx2.TransportError as error:
            raise TransientError(f"gemini: {type(error).__name__} {error}") from error
        except errors.APIError as error:
            raise _status_error("gemini", error, error.code, spent=_gemini_limit(error)) from error
        except (KeyError, ValueError) as error:  # broken JSON, or an upload that was not taken to its end
            raise TransientError(f"gemini answered 200 with something unreadable: {error}") from error

    def answer(self, reply: Any) -> Answer:
        """What the SDK's ``GenerateContentResponse`` says.

        Raises:
            TransientError: it is not what we read from it.
        """
        with _readable("gemini"):
            return self._typed(reply)

    def _typed(self, reply: Any) -> Answer:
        meta = reply.usage_metadata
        if meta is None:
            raise TransientError("gemini answered 200 without usage")
        candidate = reply.candidates[0] if reply.candidates else None
        reason = str(getattr(candidate.finish_reason, "value", candidate.finish_reason)) if candidate else "BLOCKED"
        stop: Stop = {"STOP": "stop", "MAX_TOKENS": "length"}.get(reason, "refusal")  # type: ignore[assignment]
        return Answer(
            text=reply.text or "" if stop != "refusal" else "",
            stop=stop,
            detail=reason,
            usage=Usage(
                input=meta.prompt_token_count or 0,
                output=(meta.candidates_token_count or 0) + (meta.thoughts_token_count or 0),
                cached=meta.cached_content_token_count or 0,
            ),
            served_by=reply.model_version or "",
        )

    async def models(self) -> set[str]:
        return {str(m.name).removeprefix("models/") async for m in await self.client().aio.models.list()}

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aio.aclose()
            self._client.close()
            await self._http.aclose()
        await self._line.close()


_GEMINI_OWN = {"system_instruction": "", "max_output_tokens": "maxOutputTokens", "temperature": "temperature"}
"""Fields of a config that differ from call to call, and their names in ``generationConfig``."""


def _gemini_body(wire: Wire, sent: Wire) -> Wire:
    """The body the SDK would send, from one it did send for a config of the same shape."""
    config = wire["config"]
    own = {name: config[key] for key, name in _GEMINI_OWN.items() if name and key in config}
    body = sent | {"contents": wire["contents"], "generationConfig": sent["generationConfig"] | own}
    if "system_instruction" in config:
        parts = [{"text": config["system_instruction"]}]
        body["systemInstruction"] = {"parts": parts, "role": sent["systemInstruction"]["role"]}
    return body


def _gemini_limit(error: Any) -> bool:
    """A 429 that is the quota of a day: it looks like any other, and waiting for it would outlast the run."""
    try:
        rows = error.details["error"]["details"]
        named = [violation["quotaId"] for row in rows for violation in row.get("violations", [])]
    except (LookupError, TypeError, AttributeError):  # told in another way, or not at all
        return False
    return error.code == 429 and any("PerDay" in quota for quota in named)


def _gemini_answer(found: Any) -> Answer | None:
    """The same from the JSON; None for whatever is not as usual."""
    (candidate,), meta = found["candidates"], found["usageMetadata"]
    reason, parts = candidate["finishReason"], candidate.get("content", {}).get("parts") or []
    if any(not part.keys() <= {"text", "thought", "thoughtSignature"} for part in parts):
        return None
    stop: Stop = {"STOP": "stop", "MAX_TOKENS": "length"}.get(reason, "refusal")  # type: ignore[assignment]
    text = "".join(part["text"] for part in parts if not part.get("thought") and part.get("text"))
    return Answer(
        text=text if stop != "refusal" else "",
        stop=stop,
        detail=reason,
        usage=Usage(
            input=meta.get("promptTokenCount") or 0,
            output=(meta.get("candidatesTokenCount") or 0) + (meta.get("thoughtsTokenCount") or 0),
            cached=meta.get("cachedContentTokenCount") or 0,
        ),
        served_by=found.get("modelVersion") or "",
    )


PROVIDERS: dict[str, Callable[[], Provider]] = {
    "anthropic": Anthropic,
    "openai": OpenAI,
    "endpoint": Endpoint,
    "gemini": Gemini,
}
KEY_NAMES = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY"}

# ---------------------------------------------------------------- errors

RETRIED = {408, 409, 425, 429}


def _status_error(provider: str, error: Any, status: int, *, spent: bool) -> Exception:
    """Our error for an HTTP status: transient, this request's own fault, or fatal."""
    said = f"{provider} answered {status}: {getattr(error, 'message', None) or error}"[:500]
    if spent:
        return ProviderError(said, "add credit or raise the spend limit at the provider, then run the same command")
    if status in (401, 403) or "API_KEY_INVALID" in str(error):  # Gemini answers 400 to a wrong key
        return KeyMissingError(said, f"check {KEY_NAMES.get(provider, 'ENDPOINT_API_KEY')} in .env")
    if status == 402:
        return ProviderError(said, "add credit at the provider, then run the same command")
    if status == 404:
        return NotFoundError(said, "the model may be retired: choose one from shared/llm/models.toml in the settings")
    if status in RETRIED or status >= 500:
        after_s = _retry_after_s(error)
        overloaded = status == 529 or (status == 503 and after_s is not None)
        return TransientError(said, limited=status == 429 or overloaded, overloaded=overloaded, after_s=after_s)
    return BadRequestError(said)


def _retry_after_s(error: Any) -> float | None:
    """Seconds the provider asks us to wait: ``retry-after-ms``, ``retry-after`` (seconds or date), or RetryInfo."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        if value := headers.get("retry-after-ms"):
            return float(value) / 1000
        if value := headers.get("retry-after"):
            if value.replace(".", "", 1).isdigit():
                return float(value)
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        details = getattr(error, "details", None)
        for row in (details or {}).get("error", {}).get("details", []) if isinstance(details, dict) else []:
            if str(row.get("@type", "")).endswith("RetryInfo"):
                return float(str(row["retryDelay"]).rstrip("s"))
    except (ValueError, TypeError, KeyError):
        return None
    return None
