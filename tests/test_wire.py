"""The SDKs without their cost: what goes over the wire, and who reads what comes back."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

import shared.llm.wire as wire_module
from shared.errors import SettingsError
from shared.llm import Request, chat
from shared.llm.catalogue import catalogue
from shared.llm.providers import PROVIDERS, BadRequestError, OpenAI, Provider, TransientError
from shared.llm.types import Answer, Usage
from tests.conftest import ROOT

CLAUDE, GPT, GEMINI = "anthropic/claude-haiku-5-5", "openai/gpt-6-luna", "gemini/gemini-3.8-flash"
ENDPOINT = "endpoint/some-model"
ALL = (CLAUDE, GPT, GEMINI, ENDPOINT)


class Points(BaseModel):
    points: list[str]


Response = tuple[int, dict[str, str], bytes]


def answer_to(path: str, text: str = "hello") -> dict[str, Any]:
    """What a provider answers; fields of the published examples."""
    if path.endswith("/messages"):
        usage = {"input_tokens": 12, "output_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2}
        blocks = [{"type": "thinking", "thinking": "well", "signature": "s"}, {"type": "text", "text": text}]
        message = {"id": "m", "type": "message", "role": "assistant", "model": "served", "stop_sequence": None}
        return message | {"content": blocks, "stop_reason": "end_turn", "usage": usage}
    if path.endswith(":generateContent"):
        counts = {"promptTokenCount": 12, "candidatesTokenCount": 5, "thoughtsTokenCount": 3, "totalTokenCount": 20}
        parts = [{"text": "well", "thought": True}, {"text": text[:2]}, {"text": text[2:]}]
        candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "served", "responseId": "r"}
    usage = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
    usage |= {"prompt_tokens_details": {"cached_tokens": 4}}  # type: ignore[dict-item]
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": "stop"}
    completion = {"id": "c", "object": "chat.completion", "created": 1, "model": "served", "usage": usage}
    return completion | {"choices": [choice]}


class Server:
    """A provider that answers as it is told; what it was asked.

    Attributes:
        script: answers of the next requests, in turn; afterwards the usual one.
        seen: path, headers in lower case and body of every request.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.script: list[Callable[[str], Response]] = []
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one write an answer

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                respond = outer.script.pop(0) if outer.script else usual
                status, headers, content = respond(self.path)
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.http.server_port}"

    def connect(self) -> None:
        """Point the SDKs here."""
        os.environ |= {"ANTHROPIC_BASE_URL": self.url, "GOOGLE_GEMINI_BASE_URL": self.url}
        os.environ |= {"OPENAI_BASE_URL": f"{self.url}/v1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        os.environ |= dict.fromkeys(("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY"), "a-key")


def usual(path: str) -> Response:
    return 200, {}, orjson.dumps(answer_to(path))


@contextmanager
def running(server: Server) -> Iterator[Server]:
    threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True).start()
    server.connect()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def server(_own_environment: None) -> Iterator[Server]:
    with running(Server()) as found:
        yield found


def question(model: str, text: str = "hi", **more: Any) -> Request:
    return Request(model=model, messages=chat("Be brief.", text), response=Points, **more)


def send_all(model: str, *requests: Request, again: str = "") -> list[Answer | Exception]:
    """One after the other, through one provider; the answers, or what was raised."""
    return asyncio.run(_send_all(PROVIDERS[model.partition("/")[0]](), requests, again))


async def _send_all(provider: Provider, requests: tuple[Request, ...], again: str) -> list[Answer | Exception]:
    found: list[Answer | Exception] = []
    for request in requests:
        wire = provider.wire(request, catalogue().card(request.model))
        try:
            found.append(await provider.send(wire, request.base_url, again))
        except Exception as error:
            found.append(error)
    await provider.close()
    return found


