"""Spans: one a stage, one a batch, one a model call, sent where the environment says; nothing at all otherwise."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT, StandinLog, run_stage

STAGE = ROOT / "stages" / "05_extract_qa"


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP endpoint on loopback; the path, authorization and body of everything it is sent."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((f"{self.path} {self.headers.get('Authorization', '')}", body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()


def extract(data: Path, **environment: str) -> None:
    facts = data / "facts.md"
    facts.write_text("# Pump\n- The pump of hall 7 stops at 41 degrees.\n- It was built in 1987 by Ada Novak.\n")
    flags = ("--in", facts, "--out", data / "05_extract_qa.jsonl", "--config", STAGE / "trial.toml")
    done = run_stage(
        STAGE / "main.py", *flags, "--track", "grounded", OTEL_EXPORTER_OTLP_COMPRESSION="none", **environment
    )
    assert done.returncode in (0, 4), done.stderr


@pytest.mark.parametrize("text", ["", "1"])
def test_stage_batches_and_calls_are_sent_to_any_otlp_endpoint(standin: StandinLog, data: Path, text: str) -> None:
    with collector() as (url, received):
        extract(data, OTEL_EXPORTER_OTLP_ENDPOINT=url, TRACE_TEXT=text)
    sent = b"".join(body for _, body in received)
    assert {path for path, _ in received} == {"/v1/traces "}
    for name in (b"stage", b"batch", b"model call", b"05_extract_qa", b"anthropic/claude-haiku-5-5", b"synthmill"):
        assert name in sent
    assert (b"hall 7" in sent) is bool(text), "prompts are sent only when asked for"


def test_a_logfire_token_sends_them_to_logfire(standin: StandinLog, data: Path) -> None:
    with collector() as (url, received):
        extract(data, LOGFIRE_TOKEN="a-token", LOGFIRE_BASE_URL=url)
    assert received and {path for path, _ in received} == {"/v1/traces a-token"}


def test_nothing_is_imported_when_nobody_asks() -> None:
    code = "import sys, shared.tracing as t\nwith t.span('x', a=1) as s: s.set(b=2)\nt.flush()\n"
    code += "print(any(m.startswith('opentelemetry') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
