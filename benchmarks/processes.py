"""Run one program and watch it: seconds, CPU seconds, and the memory of the whole tree of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

WATCH_S = 0.1
"""How often memory is looked at; reading the maps of 300 MiB takes the kernel some milliseconds."""
MIB = 1 << 20


class Ran(NamedTuple):
    """What became of a program.

    Attributes:
        ended: its exit status, negative for a signal; None when it hung and was killed.
        wall_s: from start to end.
        cpu_s: of it and the children it waited for, user and system.
        process_mib: the highest peak of any one process: the one that does the work.
        tree_mib: the peak of all of them together. Both are proportional (PSS) on Linux; elsewhere they are the
            resident size of the program alone.
        processes: the most there were at once.
    """

    ended: int | None
    wall_s: float
    cpu_s: float
    process_mib: float
    tree_mib: float
    processes: int
    out: str
    err: str


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    limit_s: float,
    kill_when: Callable[[], bool] | None = None,
) -> Ran:
    """Run it to its end, to ``limit_s`` seconds, or until ``kill_when`` says so: then the whole tree gets SIGKILL.

    ``folder`` is where it runs; its output is kept in files there meanwhile.
    """
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    started = time.monotonic()
    with open(out, "wb") as to_out, open(err, "wb") as to_err:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=to_out,
            stderr=to_err,
            start_new_session=True,
        )
    peaks: dict[int, float] = {}
    tree_peak, most, hung, ending, looked = 0.0, 1, False, False, 0.0
    reaped = False
    try:
        while True:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if reaped := pid != 0:
                break
            now = time.monotonic()
            if now - looked >= WATCH_S:
                looked, sizes = now, {pid: pss_mib(pid) for pid in tree(child.pid)}
                for pid, size in sizes.items():
                    peaks[pid] = max(size, peaks.get(pid, 0.0))
                tree_peak, most = max(tree_peak, sum(sizes.values())), max(most, len(sizes))
            hung = hung or now - started > limit_s
            ending = ending or hung or (kill_when is not None and kill_when())
            if ending:  # it may take a while to die, and is not asked again meanwhile
                kill(child.pid)
            time.sleep(0.005 if kill_when else 0.02)
    finally:
        if not reaped:
            kill(child.pid)
        with contextlib.suppress(ProcessLookupError):  # what it left behind: its session was its own
            os.killpg(child.pid, signal.SIGKILL)
    child.returncode = os.waitstatus_to_exitcode(status)
    resident = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB
    return Ran(
        ended=None if hung else child.returncode,
        wall_s=time.monotonic() - started,
        cpu_s=used.ru_utime + used.ru_stime,
        process_mib=max(peaks.values(), default=0.0) or resident,
        tree_mib=tree_peak or resident,
        processes=most,
        out=out.read_text("utf-8", "replace"),
        err=err.read_text("utf-8", "replace"),
    )


def tree(pid: int) -> list[int]:
    """A process and all below it; the process alone where the system does not tell."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += tree(int(child))
    return found


def kill(pid: int) -> None:
    """SIGKILL for a process and all below it."""
    for each in reversed(tree(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def pss_mib(pid: int) -> float:
    """Proportional memory of a process now; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)
