"""The journal of batches: what was sent to be answered later, in the same file as the answers and the ledger.

A batch is written down before it is created, with all that is needed to recognise it at the provider and to keep its
answers: whichever process finds it there again, now or days later, does the rest. A request leaves the journal in the
transaction that brings its answer and its price in, so each is billed once, however often its batch is fetched. A key
is in one batch at most, whatever the number of processes: who asks for it waits for that batch.

What a batch may cost at most is reserved under its own name, not its process's, until its answers have taken the place.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from shared.llm.catalogue import NANO
from shared.llm.store import Entry, Store, _dead, _forget_the_dead, _lock_of, over_budget
from shared.llm.types import Answer

_TABLES = (
    "CREATE TABLE IF NOT EXISTS batches (name TEXT PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, "
    "model TEXT NOT NULL, run TEXT NOT NULL, track TEXT NOT NULL, stage TEXT NOT NULL, requests INTEGER NOT NULL, "
    "at REAL NOT NULL, done REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS batched (key TEXT PRIMARY KEY, batch TEXT NOT NULL, nano INTEGER NOT NULL, "
    "request BLOB NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS batched_by_batch ON batched (batch)",
)


class Ask(NamedTuple):
    """One request to be sent in a batch.

    Attributes:
        again: tells a repeated question from the first.
        nano: the most it can cost there, in nanodollars.
        size: of its body as JSON, in bytes.
    """

    model: str
    key: str
    again: str
    wire: dict[str, Any]
    nano: int
    size: int


class Batch(NamedTuple):
    """One batch as the journal has it.

    Attributes:
        name: ours.
        id: the provider's; ``""`` = not known (yet).
        owner: the process that creates it, or looks for it.
        at: when it was written down, in seconds since 1970; ``done``: when its last answer was; 0 = not yet.
    """

    name: str
    id: str
    owner: str
    model: str
    run: str
    track: str
    stage: str
    requests: int
    at: float
    done: float = 0.0


class Journal:
    """The batches in a store; :meth:`open` first."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def open(self) -> None:
        """Make the tables where they are missing."""

        def write(db: sqlite3.Connection) -> None:
            for statement in _TABLES:
                db.execute(statement)

        await self.store._write(write)

    # -- reading

    def batch_of(self, key: str) -> str:
        """The name of the batch that a key waits in; ``""`` for none."""
        rows = self.store.rows("SELECT batch FROM batched WHERE key = ?", key)
        return str(rows[0]["batch"]) if rows else ""

    def get(self, name: str) -> Batch | None:
        """A batch; None when it was taken back, because it was never created."""
        rows = self.store.rows("SELECT * FROM batches WHERE name = ?", name)
        return Batch(*rows[0]) if rows else None

    def waiting(self, run: str) -> list[Batch]:
        """The batches of a run that have not brought all their answers."""
        return [Batch(*row) for row in self.store.rows("SELECT * FROM batches WHERE run = ? AND done = 0", run)]

    def ids(self) -> set[str]:
        """The provider's ids of all batches there ever were."""
        return {row["id"] for row in self.store.rows("SELECT id FROM batches WHERE id != ''")}

    def keys(self, name: str) -> list[str]:
        """The keys of a batch whose answers are not in."""
        return [row["key"] for row in self.store.rows("SELECT key FROM batched WHERE batch = ?", name)]

    def abandoned(self, batch: Batch) -> bool:
        """Whether the process that was to create it, or to look for it, is dead."""
        return batch.owner != self.store.owner and _dead(_lock_of(self.store.path, batch.owner))

    # -- writing

    async def intend(self, batch: Batch, asks: Sequence[Ask], budget_nano: int | None) -> dict[str, str]:
        """Write down a batch of as many requests, from the first on, as the budget has room for, and reserve that.

        Returns:
            The batch of each key that is in one now: this one, or the one it was in; ``""`` = it is answered. Nothing
            when only what is reserved is in the way.

        Raises:
            BudgetError: what is spent leaves too little for the first request alone.
        """
        placed: dict[str, str] = {}

        def write(db: sqlite3.Connection) -> None:
            self.store._hold_lock()
            room = float("inf")
            (spent,) = db.execute("SELECT COALESCE(SUM(nano), 0) FROM spent WHERE run = ?", (batch.run,)).fetchone()
            if budget_nano is not None:
                _forget_the_dead(db, self.store.path, self.store.owner)
                aside = "SELECT COALESCE(SUM(nano), 0) FROM reserved WHERE run = ?"
                room = budget_nano - spent - db.execute(aside, (batch.run,)).fetchone()[0]
            fresh, nano = [], 0
            for ask in asks:
                if row := db.execute("SELECT batch FROM batched WHERE key = ?", (ask.key,)).fetchone():
                    placed[ask.key] = row["batch"]
                elif db.execute("SELECT 1 FROM replies WHERE key = ?", (ask.key,)).fetchone():
                    placed[ask.key] = ""
                elif nano + ask.nano > room:
                    if budget_nano is not None and not placed and spent + ask.nano > budget_nano:
                        raise over_budget(batch.run, spent, ask.nano, budget_nano)
                    break
                else:
                    placed[ask.key] = batch.name
                    nano += ask.nano
                    fresh.append((ask.key, batch.name, ask.nano, zlib.compress(orjson.dumps(ask.wire), 1)))
            if fresh:
                row = batch._replace(requests=len(fresh))
                db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                db.executemany("INSERT INTO batched VALUES (?, ?, ?, ?)", fresh)
                db.execute("INSERT INTO reserved VALUES (?, ?, ?, ?)", (_purse(batch), batch.run, nano, batch.at))

        await self.store._write(write)
        return placed

    async def created(self, name: str, identity: str) -> None:
        """The provider has it under this id."""
        await self.store._write(lambda db: db.execute("UPDATE batches SET id = ? WHERE name = ?", (identity, name)))

    async def adopt(self, batch: Batch) -> bool:
        """Look for it in the place of a dead process; False when another one does already."""
        mine = False

        def write(db: sqlite3.Connection) -> None:
            nonlocal mine
            self.store._hold_lock()
            values = (self.store.owner, batch.name, batch.owner)
            mine = db.execute("UPDATE batches SET owner = ? WHERE name = ? AND owner = ?", values).rowcount == 1

        await self.store._write(write)
        return mine

    async def keep(self, batch: Batch, answers: Sequence[tuple[Answer, Entry]]) -> list[Entry]:
        """Store answers of a batch with their ledger lines; those that were not in already."""
        billed: list[Entry] = []

        def write(db: sqlite3.Connection) -> None:
            for answer, entry in answers:
                here = (entry.key, batch.name)
                row = db.execute("SELECT nano, request FROM batched WHERE key = ? AND batch = ?", here).fetchone()
                if row is None:
                    continue
                db.execute("DELETE FROM batched WHERE key = ?", (entry.key,))
                packed = zlib.compress(answer.model_dump_json().encode(), 1)
                # Asked directly meanwhile, it is paid twice; the answer that was used already stays.
                db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (entry.key, row["request"], packed))
                db.execute("UPDATE reserved SET nano = nano - ? WHERE owner = ?", (row["nano"], _purse(batch)))
                self.store._bill(db, entry, 0)
                billed.append(entry)

        await self.store._write(write)
        return billed

    async def finish(self, batch: Batch, *, at_most: bool = False) -> int:
        """No more answers will come; how many are missing. ``at_most``: book the most that these may have cost."""
        missing = 0

        def write(db: sqlite3.Connection) -> None:
            nonlocal missing
            total = "SELECT COUNT(*), COALESCE(SUM(nano), 0) FROM batched WHERE batch = ?"
            missing, nano = db.execute(total, (batch.name,)).fetchone()
            if at_most and missing:
                whose = {"model": batch.model, "run": batch.run, "track": batch.track, "stage": batch.stage}
                entry = Entry(key=f"batch {batch.name}", **whose, input=0, output=0, cached=0, nano=nano, batch=True)
                self.store._bill(db, entry, 0)
            _forget(db, batch)
            db.execute("UPDATE batches SET done = ? WHERE name = ?", (time.time(), batch.name))

        await self.store._write(write)
        return missing

    async def take_back(self, batch: Batch) -> None:
        """It was not created: its requests may be sent anew, and cost nothing."""

        def write(db: sqlite3.Connection) -> None:
            _forget(db, batch)
            db.execute("DELETE FROM batches WHERE name = ?", (batch.name,))

        await self.store._write(write)


def _purse(batch: Batch) -> str:
    """Whose a batch's reservation is: nobody who can die."""
    return f"batch|{batch.name}"


def _forget(db: sqlite3.Connection, batch: Batch) -> None:
    db.execute("DELETE FROM batched WHERE batch = ?", (batch.name,))
    db.execute("DELETE FROM reserved WHERE owner = ?", (_purse(batch),))


def set_aside(store: Store, run: str) -> int:
    """Nanodollars that batches of a run, which are under way at their providers, may cost at most."""
    query = "SELECT COALESCE(SUM(nano), 0) FROM reserved WHERE run = ? AND owner LIKE 'batch|%'"
    return int(store.rows(query, run)[0][0])


def in_the_way(store: Store, run: str, nano: int, budget_nano: int) -> int:
    """What batches have set aside, when that leaves no room for ``nano``; else 0.

    Whoever does not look at batches must not wait for theirs: that might never end.
    """
    aside = set_aside(store, run)
    return aside if round(store.spent_usd(run) * NANO) + aside + nano > budget_nano else 0
