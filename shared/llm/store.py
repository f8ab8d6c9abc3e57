"""The reply store and the spend ledger: one SQLite file in WAL mode, shared by every process of a machine.

An answer and its price enter in one transaction, before the answer is used: there is no moment at which we have paid
and do not know it, except between the provider's last byte and our commit. So a commit is made at once, by one thread,
and survives from then on whatever becomes of this process; another thread brings it to the disk, where it survives a
power failure too (on macOS: as far as fsync goes), and only then tells the caller. What is ready at the same time
shares a commit, what is committed while the disk is busy shares the next sync.

``data/cache/mock.sqlite`` and ``data/cache/live.sqlite`` are separate files: a stand-in's answer is never a live one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import os
import queue
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from shared.errors import BudgetError, SettingsError, SynthmillError
from shared.llm.catalogue import NANO
from shared.llm.types import Answer
from shared.records import Part

SCHEMA = 1
SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
ROOM, LOOK_S = 32 << 20, 0.1
"""Bytes that must be free before a question is sent, and how often to look: what is under way (hundreds of answers of
a few kilobytes, a few parts of 12 MB of vectors) and the log's growth up to its checkpoint (4 MB) must fit."""
STALE_S = 3600.0
"""Reservations of versions that held no lock: not renewed for this long, they belong to a process that died."""

_TABLES = """
CREATE TABLE replies (key TEXT PRIMARY KEY, request BLOB NOT NULL, answer BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE vectors (key TEXT PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL, track TEXT NOT NULL,
    stage TEXT NOT NULL, day TEXT NOT NULL, input INTEGER NOT NULL, output INTEGER NOT NULL,
    cached INTEGER NOT NULL, nano INTEGER NOT NULL, batch INTEGER NOT NULL);
CREATE TABLE spent (run TEXT PRIMARY KEY, nano INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE reserved (
    owner TEXT PRIMARY KEY, run TEXT NOT NULL, nano INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
"""


class Entry(Part):
    """One line of the ledger: what a call was for and what it cost."""

    key: str
    model: str
    run: str
    track: str
    stage: str
    input: int
    output: int
    cached: int
    nano: int
    batch: bool = False


