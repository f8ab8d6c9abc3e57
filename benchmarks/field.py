"""Ours among its peers, side by side: seconds, memory, refused calls, what a kill costs. `make bench-client` runs it.

    python -m benchmarks.field                                          # everything, 3 times; half an hour
    python -m benchmarks.field --peers "datatrove curator" --repeats 1 --scenarios fast --out ""

Every peer runs in an environment of its own (benchmarks/venvs.py), through a script of the same interface
(benchmarks/peers/), against the same stub (benchmarks/stub.py), which counts the requests. Who can be installed and run
is measured; who cannot is listed with the reason. The repeats are interleaved, because a shared machine is never the
same twice; figures are medians.

fast      2,000 calls, 50 at a time, answered after 100 ms
capped    100 calls where 20 a second are let through, the rest refused with 429 and Retry-After; 10 and 50 at a time
killed    100 calls, 10 at a time, 50 to 150 ms each; 50 ms after the 50th answer the whole process tree gets SIGKILL,
          then the same is run again
heavy     ours and bare aiohttp: 20,000 calls, 64 at a time; 95 % take 50 ms, 4.5 % 500 ms, 0.5 % 2 s
memory    ours: peak at 1,000, 10,000 and 100,000 calls
variants  ours: the other providers' SDKs in `fast`, and `capped` from two processes at once

- seconds: the library's call, from inside the process; imports and start-up are left out, for everybody alike. At the
  server: from the first question that reached it to the last answer it gave.
- MiB: peak proportional memory (PSS) of the process that does the work, and of its whole tree of processes.
- wasted: requests answered with 429. Paid twice: answers delivered 50 ms before the kill or earlier, which the second
  run asks for again. What was under way when it was killed is not counted: nobody has these answers.
- ours keeps its reply store and ledger in all of them; peers keep theirs where `killed` says so, else run at defaults.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import client, rate, results, venvs
from benchmarks.client import ROOT, stats, stub
from benchmarks.processes import Ran, run
from benchmarks.results import CALLS

OURS = ("synthmill", "bare")
SAVES = ("datatrove", "data_designer", "sdg_hub")
"""Peers that let one say how often to save; the others save as they do."""
SCENARIOS = ("fast", "capped", "killed", "heavy", "memory", "variants")
INSTALL_LIMIT_S = 900.0
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
"""What a measured process gets of our environment: no key, no proxy, no setting of ours."""

Row = dict[str, Any]


# ---------------------------------------------------------------- one run of one peer


def once(
    peer: str,
    url: str,
    calls: int,
    concurrency: int,
    place: Path,
    limit_s: float,
    save_every: int = 0,
    kill_when: Callable[[], bool] | None = None,
) -> Row:
    """Run a peer's script in ``place``; what it cost, what it delivered, and ``failed``: why it did not, else empty."""
    python = sys.executable if peer in OURS else str(venvs.python_of(peer))
    rows, state = place / "rows.jsonl", place / "state"
    state.mkdir(exist_ok=True)
    rows.unlink(missing_ok=True)
    flags = [url, str(calls), str(concurrency), str(rows), str(state), str(save_every)]
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(place), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", f"benchmarks.peers.{peer}", *flags]
    ran = run(command, folder=place, environment=environment, limit_s=limit_s, kill_when=kill_when)
    delivered = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.exists() else []
    found: Row = {
        "seconds": said_seconds(ran.out),
        "wall_s": round(ran.wall_s, 2),
        "cpu_s": round(ran.cpu_s, 2),
        "process_mib": round(ran.process_mib, 1),
        "tree_mib": round(ran.tree_mib, 1),
        "processes": ran.processes,
        "rows": len(delivered),
        "different": len({row["question"] for row in delivered if row["answer"]}),
        "failed": "" if kill_when else complaint(ran, limit_s),
    }
    return found


def said_seconds(out: str) -> float | None:
    """What the script printed last; None when it did not get that far."""
    for line in reversed(out.splitlines()):
        if line.startswith('{"seconds"'):
            return round(float(json.loads(line)["seconds"]), 3)
    return None


def complaint(ran: Ran, limit_s: float) -> str:
    if ran.ended is None:
        return f"hung, killed after {limit_s:.0f} s"
    return (venvs.reason(ran.err) or f"exit status {ran.ended}") if ran.ended else ""


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A new directory for one run."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR"), ignore_cleanup_errors=True) as name:
        yield Path(name)


