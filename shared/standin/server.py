"""The HTTP server: reads a request, finds its protocol, adds faults and latency, writes and logs the answer."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from urllib.parse import unquote

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse
from aiohttp.web_server import Server

from shared.standin import anthropic_api, gemini_api, hub, openai_api, tinker_api
from shared.standin.batches import Batches
from shared.standin.engine import BAD_SHARE
from shared.standin.faults import BATCH, CONTENT, TINKER, Faults, RateCap
from shared.standin.log import Log
from shared.standin.wire import RefusedError, Reply, Request

_PIECEMEAL = ("slow_loris", "half_closed")
USUAL_LIMIT = 4000
"""Requests a minute in the rate-limit headers when no cap is set."""


@dataclass
class Settings:
    """How the stand-in behaves.

    Attributes:
        faults: what goes wrong, and how often.
        rate: requests per second and service, beyond which it answers 429; 0 = no cap.
        latency_s: seconds added to each answer of a model.
        bad_share: share of texts, 0 to 1, that are compressed badly.
        log: file of the request log; ``""`` = none.
        state: directory of what outlives the process (Tinker's checkpoints, batches); ``""`` = a temporary one.
    """

    faults: Faults = field(default_factory=Faults)
    rate: float = 0.0
    latency_s: float = 0.0
    bad_share: float = BAD_SHARE
    log: str = ""
    state: str = ""


async def serve(settings: Settings, host: str = "127.0.0.1", port: int = 0) -> str:
    """Listen; returns ``http://HOST:PORT``. Serves until the loop ends."""
    server = Server(Cloud(settings).handle, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, host, port, backlog=1024)
    return f"http://{host}:{listening.sockets[0].getsockname()[1]}"


class ResetError(Exception):
    """The connection is to be cut without an answer."""


class Cloud:
    """All services of the stand-in, with what they count between requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = Log(settings.log)
        self.caps = {api: RateCap(settings.rate) for api in (anthropic_api, openai_api, gemini_api, tinker_api)}
        self.tinker = tinker_api.Tinker(settings.state, settings.faults, settings.latency_s)
        self.batches = Batches(settings.state, settings.faults, self.log, self._answer_in_batch)

    async def handle(self, incoming: BaseRequest) -> StreamResponse:
        """One request, from reading to logging."""
        request = Request(
            incoming.method,
            incoming.raw_path.partition("?")[0],
            incoming.query if "?" in incoming.raw_path else {},
            incoming.headers,
            await incoming.content.read() if incoming.body_exists else b"",
        )
        api = protocol(request)
        try:
            if request.path.startswith(tinker_api.PREFIX):
                reply = await self._tinker_reply(request)
            else:
                reply = await self._model_reply(request, api) if api is not None else hub.handle(request)
        except ResetError as error:
            self.log.write(request, Reply(0, b"", fault=str(error)), written=False)
            if incoming.transport is not None:
                incoming.transport.abort()
            return Response()  # goes nowhere
        return await self._send(incoming, request, reply)

    async def _send(self, incoming: BaseRequest, request: Request, reply: Reply) -> StreamResponse:
        body = reply.bytes()
        headers = reply.headers
        headers.setdefault("Content-Type", "application/json")
        if request.method == "HEAD":  # a body here would be read as the next answer
            headers.setdefault("Content-Length", "0" if reply.status >= 400 else str(len(body)))
            body = b""
        response: StreamResponse = Response(status=reply.status, body=body or None, headers=headers)
        written = False
        if reply.fault in ("cut", *_PIECEMEAL):  # a download that ends half-way; an answer in pieces
            headers.setdefault("Content-Length", str(len(body)))
            response = StreamResponse(status=reply.status, headers=headers)
        try:
            await response.prepare(incoming)
            if reply.fault == "cut" and incoming.transport is not None:
                await response.write(body[: len(body) // 2])
                incoming.transport.close()
                return response
            if reply.fault in _PIECEMEAL and incoming.transport is not None:
                await self._in_pieces(response, incoming.transport, body, reply.fault)
                return response
            await response.write_eof()
            written = incoming.transport is not None and not incoming.transport.is_closing()
        except ConnectionError:  # the client has gone; the log says so
            pass
        finally:
            self.log.write(request, reply, written=written)
        return response

    async def _in_pieces(self, response: StreamResponse, transport: asyncio.Transport, body: bytes, fault: str) -> None:
        if fault == "half_closed":
            await response.write(body[: len(body) // 2])
            transport.write_eof()
        until = time.monotonic() + self.settings.faults.timeout_s
        for place in range(len(body) - 1):  # never the last byte
            if transport.is_closing() or time.monotonic() > until:
                break
            if fault == "slow_loris":
                await response.write(body[place : place + 1])
            await asyncio.sleep(0.1)
        transport.abort()

    # ------------------------------------------------------------ models

    async def _model_reply(self, request: Request, api: ModuleType) -> Reply:
        settings, fault = self.settings, ""
        if request.method == "POST":
            if wait := self.caps[api].wait_s(time.monotonic()):
                return self._limited(request, api, wait, "rate")
            asked = request.body + request.attempt.encode()
            wish, content = request.headers.get("x-standin-fault", ""), BATCH if _creates_batch(request) else CONTENT
            found = settings.faults.decide(request.path, asked, wish, content)
            if found.transport and found.transport not in _PIECEMEAL:
                return await self._failed(request, api, found.transport)
            fault = found.content
            if settings.latency_s:
                await asyncio.sleep(settings.latency_s)
        reply = _answered(request, api, lambda: self._handled(request, api, fault), fault)
        if request.method == "POST" and found.transport:
            reply.fault = found.transport
        reply.headers |= self._headers(request, api)
        return reply

    def _handled(self, request: Request, api: ModuleType, fault: str) -> Reply:
        about_batches: Reply | None = api.batches(request, self.batches, fault)
        if about_batches is not None:
            return about_batches
        reply: Reply = api.handle(request, fault, self.settings.bad_share)
        return reply

    def _answer_in_batch(self, request: Request, fault: str) -> Reply:
        api = protocol(request)
        assert api is not None, request.path
        return _answered(request, api, lambda: api.handle(request, fault, self.settings.bad_share), fault)

    async def _tinker_reply(self, request: Request) -> Reply:
        settings, api = self.settings, tinker_api
        if api.counts(request) and (wait := self.caps[api].wait_s(time.monotonic())):
            return self._limited(request, api, wait, "rate")
        path, asked = api.asked(request)
        found = settings.faults.decide(path, asked, request.headers.get("x-standin-fault", ""), TINKER)
        if found.transport:
            return await self._failed(request, api, found.transport)
        try:
            return await self.tinker.handle(request, found.content)
        except RefusedError as error:
            return api.error(request, error.status, error.message)
        except Exception as error:
            # Protobuf has errors of its own for a body that is none; the real service answers 422.
            traceback.print_exc()
            return api.error(request, 422, f"malformed request: {type(error).__name__} {error}")

    async def _failed(self, request: Request, api: ModuleType, fault: str) -> Reply:
        """What a transport fault looks like from outside."""
        if fault in ("reset", *_PIECEMEAL):
            raise ResetError(fault)
        if fault == "timeout":
            await asyncio.sleep(self.settings.faults.timeout_s)
            raise ResetError(fault)
        if fault in ("429", "529"):
            return self._limited(request, api, self.settings.faults.retry_after_s, fault, int(fault))
        if fault == "quota":
            reply: Reply = api.error(request, 429, "you exceeded your current quota", "quota")
        else:
            reply = api.error(request, int(fault), f"the stand-in was asked for {fault}")
        reply.fault = fault
        reply.headers |= self._headers(request, api)
        return reply

    def _limited(self, request: Request, api: ModuleType, wait_s: float, fault: str, status: int = 429) -> Reply:
        message = "too many requests, slow down" if status == 429 else "overloaded, try again later"
        reply: Reply = api.error(request, status, message)
        reply.fault = fault
        reply.headers |= self._headers(request, api) | {
            "retry-after": str(max(0, -int(-wait_s // 1))),  # whole seconds, rounded up
            "retry-after-ms": str(-int(-wait_s * 1000 // 1)),
        }
        if api is gemini_api:
            gemini_api.retry_info(reply, wait_s)
        return reply

    def _headers(self, request: Request, api: ModuleType) -> dict[str, str]:
        cap = self.caps[api]
        limit = int(cap.per_second * 60) or USUAL_LIMIT
        remaining = max(0, int(cap.per_second) - cap.used) if cap.per_second else limit - 1
        found: dict[str, str] = api.headers(request, limit, remaining, _reset(int(time.time()) + 1))
        return found


def _creates_batch(request: Request) -> bool:
    return unquote(request.path).rstrip("/").endswith(("/batches", ":batchGenerateContent"))


def _answered(request: Request, api: ModuleType, handle: Callable[[], Reply], fault: str) -> Reply:
    """The protocol's answer, or its error in its own shape."""
    try:
        reply = handle()
        reply.fault = fault or None
    except RefusedError as error:
        reply = api.error(request, error.status, error.message, error.kind, error.param)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A body of the right outline whose parts have the wrong types: the real services answer 400.
        traceback.print_exc()
        reply = api.error(request, 400, f"malformed request: {type(error).__name__} {error}")
    return reply


def protocol(request: Request) -> ModuleType | None:
    """The API whose request this is; None for the Hub's.

    Anthropic, OpenAI and Gemini share ``/v1/models``: their SDKs tell themselves apart by their headers.
    """
    path = request.path
    if not path.startswith(("/v1/", "/v1beta/", "/v1alpha/", "/upload/")):
        return None
    if "anthropic-version" in request.headers or path.startswith("/v1/messages"):
        return anthropic_api
    if "x-goog-api-key" in request.headers or not path.startswith("/v1/") or ":" in unquote(path):
        return gemini_api
    return openai_api


@lru_cache(maxsize=4)
def _reset(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
