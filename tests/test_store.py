"""The reply store and the ledger: what is paid for is kept, counted once, and never misread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import shared.llm.store as store_module
from shared.errors import BudgetError, SettingsError, SynthmillError
from shared.llm.catalogue import NANO
from shared.llm.store import STALE_S, Entry, Store
from shared.llm.types import Answer, Usage
from shared.stage import ROOT

ANSWER = Answer(text="naïve 文 \x00 →", stop="stop", detail="end_turn", usage=Usage(input=12, output=5), served_by="m")
WIRE = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def entry(key: str = "k", run: str = "trial", nano: int = 1_000) -> Entry:
    where: dict[str, Any] = {"run": run, "track": "compression", "stage": "04_validate"}
    return Entry(key=key, model="openai/m", **where, input=12, output=5, cached=0, nano=nano)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of ``work``, which must not take longer: a hang is a failure, not a hang of the suite."""
    done: list[Any] = []

    def call() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, f"still waiting after {seconds} s"
    result, error = done[0]
    if error is not None:
        raise error
    return result


def fill(path: Path, *keys: str) -> None:
    """A store with these answers in it."""
    store = Store(path)
    asyncio.run(_puts(store, keys))
    store.close()


async def _puts(store: Store, keys: tuple[str, ...]) -> None:
    await asyncio.gather(*(store.put(entry(key), WIRE, ANSWER) for key in keys))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "mock.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(path)
    yield opened
    within(20, opened.close)


# ---------------------------------------------------------------- keeping


def test_an_answer_is_found_again_with_its_question_and_its_price(store: Store) -> None:
    assert store.answer("k") is None and store.request("k") is None
    asyncio.run(store.put(entry(), WIRE, ANSWER))
    assert store.answer("k") == ANSWER
    assert store.request("k") == WIRE
    assert store.spent_usd("trial") == 1_000 / NANO and store.spent_usd("full") == 0
    (row,) = store.rows("SELECT * FROM ledger")
    assert (row["key"], row["model"], row["stage"], row["input"], row["nano"]) == (
        "k",
        "openai/m",
        "04_validate",
        12,
        1000,
    )


def test_vectors_are_found_again(store: Store) -> None:
    asyncio.run(store.put_vectors(entry("call"), {"a": b"\0\0\x80?", "b": b""}))
    assert store.vector("a") == b"\0\0\x80?" and store.vector("b") == b"" and store.vector("c") is None
    assert len(store.rows("SELECT * FROM ledger")) == 1, "one call, one line, whatever it brought"


def test_all_of_it_survives_the_process(path: Path) -> None:
    fill(path, "a", "b")
    again = Store(path)
    assert again.answer("a") == ANSWER and again.answer("b") == ANSWER
    assert again.spent_usd("trial") == 2_000 / NANO
    again.close()


def test_an_answer_is_on_disk_when_put_returns(path: Path) -> None:
    code = (
        "import asyncio, os, pathlib, signal, sys\n"
        "from shared.llm.store import Entry, Store\n"
        "from shared.llm.types import Answer\n"
        "e = Entry(key='k', model='openai/m', run='trial', track='t', stage='s', input=1, output=1, cached=0, nano=7)\n"
        "async def main():\n"
        "    await Store(pathlib.Path(sys.argv[1])).put(e, {}, Answer(text='paid', stop='stop'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    again = Store(path)
    answer = again.answer("k")
    assert answer is not None and answer.text == "paid" and again.spent_usd("trial") == 7 / NANO
    again.close()


def test_many_answers_share_a_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    commit = store_module._commit

    def counted(db: sqlite3.Connection, group: list[Any]) -> None:
        groups.append(len(group))
        commit(db, group)

    monkeypatch.setattr(store_module, "_commit", counted)
    keys = tuple(f"k{n}" for n in range(500))
    asyncio.run(_puts(store, keys))
    assert sum(groups) == 500 and len(groups) <= 50, f"{len(groups)} commits for 500 answers"
    assert all(store.answer(key) == ANSWER for key in keys)


class Disk:
    """A disk that syncs when it is told to; stands between the store and the real one."""

    def __init__(self) -> None:
        self.ready, self.broken, self.synced = threading.Event(), False, 0

    def sync(self, fd: int) -> None:
        assert self.ready.wait(20)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        os.fsync(fd)
        self.synced += 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    slow = Disk()
    monkeypatch.setattr(store_module, "SYNC", slow.sync)
    return slow


def test_a_kill_while_the_disk_is_busy_loses_nothing_and_nobody_is_told_before_it_is_done(
    path: Path, disk: Disk
) -> None:
    store = Store(path)

    async def put() -> None:
        first = asyncio.create_task(store.put(entry("first"), WIRE, ANSWER))
        deadline = time.monotonic() + 10
        while rows_of(path, "SELECT key FROM replies") != [("first",)]:  # another process has it already
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(store.put(entry(f"k{n}"), WIRE, ANSWER)) for n in range(50)]
        while len(rows_of(path, "SELECT key FROM replies")) < 51:  # nor do these wait for the disk
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert not first.done() and not any(other.done() for other in others)
        disk.ready.set()
        await asyncio.gather(first, *others)

    within(20, lambda: asyncio.run(put()))
    assert disk.synced <= 3, "what was committed meanwhile shares the next sync"
    within(20, store.close)


