"""How fast one model may be asked: learnt from its answers, and shared by every process that asks it.

What is known of a model is one small file in the cache directory, read and written under ``flock``: what one process
learns, the others obey. Nothing in the file is held by anybody, so a killed process leaves nothing behind.

- *Start.* Nothing is known: :data:`START` calls under way, twice as many after each :data:`ROUND_S` with answers, until
  the first rate-limit headers.
- *Told.* Buckets of requests and of tokens, filled at limit / 60 a second and never taken for fuller than the headers
  say. While there is plenty, nothing waits.
- *Paced.* A 429 all the same, or more than half of a minute's limit gone at the first answer: the server counts in
  shorter windows than it tells, or somebody else asks as well. For :data:`PACED_S` calls go out evenly, at
  :data:`MARGIN` of the limit; without one, at what was let through in the busiest of the last seconds. A further
  refusal lowers the rate to that, at most by half; each second without one raises it, ever faster.
- *Overloaded* (529, or 503 with Retry-After): concurrency halves, at most once a second, and grows by one a round.
- *Retry-After* closes the model for all processes, for at most :data:`MAX_WAIT_S`; without one, and after a long series
  of refusals, it closes for longer and longer.
- *Broken.* Nothing but refusals, in any process, for longer than the caller has patience: :meth:`Limiter.refused_for`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

MAX_WAIT_S = 120.0
"""A longer Retry-After is cut to this: an hour's sleep inside one call looks like a hang (anthropic obeys 3600)."""
START, ROUND_S = 4, 0.25
"""Calls under way before anything is known, and how long until they are doubled: no more than these can be refused."""
MARGIN = 0.97
"""Of the limit, when calls go out evenly: 20 of 20 a second then take 1.03 s, so that 30 ms of jitter is no refusal."""
INCREASE = 0.01
"""Share of the rate that is added a second, times the seconds since it was lowered: 10 % a second after 10 s."""
PACED_S = 300.0
FORGET_S = 3600.0
"""What was learnt and not used for this long is learnt anew."""
MOST_PAUSE_S = 30.0
LOCK_S = 0.05
"""A process that was stopped inside the lock must not stop the others: after this long they go on by themselves."""
LOOK_AGAIN_S = 0.02
LEASE, LEASE_S = 16, 0.25
"""While there is plenty, calls are taken from the file this many at a time, and heard of this often."""
MINUTE = 60
UNLIMITED = 1e9

BUCKETS = ("requests", "tokens", "input-tokens", "output-tokens")
"""What providers limit. OpenAI counts ``tokens`` together, Anthropic input and output apart."""
PREFIXES = ("x-ratelimit-{what}-{bucket}", "anthropic-ratelimit-{bucket}-{what}")
_HEADERS = [
    [tuple(form.format(bucket=bucket, what=what) for what in ("limit", "remaining")) for form in PREFIXES]
    for bucket in BUCKETS
]

Costs = tuple[float, float, float, float]
"""What a call takes from each of :data:`BUCKETS`."""


@dataclass
class Bucket:
    """Requests or tokens that may be used.

    Attributes:
        level: what may be used now; below 0: what is booked ahead.
        rate: a second; 0 = not known, no limit.
        most: the level never rises above it.
        told: the limit a minute in the headers; 0 = none.
        taken: everything ever taken.
    """

    level: float = 0.0
    rate: float = 0.0
    most: float = 0.0
    told: float = 0.0
    taken: float = 0.0

    def pace(self, rate: float) -> None:
        """From now on evenly, at this rate."""
        self.rate = max(rate, 1 / MOST_PAUSE_S)
        self.most = max(1.0, self.rate * 0.05)  # a timer's and a scheduler's jitter
        self.level = min(self.level, self.most)


