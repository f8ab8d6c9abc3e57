"""One small script a library, all with the same interface, each run by its own environment's Python.

    python -m benchmarks.peers.<peer> URL CALLS CONCURRENCY ROWS PLACE SAVE_EVERY

It asks the OpenAI-style server at URL (without ``/v1``) CALLS different questions, CONCURRENCY at a time, and writes
the answered ones to ROWS. PLACE is its working directory; what an earlier, killed run left there is used again, in
whatever way the library offers. SAVE_EVERY is how many rows apart the library shall save, for those that let one say
so; 0 = as the library does by itself. The last line it prints is ``{"seconds": ...}``: the library's call, without
imports.

``benchmarks/peers/<peer>.txt`` is what is installed for it: nothing here may import more than that and the standard
library. ``synthmill`` and ``bare`` (aiohttp and nothing else: the floor) run in our own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Task:
    """What this process was told to do.

    Attributes:
        url: of the server, without ``/v1``.
        questions: all different; ``item-N`` in each is what the server tells them apart by.
        rows: the file to write.
    """

    def __init__(self, flags: list[str]) -> None:
        self.url, calls, concurrency, rows, place, save_every = flags
        self.concurrency, self.save_every = int(concurrency), int(save_every)
        self.rows, self.place = Path(rows), Path(place)
        self.questions = [f"say item-{n}" for n in range(int(calls))]
        self.seconds = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Around the library's call."""
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started

    def done(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write the questions and their answers; tell the time."""
        with open(self.rows, "w", encoding="utf-8") as file:
            for question, answer in rows:
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")
        print(json.dumps({"seconds": self.seconds}), flush=True)


def task() -> Task:
    """From the command line."""
    return Task(sys.argv[1:])
