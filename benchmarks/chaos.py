"""Kill -9 the whole trial again and again, let it finish, and show that nothing was lost, spoilt or paid twice.

    python -m benchmarks.chaos                                    # 50 kills, native, make -j4: make chaos
    python -m benchmarks.chaos --kills 5 --seed 7 --runner docker # stages in containers; needs `make images`

Two clones of HEAD, each with a stand-in of its own that answers some requests with 429, 529, 500 or a reset. In one
`make trial` runs undisturbed. In the other every process of it (make, stages, containers) gets SIGKILL at random
moments, and it is started anew, until all kills are done; its stand-in lives on, so the log of what it served is whole.
Moments are drawn so that kills fall on every stage. Promises, each checked at the end; exit code 1 when one is broken:

bytes   every file of data/trial and models/trial is there, and has the bytes of the undisturbed run. Not compared:
        reports, the receipts and the card of the model (they hold times), empty lock files.
paid    no answered request is asked again. Out of reach is what was under way at a kill: an answer that the provider
        has sent and we have not committed yet. No provider takes a key with a completion that would make a second one
        free, so it is paid twice. These are counted, with how long before the kill they were sent; any other breaks
        the promise, and so does more than one a kill.
ledger  the ledger's total is, to the nanodollar, the price of all that was served but for those; to the cent, of all.
left    no half-written file, no lock, no container, no money set aside is left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shared.llm.catalogue import NANO, catalogue
from shared.llm.types import Usage
from shared.standin import start

ROOT = Path(__file__).resolve().parent.parent
FAULTS = "429=0.02,529=0.01,500=0.02,reset=0.02,retry_after=0.2,seed=5"
"""Of transport only: faults of content (a cut answer, say) would change the bytes of both runs alike."""
BUDGET_USD = 2.0
"""Far more than a trial costs: it is there so that money is set aside when a kill comes."""
UNDER_WAY_S, STRAY_S = 1.0, 0.2
"""An answer sent this long before a kill is committed: the slowest of 1,200 took 0.1 s on a busy machine."""
LIMIT_S = 1800.0
NOT_COMPARED = re.compile(r".*\.report\.json|\..*\.lock|1[456]_\w+\.json|README\.md")
INSIDE, PUBLISHED = "synthmill-standin", "synthmill-chaos"
"""The network that contained stages join (docker/compose.yaml has it too), and one that can publish a port."""

# ---------------------------------------------------------------- what is done


class Kill(NamedTuple):
    """One kill: from when until when (seconds since 1970), after how many seconds, and what it hit.

    Attributes:
        processes: how many, containers among them.
        stages: those under way, ``NN_name/track``.
    """

    at: float
    until: float
    life_s: float
    processes: int
    stages: tuple[str, ...]


@dataclass
class Trial:
    """A clone, its stand-in's log, and what happened in it."""

    root: Path
    log: Path
    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0

    @property
    def store(self) -> Path:
        return self.root / "data" / "cache" / "mock.sqlite"

    def served(self) -> list[dict[str, Any]]:
        """The answers that went out in full, in their order."""
        lines = [json.loads(line) for line in self.log.read_bytes().splitlines()] if self.log.exists() else []
        return [line for line in lines if line["served"]]


def clone(target: Path) -> Path:
    """A clone of HEAD in which set-up is done."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    (target / ".venv").mkdir()
    for entry in (ROOT / ".venv").iterdir():
        (target / ".venv" / entry.name).symlink_to(entry)
    shutil.copy(ROOT / "uv.lock", target)
    if (ROOT / ".images").exists():
        shutil.copytree(ROOT / ".images", target / ".images")
    (target / ".venv" / ".setup").unlink(missing_ok=True)
    for made in (target / ".venv" / ".setup", target / "uv.lock", *target.glob(".images/*")):  # newest, in this order
        made.touch()
    return target


def environment(url: str, runner: str, temporary: Path) -> dict[str, str]:
    """What `make trial` runs in: no key, and nothing of a make that we may be part of."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONPATH", "RUN", "LIMIT", "FACTS", "ENGINE", "RETRAIN", "BATCH"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith("STANDIN_") and not name.endswith(("_API_KEY", "_TOKEN"))
    }
    temporary.mkdir(exist_ok=True)
    wanted = {"APIS": "mock", "RUNNER": runner, "BUDGET_USD": f"{BUDGET_USD:g}", "STANDIN_URL": url}
    return kept | wanted | {"TMPDIR": str(temporary)}