@dataclass
class State:
    """What the processes share about one model. Times are seconds since 1970."""

    touched: float = 0.0  # the buckets were filled up to here
    closed_until: float = 0.0
    places: float = -1.0  # calls that may start while nothing is known; below 0: something is
    window: float = 0.0  # of so many under way
    began: float = 0.0  # when the first of them started
    widened: float = 0.0  # when; the first answer counts
    paced: float = 0.0  # since when; 0 = not
    slowed: float = 0.0  # when the rate was lowered last
    factor: float = 1.0  # share of its concurrency that each process may use
    halved: float = 0.0
    refused: float = 0.0  # the first refusal since the last answer; 0 = none
    second: float = 0.0  # the last one in `passed`
    buckets: list[Bucket] = field(default_factory=lambda: [Bucket() for _ in BUCKETS])
    passed: list[float] = field(default_factory=lambda: [0.0] * MINUTE)  # calls let through, by second of the minute

    def pack(self) -> bytes:
        numbers = [getattr(self, name) for name in _SCALARS]
        for b in self.buckets:
            numbers += (b.level, b.rate, b.most, b.told, b.taken)
        return _FORM.pack(_MAGIC, *numbers, *self.passed)

    @classmethod
    def unpack(cls, data: bytes) -> State | None:
        """None when it was written by another version, or is damaged."""
        if len(data) != _FORM.size:
            return None
        magic, *numbers = _FORM.unpack(data)
        if magic != _MAGIC or not all(abs(number) < 1e15 for number in numbers):  # nan is not below anything
            return None
        middle = len(_SCALARS) + 5 * len(BUCKETS)
        buckets = [Bucket(*numbers[n : n + 5]) for n in range(len(_SCALARS), middle, 5)]
        scalars = dict(zip(_SCALARS, numbers, strict=False))
        return cls(**scalars, buckets=buckets, passed=numbers[middle:])

    @property
    def calm(self) -> bool:
        """Nothing is being learnt and nothing is in the way."""
        return self.places < 0 and not self.paced and self.factor >= 1 and not self.refused


_SCALARS = tuple(f.name for f in fields(State) if f.name not in ("buckets", "passed"))
_MAGIC = b"limits-2"
_FORM = struct.Struct(f"<8s{len(_SCALARS) + 5 * len(BUCKETS) + MINUTE}d")


@dataclass(frozen=True)
class Ticket:
    """A call that may be sent. ``taken``: from each bucket, by everybody, up to this call."""

    taken: tuple[float, ...] = ()


def told(headers: Mapping[str, str]) -> list[tuple[float, float] | None]:
    """Limit a minute and what remains of it, for each of :data:`BUCKETS`; None where the headers do not say."""
    found: list[tuple[float, float] | None] = []
    for forms in _HEADERS:
        row = None
        for limit, remaining in forms:
            if limit in headers and remaining in headers:
                with contextlib.suppress(ValueError):
                    row = (float(headers[limit]), max(0.0, float(headers[remaining])))
        if row is not None and not 1 <= row[0] < UNLIMITED:  # a gateway's way to say that there is none
            row = None
        found.append(row)
    return found


