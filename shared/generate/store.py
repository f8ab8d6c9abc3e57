"""Every finished local generation, kept: a killed run never generates the same text again.

One append-only SQLite file, shared by every run of a machine; the stand-in's runs have one of their own. Generations
cost hours, not dollars, so they are apart from the ledger of paid replies. An entry is the raw output, as the model
wrote it: cleaning and rejecting happen after it is read back, so changing their rules costs nothing.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.errors import SettingsError, SynthmillError
from shared.stage import shown

SCHEMA = 1
_TABLE = """
CREATE TABLE generations (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL, tokens INTEGER NOT NULL
) STRICT, WITHOUT ROWID
"""


class Finished(NamedTuple):
    """A finished generation: ``finish_reason`` is ``stop`` or ``length``; ``tokens`` counts the model's own."""

    text: str
    finish_reason: str
    tokens: int


def store_path(cache: Path, apis: str) -> Path:
    """Where the generations of live runs lie, or of the stand-in's: what it serves bears the names of real models."""
    return cache / f"generations_{apis}.sqlite"


class GenerationStore:
    """The store at ``path``, made with its directory when it does not exist.

    Raises:
        SettingsError: the file was written by another schema version, or is no such store; it is left untouched.
        SynthmillError: it cannot be opened or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # 60 s: another process may be writing; its transactions last milliseconds.
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise self._in_the_way(error) from None
        try:
            self._check()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise self._in_the_way(error) from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise SettingsError(f"{shown(path)} is no store of generations: {error}", self._mend()) from None
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        if self._version() == 0:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("BEGIN IMMEDIATE")  # two first runs at once: one makes the table, the other finds it
            if self._version() == 0 and not self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            self._db.execute("COMMIT")
        if self._version() != SCHEMA:
            raise SettingsError(
                f"{shown(self.path)} has schema version {self._version()}; this code reads version {SCHEMA}",
                self._mend(),
            )

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _mend(self) -> str:
        name = shown(self.path)
        return f"check out the code that wrote it, or: mv {name} {name}.old   (its texts would be generated again)"

    def _in_the_way(self, error: sqlite3.OperationalError) -> SynthmillError:
        """Locked, a full disk, no rights: what is in the store is fine."""
        return SynthmillError(
            f"{shown(self.path)} cannot be used: {error}; what was generated before is kept",
            f"let other processes end, free some disk or open {shown(self.path.parent)} for writing, "
            "then run the same command",
        )

    def find(self, keys: Sequence[str]) -> dict[str, Finished]:
        """The stored generations among ``keys``."""
        found: dict[str, Finished] = {}
        for start in range(0, len(keys), 500):  # below SQLite's oldest limit of 999 parameters
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            query = f"SELECT key, text, finish_reason, tokens FROM generations WHERE key IN ({marks})"
            found.update({key: Finished(*rest) for key, *rest in self._db.execute(query, some)})
        return found

    def add(self, finished: Iterable[tuple[str, Finished]]) -> None:
        """Keep generations; they are on the disk when this returns. One that is there already stays as it is.

        Raises:
            SynthmillError: they cannot be kept: a full disk, say.
        """
        rows = ((key, *generation) for key, generation in finished)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO generations VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise self._in_the_way(error) from None

    def count(self) -> int:
        """How many generations are kept."""
        return int(self._db.execute("SELECT COUNT(*) FROM generations").fetchone()[0])

    def close(self) -> None:
        self._db.close()