@pytest.fixture
def by_sdk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every call that goes through an SDK."""
    calls: list[str] = []
    for name in ("anthropic", "openai", "gemini"):
        cls: Any = PROVIDERS[name]
        original = cls._by_sdk

        async def counted(self: Any, *arguments: Any, original: Any = original) -> Any:
            calls.append(self.name)
            return await original(self, *arguments)

        monkeypatch.setattr(cls, "_by_sdk", counted)
    return calls


# ---------------------------------------------------------------- what goes out


@pytest.mark.parametrize("model", ALL)
def test_after_the_first_call_the_sdk_is_left_out_and_nothing_else_differs(
    server: Server, by_sdk: list[str], model: str
) -> None:
    first, second, third = send_all(model, question(model, "say 1"), question(model, "say 1"), question(model, "say 2"))
    assert len(by_sdk) == 1
    assert first == second == third and isinstance(first, Answer) and first.text == "hello"
    (path, headers, body), again, other = server.seen
    assert again == (path, headers, body), "the same question is the same bytes, whoever sends it"
    assert other[0] == path and other[1].keys() == headers.keys()
    assert {name for name in headers if headers[name] != other[1][name]} <= {"content-length"}
    assert other[2] == body.replace(b"say 1", b"say 2")
    assert "a-key" in str(headers) or model == ENDPOINT
    assert "Python" in headers["user-agent"] or "genai" in headers["user-agent"], "the SDK's own"


@pytest.mark.parametrize("model", ALL)
def test_requests_of_another_shape_go_through_the_sdk_first(server: Server, by_sdk: list[str], model: str) -> None:
    plain = Request(model=model, messages=chat("", "hi"))
    requests = [question(model), plain, question(model), plain, question(model, max_tokens=77), question(model, "x")]
    answers = send_all(model, *requests)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert len(by_sdk) == 2, "one with a system prompt and a schema, one without"
    assert b"77" in server.seen[4][2]


@pytest.mark.parametrize("model", ALL)
def test_a_repeated_question_says_so_and_the_next_one_does_not(server: Server, model: str) -> None:
    provider = PROVIDERS[model.partition("/")[0]]()
    wire = provider.wire(question(model), catalogue().card(model))

    async def work() -> None:
        for again in ("1.0", "", "2.1", ""):
            await provider.send(wire, "", again)
        await provider.close()

    asyncio.run(work())
    assert [headers.get("x-synthmill-attempt", "") for _, headers, _ in server.seen] == ["1.0", "", "2.1", ""]


def test_many_that_begin_together_learn_from_one(server: Server, by_sdk: list[str]) -> None:
    provider = PROVIDERS["openai"]()

    async def work() -> list[Answer]:
        wires = [provider.wire(question(GPT, f"{n}"), catalogue().card(GPT)) for n in range(20)]
        found = await asyncio.gather(*(provider.send(wire, "", "") for wire in wires))
        await provider.close()
        return found

    assert len(asyncio.run(work())) == 20
    assert len(server.seen) == 20 and len({body for _, _, body in server.seen}) == 20
    # Until one answer was read alike by both, answers go through the SDK; but only one request does.
    assert 1 <= len(by_sdk) <= 20


@pytest.mark.parametrize("model", ALL)
def test_a_rehearsal_goes_through_all_of_the_sdk_and_asks_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    cls: Any = PROVIDERS[model.partition("/")[0]]
    came: list[Any] = []

    async def run(method: str, rehearse: str) -> None:
        original = getattr(cls, method)

        async def noted(self: Any, *arguments: Any) -> Any:
            came.append(await original(self, *arguments))
            return came[-1]

        monkeypatch.setattr(cls, method, noted)
        provider = cls()
        await getattr(provider, rehearse)()
        await provider.close()

    asyncio.run(run("_by_sdk", "rehearse"))
    assert [answer.text for answer in came] == ["-"] and server.seen == []
    if hasattr(cls, "rehearse_embeddings"):
        asyncio.run(run("_embed_by_sdk", "rehearse_embeddings"))
        assert [vector.tolist() for vector in came[1][0]] == [[1.0]] and server.seen == []


def test_a_rehearsal_that_the_sdk_would_not_end_with_reaches_nobody_either(server: Server) -> None:
    provider: Any = PROVIDERS["openai"]()

    refused: list[TransientError] = []

    async def work() -> None:
        async def twice() -> None:
            for _ in range(2):
                try:
                    await provider._by_sdk({"model": "-", "messages": []}, "", "")
                except TransientError as error:
                    refused.append(error)

        await provider._line.rehearse(twice, b"{}")
        await provider.close()

    asyncio.run(work())
    assert len(refused) == 2 and server.seen == []


def test_what_the_sdk_sends_otherwise_is_left_to_the_sdk(server: Server, by_sdk: list[str]) -> None:
    provider = PROVIDERS["anthropic"]()
    wire = provider.wire(question(CLAUDE), catalogue().card(CLAUDE)) | {"extra_body": {"tier": "fast"}}

    async def work() -> list[Answer]:
        found = [await provider.send(wire, "", "") for _ in range(3)]
        await provider.close()
        return found

    assert [answer.text for answer in asyncio.run(work())] == ["hello"] * 3
    assert len(by_sdk) == 3
    assert all(orjson.loads(body)["tier"] == "fast" for _, _, body in server.seen), "merged, as the SDK does"


def test_what_was_learnt_is_learnt_again_after_a_while(
    server: Server, by_sdk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "LEARN_AGAIN_S", 0.0)
    send_all(GPT, *(question(GPT, f"{n}") for n in range(3)))
    assert len(by_sdk) == 3


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("model", ALL)
def test_both_readings_of_an_answer_agree(server: Server, model: str) -> None:
    expected = {
        CLAUDE: Usage(input=17, output=5, cached=3, written=2),
        GPT: Usage(input=12, output=5, cached=4),
        ENDPOINT: Usage(input=12, output=5, cached=4),
        GEMINI: Usage(input=12, output=8),
    }
    by_the_sdk, by_us = send_all(model, question(model), question(model))
    assert by_the_sdk == by_us and isinstance(by_us, Answer)
    assert (by_us.text, by_us.stop, by_us.served_by, by_us.usage) == ("hello", "stop", "served", expected[model])


def variants(model: str) -> list[dict[str, Any]]:
    """Answers out of the ordinary, every one of them paid for."""
    usual_one = answer_to({CLAUDE: "/messages", GEMINI: ":generateContent"}.get(model, "/chat/completions"))
    if model == CLAUDE:
        return [
            usual_one | {"stop_reason": "max_tokens"},
            usual_one | {"stop_reason": "refusal", "content": []},
            usual_one | {"stop_reason": "model_context_window_exceeded"},
            usual_one | {"stop_reason": None},
            usual_one | {"content": [{"type": "from_the_future", "more": 1}]},
        ]
    if model == GEMINI:
        candidate = usual_one["candidates"][0]
        return [
            usual_one | {"candidates": [candidate | {"finishReason": "MAX_TOKENS"}]},
            usual_one | {"candidates": [candidate | {"finishReason": "FROM_THE_FUTURE"}]},
            usual_one | {"candidates": [{"finishReason": "SAFETY", "index": 0}]},
            {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 1}},
            usual_one | {"candidates": [candidate | {"content": {"role": "model", "parts": [{"functionCall": {}}]}}]},
        ]
    choice = usual_one["choices"][0]
    message = choice["message"]
    return [
        usual_one | {"choices": [choice | {"finish_reason": "length"}]},
        usual_one | {"choices": [choice | {"finish_reason": "content_filter"}]},
        usual_one | {"choices": [choice | {"message": message | {"content": None, "refusal": "no"}}]},
        usual_one | {"choices": [choice | {"message": {"role": "assistant", "content": "hello"}}]},
        usual_one | {"usage": usual_one["usage"] | {"prompt_tokens_details": None}},
    ]


@pytest.mark.filterwarnings("ignore:FROM_THE_FUTURE")
@pytest.mark.parametrize("model", ALL)
def test_an_answer_out_of_the_ordinary_is_read_as_the_sdk_reads_it(server: Server, model: str) -> None:
    def answering(found: dict[str, Any]) -> Callable[[str], Response]:
        return lambda path: (200, {}, orjson.dumps(found))

    every = variants(model)
    server.script = [answering(found) for found in every]
    by_the_sdk = [send_all(model, question(model))[0] for _ in every]  # a new client each: the first call is the SDK's
    server.script = [usual, *(answering(found) for found in every)]
    by_us = send_all(model, *[question(model)] * (len(every) + 1))
    for found, one, other in zip(every, by_the_sdk, by_us[1:], strict=True):
        assert one == other or repr(one) == repr(other), found


@pytest.mark.parametrize("model", ALL)
def test_errors_are_the_sdks_whichever_way_the_call_went(server: Server, model: str) -> None:
    def failing(status: int) -> Callable[[str], Response]:
        body = orjson.dumps({"error": {"message": "slow down", "type": "t", "code": status, "status": "S"}})
        return lambda path: (status, {"retry-after": "7"}, body)

    server.script = [failing(429), usual, failing(429), failing(500), failing(400), usual]
    first, ok, limited, broken, bad, again = send_all(model, *[question(model)] * 6)
    assert isinstance(ok, Answer) and ok == again
    assert isinstance(first, TransientError) and isinstance(limited, TransientError)
    assert str(first) == str(limited) and (limited.limited, limited.overloaded, limited.after_s) == (True, False, 7.0)
    assert type(first.__cause__) is type(limited.__cause__)
    assert type(limited.__cause__).__module__.split(".")[0] in ("anthropic", "openai", "google")
    assert isinstance(broken, TransientError) and not broken.limited
    assert isinstance(bad, BadRequestError) and "slow down" in str(bad)
    assert len(server.seen) == 6, "and the SDK asked nothing by itself"


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("body", [b'{"choices": [', b"{}", b"", b"[1, 2]", b"<html>", b'{"choices": [{}]}'])
def test_a_200_that_is_no_answer_may_be_tried_again(server: Server, model: str, body: bytes) -> None:
    server.script = [usual, lambda path: (200, {}, body)]
    ok, odd = send_all(model, question(model), question(model))
    assert isinstance(ok, Answer) and isinstance(odd, TransientError), odd


@pytest.mark.parametrize("model", [GPT, GEMINI])
def test_compressed_answers_are_read(server: Server, model: str) -> None:
    def packed(path: str) -> Response:
        return 200, {"content-encoding": "gzip"}, gzip.compress(orjson.dumps(answer_to(path)))

    server.script = [packed, packed, usual]
    one, two, three = send_all(model, *[question(model)] * 3)
    assert one == two == three and isinstance(one, Answer)


def test_a_redirect_is_followed_by_the_sdk(server: Server) -> None:
    def moved(path: str) -> Response:
        return 307, {"location": f"{server.url}/elsewhere{path}"}, b""

    server.script = [usual, moved, usual]
    answers = send_all(GPT, question(GPT), question(GPT))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert server.seen[2][0].startswith("/elsewhere/") and server.seen[2][2] == server.seen[1][2]


@pytest.mark.parametrize("model", ALL)
def test_nobody_there_is_the_sdks_own_error(server: Server, model: str) -> None:
    server.connect()
    provider = PROVIDERS[model.partition("/")[0]]()
    wire = provider.wire(question(model), catalogue().card(model))

    async def work() -> list[Answer | Exception]:
        found: list[Answer | Exception] = [await provider.send(wire, "", "")]
        server.http.shutdown()
        server.http.server_close()
        try:
            for _ in range(2):  # the first may find its connection still open
                found.append(await provider.send(wire, "", ""))
        except Exception as error:
            found.append(error)
        await provider.close()
        return found

    error = asyncio.run(work())[-1]
    if isinstance(error, TransientError):  # a thread of the server may have answered on the open connection
        assert type(error.__cause__).__name__ in ("APIConnectionError", "ConnectError", "ReadError")
    else:
        assert isinstance(error, Answer)


def test_a_reading_that_differs_from_the_sdks_is_not_used(
    server: Server, by_sdk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenAI, "_answer", lambda self, found: Answer(text="something else", stop="stop"))
    answers = send_all(GPT, *[question(GPT)] * 3)
    assert [answer.text for answer in answers if isinstance(answer, Answer)] == ["hello"] * 3
    assert len(by_sdk) == 3


def test_vectors_are_the_same_from_both(server: Server) -> None:
    def vectors(path: str) -> Response:
        rows = [{"object": "embedding", "index": n, "embedding": "AAAAPwAAAD8="} for n in (1, 0)]
        usage = {"prompt_tokens": 6, "total_tokens": 6}
        return 200, {}, orjson.dumps({"object": "list", "data": rows, "model": "e", "usage": usage})

    provider = OpenAI()
    wire = {"model": "text-embedding-3-small", "input": ["a", "b"], "dimensions": 2}

    async def work() -> list[Any]:
        found = [await provider.embed(wire) for _ in range(3)]
        await provider.close()
        return found

    server.script = [vectors] * 3
    one, two, three = asyncio.run(work())
    assert one == two == three
    assert [list(vector) for vector in one[0]] == [[0.5, 0.5], [0.5, 0.5]] and one[1] == Usage(input=6)
    assert [orjson.loads(body)["encoding_format"] for _, _, body in server.seen] == ["base64"] * 3


def test_whoever_uses_the_sdk_itself_has_its_time_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.llm.providers.TIMEOUT_S", 0.2)

    def slow(path: str) -> Response:
        time.sleep(0.6)
        return usual(path)

    async def work() -> str:
        provider = OpenAI()
        messages: Any = [{"role": "user", "content": "hi"}]
        found = await provider.client().chat.completions.create(model="m", messages=messages, timeout=5.0)
        await provider.close()
        return str(found.choices[0].message.content)

    server.script = [slow, slow]
    assert asyncio.run(work()) == "hello"
    (late,) = send_all(GPT, question(GPT))
    assert isinstance(late, TransientError), "a question has ours"


# ---------------------------------------------------------------- the way there


def test_proxies_are_used_and_the_exceptions_from_them(server: Server) -> None:
    os.environ.pop("NO_PROXY")
    os.environ.pop("no_proxy")
    os.environ |= {
        "OPENAI_BASE_URL": "http://api.example.invalid/v1",
        "HTTP_PROXY": server.url,
        "http_proxy": server.url,
    }
    answers = send_all(GPT, question(GPT), question(GPT))
    assert all(isinstance(answer, Answer) for answer in answers), answers
    assert {path for path, _, _ in server.seen} == {"http://api.example.invalid/v1/chat/completions"}
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "example.invalid"
    (refused,) = send_all(GPT, question(GPT))
    assert isinstance(refused, Exception) and len(server.seen) == 2, "not through the proxy"


def test_a_proxy_we_cannot_speak_to_is_a_setting_to_mend(server: Server) -> None:
    os.environ.pop("NO_PROXY")
    os.environ.pop("no_proxy")
    os.environ |= {"OPENAI_BASE_URL": "http://api.example.invalid/v1", "http_proxy": "socks5://127.0.0.1:1"}
    os.environ.pop("HTTP_PROXY", None)
    (error,) = send_all(GPT, question(GPT))
    assert isinstance(error, SettingsError) and "socks5" in str(error)


def certificate(place: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody vouches for, and its key."""
    x509 = pytest.importorskip("cryptography.x509", reason="NOT TESTED: makes the certificate of the test's server")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        builder.add_extension(names, False)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = place / "certificate.pem", place / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    secret.write_bytes(key.private_bytes(*form))
    return pem, secret


