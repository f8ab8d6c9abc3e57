"""How near to the wire our client is: seconds, calls a second and memory against a stub of chosen latency.

    python -m benchmarks.client                     # 2,000 calls, 50 at a time, 100 ms; bare aiohttp in the same run
    python -m benchmarks.client --latency heavy --concurrency 64 --calls 4000 --repeats 3
    python -m benchmarks.client --flat              # memory at 1,000, 10,000 and 100,000 calls

`bare` is aiohttp with a window of workers and nothing else: the base every figure is compared with, measured in turn
with ours because a shared machine is never the same twice. `ours` is :class:`shared.llm.Models` whole: reply store,
ledger, retries, limits. Each measurement is a process of its own; the figures are medians of the repeats.

- seconds: from the first record asked for to the last answer delivered; imports and start-up are beside it.
- ideal: what Little's law allows: the sum of the latencies the stub chose / concurrency.
- PSS: peak proportional memory of the process that asks (Linux; elsewhere its peak resident set).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.asking import MODELS
from benchmarks.processes import pss_mib

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- measuring


@contextmanager
def stub(*flags: str) -> Iterator[str]:
    """A stub for the length of the block; its address."""
    command = [sys.executable, "-m", "benchmarks.stub", *flags]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip()
    finally:
        child.terminate()
        child.wait()
        child.stdout.close()


def stats(url: str) -> dict[str, Any]:
    """What the stub counted."""
    with urllib.request.urlopen(f"{url}/__stats", timeout=10) as answer:
        return dict(json.load(answer))


def measure(what: str, url: str, calls: int, concurrency: int, provider: str = "openai") -> dict[str, float]:
    """One run in a process of its own: seconds, the whole process's wall and CPU seconds, and peak MiB."""
    urllib.request.urlopen(f"{url}/__reset", data=b"", timeout=10).close()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as cache:
        return _measure([what, url, str(calls), str(concurrency), provider, cache])


def _measure(flags: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.asking", *flags]
    env = os.environ | {"APIS": "mock", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    peak, watching = [0.0], True

    def watch() -> None:
        while watching:
            peak[0] = max(peak[0], pss_mib(child.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = child.communicate()
    watching = False
    watcher.join()
    if child.returncode:
        sys.exit(child.returncode)
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    counted = stats(flags[1])
    assert counted["asked"] == counted["answered"] == int(flags[2]), counted
    found |= {"wall_s": time.perf_counter() - started, "mib": peak[0] or found["rss_mib"]}
    return found | {"latency_s": counted["latency_s"]}


def compare(calls: int, concurrency: int, latency: str, repeats: int, provider: str) -> dict[str, Any]:
    """Ours and the base in turn; medians, and the ratio that counts."""
    rows: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
    with stub("--latency", latency) as url:
        for _ in range(repeats):
            for what, found in rows.items():
                found.append(measure(what, url, calls, concurrency, provider))
    medians = {
        what: {key: statistics.median(row[key] for row in found) for key in found[0]} for what, found in rows.items()
    }
    ideal = medians["bare"]["latency_s"] / concurrency  # an item's latency is the same for both
    print(f"{calls:,} calls to {provider}, {concurrency} at a time, latency {latency}; ideal {ideal:.2f} s;", end=" ")
    print(f"medians of {repeats}")
    print(f"{'':6}{'seconds':>9}{'calls/s':>9}{'of ideal':>9}{'vs bare':>9}{'CPU s':>8}{'wall s':>8}{'MiB':>7}   runs")
    for what, m in medians.items():
        runs = " ".join(f"{row['seconds']:.2f}" for row in rows[what])
        ratio = m["seconds"] / medians["bare"]["seconds"]
        print(
            f"{what:6}{m['seconds']:9.2f}{calls / m['seconds']:9.0f}{ideal / m['seconds']:9.2f}{ratio:9.2f}"
            f"{m['cpu_s']:8.2f}{m['wall_s']:8.2f}{m['mib']:7.1f}   {runs}"
        )
    given = {"calls": calls, "concurrency": concurrency, "latency": latency, "provider": provider}
    return given | {"ideal_s": ideal, "runs": rows, "medians": medians}


def flat(provider: str, many: Sequence[int] = (1_000, 10_000, 100_000)) -> dict[str, Any]:
    """Peak memory for more and more calls: it must not grow with them."""
    found = {}
    with stub("--latency", "0.005") as url:
        for calls in many:
            row = measure("ours", url, calls, 50, provider)
            found[str(calls)] = row
            print(f"{calls:>8,} calls: {row['seconds']:7.1f} s, {calls / row['seconds']:5.0f}/s, {row['mib']:.1f} MiB")
    return {"flat": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--latency", default="0.1", help="seconds, or `heavy`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--provider", choices=MODELS, default="openai")
    parser.add_argument("--flat", action="store_true", help="memory at 1,000, 10,000 and 100,000 calls instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    flags = parser.parse_args()
    if flags.flat:
        found = flat(flags.provider)
    else:
        found = compare(flags.calls, flags.concurrency, flags.latency, flags.repeats, flags.provider)
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
