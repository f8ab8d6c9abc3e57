"""Under fire: two makes at once, clocks set back, full and closed disks, torn files, odd texts, providers that storm.

Everything runs for real, in seconds: `make` in a copy of the repository, stages as processes against the stand-in, a
small file system that is mounted where that may be done. `MAKE381=/path/to/make` adds GNU Make 3.81.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shared.llm.limits as limits
import shared.llm.models as models_module
from shared import claim as claiming
from shared.errors import ProviderError, SynthmillError
from shared.generate.store import Finished, GenerationStore
from shared.llm.catalogue import NANO
from shared.llm.limits import Limiter, Shared
from shared.llm.store import Store
from shared.records import Domain, Example, Pair, RawText, content_id
from shared.stage import read_records
from shared.text import normalise
from tests.conftest import (
    ROOT,
    StandinLog,
    StandinWith,
    closed_environment,
    copy_of_repository,
    environment_of,
    make,
    run_stage,
)
from tests.conversations import stage_module
from tests.test_limits import CLAUDE, GEMINI, GPT, ONE, PATHS, Clock, ask_many, at_once, known
from tests.test_llm import EMBEDDER
from tests.test_stage import _obey_modes as obey_modes
from tests.test_store import ANSWER, WIRE, entry

QA, VALID_QA = "data/trial/grounded/05_extract_qa.jsonl", "data/trial/grounded/06_validate_qa.jsonl"
PATTERNS = "data/trial/patterns/08_pattern.jsonl"
FEW = "LIMIT=2"


def wait_for(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What it gives, as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.01)
    return found


# ---------------------------------------------------------------- two makes at once


@pytest.fixture(params=["make", "make 3.81"])
def program(request: pytest.FixtureRequest) -> str:
    if request.param == "make":
        return "make"
    if not (old := os.environ.get("MAKE381", "")):
        pytest.skip("NOT TESTED with GNU Make 3.81: set MAKE381=/path/to/make (on macOS: /usr/bin/make)")
    return old


@pytest.fixture(scope="module")
def _copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_repository(tmp_path_factory.mktemp("fire") / "synthmill")


@pytest.fixture
def copy(_copy: Path) -> Iterator[Path]:
    """A copy of the repository in which nothing was made yet."""
    yield _copy
    for place in ("data/trial", "data/full", "models/trial", ".images"):
        shutil.rmtree(_copy / place, ignore_errors=True)
    for mark in _copy.glob("data/.*"):
        mark.unlink()


def started(copy: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A make that runs, as somebody would start it in another terminal; ends with its stages when it is left."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([program, *arguments], cwd=copy, env=env, start_new_session=True, **pipes)


@contextlib.contextmanager
def at_work(copy: Path, program: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A make whose stages are stopped in the middle, and the numbers of their processes."""
    first = started(copy, program, *arguments)
    try:
        wait_for(lambda: part_of(copy))
        stages = children(first.pid)
        signal_all(stages, signal.SIGSTOP)
        yield first, stages
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def signal_all(processes: list[int], kind: signal.Signals) -> None:
    for process in processes:
        os.kill(process, kind)


def children(parent: int) -> list[int]:
    every = ["ps", "-A", "-o", "pid=,ppid="]
    rows = subprocess.run(every, capture_output=True, text=True, check=True).stdout.split()
    return [int(pid) for pid, ppid in zip(rows[::2], rows[1::2], strict=True) if int(ppid) == parent]


def part_of(copy: Path) -> list[Path]:
    return list(copy.glob("data/trial/*/.*.jsonl.part"))


def test_a_second_make_stops_with_a_message_and_the_first_is_not_disturbed(
    copy: Path, program: str, standin: StandinLog
) -> None:
    goals = ("-j2", VALID_QA, PATTERNS, FEW)
    with at_work(copy, program, *goals) as (first, stages):
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("data/**/*") if path.is_file()}
        says = f"error: make (process {first.pid}) is at work on RUN=trial since 20"
        stops = f"  next: wait for it, or stop it (kill {first.pid}), then run the same command"
        for arguments in (goals, (VALID_QA, "LIMIT=3"), ("clean",)):
            refused = make(copy, *arguments, MAKE=program)
            assert refused.returncode == 2, refused.stdout + refused.stderr
            assert says in refused.stderr and stops in refused.stderr and "Traceback" not in refused.stderr
        (copy / ".images").mkdir()
        for image in ("llm", "data"):
            (copy / ".images" / f"{image}.iid").touch()
        docker = make(copy, PATTERNS, FEW, "RUNNER=docker", MAKE=program, DOCKER="/nonexistent/docker")
        assert docker.returncode == 2 and says in docker.stderr, "asked on the host, before a container is"
        assert "Docker" not in docker.stderr
        after = {path: path.stat().st_mtime_ns for path in copy.rglob("data/**/*") if path.is_file()}
        assert {path: after.get(path) for path in before} == before, "not a file of the run was touched"
        signal_all(stages, signal.SIGCONT)
        said, _ = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert (copy / VALID_QA).exists() and (copy / PATTERNS).exists()
    again = make(copy, *goals, MAKE=program)
    assert again.returncode == 0 and "stages/" not in again.stdout, "and a second one, later, has nothing to do"


