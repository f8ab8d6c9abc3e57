"""Faults on demand, seeded, and the same whatever the concurrency.

``STANDIN_FAULTS="429=0.05,529=0.02,500=0.02,reset=0.01,timeout=0.0,truncate=0.02,refuse=0.01,broken_json=0.02,seed=7"``

- Transport faults (a status, ``reset``, ``timeout``) are decided by a hash of the seed, the request, and how many times
  this request has come: a retry may succeed. None hits a request more than twice in a row.
- Content faults (``truncate``, ``refuse``, ``broken_json``) are decided by a hash of the seed and the request alone: a
  second run sees the same.
- A request's own header ``x-standin-fault: 429`` is obeyed every time; ``429*2``, the first two times.
- ``500@optim_step=3`` hits the third request whose path ends in ``optim_step``, ``=3-5`` the third to the fifth,
  ``=3-`` all from the third on, counted in this process; no matter what the shares say.

``retry_after`` (seconds, default 1) goes with 429 and 529; ``timeout_s`` (default 600) is how long a request hangs.
``slow_loris`` answers a byte every tenth of a second, for as long; ``half_closed`` ends its side of the connection in
the middle of the answer and leaves the other open. Neither counts as served.

Only for Tinker (ids, which differ from run to run, are no part of its hashes):

==================  ====================================================================================================
402, quota          the account has no credit
future_failed       a request is taken, and then fails: its future answers an error, nothing was computed
future_slow         its future takes ``slow_s`` (default 2) seconds longer
paused_capacity     its future says so for ``pause_s`` (default 2) seconds; so does ``paused_rate_limit``
link_expired        signed links have expired when they are handed out
path_escape         among the exported files is one whose path leads out of the directory
cut                 a download ends half-way, and the connection with it
==================  ====================================================================================================

``link_s`` (default 3600) is for how many seconds a signed link is good.

Only for batches; ``cut@batches=1`` cuts the answer to the creation of one that is created:

==================  ====================================================================================================
expired, errored    a request of a batch is not answered in time; is refused (``errored@messages=2``: the second)
batch_failed        a batch fails as a whole; ``batch_full``: because too much of ours waits already (OpenAI)
batch_slow          it begins ``slow_s`` seconds later
batch_gone          a batch is created, and then nobody knows it
==================  ====================================================================================================
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.errors import SettingsError

STATUSES = ("400", "401", "402", "403", "404", "408", "409", "413", "429", "500", "502", "503", "504", "529")
TRANSPORT = (*STATUSES, "quota", "reset", "timeout", "slow_loris", "half_closed")
CONTENT = ("truncate", "refuse", "broken_json")
TINKER = ("future_failed", "future_slow", "paused_capacity", "paused_rate_limit", "link_expired", "path_escape", "cut")
BATCH = ("batch_failed", "batch_full", "batch_slow", "batch_gone")
IN_BATCH = ("expired", "errored")
NUMBERS = ("seed", "retry_after", "timeout_s", "slow_s", "pause_s", "link_s")
MOST_IN_ROW = 2


class Fault(NamedTuple):
    """What goes wrong with one request; ``""`` for nothing."""

    transport: str = ""
    content: str = ""


class Exact(NamedTuple):
    """A fault that hits the requests of one operation by their number, counted from 1; ``last`` None is without end."""

    fault: str
    operation: str
    first: int
    last: int | None


@dataclass
class Faults:
    """Decides what goes wrong with each request.

    Args:
        shares: share of requests, 0 to 1, by fault.
        seed: of the hash.
        retry_after_s: what 429 and 529 ask for.
        timeout_s: how long a ``timeout`` hangs before the connection closes.
        slow_s: how much longer a ``future_slow`` takes.
        pause_s: how long a future is paused.
        link_s: for how long a signed link is good.
        exact: faults of requests by their number.
    """

    shares: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    retry_after_s: float = 1.0
    timeout_s: float = 600.0
    slow_s: float = 2.0
    pause_s: float = 2.0
    link_s: float = 3600.0
    exact: tuple[Exact, ...] = ()
    _numbers: Counter[str] = field(default_factory=Counter)
    _times: Counter[bytes] = field(default_factory=Counter)
    _row: Counter[bytes] = field(default_factory=Counter)
    _asked: Counter[tuple[bytes, str]] = field(default_factory=Counter)

    def decide(self, path: str, body: bytes, wish: str = "", content: tuple[str, ...] = CONTENT) -> Fault:
        """The fault of a request; ``wish`` is its header, ``content`` what can be wrong with an answer. Counts it."""
        digest = hashlib.sha256(path.encode() + b"\0" + body).digest()
        if found := self._exact(path.rpartition("/")[2]):
            return Fault(transport=found) if found in TRANSPORT else Fault(content=found)
        if wish:
            return self._wished(digest, wish.strip().lower(), content)
        if not self.shares:
            return Fault()
        self._times[digest] += 1
        hit = self._pick(TRANSPORT, digest, str(self._times[digest]))
        if hit and self._row[digest] < MOST_IN_ROW:
            self._row[digest] += 1
            return Fault(transport=hit)
        del self._row[digest]
        # Tinker's ask for a link, and each download, is the same every time: there the second try must differ.
        salt = "content" if content is CONTENT else f"content {self._times[digest]}"
        return Fault(content=self._pick(content, digest, salt))

    def in_batch(self, path: str, body: bytes) -> str:
        """The fault of one request of a batch; ``path`` is where it would be sent alone. Counts it."""
        digest = hashlib.sha256(path.encode() + b"\0" + body).digest()
        exact = self._exact(path.rpartition("/")[2])
        return exact or self._pick(IN_BATCH, digest, "batch") or self._pick(CONTENT, digest, "content")

    def _exact(self, operation: str) -> str:
        self._numbers[operation] += 1
        number = self._numbers[operation]
        for found in self.exact:
            if found.operation == operation and found.first <= number <= (found.last or number):
                return found.fault
        return ""

    def _wished(self, digest: bytes, wish: str, content: tuple[str, ...]) -> Fault:
        name, _, times = wish.partition("*")
        self._asked[digest, wish] += 1
        if times.isdigit() and self._asked[digest, wish] > int(times):
            return Fault()
        if name in TRANSPORT:
            return Fault(transport=name)
        return Fault(content=name) if name in content else Fault(transport="400")

    def _pick(self, names: tuple[str, ...], digest: bytes, salt: str) -> str:
        hashed = hashlib.sha256(f"{self.seed}\0{salt}\0".encode() + digest).digest()
        place = int.from_bytes(hashed[:7], "big") / (1 << 56)
        for name in names:
            place -= self.shares.get(name, 0.0)
            if place < 0:
                return name
        return ""


def parse(text: str) -> Faults:
    """Faults from ``name=share,...``; ``""`` means none.

    Raises:
        SettingsError: a name is unknown, a value is no number, or the shares of a kind add up to more than 1.
    """
    shares: dict[str, float] = {}
    exact = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        name, at, operation = name.strip().partition("@")
        known = (*TRANSPORT, *CONTENT, *TINKER, *BATCH, *IN_BATCH, *(() if at else NUMBERS))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"STANDIN_FAULTS: unknown fault {name!r}", f"the nearest valid one is {near!r}")
        if at:
            exact.append(_exact(name, operation, value.strip()))
            continue
        try:
            shares[name] = float(value)
        except ValueError:
            raise SettingsError(
                f"STANDIN_FAULTS: {name} must be a number, got {value!r}", f"for example STANDIN_FAULTS={name}=0.05"
            ) from None
    faults = Faults(
        seed=int(shares.pop("seed", 0)),
        retry_after_s=shares.pop("retry_after", 1.0),
        timeout_s=shares.pop("timeout_s", 600.0),
        slow_s=shares.pop("slow_s", 2.0),
        pause_s=shares.pop("pause_s", 2.0),
        link_s=shares.pop("link_s", 3600.0),
        shares={name: share for name, share in shares.items() if share},
        exact=tuple(exact),
    )
    for kind in (TRANSPORT, CONTENT, TINKER, BATCH, IN_BATCH):
        total = sum(faults.shares.get(name, 0.0) for name in kind)
        if total > 1 or min(faults.shares.values(), default=0) < 0:
            raise SettingsError(f"STANDIN_FAULTS: the shares of {', '.join(kind[-3:])}, ... are {total}", "at most 1")
    return faults


def _exact(fault: str, operation: str, numbers: str) -> Exact:
    found = re.fullmatch(r"([1-9]\d*)(-([1-9]\d*)?)?", numbers)
    if not operation or not found:
        raise SettingsError(
            f"STANDIN_FAULTS: {fault}@{operation} must be the numbers of requests, got {numbers!r}",
            f"for example STANDIN_FAULTS={fault}@{operation or 'optim_step'}=3, =3-5 or =3-",
        )
    first, last = int(found[1]), int(found[3]) if found[3] else None
    return Exact(fault, operation, first, last if found[2] else first)


class RateCap:
    """At most ``per_second`` requests in any second; 0 = no cap. Times are seconds of one monotonic clock."""

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._recent: list[float] = []

    @property
    def used(self) -> int:
        """Requests counted in the last second."""
        return len(self._recent)

    def wait_s(self, now: float) -> float:
        """0 when the request may pass (and is counted), else the seconds until one may."""
        if not self.per_second:
            return 0.0
        window = max(1.0, 1.0 / self.per_second)
        self._recent = [time for time in self._recent if time > now - window]
        if len(self._recent) < max(1, int(self.per_second)):
            self._recent.append(now)
            return 0.0
        return self._recent[0] + window - now
