"""The vendors' SDKs without their cost: learnt from the SDK, sent with aiohttp, checked against the SDK.

An SDK call costs 1.1 to 1.8 ms of CPU, aiohttp alone 0.16 ms (openai 3.52, anthropic 2.11, google-genai 3.4). So the
SDK does the first call of every *shape* of request (one client, one model, one set of fields) from end to end, and
again every :data:`LEARN_AGAIN_S`; all others are sent as that one was.

What is the SDK's:

- the client: keys, base URL, authentication, user agent and every other header, the path, and how a request's fields
  are named and nested on the wire. :class:`_Transport` sees what it was about to send and remembers it;
- every answer that is not a plain 200 we can read: errors, redirects, cut or unreadable answers, broken connections.
  They are handed to the SDK as if it had received them itself, so the exceptions are its own;
- the answers of the first call of a shape, read into the SDK's types. Only when our reading of the same bytes gives the
  same is the shape read by us from then on.

What is ours: the connections (one aiohttp session, under the SDK too), writing the body as JSON, putting the texts of
one request in the place of another's, and reading text, stop reason and usage out of a plain 200. A body that is not,
field by field, what the SDK would send is never sent by us: such a shape stays the SDK's. What the SDK's own middleware
or telemetry hooks would do with later calls does not happen; nothing here sets any.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import orjson

from shared.errors import SettingsError

if TYPE_CHECKING:
    import aiohttp
    import httpx2
    from yarl import URL

R = TypeVar("R")

CONNECTIONS = 256
LEARN_AGAIN_S = 600.0
"""A header that ages (a token, a version) is at most this old."""
ATTEMPT = "x-synthmill-attempt"
_NOT_LEARNT = {"host", "content-length", "connection", "transfer-encoding", ATTEMPT}
_UNPACKED = {"content-encoding", "content-length", "transfer-encoding", "connection"}


@dataclass(frozen=True)
class Answered:
    """One HTTP answer, its body unpacked."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Hear = Callable[[Answered], None]


@dataclass
class Question(Generic[R]):
    """One request in the two ways it can be sent.

    Attributes:
        key: what makes it one of a shape: requests with the same key differ in nothing but what ``body`` puts in.
        body: the JSON to send, from the JSON the SDK sends for a request of this shape; must not change its argument.
        read: the result, from the JSON of a plain 200; None for whatever is not as usual.
        sdk: the whole call through the SDK.
        again: value of the header that tells a repeated question from the first; ``""`` = none.
        hear: told of every answer that comes over the wire.
    """

    key: Hashable
    body: Callable[[dict[str, Any]], dict[str, Any]]
    read: Callable[[Any], R | None]
    sdk: Callable[[], Awaitable[R]]
    again: str = ""
    hear: Hear | None = None


class Shape:
    """What the SDK was seen to send for a kind of request."""

    def __init__(self) -> None:
        self.url: URL | None = None
        self.headers: Mapping[str, str] = {}
        self.sent: dict[str, Any] = {}
        self.until = 0.0  # learn anew then
        self.seen = asyncio.Event()  # the SDK has sent, or failed to
        self.ours = True  # we would send the same body, and read the same
        self.trusted = False  # and have read the same


@dataclass
class _Call(Generic[R]):
    """The SDK call under way in this task."""

    question: Question[R]
    shape: Shape
    given: Answered | Exception | None = None  # came over the wire already, or in its place; the SDK is to judge it
    got: Answered | None = None
    rehearsed: bool = False  # nothing may be sent


_CALL: ContextVar[_Call[Any] | None] = ContextVar("call", default=None)


