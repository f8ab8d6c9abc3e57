"""The request log: one JSON line per request, appended after its answer was written.

Several stand-ins may share the file: each line is one ``write`` to a file opened for appending.
"""

from __future__ import annotations

import os
import time
from typing import Any

import orjson

from shared.standin.wire import Reply, Request


class Log:
    """Appends to ``path``; with ``""`` it does nothing."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else -1

    def write(self, request: Request, reply: Reply, *, written: bool, batch: str = "") -> None:
        """``served`` is true when a model's answer went out in full: from then on asking again costs again.

        A request of a batch has a line of its own, with ``batch`` its id, when it is answered: it is owed from then on.
        """
        if self._fd < 0:
            return
        line: dict[str, Any] = {
            "at": round(time.time(), 4),
            "method": request.method,
            "path": request.path,
            "status": reply.status,
            "sha256": request.digest,
            "model": reply.model,
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
            "fault": reply.fault,
            "served": written and reply.answered and 200 <= reply.status < 300,
        }
        if batch:
            line["batch"] = batch
        os.write(self._fd, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