def test_between_two_stages_the_run_is_held_too(copy: Path, program: str, standin: StandinLog) -> None:
    first = started(copy, program, VALID_QA, FEW)
    try:
        wait_for(lambda: part_of(copy))
        os.kill(first.pid, signal.SIGSTOP)  # make itself: its stage ends, and the next one is not started
        wait_for(lambda: (copy / QA).exists())
        wait_for(lambda: not part_of(copy))
        refused = make(copy, VALID_QA, FEW, MAKE=program)
        assert refused.returncode == 2 and f"make (process {first.pid}) is at work on RUN=trial" in refused.stderr
        flags = ["--in", QA, "--out", VALID_QA, "--limit", "2", "--track", "grounded"]
        flags += ["--config", "stages/06_validate_qa/trial.toml"]
        by_hand = subprocess.run(
            [".venv/bin/python", "stages/06_validate_qa/main.py", *flags],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert by_hand.returncode == 0, "a stage that is called by hand is judged by its output's lock alone"
        os.kill(first.pid, signal.SIGCONT)
        said, _ = first.communicate(timeout=60)
        assert first.returncode == 0, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)


def test_nothing_is_cleaned_up_by_hand_after_kill_9_of_make(copy: Path, program: str, standin: StandinLog) -> None:
    with at_work(copy, program, VALID_QA, FEW) as (first, stages):
        os.kill(first.pid, signal.SIGKILL)  # nobody has asked how it ended: it stays in the table of processes
        orphan = make(copy, VALID_QA, FEW, MAKE=program)
        assert orphan.returncode == 2 and f"another process is writing {QA}" in orphan.stderr
        signal_all(stages, signal.SIGKILL)
        wait_for(lambda: not any(map(claiming.process, stages)))
        again = make(copy, VALID_QA, FEW, MAKE=program)
        assert again.returncode == 0, again.stderr
        assert (copy / VALID_QA).exists()


