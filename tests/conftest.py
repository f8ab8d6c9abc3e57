"""What every test gets: no network but loopback, no keys, an environment of its own, and a copy of the repository.

Nothing here replaces code: a test that needs a service talks to the stand-in cloud (`standin`) through the real SDKs.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "http://127.0.0.1:1"
"""Nothing listens on port 1: what a test did not point at the stand-in is refused at once."""
BASE_URLS = (
    "ANTHROPIC_BASE_URL",
    "OPENAI_BASE_URL",
    "GOOGLE_GEMINI_BASE_URL",
    "HF_ENDPOINT",
    "TINKER_BASE_URL",
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
OURS = {
    "APIS",
    "BATCH",
    "BUDGET_USD",
    "ENGINE",
    "RUN",
    "ID",
    "LIMIT",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "TRACK",
    "PUSH",
    "HF_REPO",
    "RETRAIN",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; runs by default, left out with -m 'not slow'")
    sys.addaudithook(_refuse_the_network)


# ---------------------------------------------------------------- no network but loopback


class NetworkForbiddenError(RuntimeError):
    """A test reached for something that is not on this machine."""


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode("idna")
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_the_network(event: str, args: tuple[Any, ...]) -> None:
    # An audit hook sees every socket of this process, whichever library opens it, and cannot be patched away.
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # a str or bytes is the path of a unix socket
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if not _is_local(host):
        raise NetworkForbiddenError(f"{event} to {host!r}: tests reach nothing but this machine")


def closed_environment() -> dict[str, str]:
    """This process's environment without keys, and with every way out pointed at a closed port.

    What the audit hook does in here, this does for the processes a test starts: an SDK without a stand-in, pip, git
    over http and everything else that obeys the proxy variables is refused at once instead of reaching a real host.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OURS
        and not name.startswith(("STANDIN_", "SYNTHMILL_", "OTEL_", "LOGFIRE_"))
        and not name.endswith(("_API_KEY", "_TOKEN", "_BASE_URL"))
    }
    return kept | {
        "APIS": "mock",  # whatever .env lies in the checkout
        "RUNNER": "native",  # whatever engine and images are here; test_docker.py says docker where it means it
        "PYTHONPATH": str(ROOT),
        **dict.fromkeys(BASE_URLS, NOWHERE),
        **dict.fromkeys(PROXIES, NOWHERE),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file:http:https",  # ssh and git:// know no proxy
    }


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Each test starts from the closed environment and leaves no variable behind."""
    with environment_of(closed_environment()):
        yield


@contextmanager
def environment_of(variables: dict[str, str]) -> Iterator[None]:
    """Exactly these variables inside the block; what they were before, after it."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---------------------------------------------------------------- the stand-in cloud


class StandinLog:
    """The log of a stand-in: one JSON line for every request that reached it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = 0

    def everything(self) -> list[dict[str, Any]]:
        """All requests since the stand-in started."""
        before, lines = -1, self._lines()
        while len(lines) != before:  # a line is written after its answer: let the last ones come in
            time.sleep(0.1)
            before, lines = len(lines), self._lines()
        return [orjson.loads(line) for line in lines]

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path.exists() else []

    def requests(self) -> list[dict[str, Any]]:
        """The requests since :meth:`mark`."""
        return self.everything()[self.start :]

    def mark(self) -> None:
        """From here on, count anew."""
        self.start = len(self.everything())


@pytest.fixture(scope="session")
def _standin_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    from shared.standin import start

    log = tmp_path_factory.mktemp("standin") / "requests.jsonl"
    with contextlib.ExitStack() as stack:
        with environment_of(closed_environment() | {"STANDIN_LOG": str(log)}):
            url = stack.enter_context(start())
        yield url, log


@pytest.fixture
def standin(_standin_server: tuple[str, Path], _own_environment: None) -> StandinLog:
    """A running stand-in that stages and :class:`shared.llm.Models` use in this test; its log, from now on."""
    url, path = _standin_server
    os.environ["STANDIN_URL"] = url
    log = StandinLog(path)
    log.mark()
    return log


StandinWith = Callable[..., StandinLog]


@pytest.fixture
def standin_with(tmp_path: Path, _own_environment: None) -> Iterator[StandinWith]:
    """Start a stand-in with settings of its own, as ``standin_with(faults="429=1", latency_s=0.5)``; its log."""
    from shared.standin import start

    with contextlib.ExitStack() as stack:

        def begin(**settings: object) -> StandinLog:
            log = tmp_path / f"requests-{time.monotonic_ns()}.jsonl"
            wanted = {f"STANDIN_{name.upper()}": str(value) for name, value in (settings | {"log": log}).items()}
            with environment_of(dict(os.environ) | wanted):
                url = stack.enter_context(start())
            os.environ["STANDIN_URL"] = url
            os.environ.pop("SYNTHMILL_CONNECTED", None)
            return StandinLog(log)

        yield begin


# ---------------------------------------------------------------- directories


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """``<tmp>/data/trial/compression``: outputs and cache of this test alone."""
    path = tmp_path / "data" / "trial" / "compression"
    path.mkdir(parents=True)
    return path


def copy_of_repository(target: Path, origin: Path = ROOT) -> Path:
    """What a clone of this repository would hold (committed and new files, no ignored ones), as one commit.

    The same files make the same commit, so two copies are two clones; a copy can be the origin of another.

    Set-up is done in it, as in :func:`clone_of`.
    """
    listing = ["git", "-C", str(origin), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        source, copy = origin / name, target / name
        if source.is_file():  # a file deleted but not yet committed is listed too
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    git = ["git", "-C", str(target), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    date = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["-c", "commit.gpgsign=false", "commit", "-qm", "clone"],
    ):
        subprocess.run([*git, *command], check=True, env=os.environ | date)
    _set_up(target)
    return target


def clone_of(origin: Path, target: Path) -> Path:
    """A clone of the repository at ``origin``, as of its last commit, with set-up done: see :func:`_set_up`."""
    subprocess.run(["git", "clone", "-q", str(origin), str(target)], check=True)
    _set_up(target)
    return target


def _set_up(target: Path) -> None:
    """Make ``.venv`` a directory of links to ours with a ``.setup`` of its own: nothing there touches the original."""
    venv = target / ".venv"
    venv.mkdir()
    for entry in (ROOT / ".venv").iterdir():
        if entry.name != ".setup":
            (venv / entry.name).symlink_to(entry)
    if (ROOT / "uv.lock").exists():
        shutil.copy2(ROOT / "uv.lock", target / "uv.lock")
    (venv / ".setup").touch()  # newest of all: set-up is done
    (target / "uv.lock").touch()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository in which `make` can be run."""
    return copy_of_repository(tmp_path / "synthmill")


# ---------------------------------------------------------------- running things


def run_stage(script: Path, *flags: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage's script through its flags; ``environment`` is added to this test's."""
    command = [sys.executable, str(script), *map(str, flags)]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def patience(seconds: float) -> float:
    """A limit in seconds for what takes a fraction of it on a machine that is not busy, more where others are waiting.

    At most eight times as much: whatever has such a limit would otherwise take minutes.
    """
    return seconds * min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def make(where: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `make` in a copy of the repository, as somebody would type it there."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "STANDIN_URL")} | environment
    command = [env.get("MAKE", "make"), *arguments]
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=600)
