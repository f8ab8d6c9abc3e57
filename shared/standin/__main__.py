"""Serve the stand-in cloud until Ctrl-C, and print the settings that point the SDKs at it.

    python -m shared.standin --port 8080 --faults "429=0.05,seed=7"

Each flag is also an environment variable, so that ``make trial`` and ``start()`` can pass it:
``STANDIN_FAULTS`` ``STANDIN_RATE`` ``STANDIN_LATENCY_S`` ``STANDIN_BAD_SHARE`` ``STANDIN_LOG`` ``STANDIN_STATE``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from typing import NoReturn

from shared.errors import SettingsError
from shared.standin import faults, tinker_store
from shared.standin.engine import BAD_SHARE
from shared.standin.server import Settings, serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.standin", description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port; 0 = any free one")
    for flag, default, text in (
        ("faults", "", "share of requests by fault, for example 429=0.05,reset=0.01,seed=7; '' = none"),
        ("rate", "0", "requests per second and service, beyond which it answers 429; 0 = no cap"),
        ("latency-s", "0", "seconds added to each answer of a model; 0 = none"),
        ("bad-share", str(BAD_SHARE), "share of texts, 0 to 1, that are compressed badly"),
        ("log", "", "file to append one JSON line a request to; '' = none"),
        ("state", "", "directory of what outlives the process, as Tinker's checkpoints; '' = a temporary one"),
    ):
        name = f"STANDIN_{flag.upper().replace('-', '_')}"
        parser.add_argument(f"--{flag}", default=os.environ.get(name) or default, help=f"{text} ({name})")
    parser.add_argument("--child", action="store_true", help="print the URL only, and end when stdin ends")
    flags = parser.parse_args()
    try:
        settings = Settings(
            faults=faults.parse(flags.faults),
            rate=_number("STANDIN_RATE", flags.rate),
            latency_s=_number("STANDIN_LATENCY_S", flags.latency_s),
            bad_share=_number("STANDIN_BAD_SHARE", flags.bad_share),
            log=flags.log,
            state=flags.state,
        )
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if flags.state:
        os.environ["STANDIN_STATE"] = flags.state  # where the Hub looks for it
    if flags.child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; then our stdin ends

    async def run() -> None:
        url = await serve(settings, flags.host, flags.port)
        print(url if flags.child else _exports(url), flush=True)
        if flags.child:
            asyncio.get_running_loop().add_reader(0, _end_with_parent)
        await asyncio.Event().wait()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        print("\nthe stand-in cloud has ended", file=sys.stderr)
        tinker_store.forget()
    except OSError as error:
        print(f"error: cannot listen on {flags.host}:{flags.port}: {error}\n  next: --port 0", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Called when stdin can be read: end of file means the parent is gone, however it went."""
    if not os.read(0, 4096):
        _exit()


def _exit() -> NoReturn:
    tinker_store.forget()
    os._exit(0)  # nothing to save: each log line was one write


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise SettingsError(f"{name} must be a number of 0 or more, got {text!r}", f"unset {name}")
    return value


def _exports(url: str) -> str:
    names = {
        "APIS": "mock",
        "STANDIN_URL": url,
        "ANTHROPIC_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "GOOGLE_GEMINI_BASE_URL": url,
        "HF_ENDPOINT": url,
        "TINKER_BASE_URL": url,
        "ANTHROPIC_API_KEY": "standin",
        "OPENAI_API_KEY": "standin",
        "GEMINI_API_KEY": "standin",
        "HF_TOKEN": "standin",
        "TINKER_API_KEY": "tml-standin",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return "\n".join([*(f"export {name}={value}" for name, value in names.items()), "# Ctrl-C ends it"])


if __name__ == "__main__":
    main()