def test_a_make_that_is_refused_deletes_nothing(copy: Path, program: str, standin: StandinLog) -> None:
    # .DELETE_ON_ERROR takes away a target that has changed while its recipe failed: a good one of another make.
    (copy / QA).parent.mkdir(parents=True)
    for mark in (copy / QA).parents[1] / ".limit-2-facts-data_inputs_facts.md", copy / "data/.trial.make":
        mark.touch()
    with open(copy / "data" / ".trial.make", "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # so that the stage waits here until the other make has finished its own
        refused = started(copy, program, QA, FEW)
        stage = wait_for(lambda: next(iter(children(refused.pid)), 0))
        wait_for(lambda: ".trial.make" in "".join(opened(stage)))
        (copy / QA).write_text("what the other make has made\n")
        me = claiming.process(os.getpid())
        assert me is not None
        held.write(f"{me.number}\t{me.started}\t2026-11-21 08:00:00\n".encode())
        held.flush()
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and f"make (process {os.getpid()}) is at work" in said, said
    assert (copy / QA).read_text() == "what the other make has made\n"


def opened(process: int) -> list[str]:
    """The files a process has open."""
    if (found := Path(f"/proc/{process}/fd")).exists():
        with contextlib.suppress(OSError):
            return [os.readlink(file) for file in found.iterdir()]
        return []
    done = subprocess.run(["lsof", "-p", str(process), "-Fn"], capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "left",
    [
        "{pid}\tanother start\t2026-11-21 08:00:00\n",  # its number is another process's by now
        "999999999\tany\t2026-11-21 08:00:00\n",
        "{pid}",
        "",
        "\0" * 64,
        "{pid}\t{started}\t2026-11-21 08:00:00\n{more}",
    ],
)
def test_what_a_dead_make_left_holds_nothing(tmp_path: Path, program: str, left: str) -> None:
    me = claiming.process(os.getpid())
    assert me is not None
    lives = "{started}" in left
    (tmp_path / ".trial.make").write_text(left.format(pid=me.number, started=me.started, more="x" * 300))
    (tmp_path / "Makefile").write_text(f"all:\n\t@{sys.executable} -m shared.claim {tmp_path} trial\n")
    for run in range(2):
        done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == (2 if lives else 0), (run, done.stderr)
        assert lives == ("is at work on RUN=trial since 2026-11-21 08:00:00" in done.stderr)
    assert lives or len((tmp_path / ".trial.make").read_text().splitlines()) == 1


def test_stages_of_one_make_and_of_its_sub_makes_share_the_run(tmp_path: Path, program: str) -> None:
    claims = f"{sys.executable} -m shared.claim {tmp_path} trial"
    lines = [
        "all: a b c",
        *(f"{name}:\n\t@{claims} && cat .trial.make" for name in "ab"),
        f"c:\n\t@$(MAKE) -s d\nd:\n\t@true; {claims} && cat .trial.make",
    ]
    (tmp_path / "Makefile").write_text("\n".join(lines) + "\n")
    done = subprocess.run([program, "-s", "-j4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 and len(set(done.stdout.splitlines())) == 1


def test_processes_are_told_apart_by_what_ps_says_too() -> None:
    # macOS has no /proc; ps tells the same there, with the start to the second.
    me, parent = claiming._from_ps(os.getpid()), claiming._from_ps(os.getppid())
    assert me is not None and me.parent == os.getppid() and me.number == os.getpid() and "python" in me.name.lower()
    assert parent is not None and len(me.started.split()) == 5 and me.started == claiming._from_ps(os.getpid()).started  # type: ignore[union-attr]
    assert claiming._from_ps(999_999_999) is None is claiming.process(999_999_999)
    with subprocess.Popen(["true"]) as ended:
        wait_for(lambda: claiming.process(ended.pid) is None)
        assert claiming._from_ps(ended.pid) is None, "a zombie is dead"


# ---------------------------------------------------------------- a clock that is set back


def test_outputs_from_before_the_clock_was_set_back_are_not_made_again_and_again(
    copy: Path, program: str, standin: StandinLog
) -> None:
    assert make(copy, QA, FEW, MAKE=program).returncode == 0
    ahead = time.time() + 3000  # 05 ran, then the clock was set back by fifty minutes
    for path in (copy / QA, copy / "data/trial/.limit-2-facts-data_inputs_facts.md"):
        os.utime(path, (ahead, ahead))
    ahead = (copy / QA).stat().st_mtime
    goes_on = make(copy, VALID_QA, FEW, MAKE=program)
    assert goes_on.returncode == 0, goes_on.stderr
    assert "05_extract_qa/main.py" not in goes_on.stdout and "06_validate_qa/main.py" in goes_on.stdout
    assert (copy / VALID_QA).stat().st_mtime == ahead, "not older than what it was made from"
    assert make(copy, "-q", VALID_QA, FEW, MAKE=program).returncode == 0, "a second make has nothing to do"
    before = (copy / VALID_QA).read_bytes()
    standin.mark()
    assert make(copy, "stage6", FEW, MAKE=program).returncode == 0
    assert (copy / VALID_QA).read_bytes() == before and standin.requests() == [], "made again, it costs nothing"
    assert make(copy, "-q", VALID_QA, FEW, MAKE=program).returncode == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("shared.llm.limits.time.time", found)
    return found


@pytest.mark.parametrize("back", [30.0, 3600.0, 86_400.0])
def test_a_clock_set_back_takes_no_patience_and_no_speed(tmp_path: Path, clock: Clock, back: float) -> None:
    refused = Limiter(known(tmp_path / "refused", 1200, 19), 4)
    refused.refused(1.0, overloaded=False)
    clock.now -= back
    for _ in range(200):
        refused.refused(1.0, overloaded=False)
        clock.now += 5
    assert 900 < refused.refused_for() <= 1000, "the run still ends when nothing but refusals comes for 15 minutes"
    opening = Shared(tmp_path / "opening")
    _, ticket, _ = opening.take(ONE)
    assert ticket is not None
    opening.heard(ticket, {}, answered=True)
    clock.now -= back
    opening.heard(ticket, {}, answered=True)
    clock.now += 2 * limits.ROUND_S
    opening.heard(ticket, {}, answered=True)
    assert at_once(opening) > limits.START, "and what is not known to be limited opens as fast as ever"


def test_what_is_stored_reserved_and_spent_knows_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(store: Store, key: str) -> None:
        async def work() -> None:
            assert await store.reserve("trial", 10, 100)
            await store.put(entry(key, nano=10), WIRE, ANSWER, 10)

        asyncio.run(work())

    now = time.time()
    path = tmp_path / "mock.sqlite"
    for number, at in enumerate((now, now - 86_400, now + 3600, now - 1)):
        monkeypatch.setattr("shared.llm.store.time.time", lambda at=at: at)
        store = Store(path)
        ask(store, f"{number}")
        left = Store(path)  # and one that dies with money set aside
        assert asyncio.run(left.reserve("trial", 60, 100))
        os.close(left._alive)
        left._alive = -1
        assert asyncio.run(store.reserve("trial", 60, 100)), "what the dead one had is free, whatever the clock says"
        store.close()
    store = Store(path)
    assert [store.answer(f"{number}") for number in range(4)] == [ANSWER] * 4
    assert store.spent_usd("trial") == 40 / NANO and len(store.rows("SELECT * FROM ledger")) == 4
    store.close()


# ---------------------------------------------------------------- full and closed disks

ASKED = 40
"""Chunks of data/inputs/facts.md that are read, each one question of 05."""


@dataclass
class Place:
    """A data directory of its own; 05 runs there, its answers come after a moment."""

    root: Path
    log: StandinLog

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def output(self) -> Path:
        return self.data / "trial" / "grounded" / "05_extract_qa.jsonl"

    def command(self, pairs: int = 2) -> list[str]:
        config = self.root / f"{pairs}.toml"
        config.write_text(
            f'model = "openai/gpt-6-luna"\npairs_per_chunk = {pairs}\nconcurrency = 4\nas_of = 2026-11-20\n'
            'licence = "MIT"\ncategories = ["pipeline", "data", "models", "cost", "quality", "operations"]\n'
        )
        flags = ["--in", str(ROOT / "data/inputs/facts.md"), "--out", str(self.output), "--config", str(config)]
        return [sys.executable, "stages/05_extract_qa/main.py", *flags, "--track", "grounded", "--limit", str(ASKED)]

    def start(self, pairs: int = 2) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(pairs), cwd=ROOT, **pipes)

    def run(self, pairs: int = 2) -> tuple[int, str]:
        with self.start(pairs) as process:
            _, said = process.communicate(timeout=60)
            return process.returncode, said

    def stored(self) -> int:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.store)) as db:
            return int(db.execute("SELECT COUNT(*) FROM replies").fetchone()[0])
        return 0

    @property
    def store(self) -> Path:
        return self.data / "cache" / "mock.sqlite"

    def served(self) -> Counter[str]:
        """How often each question was answered."""
        return Counter(line["sha256"] for line in self.log.requests() if line["served"])

    def files(self) -> dict[str, bytes]:
        """What is in the run's directory and is no lock."""
        found = self.output.parent.glob("*") if self.output.parent.exists() else ()
        return {path.name: path.read_bytes() for path in found if not path.name.endswith(".lock")}


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Callable[[str], None]]:
    """A file system of that size there; gives a function that mounts it anew with other options."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
        why = mounted.stderr.strip() if mounted.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        pytest.skip(f"NOT TESTED: a small file system needs mount rights here ({why})")

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(directory: Path, leave: int) -> None:
    """Take all room but ``leave`` bytes."""
    with open(directory / "other-programs.dat", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while (free := (disk := os.statvfs(directory)).f_bavail * disk.f_frsize) > leave:
            file.write(bytes(min(free - leave, 1 << 20)))


@pytest.fixture(scope="module")
def _slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    from shared.standin import start

    log = tmp_path_factory.mktemp("slow") / "requests.jsonl"
    with contextlib.ExitStack() as stack:
        with environment_of(closed_environment() | {"STANDIN_LOG": str(log), "STANDIN_LATENCY_S": "0.1"}):
            url = stack.enter_context(start())
        yield url, log


@pytest.fixture(scope="module")
def undisturbed(_slow: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What 05 writes when nothing is in its way."""
    with environment_of(closed_environment() | {"STANDIN_URL": _slow[0]}):
        there = Place(tmp_path_factory.mktemp("undisturbed"), StandinLog(_slow[1]))
        code, said = there.run()
        assert code == 0, said
        return there.output.read_bytes()