class Store:
    """Replies, vectors and the ledger.

    Args:
        path: the SQLite file; made, with its directory, when it does not exist.

    Raises:
        SettingsError: the file was written by another schema version, or is no such database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"lock|{uuid.uuid4().hex}"
        self._alive = -1
        self._roomy_until = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reader = _open(path)
        self._clear_up()
        self._jobs: Jobs = queue.SimpleQueue()
        self._writer: threading.Thread | None = None

    def _clear_up(self) -> None:
        """Take away what killed processes left: what they had set aside, and the locks that said they live."""
        with contextlib.suppress(sqlite3.Error, OSError):  # nothing depends on it
            for lock in self.path.parent.glob(_lock_of(self.path, "lock|*").name):
                _dead(lock)
            if self._reader.execute("SELECT 1 FROM reserved").fetchone():
                _forget_the_dead(self._reader, self.path, self.owner)

    def check_room(self) -> None:
        """To be called before anything is paid for: is there room for its answer?

        Raises:
            SynthmillError: less than :data:`ROOM` is free.
        """
        if (now := time.monotonic()) < self._roomy_until:
            return
        with contextlib.suppress(OSError):
            disk = os.statvfs(self.path.parent)
            if disk.f_blocks and (free := disk.f_bavail * disk.f_frsize) < ROOM:
                raise SynthmillError(
                    f"only {free / 2**20:.1f} MiB are free in {self.path.parent}, and {ROOM >> 20} are wanted; nothing "
                    "more is asked, because its answer might not be kept",
                    "free some disk, then run the same command",
                )
        self._roomy_until = now + LOOK_S

    # -- reading, from the caller's thread

    def answer(self, key: str) -> Answer | None:
        """The stored answer, or None."""
        rows = self.rows("SELECT answer FROM replies WHERE key = ?", key)
        try:
            return Answer.model_validate_json(zlib.decompress(rows[0][0])) if rows else None
        except (zlib.error, ValidationError) as error:
            raise _unusable(self.path, error) from None

    def request(self, key: str) -> dict[str, Any] | None:
        """The wire body that was answered, or None."""
        rows = self.rows("SELECT request FROM replies WHERE key = ?", key)
        try:
            return orjson.loads(zlib.decompress(rows[0][0])) if rows else None
        except (zlib.error, orjson.JSONDecodeError) as error:
            raise _unusable(self.path, error) from None

    def vector(self, key: str) -> bytes | None:
        """The stored embedding as little-endian float32 bytes, or None."""
        rows = self.rows("SELECT vector FROM vectors WHERE key = ?", key)
        return rows[0][0] if rows else None

    def spent_usd(self, run: str) -> float:
        """Everything ever paid for a run."""
        rows = self.rows("SELECT nano FROM spent WHERE run = ?", run)
        return (rows[0][0] if rows else 0) / NANO

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Rows of a reading query.

        Raises:
            SettingsError: the file is damaged or cannot be read.
        """
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise _unusable(self.path, error) from None

    # -- writing, through the one writer thread

    async def put(self, entry: Entry, request: dict[str, Any], answer: Answer, reserved: int = 0) -> None:
        """Store an answer with its ledger line, and give back what was reserved; returns once all is on disk."""
        asked, answered = orjson.dumps(request), answer.model_dump_json().encode()

        def write(db: sqlite3.Connection) -> None:
            packed = zlib.compress(asked, 1), zlib.compress(answered, 1)
            db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (entry.key, *packed))
            self._bill(db, entry, reserved)

        await self._write(write)

    async def put_vectors(self, entry: Entry, vectors: dict[str, bytes], reserved: int = 0) -> None:
        """Store embeddings with the ledger line of the call that brought them; as :meth:`put`."""

        def write(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", vectors.items())
            self._bill(db, entry, reserved)

        await self._write(write)

    async def reserve(self, run: str, nano: int, budget_nano: int) -> bool:
        """Set money aside for a call that is about to be sent, across all processes.

        Returns:
            False when only what calls under way have set aside is in the way: most cost far less, so ask again.

        Raises:
            BudgetError: what is spent for the run leaves too little, whatever the calls under way cost.
        """
        reserved = False

        def write(db: sqlite3.Connection) -> None:
            nonlocal reserved
            self._hold_lock()
            (spent,) = db.execute("SELECT COALESCE(SUM(nano), 0) FROM spent WHERE run = ?", (run,)).fetchone()
            (aside,) = db.execute("SELECT COALESCE(SUM(nano), 0) FROM reserved WHERE run = ?", (run,)).fetchone()
            if spent + aside + nano > budget_nano:
                _forget_the_dead(db, self.path, self.owner)
                (aside,) = db.execute("SELECT COALESCE(SUM(nano), 0) FROM reserved WHERE run = ?", (run,)).fetchone()
            if spent + nano > budget_nano:
                raise over_budget(run, spent, nano, budget_nano)
            reserved = spent + aside + nano <= budget_nano
            if not reserved:
                return
            db.execute(
                "INSERT INTO reserved VALUES (?, ?, ?, ?) "
                "ON CONFLICT (owner) DO UPDATE SET nano = nano + excluded.nano, at = excluded.at",
                (self.owner, run, nano, time.time()),
            )

        await self._write(write, lasting=False)
        return reserved

    async def release(self, nano: int) -> None:
        """Give back what :meth:`reserve` set aside for a call that brought nothing."""
        if nano:
            await self._write(lambda db: self._give_back(db, nano), lasting=False)

    def _hold_lock(self) -> None:
        """Lock a file that says this process lives, for as long as it does: the kernel lets go of it, however it dies.

        A process number would not do: in a container another process has the same, and nobody outside can ask for it.
        """
        path = _lock_of(self.path, self.owner)
        while self._alive < 0:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                self._alive = fd
            else:  # between the two, somebody who clears up after the killed took it for one of theirs
                os.close(fd)

    def _give_back(self, db: sqlite3.Connection, nano: int) -> None:
        db.execute("UPDATE reserved SET nano = nano - ? WHERE owner = ?", (nano, self.owner))

    def _bill(self, db: sqlite3.Connection, e: Entry, reserved: int) -> None:
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        db.execute(
            "INSERT INTO ledger (key, model, run, track, stage, day, input, output, cached, nano, batch) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (e.key, e.model, e.run, e.track, e.stage, day, e.input, e.output, e.cached, e.nano, e.batch),
        )
        db.execute(
            "INSERT INTO spent VALUES (?, ?) ON CONFLICT (run) DO UPDATE SET nano = nano + excluded.nano",
            (e.run, e.nano),
        )
        if reserved:
            self._give_back(db, reserved)

    async def _write(self, work: Callable[[sqlite3.Connection], Any], *, lasting: bool = True) -> None:
        """Return when the work is on disk; when it is not ``lasting``, as soon as every process sees it."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._serve, name="reply-store", daemon=True)
            self._writer.start()
        job = _Job(work, asyncio.get_running_loop(), lasting)
        self._jobs.put(job)
        await job.done

    def _serve(self) -> None:
        try:
            db = _open(self.path)
        except SynthmillError as error:  # whoever waits must hear of it, or it waits for ever
            while (job := self._jobs.get()) is not None:
                job.settle(error)
            return
        disk, more = _Disk(self.path), True
        while more:
            group, more = _next_group(self._jobs)
            _commit(db, group)
            disk.take([job for job in group if not job.settle_early()])
        disk.close()
        with contextlib.suppress(sqlite3.Error):
            db.execute("DELETE FROM reserved WHERE owner = ?", (self.owner,))
        db.close()
        if self._alive >= 0:
            with contextlib.suppress(OSError):
                _lock_of(self.path, self.owner).unlink()
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        """Wait for the writer; give back every reservation of this process."""
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join()
            self._writer = None
        self._reader.close()


class _Job:
    def __init__(
        self, work: Callable[[sqlite3.Connection], Any], loop: asyncio.AbstractEventLoop, lasting: bool
    ) -> None:
        self.work, self.loop, self.lasting, self.done = work, loop, lasting, loop.create_future()
        self.error: BaseException | None = None

    def settle_early(self) -> bool:
        """Whether this job need not wait for the disk; then whoever waits for it has been told."""
        early = self.error is not None or not self.lasting
        if early:
            self.settle(self.error)
        return early

    def settle(self, error: BaseException | None) -> None:
        """From another thread: tell whoever waits how it went."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.finish, error)

    def finish(self, error: BaseException | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


Jobs = queue.SimpleQueue[_Job | None]


def _next_group(jobs: Jobs) -> tuple[list[_Job], bool]:
    """The jobs that wait, at least one and at most 256, and whether more may come; None is the last."""
    group: list[_Job] = []
    job = jobs.get()
    while job is not None and len(group) < 255:
        group.append(job)
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return group, True
    return group + ([job] if job else []), job is not None


def _commit(db: sqlite3.Connection, group: list[_Job]) -> None:
    """Run a group of jobs in one transaction; a job that refuses (no budget) takes only itself out."""
    if not group:
        return
    try:
        db.execute("BEGIN IMMEDIATE")
        for job in group:
            try:
                job.work(db)
            except SynthmillError as refusal:
                job.error = refusal
        db.execute("COMMIT")
    except Exception as error:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        for job in group:
            job.error = _not_kept(error)


def _not_kept(error: Exception) -> SynthmillError:
    return SynthmillError(
        f"the reply store cannot be written: {error}; nothing more is asked, because it could not be kept",
        "free some disk or open data/cache for writing, then run the same command",
    )


class _Disk:
    """Brings commits to the disk: a thread that syncs the write-ahead log, again and again while there are new ones.

    SQLite could do it inside each commit (``synchronous = FULL``). But then the answers that come in meanwhile are in
    memory only, for milliseconds on a good disk, and a killed process pays for them again. What a commit has written
    outlives the process at once; this does the rest, as SQLite would: a sync of the whole log, whoever wrote to it.
    Frames that a checkpoint has moved out of the log are on disk before it is used anew.
    """

    def __init__(self, store: Path) -> None:
        self._wal = store.with_name(f"{store.name}-wal")
        # Of its own: SQLite holds its locks, which closing any handle of a file gives up, on the other two files.
        self._fd = -1
        self._failed: SynthmillError | None = None
        self._jobs: Jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="reply-store-disk", daemon=True)
        self._thread.start()

    def take(self, committed: list[_Job]) -> None:
        """Tell these jobs' callers when they are on disk."""
        for job in committed:
            self._jobs.put(job)

    def close(self) -> None:
        """Wait until all of them are."""
        self._jobs.put(None)
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)

    def _serve(self) -> None:
        more = True
        while more:
            jobs, more = _next_group(self._jobs)
            if jobs:
                self._sync()
            for job in jobs:
                job.settle(self._failed)

    def _sync(self) -> None:
        if self._failed is not None:  # a second sync may say all is well, and what the first lost is lost
            return
        try:
            if self._fd < 0:
                self._fd = os.open(self._wal, os.O_RDONLY | os.O_CLOEXEC)
            SYNC(self._fd)
        except OSError as error:
            self._failed = _not_kept(error)


