"""How well a limit of 20 requests a second is used: seconds, refused calls and lost rows, against the stand-in.

    python -m benchmarks.rate                       # 100 requests, 50 at a time; ideal 5.0 s
    python -m benchmarks.rate --processes 2         # 50 requests in each of two processes, at once

What is measured is :class:`shared.llm.Models` with its state of limits in a new directory, so nothing is known of the
server beforehand; SDKs are imported before the clock starts. Requests and refusals are counted by the stand-in.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.asking import MODELS, SDKS
from benchmarks.client import ROOT


def child(cache: str, provider: str, calls: str, concurrency: str, who: str) -> None:
    """Ask, when told to begin; print what came of it."""
    from shared.llm import Models, Reply, Request, chat

    model = MODELS[provider]

    async def work(n: int) -> Reply:
        return await models.ask(Request(model=model, messages=chat("", f"Say what line {n} of {who} says.")))

    with Models(Path(cache), "mock", "trial", "bench", "compression") as models:
        models.require(model)
        importlib.import_module(SDKS[provider])
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.monotonic()
        lost = sum(bool(reply.problem) for _, reply in models.map(work, range(int(calls)), int(concurrency)))
        print(json.dumps({"started": started, "ended": time.monotonic(), "lost": lost}), flush=True)


def measure(rate: float, provider: str, calls: int, concurrency: int, processes: int) -> dict[str, float]:
    """One run: seconds from the first process's start to the last one's end."""
    from shared.standin import start

    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "requests.jsonl"
        os.environ |= {"STANDIN_RATE": f"{rate:g}", "STANDIN_LOG": str(log), "APIS": "mock", "PYTHONPATH": str(ROOT)}
        with start() as url:
            os.environ["STANDIN_URL"] = url
            flags = ["--child", place, provider, str(calls // processes), str(concurrency)]
            command = [sys.executable, "-m", "benchmarks.rate", *flags]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            children = [subprocess.Popen([*command, f"process {n}"], **pipes) for n in range(processes)]
            for one in children:
                assert one.stdout is not None and one.stdout.readline() == "ready\n"
            for one in children:
                assert one.stdin is not None
                one.stdin.write("go\n")
                one.stdin.flush()
            rows = [json.loads(one.communicate()[0]) for one in children]
        asked = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "seconds": max(row["ended"] for row in rows) - min(row["started"] for row in rows),
        "wasted": sum(line["status"] == 429 for line in asked),
        "answered": sum(line["served"] for line in asked),
        "lost": sum(row["lost"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second the stand-in lets through")
    parser.add_argument("--calls", type=int, default=100, help="of all processes together")
    parser.add_argument("--concurrency", type=int, default=50, help="of each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--provider", choices=MODELS, default="openai")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(*flags.child)
        return
    given = (flags.rate, flags.provider, flags.calls, flags.concurrency, flags.processes)
    rows = [measure(*given) for _ in range(flags.repeats)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(
        f"{flags.calls} calls to {flags.provider} in {flags.processes} process(es), {flags.rate:g} a second allowed; "
        f"ideal {flags.calls / flags.rate:.2f} s; medians of {flags.repeats}"
    )
    print(f"{'seconds':>9}{'refused':>9}{'answered':>10}{'lost':>6}   runs")
    runs = " ".join(f"{row['seconds']:.2f}/{row['wasted']:.0f}" for row in rows)
    m = medians
    print(f"{m['seconds']:9.2f}{m['wasted']:9.0f}{m['answered']:10.0f}{m['lost']:6.0f}   {runs}")
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps({"rate": flags.rate, "runs": rows, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
