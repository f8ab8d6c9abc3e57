"""Make .venv from the hash-pinned exports: a virtual environment, uv in it, then every group, nothing unpinned.

Run by `make setup` with the system's Python; uses the standard library only.

    python3 docker/setup.py core llm data
"""

import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "requirements"
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 11), (3, 13)
SPARED = "mlx"
"""The group that has no wheels for some machines (before macOS 14, before glibc 2.35); the trial goes on without it."""


def main(groups: list[str]) -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(
            f"error: Python 3.11 to 3.13 is needed, this is {sys.version_info[0]}.{sys.version_info[1]}\n"
            "  next: make setup PYTHON=python3.12   (macOS: brew install python@3.12)"
        )
    python = VENV / "bin" / "python"
    if not python.exists():
        print(f"set-up: .venv with Python {sys.version_info[0]}.{sys.version_info[1]}", file=sys.stderr)
        venv.create(VENV, with_pip=True)
    elif not (VENV / "bin" / "pip").exists():  # an earlier set-up was interrupted, or another tool made it
        subprocess.run([python, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    quiet = ["--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([python, "-m", "pip", "install", *quiet, "-r", LOCKS / "uv.txt"], check=True)
    print(f"set-up: installing {', '.join(groups)}", file=sys.stderr)
    said = install(python, groups)
    if SPARED in groups and has_no_wheels(SPARED, said):
        print(
            f"set-up: {SPARED} CANNOT BE INSTALLED HERE, and is left out: nothing is generated, trained or measured on "
            f"this machine\n{said}",
            file=sys.stderr,
        )
        said = install(python, [group for group in groups if group != SPARED])
    if said:
        sys.exit(f"{said}\nerror: uv failed\n  next: look at the message above; is the package index reachable?")


def install(python: pathlib.Path, groups: list[str]) -> str:
    """Install these groups; what uv said when it could not."""
    files = [argument for group in groups for argument in ("-r", LOCKS / f"{group}.txt")]
    command = [
        VENV / "bin" / "uv",
        "pip",
        "install",
        "--quiet",
        "--compile-bytecode",
        "--python",
        python,
        "--require-hashes",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or f"uv ended with {done.returncode}"


def has_no_wheels(package: str, said: str) -> bool:
    """Whether uv said that a package, or a part of it, is not made for machines like this one, and nothing else."""
    return "no wheels with a matching" in said and f"Because {package}" in " ".join(said.split())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[0]} failed\n  next: look at the message above; is the package index reachable?")