class Shared:
    """What is known of one model, in a file; the arithmetic is here, the waiting in :class:`Limiter`.

    Args:
        path: the file; made when it is missing, made anew when it is damaged.
        start: calls under way before anything is known.
    """

    def __init__(self, path: Path, start: int = START) -> None:
        self.start = start
        self._own = self._fresh(time.time())  # what we go by while the file cannot be had
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # no room, or no right to write: this process has limits of its own
            self._fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def look(self) -> State:
        """What is known now."""
        with self._state(write=False) as (state, _):
            return state

    def take(self, costs: Costs) -> tuple[float, Ticket | None, int]:
        """Book a call, and a few more of its kind while there is plenty.

        Returns:
            ``(seconds, ticket, more)``: wait that long, then send, and ``more`` such calls without asking again;
            without a ticket, wait that long, then ask again.
        """
        with self._state() as (state, now):
            closed = max(0.0, state.closed_until - now)
            if closed > 1.0:
                return closed, None, 0  # until then, more may be learnt
            if state.places >= 0:
                if state.places < 1:
                    return max(LOOK_AGAIN_S, closed), None, 0
                state.places -= 1
                state.began = state.began or now
            rated = [(bucket, cost) for bucket, cost in zip(state.buckets, costs, strict=True) if bucket.rate]
            plenty = state.calm and not closed and all(b.level > 4 * LEASE * cost for b, cost in rated)
            calls = LEASE if plenty else 1
            for bucket, cost in zip(state.buckets, costs, strict=True):
                bucket.taken += cost * calls
                if bucket.rate:
                    bucket.level -= cost * calls
            state.passed[int(now) % MINUTE] += calls
            wait = max((-bucket.level / bucket.rate for bucket, _ in rated), default=0.0)
            ticket = Ticket(tuple(bucket.taken for bucket in state.buckets))
            return closed + max(0.0, wait), ticket, calls - 1

    def heard(self, ticket: Ticket, headers: Mapping[str, str], answered: bool) -> State:
        """Learn from what came back; ``answered``: it was an answer. What is known then."""
        with self._state() as (state, now):
            unknown = state.places >= 0
            if answered:
                state.refused = 0.0
                if state.places >= 0:
                    state.places = min(state.places + 1, state.window)
                    state.widened = state.widened or now
                    if now - state.widened > ROUND_S:
                        state.places, state.window, state.widened = state.places + state.window, 2 * state.window, now
                    if state.window > 64 * self.start:  # nobody ever said anything
                        state.places = -1.0
            for n, row in enumerate(told(headers)):
                if row is None:
                    continue
                bucket, (limit, remaining) = state.buckets[n], row
                if n == 0:
                    state.places = -1.0
                fresh = limit != bucket.told
                if fresh:
                    bucket.told, bucket.rate, bucket.most = limit, limit / MINUTE, limit
                    # More than half of a minute's limit is gone, and not by us: evenly from the first call on. When
                    # that one reached the server is not known: half-way between its start and its answer.
                    if n == 0 and unknown and remaining + ticket.taken[0] < limit / 2:
                        state.paced = state.slowed = now
                        bucket.pace(bucket.rate * MARGIN)
                        bucket.level = min(0.0, bucket.rate * (now - state.began) / 2 - bucket.taken)
                        continue
                if n == 0 and state.paced:
                    bucket.pace(min(bucket.rate, limit / MINUTE * MARGIN))
                    continue
                # What others took since this call was let go is counted in `remaining`, or not yet: two bounds.
                least = remaining - (bucket.taken - ticket.taken[n])
                bucket.level = least if fresh else min(max(bucket.level, least), remaining)
            return state

    def refused(self, after_s: float | None, overloaded: bool) -> State:
        """Slow down. What is known then."""
        with self._state() as (state, now):
            if now - state.closed_until > MINUTE:  # the last series of refusals was another run's
                state.refused = 0.0
            state.refused = state.refused or now
            long = (now - state.refused) / 8
            pause = min(MAX_WAIT_S, max(after_s, min(long, MOST_PAUSE_S)) if after_s is not None else max(0.5, long))
            state.closed_until = max(state.closed_until, now + pause)
            state.places = -1.0
            state.passed[int(now) % MINUTE] -= 1
            requests = state.buckets[0]
            if overloaded:
                if now - state.halved > 1.0:
                    state.halved, state.factor = now, max(2.0**-10, state.factor / 2)
            elif not state.paced:
                state.paced = state.slowed = now
                requests.pace((requests.rate or max(self._let_through(state, now, after_s), START)) * MARGIN)
            else:
                let = self._let_through(state, now, after_s) * MARGIN
                if now - state.slowed > 1.0 + min(after_s or 0.0, MAX_WAIT_S):
                    state.slowed = now
                    requests.pace(min(max(let, requests.rate / 2), requests.rate * MARGIN))
                elif not requests.told:  # the rest of the wave tells how many of it were too many
                    requests.pace(min(max(let, START), requests.rate))
            if not overloaded:  # what was booked and refused was not used
                requests.level = 0.0 if state.slowed == now else min(requests.level, 0.0)
            return state

    def grown(self, step: float) -> State:
        """Add ``step`` to the share of concurrency after an answer."""
        with self._state() as (state, _):
            state.factor = min(1.0, state.factor + step)
            return state

    # ------------------------------------------------------------ inside

    def _let_through(self, state: State, now: float, after_s: float | None) -> float:
        """Calls a second in the window the server seems to count in: the busiest of three seconds, or a minute."""
        if after_s is not None and after_s > 2.0:
            return max(0.0, sum(state.passed)) / MINUTE
        return max(state.passed[int(now - ago) % MINUTE] for ago in range(3))

    def _fill(self, state: State, now: float) -> None:
        since = max(state.touched, min(state.closed_until, now))  # while it is closed, nothing comes in
        passed = now - since
        for second in range(int(max(state.second, now - MINUTE)) + 1, int(now) + 1):
            state.passed[second % MINUTE] = 0.0
        state.second = float(int(now))
        if passed <= 0:
            return
        state.touched = now
        if 0 <= state.places < state.window:  # whoever took a place and died gives it back like this
            state.places += passed * state.window / 4
        requests = state.buckets[0]
        if state.paced and now - state.slowed > PACED_S:
            state.paced, requests.rate, requests.most = 0.0, requests.told / MINUTE, requests.told
        elif state.paced:
            limit = requests.told / MINUTE * MARGIN if requests.told else UNLIMITED
            faster = requests.rate * (1 + INCREASE * min(now - state.slowed, 10.0) * min(passed, 1.0))
            requests.pace(min(limit, faster) if now - state.slowed > 1.0 else requests.rate)
        for bucket in state.buckets:
            if bucket.rate:
                bucket.level = min(bucket.most, bucket.level + passed * bucket.rate)

    def _fresh(self, now: float) -> State:
        start = float(self.start)
        return State(touched=now, places=start, window=start, second=float(int(now)))

    def _sane(self, state: State | None, now: float) -> State:
        """The state, or a fresh one when it is an old one, or one from a clock that was ahead of ours."""
        if state is None or now - state.touched > FORGET_S or state.touched > now + MAX_WAIT_S:
            return self._fresh(now)
        state.touched = min(state.touched, now)
        state.closed_until = min(state.closed_until, now + MAX_WAIT_S)
        for name in ("began", "widened", "slowed", "halved", "refused"):
            setattr(state, name, min(getattr(state, name), now))
        return state

    @contextmanager
    def _state(self, write: bool = True) -> Iterator[tuple[State, float]]:
        now = time.time()
        locked = self._lock()
        try:
            read = State.unpack(os.pread(self._fd, _FORM.size + 1, 0)) if locked else self._own
            if locked and read is None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)  # another version's may be longer
            self._own = self._sane(read, now)
            self._fill(self._own, now)
            yield self._own, now
            if locked and write:
                with contextlib.suppress(OSError):  # a full disk: the others do not hear of it
                    os.pwrite(self._fd, self._own.pack(), 0)
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        if self._fd < 0:
            return False
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.0002)
            except OSError:  # a file system without locks
                return False


