"""A loopback stand-in for every paid service: Anthropic, OpenAI, Gemini, Tinker and the Hugging Face Hub, on one port.

It speaks the real wire protocols, so the real SDKs work against it unmodified::

    with start() as url:  # a child process; it ends with the block, or with this process, however that ends
        os.environ["ANTHROPIC_BASE_URL"] = url

By hand: ``python -m shared.standin``. Settings, all from the environment, are in :mod:`shared.standin.__main__`.
Behind the protocols sits a small deterministic text engine (:mod:`shared.standin.engine`), behind Tinker's a small
model that is really trained (:mod:`shared.standin.tinker_engine`); nothing is downloaded.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 10.0
"""How long the child may take to come up; it takes about half a second."""


@contextmanager
def start() -> Iterator[str]:
    """Run a stand-in for the length of the block; yields ``http://127.0.0.1:PORT``.

    Raises:
        SettingsError: it does not come up within :data:`START_S` seconds.
    """
    environment = dict(os.environ)
    for name in ("STANDIN_LOG", "STANDIN_STATE"):
        if path := environment.get(name):
            environment[name] = os.path.abspath(path)  # the child runs in the repository
    child = subprocess.Popen(
        [sys.executable, "-m", "shared.standin", "--child"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,  # its end of file tells the child that we are gone
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        yield _url(child)
    finally:
        child.stdin.close()
        try:
            child.wait(2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _url(child: subprocess.Popen[bytes]) -> str:
    """The first line the child prints."""
    assert child.stdout is not None
    line, end = b"", time.monotonic() + START_S
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
        chunk = os.read(child.stdout.fileno(), 4096) if ready else b""
        if not chunk:
            code = child.poll()
            what = "ended at once" if code is not None or ready else f"did not come up in {START_S:.0f} s"
            raise SettingsError(
                f"the stand-in cloud {what}; its messages are above",
                f"{sys.executable} -m shared.standin   (in {ROOT.name}/), or set APIS=live",
            )
        line += chunk
    return line.decode().strip()
