"""Write uv.lock, then its host-free, hash-pinned exports in docker/requirements/, one per dependency group.

uv.lock names the registry it was made from, so it is not committed; the exports are, and everything installs from them.

    make lock
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "requirements"
UV = ROOT / ".venv" / "bin" / "uv"
GROUPS = ("core", "llm", "data", "embed", "mlx", "tinker", "tracing", "dev")


def exported(group: str) -> str:
    """The export of one group from uv.lock as it is: no network."""
    choose = [] if group == "core" else ["--only-group", group]
    flags = ["--frozen", "--offline", "--no-header", "--no-annotate", "--no-emit-project", "--quiet"]
    command = [str(UV), "export", *flags, *choose]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    subprocess.run([UV, "lock", "--python", sys.executable], cwd=ROOT, check=True)
    for group in GROUPS:
        (LOCKS / f"{group}.txt").write_text(exported(group), "utf-8")
    # uv itself: its own pin, with the hashes of every platform we run on
    version = subprocess.run([UV, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    command = [str(UV), "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--universal", "-"]
    pinned = subprocess.run(command, cwd=ROOT, input=f"uv=={version}\n", text=True, capture_output=True, check=True)
    (LOCKS / "uv.txt").write_text(pinned.stdout, "utf-8")


if __name__ == "__main__":
    main()
