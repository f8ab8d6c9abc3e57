"""How many calls to one model are under way: additive increase, multiplicative decrease, and waiting when told to."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MAX_WAIT_S = 120.0
"""A longer Retry-After is cut to this: an hour's sleep inside one call looks like a hang (anthropic obeys 3600)."""


class Limiter:
    """A gate for one model. Opens to ``most`` calls, halves when the provider says too fast, grows by one a round.

    Attributes:
        most: the settings' concurrency: never more than this under way.
        allowed: the present limit, 1 to ``most``.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.allowed = float(most)
        self.busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed_until = 0.0
        self._halved_at = 0.0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the allowed places."""
        while self.busy >= int(self.allowed):
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        self.busy += 1
        try:
            while (pause := self._closed_until - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(pause)
            yield
        finally:
            self.busy -= 1
            self._wake()

    def resize(self, most: int) -> None:
        """Open to another number of calls: a later batch of work with its own concurrency."""
        self.most = most
        self.allowed = float(most)
        self._wake()

    def succeeded(self) -> None:
        """One answer came: grow by 1/allowed, so by one for every round of calls."""
        self.allowed = min(float(self.most), self.allowed + 1 / self.allowed)
        self._wake()

    def limited(self, after_s: float | None) -> None:
        """Too fast: halve, at most once a second (one wave of refusals is one signal), and close until ``after_s``."""
        now = asyncio.get_running_loop().time()
        if now - self._halved_at > 1.0:
            self.allowed = max(1.0, self.allowed / 2)
            self._halved_at = now
        self._closed_until = max(self._closed_until, now + min(after_s or 0.0, MAX_WAIT_S))

    def _wake(self) -> None:
        free = int(self.allowed) - self.busy
        while free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1