def tell(url: str, what: str) -> None:
    """``reset`` or ``mark``, see benchmarks/stub.py."""
    urllib.request.urlopen(f"{url}/__{what}", data=b"", timeout=10).close()


def asked(peer: str, url: str, calls: int, concurrency: int, limit_s: float) -> Row:
    """One run from nothing; with what the stub counted."""
    tell(url, "reset")
    with place() as here:
        row = once(peer, url, calls, concurrency, here, limit_s)
    counted = stats(url)
    names = ("asked", "answered", "refused", "repeated", "most_under_way")
    row |= {name: counted[name] for name in names}
    row["span_s"] = round(max(0.0, counted["last"] - counted["first"]), 3)
    return row | {"lost": calls - row["different"]}


def killed(peer: str, url: str, calls: int, concurrency: int, limit_s: float, save_every: int) -> Row:
    """One run that is killed at half, and one that goes on."""
    tell(url, "reset")
    half = calls // 2

    def now() -> bool:
        if stats(url)["distinct"] < half:
            return False
        tell(url, "mark")
        time.sleep(0.05)  # whoever saves an answer as it comes has saved these
        return True

    with place() as here:
        first = once(peer, url, calls, concurrency, here, limit_s, save_every, now)
        while stats(url)["under_way"]:
            time.sleep(0.05)
        before = stats(url)
        row = once(peer, url, calls, concurrency, here, limit_s, save_every)
    after = stats(url)
    if first["seconds"] is not None:
        row["failed"] = row["failed"] or "it had ended before it could be killed"
    return row | {
        "answered_before": before["distinct"],
        "under_way_when_killed": before["abandoned"],
        "asked_again": after["asked"] - before["asked"],
        "paid_twice": after["repeated"],
        "lost": calls - row["different"],
    }


# ---------------------------------------------------------------- scenarios


def repeated(names: Sequence[str], repeats: int, measure: Callable[[str], Row]) -> dict[str, Row]:
    """Every one in turn, ``repeats`` times; all rows, and their medians. One that failed each time has no medians."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names:
            rows[name].append(measure(name))
            print(f"  {turn + 1}/{repeats} {name}: {told(rows[name][-1])}", file=sys.stderr, flush=True)
    return {name: {"runs": found, "medians": medians(found)} for name, found in rows.items()}


def medians(rows: Sequence[Row]) -> Row:
    """Of the figures of the runs that did not fail; and how many there were of which."""
    good = [row for row in rows if not row["failed"]]
    found: Row = {"good": len(good), "of": len(rows)}
    found["failed"] = next((row["failed"] for row in rows if row["failed"]), "")
    for name, value in rows[0].items():
        if isinstance(value, int | float) or (value is None and good and good[0][name] is not None):
            figures = [row[name] for row in good or rows if row[name] is not None]
            found[name] = round(statistics.median(figures), 3) if figures else None
    return found


def told(row: Row) -> str:
    names = ("seconds", "process_mib", "tree_mib", "asked", "refused", "paid_twice", "different", "failed")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) not in (None, ""))


def fast(names: Sequence[str], repeats: int, calls: int, limit_s: float) -> Row:
    with stub("--latency", "0.1") as url:
        found = repeated(names, repeats, lambda peer: asked(peer, url, calls, 50, limit_s))
    return {"calls": calls, "concurrency": 50, "latency_s": 0.1, "ideal_s": calls * 0.1 / 50, "found": found}


def capped(names: Sequence[str], repeats: int, calls: int, concurrency: int, limit_s: float) -> Row:
    with stub("--latency", "0.1", "--rate", "20") as url:

        def measure(peer: str) -> Row:
            time.sleep(1.1)  # the server's second of the last one is over
            return asked(peer, url, calls, concurrency, limit_s)

        found = repeated(names, repeats, measure)
    return {"calls": calls, "concurrency": concurrency, "rate": 20, "ideal_s": calls / 20, "found": found}


def killed_all(names: Sequence[str], repeats: int, calls: int, limit_s: float) -> Row:
    """A peer that can be told how often to save is told 10, and is measured at its defaults as well."""
    variants = {name: (name, 10 if name in SAVES else 0) for name in names}
    variants |= {f"{name}, defaults": (name, 0) for name in names if name in SAVES}
    with stub("--latency", "spread") as url:
        found = repeated(
            list(variants), repeats, lambda name: killed(variants[name][0], url, calls, 10, limit_s, variants[name][1])
        )
    return {"calls": calls, "concurrency": 10, "killed_at": calls // 2, "save_every": 10, "found": found}


def variants(repeats: int, calls: int) -> Row:
    others = {name: client.compare(calls, 50, "0.1", repeats, name) for name in ("anthropic", "gemini")}
    rows = [rate.measure(20, "openai", 100, 50, 2) for _ in range(repeats)]
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {"providers": others, "two_processes": {"runs": rows, "medians": middle}}


# ---------------------------------------------------------------- everything


def installed(peers: Sequence[str]) -> dict[str, Row]:
    """Every peer's environment: what is in it, or under ``missing`` why there is none."""
    end, found = time.monotonic() + INSTALL_LIMIT_S, {}
    for peer in peers:
        found[peer] = {"version": venvs.version(peer), "missing": ""}
        try:
            found[peer] |= venvs.install(peer, end - time.monotonic())
        except venvs.NotInstalledError as error:
            found[peer]["missing"] = str(error)
        print(f"  {peer}: {found[peer]}", file=sys.stderr, flush=True)
    return found