def test_setting_money_aside_does_not_wait_for_the_disk(path: Path, disk: Disk) -> None:
    store = Store(path)
    asyncio.run(asyncio.wait_for(store.reserve("trial", 10, 95), 10))
    asyncio.run(asyncio.wait_for(store.release(10), 10))
    disk.ready.set()
    within(20, store.close)


def test_a_disk_that_fails_once_is_not_believed_again(path: Path, disk: Disk) -> None:
    disk.broken = True
    disk.ready.set()
    store = Store(path)
    for key in ("first", "second"):  # a second sync may succeed although what the first had to write is lost
        with pytest.raises(SynthmillError, match=r"reply store cannot be written: .*Input/output error"):
            within(20, lambda key=key: asyncio.run(store.put(entry(key), WIRE, ANSWER)))  # type: ignore[misc]
        disk.broken = False
    within(20, store.close)


@pytest.mark.slow
def test_processes_share_one_file(path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from tests.test_store import fill\n"
        "fill(pathlib.Path(sys.argv[1]), *(f'{sys.argv[2]}{n}' for n in range(300)))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, path, name], cwd=ROOT) for name in "abc"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    store = Store(path)
    assert store.rows("SELECT COUNT(*) AS n FROM replies")[0]["n"] == 900
    assert store.spent_usd("trial") == 900_000 / NANO
    store.close()


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    # `make -j` does this: the first stages of several tracks start together.
    code = (
        "import pathlib, sys, time\n"
        "from tests.test_store import fill\n"
        "root, start = pathlib.Path(sys.argv[1]), float(sys.argv[2])\n"
        "for n in range(20):\n"
        "    time.sleep(max(0.0, start + n * 0.1 - time.time()))\n"
        "    fill(root / str(n) / 'mock.sqlite', *(f'{sys.argv[3]}{k}' for k in range(3)))\n"
    )
    start = str(time.time() + 3)
    pipes: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path, start, name], **pipes) for name in "abcdef"]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, said


# ---------------------------------------------------------------- versions and broken files


def other_version(path: Path, version: int, journal: str) -> bytes:
    """A store as another version of this code would leave it; its bytes."""
    fill(path, "a")
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA journal_mode = {journal}")
    db.execute(f"PRAGMA user_version = {version}")
    db.execute("ALTER TABLE replies RENAME COLUMN answer TO reply")
    db.commit()
    db.close()
    return path.read_bytes()


