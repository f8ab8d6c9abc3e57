"""Faults on demand, seeded, and the same whatever the concurrency.

``STANDIN_FAULTS="429=0.05,529=0.02,500=0.02,reset=0.01,timeout=0.0,truncate=0.02,refuse=0.01,broken_json=0.02,seed=7"``

- Transport faults (a status, ``reset``, ``timeout``) are decided by a hash of the seed, the request, and how many times
  this request has come: a retry may succeed. None hits a request more than twice in a row.
- Content faults (``truncate``, ``refuse``, ``broken_json``) are decided by a hash of the seed and the request alone: a
  second run sees the same.
- A request's own header ``x-standin-fault: 429`` is obeyed every time; ``429*2``, the first two times.

``retry_after`` (seconds, default 1) goes with 429 and 529; ``timeout_s`` (default 600) is how long a request hangs.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.errors import SettingsError

STATUSES = ("400", "401", "403", "404", "408", "409", "413", "429", "500", "502", "503", "504", "529")
TRANSPORT = (*STATUSES, "quota", "reset", "timeout")
CONTENT = ("truncate", "refuse", "broken_json")
MOST_IN_ROW = 2


class Fault(NamedTuple):
    """What goes wrong with one request; ``""`` for nothing."""

    transport: str = ""
    content: str = ""


@dataclass
class Faults:
    """Decides what goes wrong with each request.

    Args:
        shares: share of requests, 0 to 1, by fault.
        seed: of the hash.
        retry_after_s: what 429 and 529 ask for.
        timeout_s: how long a ``timeout`` hangs before the connection closes.
    """

    shares: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    retry_after_s: float = 1.0
    timeout_s: float = 600.0
    _times: Counter[bytes] = field(default_factory=Counter)
    _row: Counter[bytes] = field(default_factory=Counter)
    _asked: Counter[tuple[bytes, str]] = field(default_factory=Counter)

    def decide(self, path: str, body: bytes, wish: str = "") -> Fault:
        """The fault of a request; ``wish`` is its header. Counts the request."""
        digest = hashlib.sha256(path.encode() + b"\0" + body).digest()
        if wish:
            return self._wished(digest, wish.strip().lower())
        if not self.shares:
            return Fault()
        self._times[digest] += 1
        hit = self._pick(TRANSPORT, digest, str(self._times[digest]))
        if hit and self._row[digest] < MOST_IN_ROW:
            self._row[digest] += 1
            return Fault(transport=hit)
        del self._row[digest]
        return Fault(content=self._pick(CONTENT, digest, "content"))

    def _wished(self, digest: bytes, wish: str) -> Fault:
        name, _, times = wish.partition("*")
        self._asked[digest, wish] += 1
        if times.isdigit() and self._asked[digest, wish] > int(times):
            return Fault()
        if name in TRANSPORT:
            return Fault(transport=name)
        return Fault(content=name) if name in CONTENT else Fault(transport="400")

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
    numbers = ("seed", "retry_after", "timeout_s")
    known = (*TRANSPORT, *CONTENT, *numbers)
    shares: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"STANDIN_FAULTS: unknown fault {name!r}", f"the nearest valid one is {near!r}")
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
        shares={name: share for name, share in shares.items() if share},
    )
    for kind in (TRANSPORT, CONTENT):
        total = sum(faults.shares.get(name, 0.0) for name in kind)
        if total > 1 or min(faults.shares.values(), default=0) < 0:
            raise SettingsError(f"STANDIN_FAULTS: the shares of {', '.join(kind[-3:])}, ... are {total}", "at most 1")
    return faults


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