class Limiter:
    """A gate for one model in this process: at most ``most`` calls under way, and none before its turn.

    Attributes:
        most: the settings' concurrency.
        busy: calls that are under way or wait for their turn.
    """

    def __init__(self, shared: Shared, most: int) -> None:
        self.shared, self.most = shared, most
        self.busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()
        self._known = shared.look()
        self._lease: tuple[Ticket, int, float, Costs] | None = None
        self._heard_at = 0.0
        self._refused_since = 0.0

    @property
    def allowed(self) -> int:
        """The present limit of concurrency, 1 to ``most``."""
        return max(1, int(self.most * self._known.factor))

    @asynccontextmanager
    async def slot(self, costs: Costs) -> AsyncIterator[Ticket]:
        """Hold one of the allowed places, when it is this call's turn; give the ticket to :meth:`heard`."""
        while self.busy >= self.allowed:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        self.busy += 1
        try:
            yield self._leased(costs) or await self._next(costs)
        finally:
            self.busy -= 1
            self._wake()

    def _leased(self, costs: Costs) -> Ticket | None:
        if self._lease is None or self._turn.locked():
            return None
        ticket, left, until, paid = self._lease
        if (
            left < 1 or time.monotonic() > until or costs[1] > 4 * paid[1]
        ):  # of 64 that there was room for, 16 are leased
            self._lease = None
            return None
        self._lease = (ticket, left - 1, until, paid)
        return ticket

    async def _next(self, costs: Costs) -> Ticket:
        async with self._turn:  # in the order they came; one at a time books ahead
            while True:
                self._news.clear()
                wait, ticket, more = self.shared.take(costs)
                if ticket is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), wait)
                    continue
                if more:
                    self._lease = (ticket, more, time.monotonic() + LEASE_S, costs)
                while wait > 0:
                    await asyncio.sleep(wait)
                    wait = self.shared.look().closed_until - time.time()  # somebody may have been refused meanwhile
                return ticket

    def resize(self, most: int) -> None:
        """Open to another number of calls: a later batch of work with its own concurrency."""
        self.most = most
        self._wake()

    def heard(self, ticket: Ticket, headers: Mapping[str, str], answered: bool) -> None:
        """An answer or an error came, with these headers."""
        now = time.monotonic()
        if answered and self._known.calm and now - self._heard_at < LEASE_S and self._lease is not None:
            return
        self._heard_at = now
        if answered:
            self._refused_since = 0.0
        self._known = self.shared.heard(ticket, headers, answered)
        if answered and self._known.factor < 1:
            self._known = self.shared.grown(1 / (self.most * self.allowed))
        self._news.set()
        self._wake()

    def refused(self, after_s: float | None, overloaded: bool) -> None:
        """The provider says we are too fast, or that it is overloaded."""
        self._lease = None
        self._known = self.shared.refused(after_s, overloaded)
        now = time.time()  # a clock set back begins the wait anew, at most
        self._refused_since = max(min(self._refused_since, now) or now, self._known.refused)

    def refused_for(self) -> float:
        """Seconds this process has been refused, and no process answered; 0 = not."""
        since, now = self.shared.look().refused, time.time()
        self._refused_since = min(self._refused_since, now)
        return max(0.0, now - max(since, self._refused_since)) if since and self._refused_since else 0.0

    def _wake(self) -> None:
        free = self.allowed - self.busy
        while free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1


def file_of(cache: Path, where: str, model: str, base_url: str) -> Path:
    """The file of one model of one provider; ``where`` tells live services and every stand-in apart."""
    digest = hashlib.sha256("\0".join((where, model, base_url)).encode()).hexdigest()[:12]
    return cache / f".limits-{re.sub(r'[^A-Za-z0-9.-]+', '-', model)[:60]}-{digest}"


def forget_old(cache: Path) -> None:
    """Remove files that say nothing any more: every stand-in has had its own."""
    for file in cache.glob(".limits-*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > FORGET_S:
                file.unlink()