@pytest.fixture
def place(_slow: tuple[str, Path], tmp_path: Path, _own_environment: None) -> Place:
    os.environ["STANDIN_URL"] = _slow[0]
    log = StandinLog(_slow[1])
    log.mark()
    return Place(tmp_path, log)


@pytest.mark.parametrize(("where", "leave"), [("data", 2 << 20), ("data/cache", 0)])
def test_a_disk_that_fills_up_stops_the_questions_and_with_more_of_it_the_same_command_goes_on(
    place: Place, undisturbed: bytes, where: str, leave: int
) -> None:
    with small_disk(place.root / where, 40) as mount_again:
        process = place.start()
        wait_for(lambda: place.stored() >= 8)
        fill(place.root / where, leave)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "Traceback" not in said
        assert re.search(r"only [\d.]+ MiB are free in .*/data/cache|the reply store cannot be written: .*full", said)
        assert "next: free some disk" in said and "then run the same command" in said
        assert place.files() == {}, "nothing half-written is left"
        kept, served = place.stored(), place.served()
        assert kept >= 8
        if leave:
            assert kept == served.total(), "it stopped while there was room for what was under way: nothing is lost"
        assert served.total() - kept <= 8, "at most what was under way when the last byte was taken"
        mount_again("size=80m")
        code, said = place.run()
        assert code == 0, said
        assert place.output.read_bytes() == undisturbed
        assert place.served().total() == ASKED + served.total() - kept, "no stored answer was asked for again"