def machine() -> Row:
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / (1 << 30)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("aiohttp", "anthropic", "google-genai", "openai")}


def measure(flags: argparse.Namespace, peers: Sequence[str], scenarios: Sequence[str]) -> Row:
    found: Row = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": flags.command,
        "repeats": flags.repeats,
        "calls": flags.calls,
        "machine": machine(),
        "versions": versions(),
        "newest": venvs.NEWEST,
    }
    print("installing", file=sys.stderr)
    for part in ("shared", "benchmarks/peers"):  # as the others.
        compileall.compile_dir(ROOT / part, quiet=2)
    found["peers"] = installed(peers)
    names = [*OURS, *(peer for peer in peers if not found["peers"][peer]["missing"])]
    calls = flags.calls
    for scenario in scenarios:
        print(scenario, file=sys.stderr, flush=True)
        match scenario:
            case "fast":
                found[scenario] = fast(names, flags.repeats, calls, 60 + 0.15 * calls)
            case "capped":
                for concurrency in (10, 50):
                    found[f"capped_{concurrency}"] = capped(names, flags.repeats, max(calls // 20, 1), concurrency, 45)
            case "killed":
                found[scenario] = killed_all(names, flags.repeats, max(calls // 20, 1), 45)
            case "heavy":
                found[scenario] = client.compare(calls * 10, 64, "heavy", flags.repeats, "openai")
            case "memory":
                found[scenario] = client.flat("openai", (calls // 2, calls * 5, calls * 50))
            case "variants":
                found[scenario] = variants(flags.repeats, calls)
    found["machine"]["load_after"] = [round(load, 2) for load in os.getloadavg()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", default="", metavar="NAMES", help=f"of {', '.join(venvs.PEERS)}, or none; default: all"
    )
    parser.add_argument("--scenarios", default="", metavar="NAMES", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", type=int, default=CALLS, help="of `fast`; the others are in proportion")
    parser.add_argument("--again", action="store_true", help="keep the other scenarios that OUT has, with their date")
    parser.add_argument("--out", default="benchmarks/results/client", help="there .json and .md; '' = print only")
    flags = parser.parse_args()
    peers = flags.peers.split() or venvs.PEERS
    scenarios = flags.scenarios.split() or SCENARIOS
    for given, known in ((peers, venvs.PEERS), (scenarios, SCENARIOS)):
        if wrong := set(given) - set(known) - {"none"}:
            parser.error(f"there is no {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    peers = [peer for peer in peers if peer != "none"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    flags.command = os.environ.get("BENCH_COMMAND") or " ".join(["python -m benchmarks.field", *sys.argv[1:]])
    found = measure(flags, peers, scenarios)
    if flags.again:
        found = results.again(json.loads((ROOT / flags.out).with_suffix(".json").read_text("utf-8")), found)
    print(results.document(found))
    if flags.out:
        results.write(found, ROOT / flags.out)
        whole = set(peers) == set(venvs.PEERS) and (flags.again or set(scenarios) == set(SCENARIOS))
        if whole and flags.calls == CALLS and flags.out == parser.get_default("out"):
            results.into_readme(ROOT / "README.md", found)


if __name__ == "__main__":
    main()