def test_a_store_of_the_first_version_is_still_read(path: Path) -> None:
    # Literal: the tables and an answer as schema version 1 wrote them first. What was paid for then is found today.
    path.parent.mkdir()
    written = b'{"text":"yes","stop":"stop","detail":"","usage":{"input":12,"output":5,"cached":0},"served_by":"m"}'
    with sqlite3.connect(path) as db:
        db.executescript(
            "CREATE TABLE replies (key TEXT PRIMARY KEY, request BLOB NOT NULL, answer BLOB NOT NULL) WITHOUT ROWID;"
            "CREATE TABLE vectors (key TEXT PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID;"
            "CREATE TABLE ledger (id INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL,"
            " track TEXT NOT NULL, stage TEXT NOT NULL, day TEXT NOT NULL, input INTEGER NOT NULL,"
            " output INTEGER NOT NULL, cached INTEGER NOT NULL, nano INTEGER NOT NULL, batch INTEGER NOT NULL);"
            "CREATE TABLE spent (run TEXT PRIMARY KEY, nano INTEGER NOT NULL) WITHOUT ROWID;"
            "CREATE TABLE reserved (owner TEXT PRIMARY KEY, run TEXT NOT NULL, nano INTEGER NOT NULL, at REAL NOT NULL)"
            " WITHOUT ROWID;"
            "PRAGMA user_version = 1;"
        )
        db.execute("INSERT INTO replies VALUES ('k', ?, ?)", (zlib.compress(b'{"model":"m"}'), zlib.compress(written)))
        db.execute("INSERT INTO spent VALUES ('trial', 250000000)")
    db.close()
    store = Store(path)
    answer = store.answer("k")
    assert answer is not None and (answer.text, answer.stop) == ("yes", "stop")
    assert (answer.usage.input, answer.usage.output, answer.usage.cached) == (12, 5, 0)
    assert store.request("k") == {"model": "m"} and store.spent_usd("trial") == 0.25
    assert asked(store, store.put(entry("new"), WIRE, ANSWER)) == [None] and store.answer("new") == ANSWER
    store.close()


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
@pytest.mark.parametrize("version", [2, 99])
def test_a_store_of_another_version_is_refused_and_not_touched(path: Path, version: int, journal: str) -> None:
    before = other_version(path, version, journal)
    with pytest.raises(SettingsError) as refused:
        Store(path)
    assert f"{path} has schema version {version}; this code reads 1" in str(refused.value)
    assert "not touched" in str(refused.value) and "check out the code that wrote it" in refused.value.mend
    assert path.read_bytes() == before