def test_certificates_are_trusted_as_the_environment_says(tmp_path: Path, _own_environment: None) -> None:
    pem, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem, key)
    wire_module._trust.cache_clear()
    try:
        with running(Server(tls)) as server:
            (refused,) = send_all(GPT, question(GPT))
            assert isinstance(refused, TransientError) and refused.__cause__ is not None
            assert "certificate" in str(refused.__cause__.__cause__).lower()
            assert server.seen == []
            wire_module._trust.cache_clear()
            os.environ["SSL_CERT_FILE"] = str(pem)
            answers = send_all(GPT, question(GPT), question(GPT))
            assert all(isinstance(answer, Answer) for answer in answers), answers
    finally:
        wire_module._trust.cache_clear()


# ---------------------------------------------------------------- what it is measured with


@pytest.mark.slow
def test_the_benchmarks_run_and_count_at_the_server(tmp_path: Path, _own_environment: None) -> None:
    flags = ["--calls", "60", "--concurrency", "10", "--latency", "0.01", "--repeats", "1"]
    command = [sys.executable, "-m", "benchmarks.client", *flags, "--json", str(tmp_path / "out" / "client.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = orjson.loads((tmp_path / "out" / "client.json").read_bytes())
    assert found["medians"]["ours"]["seconds"] >= found["ideal_s"] == pytest.approx(0.06)
    assert "bare" in done.stdout and "ours" in done.stdout
    flags = ["--calls", "30", "--concurrency", "10", "--repeats", "1", "--processes", "2"]
    command = [sys.executable, "-m", "benchmarks.rate", *flags, "--json", str(tmp_path / "rate.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    medians = orjson.loads((tmp_path / "rate.json").read_bytes())["medians"]
    assert (medians["answered"], medians["lost"]) == (30, 0) and medians["wasted"] <= 8
