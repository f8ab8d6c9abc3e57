"""The four ways to reach a model. Each turns a :class:`Request` into its wire body (pure, no SDK), sends it through the
vendor's SDK (imported on first use, its own retries off), and turns answers and errors into ours.

Verified by running anthropic 2.11.0, openai 3.52.0 and google-genai 3.4.0; what they do differently from memory:
no sampling parameters on Claude, thinking on by default and first in the content, `parse()` helpers that lose the
usage of a bad answer, google-genai without retries or time-outs that continues a cut answer by itself.
"""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from shared.errors import KeyMissingError, ProviderError, SettingsError
from shared.llm.catalogue import ModelCard
from shared.llm.types import Answer, Request, Stop, Usage, strict_schema
from shared.records import Message

TIMEOUT_S = 180.0
"""For one call. Our longest answers (3,000 tokens) take well under a minute; a hung socket is retried after this."""
CONNECTIONS = 256

Wire = dict[str, Any]


class TransientError(Exception):
    """Worth another try. ``limited``: the provider says we are too fast. ``after_s``: when it says to come back."""

    def __init__(self, what: str, *, limited: bool = False, after_s: float | None = None) -> None:
        super().__init__(what)
        self.limited, self.after_s = limited, after_s


class BadRequestError(Exception):
    """This request will never be answered; others may."""


class Provider(Protocol):
    """What a provider offers the rest of the package."""

    name: str
    key_names: tuple[str, ...]

    def wire(self, request: Request, card: ModelCard) -> Wire: ...
    async def send(self, wire: Wire, base_url: str, again: str) -> Answer: ...
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
    return {"x-synthmill-attempt": again} if again else {}


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
            import httpx2

            limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
            self._client = anthropic.AsyncAnthropic(
                max_retries=0, timeout=TIMEOUT_S, http_client=anthropic.DefaultAsyncHttpxClient(limits=limits)
            )
        return self._client

    async def send(self, wire: Wire, base_url: str, again: str) -> Answer:
        client = self.client()
        import anthropic

        try:
            message = await client.messages.create(**wire, extra_headers=_headers(again))
        except anthropic.APIConnectionError as error:
            raise TransientError(f"anthropic: {error}") from error
        except anthropic.APIStatusError as error:
            raise _status_error("anthropic", error, error.status_code, spent=_anthropic_limit(error)) from error
        except json.JSONDecodeError as error:
            raise TransientError(f"anthropic answered 200 with broken JSON: {error}") from error
        if message.usage is None or message.content is None:
            raise TransientError("anthropic answered 200 without content or usage")
        usage = message.usage
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


def _anthropic_limit(error: Any) -> bool:
    """A 429 that is a spend limit of the account: waiting does not help."""
    return "SpendLimit" in type(error).__name__


# ---------------------------------------------------------------- OpenAI, and servers that speak its protocol


class OpenAI:
    """GPT through chat completions."""

    name: str = "openai"
    key_names: tuple[str, ...] = ("OPENAI_API_KEY",)

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

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
            import httpx2
            import openai

            limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
            self._clients[base_url] = openai.AsyncOpenAI(
                max_retries=0,
                timeout=TIMEOUT_S,
                http_client=openai.DefaultAsyncHttpxClient(limits=limits),
                base_url=base_url or None,
                api_key=self._key(),
            )
        return self._clients[base_url]

    def _key(self) -> str | None:
        return None

    async def send(self, wire: Wire, base_url: str, again: str) -> Answer:
        create = self.client(base_url).chat.completions.create
        completion = await self._call(create, wire | {"extra_headers": _headers(again)})
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

    async def embed(self, wire: Wire) -> tuple[list[list[float]], Usage]:
        """Vectors in the order of ``wire["input"]``, and what they cost."""
        result = await self._call(self.client().embeddings.create, wire)
        vectors = [row.embedding for row in sorted(result.data, key=lambda row: row.index)]
        if len(vectors) != len(wire["input"]):
            raise TransientError(f"{self.name} answered {len(vectors)} vectors for {len(wire['input'])} texts")
        if wrong := {len(vector) for vector in vectors} - {wire["dimensions"]}:
            raise SettingsError(
                f"asked {wire['model']} for {wire['dimensions']} dimensions, got {sorted(wrong)}",
                "set `dimensions` to what the model gives",
            )
        return vectors, Usage(input=result.usage.prompt_tokens)

    async def _call(self, method: Any, wire: Wire) -> Any:
        import openai

        try:
            return await method(**wire)
        except openai.APIConnectionError as error:
            raise TransientError(f"{self.name}: {error}") from error
        except openai.APIStatusError as error:
            quota = error.code == "insufficient_quota"
            raise _status_error(self.name, error, error.status_code, spent=quota) from error
        except (json.JSONDecodeError, ValueError) as error:
            raise TransientError(f"{self.name} answered 200 with something unreadable: {error}") from error

    async def models(self) -> set[str]:
        return {model.id async for model in self.client().models.list()}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


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

            # An injected httpx2 client keeps google-genai from switching to aiohttp when that is importable.
            limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
            self._http = httpx2.AsyncClient(limits=limits)
            options = types.HttpOptions(timeout=int(TIMEOUT_S * 1000), httpx_async_client=self._http)
            self._client = genai.Client(http_options=options)
        return self._client

    async def send(self, wire: Wire, base_url: str, again: str) -> Answer:
        client = self.client()
        import httpx2
        from google.genai import errors, types

        try:
            options = types.HttpOptions(headers=_headers(again)) if again else None
            config = types.GenerateContentConfig(**wire["config"], http_options=options)
            reply = await client.aio.models.generate_content(
                model=wire["model"], contents=wire["contents"], config=config
            )
        except httpx2.TransportError as error:
            raise TransientError(f"gemini: {type(error).__name__} {error}") from error
        except errors.APIError as error:
            raise _status_error("gemini", error, error.code, spent=False) from error
        except json.JSONDecodeError as error:
            raise TransientError(f"gemini answered 200 with broken JSON: {error}") from error
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
        return ProviderError(said, "the model may be retired: choose one from shared/llm/models.toml in the settings")
    if status in RETRIED or status >= 500:
        return TransientError(said, limited=status in (429, 529), after_s=_retry_after_s(error))
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