def test_somebody_elses_database_is_refused_and_not_touched(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes (text)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(SettingsError, match="schema version 0"):
        Store(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_not_touched(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all, but longer than a header of one hundred bytes " * 4)
    before = path.read_bytes()
    with pytest.raises(SettingsError) as refused:
        Store(path)
    assert f"the reply store {path} cannot be used" in str(refused.value) and "restore a backup" in refused.value.mend
    assert path.read_bytes() == before


def test_a_damaged_page_is_a_message_and_not_an_answer(path: Path) -> None:
    keys = [f"k{n:04}" for n in range(2000)]
    fill(path, *keys)
    data = bytearray(path.read_bytes())
    for page in range(2 * 4096, len(data) - 4096, 4096):
        data[page : page + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(SettingsError) as refused:
        store = Store(path)
        try:
            for key in keys:
                assert store.answer(key) in (ANSWER, None)
        finally:
            store.close()
    assert str(path) in str(refused.value) and "restore a backup" in refused.value.mend


def test_a_damaged_answer_is_a_message_and_not_an_answer(path: Path) -> None:
    fill(path, "k")
    db = sqlite3.connect(path)
    db.execute("UPDATE replies SET answer = x'00112233'")
    db.commit()
    db.close()
    store = Store(path)
    with pytest.raises(SettingsError, match=f"the reply store {path} .*"):
        store.answer("k")
    store.close()


def test_a_place_that_cannot_be_opened_does_not_advise_to_throw_the_store_away(path: Path) -> None:
    path.mkdir(parents=True)  # sqlite: unable to open database file
    with pytest.raises(SynthmillError) as refused:
        Store(path)
    assert str(path) in str(refused.value)
    assert "mv " not in refused.value.mend, "nothing is wrong with what is in it"


# ---------------------------------------------------------------- money


def asked(store: Store, *work: Coroutine[Any, Any, Any]) -> list[Any]:
    """What each of these comes to, or the error it raises."""

    async def together() -> list[Any]:
        return await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(together())


def test_reservations_of_all_processes_count_against_the_budget(path: Path) -> None:
    one, two = Store(path), Store(path)
    results = asked(one, *(s.reserve("trial", 10, 95) for s in (one, two) * 10))
    assert sorted(results) == [False] * 11 + [True] * 9, "9 x 10 fit into 95, the rest must wait"
    one.close()
    two.close()


def test_what_is_given_back_can_be_reserved_again(store: Store) -> None:
    assert asked(store, store.reserve("trial", 10, 10)) == [True]
    assert asked(store, store.reserve("trial", 1, 10)) == [False]
    asked(store, store.release(10))
    assert asked(store, store.reserve("trial", 10, 10)) == [True]


def test_what_is_paid_takes_the_place_of_what_was_reserved(store: Store) -> None:
    asked(store, store.reserve("trial", 100, 100))
    asked(store, store.put(entry(nano=30), WIRE, ANSWER, reserved=100))
    assert store.spent_usd("trial") == 30 / NANO
    assert asked(store, store.reserve("trial", 70, 100)) == [True]
    (refused,) = asked(store, store.reserve("trial", 71, 100))
    assert isinstance(refused, BudgetError) and refused.exit_code == 5, "30 are spent: no waiting makes room for 71"
    assert "is reached for RUN=trial" in str(refused) and "go on with BUDGET_USD=<more> make trial" in str(refused)


def test_each_run_has_its_own_budget(store: Store) -> None:
    asked(store, store.put(entry(run="trial", nano=100), WIRE, ANSWER))
    assert asked(store, store.reserve("full", 100, 100)) == [True]


def test_a_process_that_ends_gives_back_what_it_reserved(path: Path) -> None:
    one = Store(path)
    asked(one, one.reserve("trial", 100, 100))
    two = Store(path)
    assert asked(two, two.reserve("trial", 100, 100)) == [False]
    one.close()
    assert asked(two, two.reserve("trial", 100, 100)) == [True]
    two.close()


KILLED_WITH_MONEY_SET_ASIDE = (
    "import asyncio, os, pathlib, signal, sys\n"
    "from shared.llm.store import Store\n"
    "assert asyncio.run(Store(pathlib.Path(sys.argv[1])).reserve('trial', 100, 100))\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
)


def rows_of(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What another program would read from the file."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def owners(path: Path) -> list[Path]:
    return list(path.parent.glob(".owner-*"))


def test_what_a_killed_process_reserved_is_free_at_once(path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WITH_MONEY_SET_ASIDE, str(path)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert rows_of(path, "SELECT nano FROM reserved") == [(100,)] and len(owners(path)) == 1
    store = Store(path)
    assert rows_of(path, "SELECT nano FROM reserved") == [] and owners(path) == [], "and nothing is left behind"
    assert asked(store, store.reserve("trial", 100, 100)) == [True]
    store.close()


def test_what_a_process_reserved_while_ours_is_open_is_free_when_it_is_killed(path: Path) -> None:
    store = Store(path)
    subprocess.run([sys.executable, "-c", KILLED_WITH_MONEY_SET_ASIDE, path], cwd=ROOT, timeout=60)
    assert len(store.rows("SELECT * FROM reserved WHERE nano = 100")) == 1
    assert asked(store, store.reserve("trial", 100, 100)) == [True]
    store.close()


def test_opening_takes_nothing_from_those_who_live(path: Path) -> None:
    one = Store(path)
    assert asked(one, one.reserve("trial", 60, 100)) == [True]
    two = Store(path)
    assert rows_of(path, "SELECT nano FROM reserved") == [(60,)] and len(owners(path)) == 1
    assert asked(two, two.reserve("trial", 60, 100)) == [False]
    one.close()
    two.close()


HOLDING = (
    "import asyncio, os, pathlib, sys\n"
    "from shared.llm.store import Store\n"
    "store = Store(pathlib.Path(sys.argv[1]))\n"
    "assert asyncio.run(store.reserve('trial', 100, 100))\n"
    "print(os.getpid(), flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.mark.parametrize("inside", [[], ["unshare", "--pid", "--fork", "--kill-child"]])
def test_what_a_process_reserved_is_free_once_it_is_dead_and_not_before(path: Path, inside: list[str]) -> None:
    # In a container a process has a number that means another process, or none, out here.
    if inside and subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("NOT TESTED: another process id namespace needs rights that are missing here")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    process = subprocess.Popen([*inside, sys.executable, "-c", HOLDING, path], **pipes)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    assert not inside or number == 1
    store = Store(path)
    assert asked(store, store.reserve("trial", 1, 100)) == [False]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while asked(store, store.reserve("trial", 100, 100)) != [True]:
        assert time.monotonic() < deadline, "the kernel lets go of a dead process's locks"
        time.sleep(0.05)
    store.close()
    assert [file.name for file in path.parent.iterdir() if "owner" in file.name] == [], "and nothing is left behind"


def test_two_stores_of_one_process_do_not_take_each_other_for_dead(path: Path) -> None:
    one, two = Store(path), Store(path)
    assert asked(one, one.reserve("trial", 60, 100)) == [True]
    assert asked(two, two.reserve("trial", 60, 100), two.reserve("trial", 40, 100)) == [False, True]
    assert asked(one, one.reserve("trial", 1, 100)) == [False]
    one.close()
    two.close()


def test_what_a_process_elsewhere_reserved_is_free_after_a_while(store: Store, path: Path) -> None:
    for age, free in ((STALE_S - 60, False), (STALE_S + 60, True)):
        with sqlite3.connect(path) as db:
            db.execute("DELETE FROM reserved")
            db.execute("INSERT INTO reserved VALUES ('a-container|1|x', 'trial', 100, ?)", (time.time() - age,))
        db.close()
        assert asked(store, store.reserve("trial", 100, 100)) == [free]


# ---------------------------------------------------------------- never waiting for ever


def test_closing_while_writes_are_queued_writes_them(path: Path) -> None:
    store = Store(path)

    async def leave_in_a_hurry() -> None:
        # An interrupt does this: the task that waits for its write is cancelled, the write is queued already.
        writes = [asyncio.create_task(store.put(entry(f"k{n}"), WIRE, ANSWER)) for n in range(3)]
        await asyncio.sleep(0)
        for write in writes:
            write.cancel()

    asyncio.run(leave_in_a_hurry())
    within(20, store.close)
    again = Store(path)
    assert [again.answer(f"k{n}") for n in range(3)] == [ANSWER] * 3
    again.close()


def test_a_store_that_breaks_under_way_is_an_error_and_not_a_hang(path: Path) -> None:
    store = Store(path)
    shutil.rmtree(path.parent)
    path.parent.write_text("a file where the directory was")
    with pytest.raises(SynthmillError, match=r"reply store"):
        within(20, lambda: asyncio.run(store.put(entry(), WIRE, ANSWER)))
    within(20, store.close)


def test_a_full_disk_is_an_error_and_what_was_kept_stays(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a small file system needs mount rights here ({mounted.stderr.strip()})")
    try:
        store = Store(place / "mock.sqlite")
        asked(store, store.put(entry("first"), WIRE, ANSWER))
        big = Answer(text=os.urandom(400_000).hex(), stop="stop")
        failure = within(20, lambda: asked(store, store.put(entry("big"), WIRE, big)))[0]
        assert isinstance(failure, SynthmillError)
        assert "reply store cannot be written" in str(failure) and "free some disk" in str(failure)
        assert store.answer("big") is None and store.answer("first") == ANSWER
        assert store.spent_usd("trial") == 1_000 / NANO, "an answer that is not kept is not billed either"
        assert asked(store, store.put(entry("small"), WIRE, ANSWER)) == [None]
        within(20, store.close)
    finally:
        subprocess.run(["umount", place], check=True)


def test_reading_from_other_threads_is_not_needed_but_harmless(store: Store) -> None:
    asyncio.run(store.put(entry(), WIRE, ANSWER))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(store.answer, "k").result() == ANSWER
