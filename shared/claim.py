"""One `make` at a time works on a run: a second one stops at its first step, and the first is never disturbed.

A lock held by each stage is not enough: between two stages nobody holds one, and a second `make trial`, started by
mistake, that takes the next output's lock first ends the run that was there before it. So the whole run has a holder.

The holder is a process, not a file. ``data/.<run>.make`` names the outermost `make` above the stage and when that
process was started, and counts for nothing once it is gone, however it ended, or its number is another process's. So
there is nothing to clean up by hand, no clock to trust, and all stages of a `make -j` and of its sub-makes share it.
A stage started without make holds nothing here: its output's lock (:mod:`shared.stage`) is all it has.

In a container the processes of the host cannot be seen, so docker/runner.py claims before one starts. Standard library
only, because it does so at every stage.

    python -m shared.claim data trial       what `make clean` does first
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from shared.errors import SettingsError, SynthmillError, complain

PROC = Path("/proc")
BOOT = PROC / "sys" / "kernel" / "random" / "boot_id"


class Process(NamedTuple):
    """A process that runs now.

    Attributes:
        started: when, in whatever form the system tells it: with the number, it is one process and no other.
        parent: its parent's number.
        name: of its program.
    """

    number: int
    started: str
    parent: int
    name: str


def process(number: int) -> Process | None:
    """The process of that number; None when there is none, or it has ended and nobody has asked how."""
    return _from_proc(number) if (PROC / "self" / "stat").exists() else _from_ps(number)


def _from_proc(number: int) -> Process | None:
    # Ticks since the machine was started, and which start that was: neither changes when the clock is set.
    try:
        before, _, after = (PROC / str(number) / "stat").read_text("utf-8", "replace").rpartition(")")
        fields = after.split()
        if fields[0] in "ZX":
            return None
        boot = BOOT.read_text("ascii").strip() if BOOT.exists() else ""
        return Process(number, f"{boot} {fields[19]}".strip(), int(fields[1]), before.partition("(")[2])
    except (OSError, LookupError, ValueError):
        return None


def _from_ps(number: int) -> Process | None:
    command = ["ps", "-ww", "-o", "ppid=,stat=,lstart=,comm=", "-p", str(number)]
    plain = os.environ | {"LC_ALL": "C", "TZ": "UTC"}  # else the same start has as many forms as there are settings
    try:
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", env=plain, check=False).stdout
        parent, state, *rest = said.split()
        if state.startswith(("Z", "X")):
            return None
        return Process(number, " ".join(rest[:5]), int(parent), os.path.basename(" ".join(rest[5:])))
    except (OSError, ValueError):
        return None


def make_above() -> Process | None:
    """The outermost `make` that this process is a part of; None when nobody's make started it."""
    levels = os.environ.get("MAKELEVEL", "")
    left = int(levels) if levels.isdecimal() else 0
    found, number = None, os.getppid()
    while left and number > 0 and (above := process(number)):
        if "make" in above.name:  # make, gmake, gnumake; between two of them there may be a shell
            found, left = above, left - 1
        number = above.parent
    return found


def claim(data: str | Path, run: str) -> None:
    """Take ``run`` for the make above this process, unless that has it already. Nothing happens without a make.

    ``data`` is the directory the runs lie in; what is in ``models/<run>`` belongs to the same run.

    Raises:
        SettingsError: another make that still runs has it.
        OSError: the directory cannot be written to.
    """
    mine = make_above()
    if mine is None:
        return
    path = Path(data) / f".{run}.make"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # for as long as it takes to read and write a line
        number, started, since = _holder(file.read(4096))
        if (number, started) == (mine.number, mine.started):
            return
        if (holder := process(number)) is not None and holder.started == started:
            raise SettingsError(
                f"make (process {number}) is at work on RUN={run} since {since}; this is another make",
                f"wait for it, or stop it (kill {number}), then run the same command",
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{mine.number}\t{mine.started}\t{now}\n".encode()
        os.pwrite(file.fileno(), line, 0)
        os.ftruncate(file.fileno(), len(line))


def _holder(found: bytes) -> tuple[int, str, str]:
    """Number, start and since when; number 0, which is no process's, when the file says nothing readable."""
    try:
        number, started, since = found.partition(b"\n")[0].decode("utf-8").split("\t")
        return int(number), started, since
    except ValueError:
        return 0, "", ""


def main(arguments: list[str]) -> int:
    """Claim a run from the command line; the exit code."""
    data, run = arguments
    try:
        claim(data, run)
    except SynthmillError as error:
        return complain(error)
    except OSError as error:
        return complain(SynthmillError(f"cannot write: {error}", "open that place, then run the same command"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