class Line:
    """The connections of one provider, on one event loop.

    Args:
        timeout_s: gives the seconds a call may take, from connecting to the last byte.
    """

    def __init__(self, timeout_s: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._shapes: dict[Hashable, Shape] = {}
        self._proxies: dict[str, str | None] = {}

    async def ask(self, question: Question[R]) -> R:
        """Send a question the short way when its shape is known, and else through the SDK.

        Raises:
            whatever the SDK raises.
        """
        shape = self._shapes.setdefault(question.key, Shape())
        now = asyncio.get_running_loop().time()
        learn = now >= shape.until
        if learn:
            shape.until = now + LEARN_AGAIN_S
        else:
            await shape.seen.wait()
        given: Answered | Exception | None = None
        if not learn and shape.ours and shape.url is not None:
            body = orjson.dumps(question.body(shape.sent))
            headers = {**shape.headers, ATTEMPT: question.again} if question.again else shape.headers
            try:
                given = await self.request("POST", shape.url, headers, body)
            except _broken() as error:
                given = error
            else:
                if question.hear is not None:
                    question.hear(given)
                if shape.trusted and (result := _read(question, given)) is not None:
                    return result
        return await self._through_the_sdk(_Call(question, shape, given))

    async def rehearse(self, sdk: Callable[[], Awaitable[Any]], answer: bytes) -> None:
        """Let the SDK make a call that goes to nobody and is answered with ``answer``, a JSON body.

        It imports, and builds its types, when it is first used: a tenth of a second in which no answer is read.
        """
        given = Answered(200, {"content-type": "application/json"}, answer)
        nothing: Question[Any] = Question(None, dict, dict, sdk)
        token = _CALL.set(_Call(nothing, Shape(), given, rehearsed=True))
        try:
            with contextlib.suppress(Exception):  # what is wrong, the first question will say
                await sdk()
        finally:
            _CALL.reset(token)

    async def _through_the_sdk(self, call: _Call[R]) -> R:
        token = _CALL.set(call)
        try:
            result = await call.question.sdk()
        finally:
            _CALL.reset(token)
            call.shape.seen.set()
        if call.got is not None and (ours := _read(call.question, call.got)) is not None:
            call.shape.trusted = call.shape.ours = call.shape.ours and bool(ours == result)
        return result

    async def request(
        self, method: str, url: URL, headers: Mapping[str, str], body: bytes, timeout_s: float = 0.0
    ) -> Answered:
        """One HTTP request, not redirected; ``timeout_s``: of this one, when it is not 0.

        Raises:
            aiohttp.ClientError, TimeoutError, OSError: no whole answer.
        """
        import aiohttp

        session = self._session or self._open()
        seconds = timeout_s or self._timeout_s()
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(30.0, seconds))
        async with session.request(
            method,
            url,
            headers=headers,
            data=body or None,
            timeout=timeout,
            allow_redirects=False,
            proxy=self._proxy(url),
            ssl=_trust() if url.scheme == "https" else True,
        ) as answer:
            return Answered(answer.status, answer.headers, await answer.read())

    def transport(self) -> httpx2.AsyncBaseTransport:
        """What the SDK's own HTTP client is to send through."""
        return _transport(self)

    async def sent_by_sdk(self, request: httpx2.Request) -> Answered:
        """The answer to a request the SDK made: over the wire, or the one that has come already.

        Raises:
            httpx2.TransportError: there is none, in the words of the SDK's own HTTP client.
        """
        call = _CALL.get()
        try:
            if call is None:  # whoever uses the SDK itself, to list models or to upload a file, gives it its time-out
                asked = (request.extensions.get("timeout") or {}).get("read")
                return await self._over_the_wire(request, request.content, asked or 0.0)
            given, call.given = call.given, None
            if isinstance(given, Exception):
                raise given
            if given is None and call.rehearsed:
                raise ConnectionError("a rehearsal has one answer")
            if given is None:
                given = await self._over_the_wire(request, self._learn(call, request))
                if call.question.hear is not None:
                    call.question.hear(given)
            call.got = given
            return given
        except _broken() as error:
            raise _in_the_words_of_httpx(error) from error

    async def _over_the_wire(self, request: httpx2.Request, body: bytes, timeout_s: float = 0.0) -> Answered:
        headers = {k: v for k, v in request.headers.items() if k not in _NOT_LEARNT or k == ATTEMPT}
        return await self.request(request.method, _url(request), headers, body, timeout_s)

    def _learn(self, call: _Call[Any], request: httpx2.Request) -> bytes:
        """Remember what the SDK sends; the bytes to send for it.

        They are ours as soon as they say the same: a question then has the same bytes, whichever way it is sent.
        """
        shape = call.shape
        ours: dict[str, Any] | None = None
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            sent = orjson.loads(request.content)
            ours = call.question.body(sent)
            if ours == sent and request.method == "POST":
                from multidict import CIMultiDict, CIMultiDictProxy

                kept = CIMultiDict((k, v) for k, v in request.headers.multi_items() if k.lower() not in _NOT_LEARNT)
                shape.url, shape.headers, shape.sent = _url(request), CIMultiDictProxy(kept), sent
                shape.seen.set()
                _keep_what_is_loaded()
                return orjson.dumps(ours)
        shape.ours = False
        return request.content

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        # trust_env stays off: it would look for a netrc file at every call. Proxies are found by :meth:`_proxy`.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ttl_dns_cache=300),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=2**18,
        )
        return self._session

    def _proxy(self, url: URL) -> str | None:
        """The proxy the environment (on macOS, the system) names for a URL, found once a host.

        Raises:
            SettingsError: it is no HTTP proxy.
        """
        host = url.raw_authority
        if host not in self._proxies:
            import urllib.request

            known = urllib.request.getproxies()
            proxy = known.get(url.scheme) or known.get("all")
            if proxy and urllib.request.proxy_bypass(host):
                proxy = None
            if proxy and "://" not in proxy:
                proxy = f"http://{proxy}"
            if proxy and not proxy.startswith(("http://", "https://")):
                raise SettingsError(f"the proxy {proxy} for {host} is no HTTP proxy", "set HTTPS_PROXY to an HTTP one")
            self._proxies[host] = proxy
        return self._proxies[host]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def _read(question: Question[R], answer: Answered | Exception) -> R | None:
    """Our reading of a plain 200; None for everything else."""
    if not isinstance(answer, Answered) or answer.status != 200:
        return None
    try:
        return question.read(orjson.loads(answer.body))
    except (LookupError, TypeError, ValueError, AttributeError):  # JSON and pydantic errors are ValueErrors
        return None


