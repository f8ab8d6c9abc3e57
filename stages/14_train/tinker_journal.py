"""What a run at a training service did and paid: a journal of its own, and the ledger that all stages share.

The journal is a file of JSON lines, each on disk before what it announces is sent, so a killed run knows what it paid
for and from which state to go on::

    began    a training starts; `training` is its name in the ledger
    step     a batch is sent: paid, whatever becomes of it
    measure  the validation rows are sent
    keep     the service is asked to keep the state
    saved    the service keeps the state after `step` (weights and optimizer) at `path`; with the losses up to it.
             Behind the scheduled steps, and where a run was interrupted
    export   the weights after `step` are asked for
    exported they can be fetched from `path`
    resumed  a later process goes on behind `step`; `lost` steps had been paid beyond it

There is no other state to keep: `step` and the seed say which rows come next (:mod:`batches`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from losses import Loss

from shared.errors import BudgetError, SettingsError
from shared.llm.catalogue import NANO
from shared.llm.journal import in_the_way, set_aside
from shared.llm.store import Entry, Store
from shared.stage import shown

STAGE = "14_train"
INFINITY = float("inf")
RESERVE_AGAIN_S = 0.1
"""While calls of other processes hold the rest of the budget, how often to look whether they cost less."""


# ---------------------------------------------------------------- the journal


class Saved(NamedTuple):
    """A state the service keeps. ``trained_tokens`` and ``seconds`` are of the training up to it."""

    step: int
    path: str
    valid_loss: float | None
    trained_tokens: int
    seconds: float


class Journal:
    """The journal at a path, read whole, and appended to; a file is made by :meth:`begin`.

    Attributes:
        training: name of this training, new for each.
        nano: nanodollars paid so far, lost steps included.
        saved: the states, in order of their steps.
        losses: those up to the last state.
        lost: steps that were paid and are behind no state, up to now.

    Raises:
        SettingsError: a line that is not the last is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training, self.nano, self.lost = "", 0, 0
        self.saved: list[Saved] = []
        self.losses: list[Loss] = []
        self.exports: dict[int, str] = {}
        self._sent: set[int] = set()
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # killed in the middle of a line: what it announced was not sent
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(orjson.loads(line))
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise SettingsError(
                    f"{shown(path)}:{number} is no line of a journal: {error}", f"rm -r {shown(path.parent.parent)}"
                ) from None

    def begin(self) -> None:
        """Give the training a name, unless it has one."""
        if not self.training:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write("began", training=uuid.uuid4().hex[:12])

    @property
    def unsaved(self) -> int:
        """Steps sent since the last state was saved or gone on from: what a kill now would lose."""
        return len(self._sent)

    @property
    def best(self) -> Saved:
        """The state with the lowest validation loss, the first of equals; the last where nothing was measured."""
        measured = [state for state in self.saved if state.valid_loss is not None]
        return min(measured, key=lambda state: state.valid_loss or 0.0) if measured else self.saved[-1]

    def write(self, event: str, **fields: Any) -> None:
        """Append a line; it is on disk when this returns."""
        line = {"event": event, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
        new = not self.path.exists()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
            if (written := os.write(file, data)) < len(data):  # the disk is full: leave no half line to write on behind
                os.ftruncate(file, os.fstat(file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file)
        finally:
            os.close(file)
        if new:
            _sync(self.path.parent)
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        event = line["event"]
        self.nano += int(line.get("nano", 0))
        if event == "began":
            self.training = str(line["training"])
        elif event == "step":
            self._sent.add(int(line["step"]))
        elif event == "saved":
            self.saved.append(Saved(*(line[name] for name in Saved._fields)))
            self.losses += [Loss(*loss) for loss in line["losses"]]
            self._sent = {step for step in self._sent if step > self.saved[-1].step}
        elif event == "exported":
            self.exports[int(line["step"])] = str(line["path"])
        elif event == "resumed":
            self.lost += int(line["lost"])
            self._sent = set()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- the ledger


@dataclass
class Ledger:
    """The spend ledger of this machine, for one run and track.

    Attributes:
        cache: ``data/cache``; ``apis`` chooses the file in it, as for every stage.
        budget_usd: the most that may ever be spent for ``run``; None = no cap.
    """

    cache: Path
    apis: str
    run: str
    track: str
    budget_usd: float | None

    def __post_init__(self) -> None:
        self._store = Store(self.cache / f"{self.apis}.sqlite")
        self._runner = asyncio.Runner()
        self._held = 0  # nanodollars set aside for what comes behind the next payment

    def close(self) -> None:
        """Wait for what is being written."""
        self._runner.close()
        self._store.close()

    def afford(self, usd: float, what: str) -> str:
        """How much is left, in words, when it is enough for what comes.

        Raises:
            BudgetError: it is not; nothing of it was spent.
        """
        if self.budget_usd is None:
            return "no cap (BUDGET_USD is not set)"
        spent = self._store.spent_usd(self.run) + set_aside(self._store, self.run) / NANO
        left = max(0.0, self.budget_usd - spent)
        if usd > left:
            raise BudgetError(
                f"{what} costs about ${usd:,.4f}, and ${left:,.4f} of BUDGET_USD={self.budget_usd:g} are left for "
                f"RUN={self.run}",
                f"BUDGET_USD={spent + usd * 1.1:.2f} make stage14 RUN={self.run}, or fewer epochs or records",
            )
        return f"${left:,.4f} of BUDGET_USD={self.budget_usd:g} are left"

    def pay(
        self,
        key: str,
        model: str,
        tokens: int,
        nano: int,
        aside: int = 0,
        until: Callable[[], float] = lambda: INFINITY,
    ) -> None:
        """Enter what is sent next, and keep ``aside`` nanodollars set aside for the next payment.

        ``until``: how long to wait, by the monotonic clock, while calls of other processes hold what is missing.

        Raises:
            BudgetError: the budget does not hold both, for other stages spend at the same time; it must not be sent.
        """
        self._runner.run(self._pay(key, model, tokens, nano, aside, until))

    async def _pay(self, key: str, model: str, tokens: int, nano: int, aside: int, until: Callable[[], float]) -> None:
        entry = Entry(
            key=key,
            model=model,
            run=self.run,
            track=self.track,
            stage=STAGE,
            input=tokens,
            output=0,
            cached=0,
            nano=nano,
        )
        if self.budget_usd is None:
            await self._store.put_vectors(entry, {})  # an answer that is not kept: the line alone
            return
        missing = max(0, nano + aside - self._held)
        if missing:
            await self._reserve(missing, until)
            self._held += missing
        await self._store.put_vectors(entry, {}, self._held - aside)
        self._held = aside

    async def _reserve(self, nano: int, until: Callable[[], float]) -> None:
        assert self.budget_usd is not None
        cap, told = round(self.budget_usd * NANO), False
        while not await self._store.reserve(self.run, nano, cap):
            if batches := in_the_way(self._store, self.run, self._held + nano, cap):
                what = f"${batches / NANO:.4f} of it are set aside for batches that are under way at their providers"
            elif round(self._store.spent_usd(self.run) * NANO) + self._held + nano > cap:
                what = f"${self._held / NANO:.4f} of it are set aside for keeping the state behind the last step"
            elif time.monotonic() > until():
                what = "the rest of it is set aside for calls of other stages"
            else:
                if not told:
                    told = True
                    print("waiting: the rest of BUDGET_USD is set aside for calls under way", file=sys.stderr)
                await asyncio.sleep(RESERVE_AGAIN_S)
                continue
            raise BudgetError(
                f"BUDGET_USD={self.budget_usd:g} has no room for the next ${nano / NANO:.4f} of RUN={self.run}: {what}",
                f"let them end (batches: BATCH=1 make {self.run}), or give more: "
                f"BUDGET_USD={self.budget_usd + nano / NANO:.2f} make stage14 RUN={self.run}",
            )