@pytest.mark.parametrize("batch", ["0", "1"])
def test_on_a_nearly_full_disk_nothing_is_asked_and_what_was_there_stays(
    place: Place, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    with small_disk(place.data, 40):
        assert place.run()[0] == 0
        before = place.files()
        fill(place.data, 8 << 20)  # room for them, but not enough to be sure
        monkeypatch.setenv("BATCH", batch)
        place.log.mark()
        code, said = place.run(pairs=1)  # other settings, other questions
        assert code in (1, 2) and "next: " in said and "free" in said and "Traceback" not in said, said
        assert place.files() == before and place.output.read_bytes() == undisturbed
        assert [line for line in place.log.requests() if line["method"] == "POST"] == []


@pytest.mark.parametrize(("where", "used"), [("data", True), ("data/cache", False), ("data/trial", True)])
def test_a_place_that_is_read_only_is_said_before_anything_is_asked(place: Place, where: str, used: bool) -> None:
    with small_disk(place.root / where, 40) as mount_again:
        place.output.parent.mkdir(parents=True)
        if used:
            assert place.run()[0] == 0
        before = place.files()
        place.log.mark()
        mount_again("ro")
        code, said = place.run(pairs=1)
        assert code in (1, 2) and "Traceback" not in said, said
        assert "Read-only file system" in said or "readonly" in said
        assert "next:" in said and "run the same command" in said
        assert place.log.requests() == []
        assert place.files() == before


def test_a_directory_that_may_not_be_written_to_is_said_before_anything_is_asked(place: Place) -> None:
    place.output.parent.mkdir(parents=True)
    (place.output.parent / ".05_extract_qa.jsonl.lock").touch()  # of an earlier run: that one may be opened
    place.output.parent.chmod(0o555)
    try:
        with subprocess.Popen(
            place.command(), cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=obey_modes
        ) as process:
            _, said = process.communicate(timeout=60)
    finally:
        place.output.parent.chmod(0o755)
    if process.returncode == 77:
        pytest.skip("NOT TESTED: root here may not give up its rights, and root writes anywhere")
    assert process.returncode == 1 and "cannot write" in said and "Permission denied" in said, said
    assert place.log.requests() == []


def test_local_generations_on_a_full_disk_end_with_a_message_and_stay(tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", 1):
        store = GenerationStore(tmp_path / "cache" / "generations_mock.sqlite")
        store.add([("first", Finished("kept", "stop", 1))])
        with pytest.raises(SynthmillError, match=r"cannot be used: .*full; what was generated before is kept"):
            store.add([("big", Finished("x" * 2_000_000, "stop", 1))])
        store.add([("small", Finished("kept too", "stop", 1))])
        assert set(store.find(["first", "big", "small"])) == {"first", "small"}
        store.close()


# ---------------------------------------------------------------- torn and NUL tails


@pytest.mark.parametrize("tail", ["torn", "nul"])
def test_a_store_whose_log_has_a_bad_tail_keeps_what_is_before_it(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "mock.sqlite"
    code = (
        "import asyncio, os, pathlib, signal, sys\n"
        "from shared.llm.store import Store\n"
        "from tests.test_store import ANSWER, WIRE, entry\n"
        "async def main():\n"
        "    store = Store(pathlib.Path(sys.argv[1]))\n"
        "    for n in range(40):\n"
        "        await store.put(entry(f'{n}'), WIRE, ANSWER)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    log = tmp_path / "mock.sqlite-wal"
    whole, size = log.read_bytes(), log.stat().st_size
    (tmp_path / "mock.sqlite-shm").unlink()  # what a power failure leaves: the log alone, its end not written
    counts = []
    for cut in (1, 100, 4000, 5000, size // 3, size // 2):
        log.write_bytes(whole[:-cut] + (b"\0" * cut if tail == "nul" else b""))
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{tmp_path / 'again.sqlite'}{suffix}")
        store = Store(tmp_path / "again.sqlite")
        keys = [n for n in range(40) if store.answer(f"{n}") is not None]
        assert keys == list(range(len(keys))), "all before the tail, none after it"
        assert len(store.rows("SELECT * FROM ledger")) == len(keys), "an answer and its price, or neither"
        assert store.spent_usd("trial") == len(keys) * 1_000 / NANO
        asyncio.run(store.put(entry("new"), WIRE, ANSWER))
        assert store.answer("new") == ANSWER
        counts.append(len(keys))
        store.close()
        for file in tmp_path.glob("again.sqlite*"):
            file.unlink()
    assert 35 <= counts[0] <= 40 and counts == sorted(counts, reverse=True) and 5 < counts[-1] < 30


def test_vectors_on_a_full_disk_end_with_a_message_and_not_with_the_process(tmp_path: Path) -> None:
    # 11 writes to a mapped file: a page that no block is left for is no error there but the end of the process.
    code = (
        "import pathlib, sys, vectors\n"
        "parquet, file = map(pathlib.Path, sys.argv[1:])\n"
        "vectors.write_unit_vectors(parquet, [str(n) for n in range(64)], file)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'stages' / '11_deduplicate'}"}
    rows = pa.array([[1.0] * 512] * 64, pa.list_(pa.float32(), 512))
    pq.write_table(pa.table({"key": [f"{n}" for n in range(64)], "vector": rows}), tmp_path / "10_embed.parquet")
    with small_disk(tmp_path / "data", 2):
        files = (str(tmp_path / "10_embed.parquet"), str(tmp_path / "data" / "vectors.npy"))
        command = [sys.executable, "-c", code, *files]
        fill(tmp_path / "data", 8192)
        full = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert full.returncode == 1 and "OSError: [Errno 28] No space left on device" in full.stderr
        (tmp_path / "data" / "other-programs.dat").unlink()
        assert subprocess.run(command, env=environment).returncode == 0


# ---------------------------------------------------------------- odd texts

TAIL = (
    " The gauge on the north pump shows 7 bar at 20 degrees, and VALVE_B must not be opened before {n} o'clock, ever."
)
SHORT = ("007", "1e5", "NaN", "true", "null", "-0", "0x1F", "Infinity", "2026-11-21", "1_000", "nil", "~", "[]", "{}")
EMPTY = ("", " ", "\t\n \r\n", "\u00a0", "\ufeff", "\u200b")
LONG = (
    *(f"{text}" + TAIL for text in SHORT),
    "cafe\u0301" + TAIL,
    "a line\u2028another\u2029and\x85one\x0bmore\x0c" + TAIL,
    "\u202eright to left\u202c \u061c" + TAIL,
    "\ufeffa mark" + TAIL,
    "one\r\ntwo\rthree" + TAIL,
    "\u200bzero\u200d width" + TAIL,
    "\U0001f600\U0001f468\u200d\U0001f469" + TAIL,
    '"quoted" \\ and \\u0000 and \\ud800' + TAIL,
    "=1+1,@SUM(A1)" + TAIL,
    "\x1b[31mred\x07" + TAIL,
    "{text} {chunk} $HOME %s {0}" + TAIL,
    "word " * 3000 + TAIL,
)
DOMAINS: tuple[Domain, ...] = ("prose", "code")


def raw_text(text: str, n: int) -> RawText:
    about = {"source": "odd", "origin": f"file#{n}", "language": "en", "category": "paragraph", "licence": "MIT"}
    return RawText.model_validate({"id": content_id(text, str(n)), "domain": DOMAINS[n % 2], "text": text} | about)


@dataclass
class Chain:
    """Stages one after the other over one track, each one's output the next one's input."""

    data: Path

    def path(self, stage: str, suffix: str = ".jsonl") -> Path:
        return self.data / f"{stage}{suffix}"

    def run(self, stage: str, before: str, settings: str) -> None:
        config = self.data / f"{stage}.toml"
        config.write_text(settings)
        script, track = ROOT / "stages" / stage / "main.py", ("--track", "compression")
        done = run_stage(script, "--in", self.path(before), "--out", self.path(stage), "--config", config, *track)
        assert done.returncode == 0, done.stderr
        counts = orjson.loads(self.path(stage, ".report.json").read_bytes())["counts"]
        read, kept, rejects = (self.lines(name) for name in (before, stage, f"{stage}.rejects"))
        assert counts["planned"] == len(read) == len(kept) + len(rejects), stage
        assert (counts["kept"], counts["rejected"]) == (len(kept), len(rejects)), stage
        assert sum(counts["reasons"].values()) == len(rejects) == sum(bool(orjson.loads(r)["reason"]) for r in rejects)

    def lines(self, name: str) -> list[bytes]:
        """Split where JSON lines end, and nowhere else."""
        return [line for line in self.path(name).read_bytes().split(b"\n") if line]

    def records(self, name: str, kind: Any) -> dict[str, Any]:
        """By id, which must be one's own."""
        found = list(read_records(self.path(name), kind))
        assert len({record.id for record in found}) == len(found), "ids are unique"
        return {record.id: record for record in found}

    def ids(self, *names: str) -> Counter[str]:
        """Of all records in these files, the rejected ones too."""
        rows = [orjson.loads(line) for name in names for line in self.lines(name)]
        return Counter(row.get("id") or row["record"]["id"] for row in rows if "raw" not in row)


@pytest.mark.slow
def test_odd_texts_are_kept_as_they_are_or_rejected_with_a_reason(tmp_path: Path, standin: StandinLog) -> None:
    chain = Chain(tmp_path / "data" / "trial" / "compression")
    chain.data.mkdir(parents=True)
    texts = [text.replace("{n}", str(n)) for n, text in enumerate((*SHORT, *EMPTY, *LONG))]
    given = [raw_text(text, n) for n, text in enumerate(texts)]
    same = texts[-3]
    twins = [raw_text(same, 100), raw_text(same + "  \n", 101), raw_text(unicodedata.normalize("NFD", texts[34]), 102)]
    nul = raw_text("a\0b" + TAIL, 103)
    lines = [record.line() for record in (*given, *twins, nul, given[-3])]  # and one line twice
    surrogate = given[0].line().replace(b'"text":"007"', b'"text":"\\ud800 alone"')
    number = given[0].line().replace(b'"text":"007"', b'"text":7')
    torn = given[-1].line()[:200]
    chain.path("01_acquire").write_bytes(b"".join([*lines, surrogate, number, b"\0" * 50 + b"\n", torn]))

    # -- 02: normalised, and what is no text or the same text is named
    chain.run(
        "02_merge", "01_acquire", 'min_chars = 1\nmax_chars = 20000\nnear_duplicate_jaccard = 1.0\nlicences = ["MIT"]'
    )
    merged = chain.records("02_merge", RawText)
    rejects = [orjson.loads(line) for line in chain.lines("02_merge.rejects")]
    reasons = Counter(reject["reason"] for reject in rejects)
    assert reasons == {
        "too_short": 5,
        "exact_duplicate": 4,
        "nul_byte": 1,
        "not_json": 2,
        "not_a_record": 1,
        "nul_bytes": 1,
    }
    assert [r["raw"] for r in rejects[:3]] == [surrogate.decode()[:-1] + "\n", number.decode(), "\0" * 50 + "\n"]
    assert rejects[3]["raw"] == torn.decode()
    for record in given:
        if record.id in merged:
            assert merged[record.id].text == record.text, "what the source had stays, byte for byte"
            assert merged[record.id].merged.text == normalise(record.text)[0]
    assert {given[n].id for n in range(len(SHORT))} <= set(merged), "a text that looks like a number is a text"

    # -- 03 and 04: compressed by a server, asked about by the panel
    endpoint = '[endpoint]\nmodel = "endpoint/some-model"\nconcurrency = 8\n'
    chain.run("03_compress", "02_merge", f'generator = "endpoint"\ntokenizer = "models/tiny"\n{endpoint}')
    pairs = chain.records("03_compress", Pair)
    assert chain.ids("03_compress", "03_compress.rejects") == chain.ids("02_merge")
    assert len(pairs) >= 8
    assert all(pair.verbose == merged[id].merged.text for id, pair in pairs.items())
    panel = 'panel = ["anthropic/claude-haiku-5-5"]\nthreshold = 0.5\ndimensions = 64\nconcurrency = 8\n'
    panel += f'embedder = "{EMBEDDER}"\n[tasks]\nprose = ["key_points"]\ncode = ["explain"]\n'
    made = next(iter(pairs.values()))
    odd = [
        made.model_copy(
            update={"id": content_id("odd", text, str(n)), "verbose": f"{text} {n} {TAIL}", "compressed": text}
        )
        for n, text in enumerate((*SHORT, *EMPTY, "a\0b", "\u2028", "x" * 5000))
    ]
    with open(chain.path("03_compress"), "ab") as file:
        file.writelines(pair.line() for pair in odd)
    chain.run("04_validate", "03_compress", panel)
    assert chain.ids("04_validate", "04_validate.rejects") == chain.ids("03_compress")

    # -- 10 to 13, with the odd ones too, as if every one had passed
    passed = chain.records("04_validate", Pair)
    verdicts = next(iter(passed.values())).verdicts
    every = {pair.id: pair.model_copy(update={"verdicts": verdicts}) for pair in odd} | passed
    empty = made.model_copy(update={"id": content_id("empty"), "verbose": "", "verdicts": verdicts})
    chain.path("04_validate").write_bytes(b"".join(pair.line() for pair in (*every.values(), empty)))
    chain.run("10_embed", "04_validate", f'model = "{EMBEDDER}"\ndimensions = 64\n')
    (refused,) = (orjson.loads(line) for line in chain.lines("10_embed.rejects"))
    assert refused["record"]["id"] == empty.id and refused["reason"] == "bad_request"
    chain.run("11_deduplicate", "10_embed", "duplicate_at = 1.0\ngroup_at = 0.99\n")
    chain.run("12_choose", "11_deduplicate", "")
    prompts = "".join(f'{role}_prompt = "stages/03_compress/prompts/{role}.txt"\n' for role in ("system", "user"))
    exports = 'exports = ["training", "openai", "anthropic", "bedrock", "nanochat"]\n'
    chain.run("13_format", "12_choose", f'pretty_name = "odd"\nvalid = 0.2\ntest = 0.2\n{prompts}{exports}')
    examples = chain.records("13_format", Example)
    assert chain.ids("13_format", "13_format.rejects") == chain.ids("12_choose") and len(examples) >= 20
    unfit = [orjson.loads(line) for line in chain.lines("13_format.rejects")]
    assert {reject["record"]["compressed"].strip() for reject in unfit} <= {"", "\ufeff", "\u200b"}, unfit
    assert {"007", "1e5", "NaN", "true", "null"} <= {example.messages[-1].content for example in examples.values()}
    for id, example in examples.items():
        assert example.messages[-1].content == every[id].compressed and every[id].verbose in example.messages[1].content

    # -- what is exported, read back as a stranger would
    expected = {id: [(m.role, m.content) for m in example.messages] for id, example in examples.items()}
    table = pq.ParquetDataset(sorted((chain.data / "dataset" / "data").glob("*.parquet"))).read()
    assert {row["id"]: [(m["role"], m["content"]) for m in row["messages"]] for row in table.to_pylist()} == expected
    code = (
        "import sys, json, datasets\n"
        "rows = [row for split in datasets.load_dataset(sys.argv[1]).values() for row in split]\n"
        "print(json.dumps({row['id']: [(m['role'], m['content']) for m in row['messages']] for row in rows}))\n"
        "lines = datasets.load_dataset('json', data_files=sys.argv[2] + '/*.jsonl', split='train')\n"
        "print(json.dumps([[(m['role'], m['content']) for m in row['messages']] for row in lines]))\n"
    )
    offline = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(chain.data / "dataset"), str(chain.data / "training")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    by_datasets, training = map(json.loads, done.stdout.splitlines())
    assert {id: list(map(tuple, messages)) for id, messages in by_datasets.items()} == expected
    assert sorted([tuple(m) for m in row] for row in training) == sorted(expected.values())


def test_lines_of_a_facts_file_are_an_editors_lines() -> None:
    facts = stage_module("05_extract_qa", "facts")
    chunks = facts.chunks_of("# 007\r\n- 1e5\u2028and\x85more\r\n- null\n- \n- null\n")
    assert [(chunk.section, chunk.text.split("\n")[-1], chunk.first) for chunk in chunks] == [
        ("007", "- 1e5\u2028and\x85more", 2),
        ("007", "- null", 3),
        ("007", "-", 4),
        ("007", "- null", 5),
    ]


# ---------------------------------------------------------------- providers that storm


@pytest.mark.parametrize("model", [CLAUDE, GPT, GEMINI])
def test_a_spent_quota_that_looks_like_any_429_ends_the_run_at_once_and_keeps_what_is_answered(
    standin_with: StandinWith, data: Path, model: str
) -> None:
    log = standin_with(faults=f"quota@{PATHS[model]}=4")
    with pytest.raises(ProviderError) as end:
        ask_many(data, model, 8, 1)
    assert "answered 429" in str(end.value) and "add credit" in end.value.mend
    statuses = [line["status"] for line in log.requests()]
    assert statuses[:4] == [200, 200, 200, 429] and len(statuses) <= 5, "only what was under way already comes after it"
    assert [reply.problem for reply in ask_many(data, model, 8, 4)] == [""] * 8
    assert sum(line["served"] for line in log.requests()) == 8, "what was answered before is not asked again"


@pytest.mark.parametrize("model", [CLAUDE, GPT, GEMINI])
def test_nothing_but_529_ends_with_a_sentence_and_few_calls(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(models_module, "PATIENCE_S", 1.0)
    log = standin_with(faults=f"529@{PATHS[model]}=4-,retry_after=0.1")
    with pytest.raises(ProviderError) as end:
        ask_many(data, model, 200, 32)
    assert f"{model} has refused every call" in str(end.value) and re.search(r"5(29|03)", str(end.value))
    assert "everything answered is saved" in end.value.mend and "run the same command" in end.value.mend
    assert len(log.requests()) < 120
    assert Store(data.parent.parent / "cache" / "mock.sqlite").spent_usd("trial") > 0


@pytest.mark.parametrize(("fault", "model"), [("slow_loris", CLAUDE), ("half_closed", GPT), ("reset", GPT)])
def test_a_provider_that_breaks_every_answer_ends_the_run_and_the_same_command_goes_on(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch, fault: str, model: str
) -> None:
    monkeypatch.setattr("shared.llm.providers.TIMEOUT_S", 0.3)
    monkeypatch.setattr(models_module, "_backoff", lambda state: 0.01)  # as often, not as long
    log = standin_with(faults=f"{fault}@{PATHS[model]}=4-,timeout_s=60")
    with pytest.raises(ProviderError) as end:
        ask_many(data, model, 8, 1)
    assert re.search(r"no answer in \d+ s", str(end.value)) and "run the same command" in end.value.mend
    before = log.requests()
    assert sum(line["served"] for line in before) == 3 and len(before) <= 3 + 3 * models_module.FAILURES
    well = standin_with()
    assert [reply.problem for reply in ask_many(data, model, 8, 1)] == [""] * 8
    assert len(well.requests()) == 5, "what was answered before is not asked again"
