"""A loopback server that answers chat completions, messages and generateContent after a chosen latency, and counts.

    python -m benchmarks.stub --latency 0.1            # every answer after 100 ms
    python -m benchmarks.stub --latency heavy          # 95 % 50 ms, 4.5 % 500 ms, 0.5 % 2 s, the same for a question
    python -m benchmarks.stub --latency spread         # 50 to 150 ms, all as likely, the same for a question
    python -m benchmarks.stub --rate 20                # 429 with Retry-After beyond 20 requests in any second

It is written for a low cost of its own (about 40 us of CPU a request): client and server share the machine.
``GET /__stats`` tells what was asked, ``POST /__reset`` forgets it. The first line it prints is its address.

A question that bears ``item-N`` is known by it, however a client wraps it: `distinct` counts the items answered,
`repeated` the answers to items that had been answered before (after ``POST /__mark``: before that). An answer nobody is
there to take counts as `abandoned` and not as answered. `latency_s` is the sum of what the answered ones had to wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import re
import time
from collections import deque
from typing import Any

import orjson

HEAVY = ((0.005, 2.0), (0.05, 0.5), (1.0, 0.05))
"""Cumulative share of questions, and their latency in seconds; the mean is 80 ms."""
_ITEM = re.compile(rb"item-(\d+)")


class Stub:
    """What all connections share.

    Args:
        latency: seconds, ``heavy`` or ``spread``.
        rate: requests a second beyond which 429 is answered; 0 = no cap.
        retry_after: header of a 429: ``ms`` also tells milliseconds, ``s`` whole seconds only.
    """

    def __init__(self, latency: str, rate: float = 0.0, retry_after: str = "s") -> None:
        self.latency, self.rate, self.retry_after = latency, rate, retry_after
        self.recent: deque[float] = deque()
        self.reset()

    def reset(self) -> None:
        self.stats: dict[str, Any] = {"asked": 0, "answered": 0, "refused": 0, "under_way": 0, "most_under_way": 0}
        self.stats |= {"first": 0.0, "last": 0.0, "latency_s": 0.0, "abandoned": 0, "distinct": 0, "repeated": 0}
        self.items: set[bytes] = set()
        self.marked: set[bytes] | None = None

    def delay(self, body: bytes) -> float:
        """Seconds until this question is answered."""
        if self.latency not in ("heavy", "spread"):
            return float(self.latency)
        item = _ITEM.search(body)  # so that whoever asks, an item takes as long
        place = int.from_bytes(hashlib.blake2b(item[0] if item else body, digest_size=6).digest(), "big") / (1 << 48)
        if self.latency == "spread":
            return 0.05 + 0.1 * place
        return next(seconds for share, seconds in HEAVY if place < share)

    def refused_for(self, now: float) -> float:
        """0 when the request may pass, else the seconds until one may."""
        if not self.rate:
            return 0.0
        while self.recent and self.recent[0] <= now - 1:
            self.recent.popleft()
        if len(self.recent) < self.rate:
            self.recent.append(now)
            return 0.0
        return self.recent[0] + 1 - now


class Connection(asyncio.Protocol):
    """One connection; requests on it are answered one after the other."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.buffer, self.last = stub, b"", False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        size = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < size:
            return
        self.buffer, self.last = rest[size:], b"\r\nconnection: close" in lower
        self._asked(head.partition(b" ")[2].partition(b" ")[0].decode(), rest[:size])

    def _asked(self, path: str, body: bytes) -> None:
        stub, now = self.stub, time.monotonic()
        if path.startswith("/__"):
            if path == "/__reset":
                stub.reset()
            elif path == "/__mark":
                stub.marked = set(stub.items)
            return self._write(b"200 OK", orjson.dumps(stub.stats))
        if path.endswith("/models"):  # some look whether their model is there
            return self._write(b"200 OK", orjson.dumps({"object": "list", "data": [{"id": "stub", "object": "model"}]}))
        stats = stub.stats
        stats["asked"] += 1
        stats["first"] = stats["first"] or now
        if wait := stub.refused_for(now):
            stats["refused"] += 1
            again = b"retry-after: %d\r\n" % -int(-wait // 1)
            if stub.retry_after == "ms":
                again += b"retry-after-ms: %d\r\n" % -int(-wait * 1000 // 1)
            refusal = {"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}}
            return self._write(b"429 Too Many Requests", orjson.dumps(refusal), again)
        stats["under_way"] += 1
        stats["most_under_way"] = max(stats["most_under_way"], stats["under_way"])
        delay = stub.delay(body)
        asyncio.get_running_loop().call_later(delay, self._answer, path, body, delay)

    def _answer(self, path: str, body: bytes, delay: float) -> None:
        stats, items = self.stub.stats, self.stub.items
        stats["under_way"] -= 1
        if self.transport.is_closing():
            stats["abandoned"] += 1
            return
        stats["answered"] += 1
        stats["latency_s"] += delay
        stats["last"] = time.monotonic()
        if item := _ITEM.search(body):
            stats["repeated"] += item[1] in (items if self.stub.marked is None else self.stub.marked)
            items.add(item[1])
            stats["distinct"] = len(items)
        limits = b"x-ratelimit-limit-requests: 100000\r\nx-ratelimit-remaining-requests: 99999\r\n"
        if self.stub.rate:
            left = max(0, int(self.stub.rate) - len(self.stub.recent))
            limits = b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n" % (
                self.stub.rate * 60,
                left,
            )
        self._write(b"200 OK", orjson.dumps(_answer(path, body)), limits)

    def _write(self, status: bytes, body: bytes, more: bytes = b"") -> None:
        if not self.transport.is_closing():
            head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
            self.transport.write(head % (status, more, len(body)) + body)
            if self.last:
                self.transport.close()


def _answer(path: str, body: bytes) -> dict[str, Any]:
    text = "This is a stub answer to " + hashlib.blake2b(body, digest_size=6).hexdigest()
    if path.endswith("/messages"):
        usage = {"input_tokens": 10, "output_tokens": 6}
        message = {"id": "m", "type": "message", "role": "assistant", "model": "stub", "stop_reason": "end_turn"}
        return message | {"content": [{"type": "text", "text": text}], "stop_sequence": None, "usage": usage}
    if path.endswith(":generateContent"):
        counts = {"promptTokenCount": 10, "candidatesTokenCount": 6, "totalTokenCount": 16}
        content = {"role": "model", "parts": [{"text": text}]}
        candidates = [{"content": content, "finishReason": "STOP", "index": 0}]
        return {"candidates": candidates, "usageMetadata": counts, "modelVersion": "stub", "responseId": "r"}
    usage = {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    completion = {"id": "c", "object": "chat.completion", "created": 1, "model": "stub"}
    return completion | {"choices": [choice], "usage": usage}


async def serve(stub: Stub, port: int = 0) -> str:
    """Listen on loopback; the address. Serves until the loop ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=1024)
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="port; 0 = any free one")
    parser.add_argument("--latency", default="0.1", help="seconds, `heavy` or `spread`")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0 = no cap")
    parser.add_argument("--retry-after", choices=("s", "ms"), default="s", help="precision of the header of a 429")
    flags = parser.parse_args()

    async def run() -> None:
        print(await serve(Stub(flags.latency, flags.rate, flags.retry_after), flags.port), flush=True)
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


if __name__ == "__main__":
    main()