def _broken() -> tuple[type[Exception], ...]:
    import aiohttp

    return aiohttp.ClientError, TimeoutError, OSError


def _url(request: httpx2.Request) -> URL:
    from yarl import URL

    return URL(str(request.url), encoded=True)


@functools.cache
def _keep_what_is_loaded() -> None:
    """Take the SDKs' hundred thousand objects out of the garbage collector's rounds: 30 ms each, while calls wait."""
    gc.freeze()


@functools.cache
def _trust() -> Any:
    """Whom we believe: ``SSL_CERT_FILE``, ``SSL_CERT_DIR`` or the system, as the SDKs' HTTP client does; read once."""
    import httpx2

    return httpx2.create_ssl_context()


def _in_the_words_of_httpx(error: Exception) -> httpx2.TransportError:
    import aiohttp
    import httpx2

    said = f"{type(error).__name__} {error}".strip()
    if isinstance(error, TimeoutError):
        return httpx2.ReadTimeout(said)
    if isinstance(error, aiohttp.ClientConnectorError):
        return httpx2.ConnectError(said)
    return httpx2.ReadError(said)


def _transport(line: Line) -> httpx2.AsyncBaseTransport:
    import httpx2

    class Transport(httpx2.AsyncBaseTransport):
        """Under the SDK's HTTP client: our connections."""

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            await request.aread()
            answer = await line.sent_by_sdk(request)
            headers = [(k, v) for k, v in answer.headers.items() if k.lower() not in _UNPACKED]
            return httpx2.Response(answer.status, headers=headers, content=answer.body)

    return Transport()
