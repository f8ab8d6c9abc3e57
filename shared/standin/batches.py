"""Batches of requests, whatever their API: kept in files that outlive the process, answered while somebody looks.

::

    <state>/batches/<id>/batch.json       what was asked for; written last: without it there is no batch
    <state>/batches/<id>/requests.jsonl   {"custom_id", "path", "body"}
    <state>/batches/<id>/results.jsonl    {"custom_id", "kind", "status", "body"}, appended one by one, in that order
    <state>/batches/<id>/cancelled        empty; no further request is answered
    <state>/uploads/<id>                  files of requests, as uploaded

A request of a batch is answered by the code that answers it alone, so both get the same answer. Which repetition of an
equal question it is, a request alone says in a header, and in a batch in its ``custom_id``, which ends in
``_<repeat>-<attempt>`` (:mod:`shared.llm.batch_apis`). Several stand-ins may share the directory: one at a time works
on a batch, and what it answered is on disk, and in the log, before the next request.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from shared.stage import atomic
from shared.standin.faults import Faults
from shared.standin.log import Log
from shared.standin.tinker_store import Store
from shared.standin.wire import RefusedError, Reply, Request

WORK_S = 0.2
"""Seconds of answering per look at a batch; then it is in progress still."""
HEADERS = {
    "anthropic": {"authorization": "Bearer batch", "anthropic-version": "2026-10-21"},
    "openai": {"authorization": "Bearer batch"},
    "gemini": {"x-goog-api-key": "batch"},
}
"""What a request would be sent with alone."""
KINDS = ("succeeded", "errored", "expired", "canceled")

Answer = Callable[[Request, str], Reply]
"""The answer of the API whose path it is, with this fault in it."""


class Asked(NamedTuple):
    """One request of a batch: where it would be sent alone, and its body."""

    custom_id: str
    path: str
    body: Any


@dataclass
class Batch:
    """A batch as it stands.

    Attributes:
        api: whose it is: ``anthropic``, ``openai`` or ``gemini``.
        name: what the client put in to recognise it by.
        source: the file its requests came from; ``""`` = inline.
        created: seconds since 1970; answered from ``ready`` on.
        failed: the fault by which it failed as a whole; ``""`` = it did not.
        gone: nobody finds it any more.
        counts: results by kind of :data:`KINDS`.
    """

    directory: Path
    id: str
    api: str
    model: str
    name: str
    source: str
    total: int
    created: float
    ready: float
    failed: str
    gone: bool
    counts: Counter[str]

    @property
    def cancelled(self) -> bool:
        return (self.directory / "cancelled").exists()

    @property
    def ended(self) -> bool:
        return bool(self.failed) or self.counts.total() == self.total

    def results(self) -> Iterator[dict[str, Any]]:
        """One by one; a batch that failed has none."""
        path = self.directory / "results.jsonl"
        if path.exists():
            with open(path, "rb") as lines:
                yield from map(orjson.loads, lines)


class Batches:
    """All batches of a state directory; ``""`` is a temporary one."""

    def __init__(self, state: str, faults: Faults, log: Log, answer: Answer) -> None:
        self._store, self._faults, self._log, self._answer = Store(state), faults, log, answer
        self._uploads: dict[str, bytearray] = {}  # under way

    @cached_property
    def _root(self) -> Path:
        for name in ("batches", "uploads"):
            (self._store.root.parent / name).mkdir(exist_ok=True)
        return self._store.root.parent

    def create(
        self, api: str, prefix: str, model: str, asked: list[Asked], fault: str, name: str = "", source: str = ""
    ) -> Batch:
        """A new batch; ``prefix``: of its id.

        Raises:
            RefusedError: it is empty, or two requests have one id.
        """
        if not asked or len({one.custom_id for one in asked}) != len(asked):
            raise RefusedError(400, "requests: at least one is required, each with a custom_id of its own")
        identity = f"{prefix}{uuid.uuid4().hex[:24]}"
        directory = self._root / "batches" / identity
        directory.mkdir()
        with open(directory / "requests.jsonl", "wb") as file:
            file.writelines(orjson.dumps(one._asdict(), option=orjson.OPT_APPEND_NEWLINE) for one in asked)
        now = time.time()
        facts: dict[str, Any] = {
            "api": api,
            "model": model,
            "name": name,
            "source": source,
            "total": len(asked),
            "created": now,
            "ready": now + self._faults.slow_s * (fault == "batch_slow"),
            "failed": fault if fault in ("batch_failed", "batch_full") else "",
            "gone": fault == "batch_gone",
        }
        with atomic(directory / "batch.json") as file:
            file.write(orjson.dumps(facts))
        return Batch(directory, identity, counts=Counter(), **facts)

    def get(self, api: str, identity: str, work: bool = True) -> Batch:
        """A batch as it stands, after some ``work`` on it.

        Raises:
            RefusedError: 404, there is none of this API.
        """
        directory = self._root / "batches" / identity
        if not identity.isidentifier() or not (directory / "batch.json").exists():
            raise RefusedError(404, f"no batch {identity!r}")
        facts = orjson.loads((directory / "batch.json").read_bytes())
        if facts["api"] != api or facts["gone"]:
            raise RefusedError(404, f"no batch {identity!r}")
        batch = Batch(directory, identity, counts=Counter(), **facts)
        if work and not batch.failed and (time.time() >= batch.ready or batch.cancelled):
            self._work(batch)
        batch.counts = Counter(result["kind"] for result in batch.results())
        return batch

    def all(self, api: str) -> list[Batch]:
        """The newest first."""
        found = []
        for directory in (self._root / "batches").iterdir():
            try:
                found.append(self.get(api, directory.name))
            except RefusedError:
                continue
        return sorted(found, key=lambda batch: batch.created, reverse=True)

    def cancel(self, api: str, identity: str) -> Batch:
        """Answer no further request of it."""
        self.get(api, identity, work=False).directory.joinpath("cancelled").touch()
        return self.get(api, identity)

    def _work(self, batch: Batch) -> None:
        with open(batch.directory / "results.jsonl", "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another stand-in is at it
                return
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)  # a line that a kill cut is answered anew
            done, until = whole.count(b"\n"), time.monotonic() + WORK_S
            with open(batch.directory / "requests.jsonl", "rb") as lines:
                for number, line in enumerate(lines):
                    if number >= done and time.monotonic() < until:
                        self._one(batch, Asked(**orjson.loads(line)), file.fileno())

    def _one(self, batch: Batch, asked: Asked, results: int) -> None:
        body = orjson.dumps(asked.body)
        again = "".join(asked.custom_id.split("_")[2:]).replace("-", ".")
        fault = self._faults.in_batch(asked.path, body + again.encode())
        headers = HEADERS[batch.api] | {"x-synthmill-attempt": again}
        kind, reply = "succeeded", None
        if batch.cancelled or fault == "expired":
            kind = "canceled" if batch.cancelled else "expired"
        else:
            sent = Request("POST", asked.path, {}, headers, b"{}" if fault == "errored" else body)
            reply = self._answer(sent, fault)
            kind = "succeeded" if reply.status == 200 else "errored"
        result = {"custom_id": asked.custom_id, "kind": kind, "status": reply.status if reply else 0}
        result["body"] = reply.body if reply else None
        os.write(results, orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))
        if reply is not None:
            self._log.write(Request("POST", asked.path, {}, headers, body), reply, written=True, batch=batch.id)

    # ------------------------------------------------------------ uploaded files

    def keep(self, content: bytes) -> str:
        """Keep an uploaded file; its id, letters and digits."""
        identity = uuid.uuid4().hex[:24]
        with atomic(self._root / "uploads" / identity) as file:
            file.write(content)
        return identity

    def begin(self) -> str:
        """Begin an upload in pieces; its id."""
        identity = uuid.uuid4().hex
        self._uploads[identity] = bytearray()
        return identity

    def append(self, upload: str, piece: bytes, *, last: bool) -> str:
        """The next piece of an upload; with the last one, the id of the file, else ``""``.

        Raises:
            RefusedError: 404, no such upload has begun.
        """
        if upload not in self._uploads:
            raise RefusedError(404, f"no upload {upload!r}")
        self._uploads[upload] += piece
        return self.keep(bytes(self._uploads.pop(upload))) if last else ""

    def uploaded(self, identity: str) -> bytes:
        """Raises:
        RefusedError: 404, there is none.
        """
        path = self._root / "uploads" / identity
        if not identity.isalnum() or not path.exists():
            raise RefusedError(404, f"no file {identity!r}")
        return path.read_bytes()


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        RefusedError: a line is none.
    """
    try:
        rows = [orjson.loads(line) for line in content.splitlines() if line.strip()]
    except orjson.JSONDecodeError as error:
        raise RefusedError(400, f"the file is not JSON Lines: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise RefusedError(400, "each line of the file must be a JSON object")
    return rows


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def when(seconds: float) -> str:
    """RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
