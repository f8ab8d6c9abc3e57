"""The peers' environments: ``benchmarks/.venvs/<peer>``, made with uv from ``benchmarks/peers/<peer>.txt``.

The files pin what they name; what that brings along is pinned by :data:`NEWEST`, the day up to which releases count.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = tuple(sorted(path.stem for path in (HERE / "peers").glob("*.txt") if path.stem != "constraints"))
UV = ROOT / ".venv" / "bin" / "uv"
NEWEST = "2026-11-20T00:00:00Z"


class NotInstalledError(Exception):
    """A peer cannot be had; the message is the reason, one line."""


def requirements(peer: str) -> list[str]:
    """The pins of a peer, its own first."""
    lines = (HERE / "peers" / f"{peer}.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def version(peer: str) -> str:
    """The pinned version of the peer itself."""
    return requirements(peer)[0].partition("==")[2]


def python_of(peer: str) -> Path:
    return HERE / ".venvs" / peer / "bin" / "python"


def install(peer: str, limit_s: float) -> dict[str, Any]:
    """Make a peer's environment unless it is up to date: packages, MB on disk, seconds it took.

    Raises:
        NotInstalledError: uv cannot, or not within ``limit_s`` seconds.
    """
    venv, started = HERE / ".venvs" / peer, time.monotonic()
    wanted = "\n".join([sys.version, NEWEST, *requirements(peer)])
    stamp = venv / ".installed"
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        if limit_s <= 0:
            raise NotInstalledError("no time was left to install it")
        _uv(limit_s, "venv", "--quiet", "--clear", "--python", sys.executable, str(venv))
        files = ["--requirements", f"benchmarks/peers/{peer}.txt", "--constraints", "benchmarks/peers/constraints.txt"]
        flags = ["--quiet", "--compile-bytecode", "--exclude-newer", NEWEST, "--python", str(python_of(peer))]
        _uv(limit_s, "pip", "install", *flags, *files)
        stamp.write_text(wanted, "utf-8")
    packages = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
    size = sum(path.lstat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
    return {"packages": packages, "mb": round(size / 1e6), "install_s": round(time.monotonic() - started, 1)}


def _uv(limit_s: float, *arguments: str) -> None:
    # nice: whoever else works on this machine goes first
    command = ["nice", "-n", "10", str(UV), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise NotInstalledError(f"not installed within {limit_s:.0f} s") from None
    if done.returncode:
        raise NotInstalledError(reason(done.stderr) or f"uv ended with {done.returncode}")


def reason(text: str) -> str:
    """The last line of a program's complaint, without what belongs to this machine alone."""
    lines = [line.strip(" │╰╭─▶×\t") for line in text.splitlines() if line.strip(" │╰╭─▶×\t")]
    last = lines[-1] if lines else ""
    last = re.sub(r"https?://\S+", "<address>", last.replace(str(ROOT), ".").replace(str(Path.home()), "~"))
    return re.sub(r"(?<![\w.])~?/(?:[^\s/]+/)+", "", last)[:200]