@contextlib.contextmanager
def standin(trial: Trial, faults: str, runner: str) -> Iterator[str]:
    """A stand-in that outlives every kill; its address on this machine."""
    state = trial.log.with_name(f"{trial.root.name}-state")
    state.mkdir()
    settings = {"STANDIN_FAULTS": faults, "STANDIN_LOG": str(trial.log), "STANDIN_STATE": str(state)}
    if runner == "docker":
        with contained(trial, settings) as url:
            yield url
        return
    os.environ |= settings
    with start() as url:
        for name in settings:
            del os.environ[name]
        yield url


class Life(contextlib.AbstractContextManager["Life"]):
    """One run of a command in a session of its own, and the end of it."""

    def __init__(self, command: Sequence[str], root: Path, env: dict[str, str], said: Path) -> None:
        self.root = root
        self.started = time.monotonic()
        with open(said, "ab") as file:
            self.child = subprocess.Popen(
                command,
                cwd=root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:  # we are interrupted ourselves
            self.kill(random.Random(0))

    def ended(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait so long, or until there is ``enough``; whether it has ended by itself."""
        end = self.started + seconds
        while self.child.poll() is None and time.monotonic() < end and not enough():
            time.sleep(0.01)
        return self.child.poll() is not None

    def members(self) -> list[int]:
        """Its processes: all of its session that are not dead."""
        listing = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True).stdout
        found = []
        for pid, state in (line.split(None, 1) for line in listing.splitlines()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if not state.startswith(("Z", "X")) and os.getsid(int(pid)) == self.child.pid:
                    found.append(int(pid))
        return found

    def kill(self, draw: random.Random, docker: bool = False) -> Kill:
        """SIGKILL for every process of it, in random order, and for its containers; again until there is none."""
        found, containers, killed = self.members(), running(self.root) if docker else [], set()
        stages, life_s, at = under_way(found), time.monotonic() - self.started, time.time()
        while found or containers:
            draw.shuffle(found)
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if containers:
                engine("kill", *containers)
            killed |= {*map(str, found), *containers}
            self.child.poll()
            found, containers = self.members(), running(self.root) if docker else []
        self.child.wait()
        return Kill(at, time.time(), life_s, len(killed), tuple(stages))


def under_way(pids: Sequence[int]) -> list[str]:
    """The stages that these processes run, ``NN_name/track``."""
    command = ["ps", "-ww", "-o", "command=", "-p", ",".join(map(str, pids))]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout if pids else ""
    found = re.findall(r"stages/(\w+)/main\.py .*--track (\w+)", listing)
    return sorted({f"{stage}/{track}" for stage, track in found})


# ---------------------------------------------------------------- containers


def engine(*arguments: str) -> str:
    """What the Docker client says."""
    client = os.environ.get("DOCKER", "").strip() or "docker"
    return subprocess.run([client, *arguments], capture_output=True, text=True, check=False).stdout.strip()


def running(root: Path, *flags: str) -> list[str]:
    """The containers of a clone's stages: those that see its code."""
    return engine("ps", "-q", *flags, "--filter", f"volume={root / 'stages'}").split()


@contextlib.contextmanager
def contained(trial: Trial, settings: dict[str, str]) -> Iterator[str]:
    """The stand-in as docker/compose.yaml has it, with a log outside; contained stages and native ones reach it."""
    sys.path.insert(0, str(ROOT / "docker"))
    image = importlib.import_module("runner").reference("data")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    trial.log.touch()
    places = [trial.log, Path(settings["STANDIN_STATE"])]
    mounts = [flag for place in places for flag in ("--volume", f"{place}:{place}")]
    variables = [flag for name, value in settings.items() for flag in ("--env", f"{name}={value}")]
    engine("network", "create", "--internal", INSIDE)
    engine("network", "create", PUBLISHED)
    name = f"synthmill-chaos-{os.getpid()}"
    try:
        command = ["run", "--detach", "--name", name, "--network", PUBLISHED, "--publish", f"127.0.0.1:{port}:8080"]
        command += ["--user", f"{os.getuid()}:{os.getgid()}", *mounts, *variables, "--pull", "never", "--init"]
        command += ["--volume", f"{ROOT / 'shared'}:/synthmill/shared:ro", "--env", "PYTHONPATH=/synthmill"]
        command += ["--workdir", "/synthmill", image]
        engine(*command, "python", "-m", "shared.standin", "--host", "0.0.0.0", "--port", "8080")
        aliases = [flag for alias in ("standin", "datasets-server.standin") for flag in ("--alias", alias)]
        engine("network", "connect", *aliases, INSIDE, name)
        deadline = time.monotonic() + 30
        while "STANDIN_URL" not in engine("logs", name):
            if time.monotonic() > deadline:
                sys.exit(f"error: the stand-in's container does not come up\n{engine('logs', name)}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        engine("rm", "--force", name)
        engine("network", "rm", INSIDE, PUBLISHED)


# ---------------------------------------------------------------- when to kill


class Work:
    """How much of a trial is left, judged by an undisturbed one."""

    def __init__(self, reference: Trial) -> None:
        self.seconds = dict(_reports(reference.root))
        self.answers = _answers(reference)
        self.wall_s = reference.seconds
        began = reference.served()[0]["at"] - _first_at(reference)
        self.begin_s = max(1.0, began)

    def left_s(self, trial: Trial) -> float:
        """Seconds of an undisturbed run that are still to come."""
        answers, left = _answers(trial), 0.0
        for name, seconds in self.seconds.items():
            if not (trial.root / name).exists():
                known = self.answers.get(_where(name), 0)
                left += seconds * (1 - min(0.95, answers.get(_where(name), 0) / known if known else 0.0))
        return left * self.wall_s / sum(self.seconds.values())

    def progress(self, trial: Trial) -> tuple[Any, ...]:
        """What changes when the trial has come further."""
        made = sum((trial.root / name).exists() for name in self.seconds)
        generated = _rows(trial.store.with_name("generations_mock.sqlite"), "SELECT COUNT(*) FROM generations")
        trained = [path.stat().st_mtime_ns for path in (trial.root / "models" / "trial").glob("*/*/state/*")]
        return made, sum(_answers(trial).values()), generated, trained


class _Served:
    """Counts the answers in a log that grows."""

    def __init__(self, log: Path) -> None:
        self.log, self.place, self.found = log, 0, 0

    def count(self) -> int:
        with open(self.log, "rb") as file:
            file.seek(self.place)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.place, self.found = self.place + len(whole), self.found + whole.count(b'"served":true')
        return self.found


def _where(name: str) -> tuple[str, str]:
    path = Path(name)
    return path.name.partition(".")[0], path.parent.name


def _reports(root: Path) -> Iterator[tuple[str, float]]:
    for top in ("data", "models"):
        for path in sorted((root / top / "trial").glob("*/*.report.json")):
            output = json.loads(path.read_bytes())
            yield next(iter(output["output"])), output["seconds"]


def _first_at(trial: Trial) -> float:
    return min(path.stat().st_mtime for path in (trial.root / "data" / "trial").glob(".limit-*"))


def _answers(trial: Trial) -> Counter[tuple[str, str]]:
    rows = _rows(trial.store, "SELECT stage, track, COUNT(*) FROM ledger GROUP BY 1, 2")
    return Counter({(stage, track): count for stage, track, count in rows})


def _rows(store: Path, query: str) -> list[tuple[Any, ...]]:
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store, timeout=60)) as db:
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:  # killed before there were tables
            return []


def undisturbed(trial: Trial, env: dict[str, str], command: Sequence[str], said: Path) -> None:
    """One run to its end.

    Raises:
        SystemExit: it fails.
    """
    with Life(command, trial.root, env, said) as life:
        if not life.ended(LIMIT_S) or life.child.returncode:
            sys.exit(f"error: the trial failed without a kill\n{said.read_text('utf-8', 'replace')[-4000:]}")
        trial.seconds += time.monotonic() - life.started
        trial.runs += 1


def disturbed(
    trial: Trial, env: dict[str, str], command: Sequence[str], said: Path, work: Work, kills: int, seed: int
) -> None:
    """Run after run, each killed but the last.

    Every other kill comes after so many answers, its share of those that are left, and a moment more: most of the time
    nobody is asked. The others come when the clock says so: a life lasts as long as it takes to begin, and on average
    its share of what is left to do; longer each time nothing came of it, so that a stage that cannot be done in parts
    is not killed for ever. When all is done before the kills are, the run begins anew, from stored answers.
    """
    draw, patience, hurry, before = random.Random(seed), 1.0, 1.0, work.progress(trial)
    while len(trial.kills) < kills:
        kills_left = kills - len(trial.kills)
        share, answers_left = work.left_s(trial) / kills_left, sum((work.answers - _answers(trial)).values())
        life_s = work.begin_s * draw.uniform(0.1, 0.7) + patience * hurry * share * draw.uniform(0.0, 2.0)
        by_answers, served = bool(answers_left and draw.random() < 0.5), _Served(trial.log)
        more = draw.randint(1, max(1, 2 * answers_left // kills_left))
        with Life(command, trial.root, env, said) as life:
            trial.runs += 1
            if by_answers:
                until = served.count() + more
                life.ended(life_s + work.begin_s, lambda: served.count() >= until)  # noqa: B023  (called here only)
                life_s = time.monotonic() - life.started + draw.uniform(0.0, 0.2)
            ended = life.ended(life_s)
            if ended and life.child.returncode:
                sys.exit(f"error: a run failed that was not killed\n{said.read_text('utf-8', 'replace')[-4000:]}")
            if not ended:
                trial.kills.append(life.kill(draw, env["RUNNER"] == "docker"))
        if ended:
            hurry /= 2  # from stored answers it is done sooner than what is left to do had taken
            for place in ("data/trial", "models/trial"):
                shutil.rmtree(trial.root / place)
        after = work.progress(trial)
        patience, before = 1.0 if after != before else patience * 1.7, after
        what = "done; begins anew from stored answers"
        if not ended:
            kill = trial.kills[-1]
            what = f"killed after {kill.life_s:.1f} s: {' '.join(kill.stages) or '-'}"
        print(f"  {len(trial.kills):3} {what}", file=sys.stderr)
    undisturbed(trial, env, command, said)


# ---------------------------------------------------------------- what is promised


class Asked(NamedTuple):
    """An answer to a request that was answered once more later.

    Attributes:
        before_kill_s: how long before the nearest kill it was sent, below 0 while that was going on; None without one.
    """

    path: str
    nano: int
    before_kill_s: float | None

    @property
    def was_under_way(self) -> bool:
        return self.before_kill_s is not None and self.before_kill_s < UNDER_WAY_S


def different_files(one: Path, two: Path) -> tuple[int, list[str]]:
    """How many files of two trials are the same, and what differs; files that hold times must only be there."""
    files = []
    for root in (one, two):
        paths = [path for top in ("data", "models") for path in (root / top / "trial").rglob("*") if path.is_file()]
        files.append({str(path.relative_to(root)): path for path in paths})
    differ = [f"{name} is in one run only" for name in sorted(files[0].keys() ^ files[1].keys())]
    compared = [name for name in files[0].keys() & files[1].keys() if not NOT_COMPARED.fullmatch(Path(name).name)]
    changed = [name for name in sorted(compared) if files[0][name].read_bytes() != files[1][name].read_bytes()]
    return len(compared) - len(changed), differ + [f"{name} has other bytes" for name in changed]


def asked_again(served: Sequence[dict[str, Any]], kills: Sequence[Kill]) -> list[Asked]:
    """The answers to requests that were answered once more later."""
    found = []
    last = {(line["path"], line["sha256"]): number for number, line in enumerate(served)}
    for number, line in enumerate(served):
        if last[line["path"], line["sha256"]] != number:
            # The server may finish an answer in the moment after its reader has died, and find out later.
            next_kill = next((kill for kill in kills if line["at"] < kill.until + STRAY_S), None)
            before = next_kill.at - line["at"] if next_kill else None
            found.append(Asked(line["path"], price_nano(line), before))
    return found


def price_nano(line: dict[str, Any]) -> int:
    """What the provider charges for a line of the log, in nanodollars."""
    path, model = line["path"], line["model"]
    if path.startswith("/services/tinker"):
        provider = "tinker"
    elif path.startswith("/v1/messages"):
        provider = "anthropic"
    else:
        provider = "gemini" if "/models/" in path else "openai"
    price = catalogue().card(f"{provider}/{model}").price()
    return price.nano(Usage(input=line["input_tokens"], output=line["output_tokens"]), bool(line.get("batch")))


def left_behind(root: Path) -> list[str]:
    """Half-written files, locks that are held, money that is set aside, stores that were not closed."""
    found = []
    for top in (root / "data", root / "models"):
        for path in top.rglob("*"):
            name = path.name
            litter = re.fullmatch(r".*\.(part|old|tmp)|\.owner-.*|\.apis\..+|.*\.sqlite-(wal|shm|journal)", name)
            if litter:
                found.append(str(path.relative_to(root)))
            elif name.endswith(".lock"):
                with open(path, "rb") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        found.append(f"{path.relative_to(root)} is held")
    aside = sum(nano for (nano,) in _rows(root / "data" / "cache" / "mock.sqlite", "SELECT nano FROM reserved"))
    return found + ([f"${aside / NANO:.4f} set aside"] if aside else [])


def verdict(reference: Trial, trial: Trial, docker: bool = False, a_kill: int = 1) -> dict[str, Any]:
    """Every promise with its figures; ``broken`` says which are not kept.

    ``a_kill``: answers under way that may be lost at each kill, on average.
    """
    same, differ = different_files(reference.root, trial.root)
    served = trial.served()
    again = asked_again(served, trial.kills)
    elsewhere = [one for one in again if not one.was_under_way]
    billed = _rows(trial.store, "SELECT COUNT(*), SUM(nano) FROM ledger")[0]
    spent = sum(nano for (nano,) in _rows(trial.store, "SELECT nano FROM spent"))
    price, twice = sum(map(price_nano, served)), sum(one.nano for one in again)
    left = left_behind(trial.root) + (running(trial.root, "--all") if docker else [])
    broken = []
    if differ or not same:
        broken.append(f"bytes: {'; '.join(differ[:5]) or 'nothing to compare'}")
    if elsewhere or len(again) > max(1, a_kill * len(trial.kills)):
        broken.append(f"paid: {len(again)} requests asked again, {len(elsewhere)} of them not under way at a kill")
    if not spent == billed[1] == price - twice:
        broken.append(
            f"ledger: {spent} nanodollars in total, {billed[1]} in lines, {price} served, {twice} served twice"
        )
    if abs(spent - price) * 100 >= NANO:
        broken.append(f"ledger: a cent or more from what was served: {spent} and {price} nanodollars")
    if left:
        broken.append(f"left: {'; '.join(left[:5])}")
    return {
        "files_same": same,
        "files_different": differ,
        "served": len(served),
        "billed": billed[0],
        "asked_again": [one._asdict() for one in again],
        "served_usd": price / NANO,
        "ledger_usd": spent / NANO,
        "paid_twice_usd": twice / NANO,
        "left_behind": left,
        "broken": broken,
    }


# ---------------------------------------------------------------- the whole of it


def table(found: dict[str, Any]) -> str:
    """What was measured, a line a promise."""
    again, kills = found["asked_again"], found["kills"]
    gaps = [one["before_kill_s"] * 1000 for one in again if one["before_kill_s"] is not None]
    under_way = f", sent {min(gaps):.1f} to {max(gaps):.1f} ms before a kill" if gaps else ""
    hit = Counter(stage.partition("/")[0] for kill in kills for stage in kill["stages"])
    stages = "  ".join(f"{stage} {count}" for stage, count in sorted(hit.items()))
    lines = {
        "undisturbed": f"{found['undisturbed_s']:.0f} s, ${found['undisturbed_usd']:.6f}",
        "disturbed": f"{len(kills)} kills in {found['runs']} runs, {found['disturbed_s']:.0f} s",
        "killed in": f"{stages}  (nothing under way: {sum(not kill['stages'] for kill in kills)})",
        "bytes": f"{found['files_same']} files the same, {len(found['files_different'])} not",
        "paid": f"{found['served']:,} answers, {len(again)} asked again{under_way}",
        "ledger": f"${found['ledger_usd']:.9f} = ${found['served_usd']:.9f} served - "
        f"${found['paid_twice_usd']:.9f} asked again",
        "left": "; ".join(found["left_behind"]) or "nothing",
        "": "; ".join(found["broken"]) or "every promise is kept",
    }
    return "\n".join(f"  {name:12} {text}" for name, text in lines.items())


def main() -> int:
    """Exit code 0, or 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runner", choices=("native", "docker", "auto"), default="native", help="auto is native")
    parser.add_argument("--jobs", type=int, default=4, help="of make")
    parser.add_argument("--faults", default=FAULTS, help="of the stand-ins; faults of content change no promise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--keep", action="store_true", help="leave the clones; they stay when a promise is broken")
    flags = parser.parse_args()
    runner = "docker" if flags.runner == "docker" else "native"
    place = Path(tempfile.mkdtemp(prefix="synthmill-chaos-"))
    reference, trial = (Trial(place / name, place / f"{name}.jsonl") for name in ("undisturbed", "disturbed"))
    command = [os.environ.get("MAKE") or "make", f"-j{flags.jobs}", "trial"]
    print(f"chaos: {' '.join(command)} RUNNER={runner}, {flags.kills} kills, seed {flags.seed}, faults {flags.faults}")
    if subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain"], capture_output=True).stdout:
        print("uncommitted changes are left out: what runs is HEAD", file=sys.stderr)
    for one in (reference, trial):
        clone(one.root)
        said = place / f"{one.root.name}.log"
        with standin(one, flags.faults, runner) as url:
            env = environment(url, runner, place / f"{one.root.name}-tmp")
            if one is reference:
                undisturbed(one, env, command, said)
            else:
                started = time.monotonic()
                disturbed(one, env, command, said, Work(reference), flags.kills, flags.seed)
                one.seconds = time.monotonic() - started
    found: dict[str, Any] = {
        "runner": runner,
        "jobs": flags.jobs,
        "seed": flags.seed,
        "faults": flags.faults,
        "undisturbed_s": round(reference.seconds, 1),
        "undisturbed_usd": sum(nano for (nano,) in _rows(reference.store, "SELECT nano FROM spent")) / NANO,
        "disturbed_s": round(trial.seconds, 1),
        "runs": trial.runs,
        "kills": [kill._asdict() for kill in trial.kills],
        **verdict(reference, trial, runner == "docker"),
    }
    print(table(found))
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if flags.keep or found["broken"]:
        print(f"  the clones are in {place}")
    else:
        shutil.rmtree(place)
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
