"""Live services or the stand-in cloud: decided here, in one place; no stage knows which.

``APIS=mock`` is the default while there is no ``.env``; ``APIS=live`` once there is one. In mock mode the base-URL
variables of every SDK point at a loopback server that dies with the process that started it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from shared.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent
MODES = ("mock", "live")
STANDIN_KEYS = ("standin", "tml-standin")
KEYS = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY", "HF_TOKEN", "TINKER_API_KEY")


def load_env(path: Path = ROOT / ".env") -> None:
    """Put ``NAME=value`` lines of ``.env`` into the environment; what is set already wins, but not what is set to "".

    The Makefile exports its variables, so ``BUDGET_USD`` is always set there, and mostly empty.
    """
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and name and not name.startswith("#") and value.strip():
            name = name.strip()
            os.environ[name] = os.environ.get(name, "").strip() or value.strip().strip("'\"")


def decide() -> str:
    """``mock`` or ``live``.

    Raises:
        SettingsError: ``APIS`` is set to something else, or it is ``live`` and a key is the stand-in's.
    """
    mode = os.environ.get("APIS", "").strip() or ("live" if (ROOT / ".env").exists() else "mock")
    if mode not in MODES:
        raise SettingsError(f"APIS must be one of {', '.join(MODES)}, got {mode!r}", "make trial APIS=mock")
    if mode == "live":
        load_env()
        # Left in a shell by what `make mock` prints: its answers would be kept, and counted, as live ones.
        if left := [name for name in KEYS if os.environ.get(name) in STANDIN_KEYS]:
            raise SettingsError(
                f"APIS=live, but {', '.join(left)} and the addresses set with it are the stand-in's",
                "open a new shell (or unset what `make mock` printed), then run the same command",
            )
    return mode


def connect(mode: str, stack: ExitStack, state: Path | None = None) -> None:
    """In mock mode, start the stand-in (or use the one at ``STANDIN_URL``) and point every SDK at it; once a process.

    ``state``: the directory where it keeps what must outlive it (training runs, pushed repositories), unless
    ``STANDIN_STATE`` names one. Must run before the SDKs are imported: ``huggingface_hub`` and ``datasets`` read their
    endpoint at import.
    """
    if mode != "mock" or os.environ.get("SYNTHMILL_CONNECTED"):
        return
    from shared.standin import start

    if state is not None and not os.environ.get("STANDIN_STATE"):
        os.environ["STANDIN_STATE"] = str(state)
    url = os.environ.get("STANDIN_URL") or stack.enter_context(start())
    for name in KEYS:
        os.environ[name] = "tml-standin" if name.startswith("TINKER") else "standin"
    os.environ |= {
        "SYNTHMILL_CONNECTED": url,
        "ANTHROPIC_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "GOOGLE_GEMINI_BASE_URL": url,
        "HF_ENDPOINT": url,
        "TINKER_BASE_URL": url,
        "TINKER_TELEMETRY": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    for name in ("ANTHROPIC_AUTH_TOKEN", "GOOGLE_API_KEY"):
        os.environ.pop(name, None)
