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


def main(groups):
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(
            "error: Python 3.11 to 3.13 is needed, this is %d.%d\n"
            "  next: make setup PYTHON=python3.12   (macOS: brew install python@3.12)" % sys.version_info[:2]
        )
    python = VENV / "bin" / "python"
    if not python.exists():
        print("set-up: .venv with Python %d.%d" % sys.version_info[:2], file=sys.stderr)
        venv.create(VENV, with_pip=True)
    quiet = ["--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([python, "-m", "pip", "install", *quiet, "-r", LOCKS / "uv.txt"], check=True)
    files = [argument for group in groups for argument in ("-r", LOCKS / ("%s.txt" % group))]
    print("set-up: installing %s" % ", ".join(groups), file=sys.stderr)
    command = [VENV / "bin" / "uv", "pip", "install", "--quiet", "--python", python, "--require-hashes", *files]
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit("error: %s failed\n  next: look at the message above; is the package index reachable?" % error.cmd[0])