def over_budget(run: str, spent: int, nano: int, budget_nano: int) -> BudgetError:
    """What to raise before the call that would exceed the budget."""
    return BudgetError(
        f"BUDGET_USD={budget_nano / NANO:g} is reached for RUN={run}: ${spent / NANO:.4f} spent, "
        f"the next call may cost ${nano / NANO:.4f}",
        f"everything answered is saved; go on with BUDGET_USD=<more> make {run}",
    )


def _lock_of(store: Path, owner: str) -> Path:
    return store.parent / f".owner-{owner.partition('|')[2]}.lock"


def _forget_the_dead(db: sqlite3.Connection, store: Path, me: str) -> None:
    """Free what processes set aside that were killed, on this machine or in a container; not what a batch will cost."""
    others = "SELECT owner, at FROM reserved WHERE owner != ? AND owner NOT LIKE 'batch|%'"
    for owner, at in db.execute(others, (me,)).fetchall():
        stale = at < time.time() - STALE_S  # what counts for versions that held no lock
        if _dead(_lock_of(store, owner)) if owner.startswith("lock|") else stale:
            db.execute("DELETE FROM reserved WHERE owner = ?", (owner,))


def _dead(lock: Path) -> bool:
    """Whether nobody holds the lock; then its file is removed."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:  # cannot be asked
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else another process removed it, and the name may be a living one's by now
            with contextlib.suppress(OSError):
                lock.unlink()
        return True
    except OSError:  # held, or a file system without locks: then it is never given up by us
        return False
    finally:
        os.close(fd)


def _open(path: Path) -> sqlite3.Connection:
    # One at a time: two processes that set the journal mode at once are told "locked" without being made to wait.
    try:
        with open(path.with_name(f".{path.name}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _open_alone(path)
    except (OSError, sqlite3.DatabaseError) as error:
        raise _unusable(path, error) from None


def _open_alone(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    version, tables = _state(db)
    if version == tables == 0:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        version, tables = _state(db)  # another process may have been quicker
        if version == tables == 0:
            for statement in _TABLES.strip().split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            version = SCHEMA
        db.execute("COMMIT")
    if version == SCHEMA:  # asked before anything is set: setting the journal mode writes to the file
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a commit is in the log at once, and :class:`_Disk` syncs that
        db.execute("PRAGMA cache_size = -512")  # KiB; the system keeps the file's pages too
        return db
    db.close()
    raise SettingsError(
        f"the reply store {path} has schema version {version}; this code reads {SCHEMA}. It was not touched.",
        "check out the code that wrote it, or move it away (its answers would be paid for again)",
    )


def _state(db: sqlite3.Connection) -> tuple[int, int]:
    """Schema version and number of tables; both 0 for a new file."""
    # Tables first: both are made in one transaction, so another process may finish between the two questions.
    tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    return db.execute("PRAGMA user_version").fetchone()[0], tables


def _unusable(path: Path, error: Exception) -> SettingsError:
    """What to do about a store that cannot be used; only a damaged one is worth giving up."""
    if isinstance(error, (OSError, sqlite3.OperationalError)):  # locked, full disk, no rights: what is in it is fine
        mend = f"let other processes end, free some disk or open {path.parent} for writing, then run the same command"
    else:
        aside = path.parent / "broken"
        mend = (
            f"restore a backup, or: mkdir {aside} && mv {path}* {aside} and run again "
            "(its answers would be paid for again)"
        )
    return SettingsError(f"the reply store {path} cannot be used: {error}", mend)
