"""Run one stage, in a container or natively: what every recipe of the Makefile calls.

    python docker/runner.py stages/02_merge/main.py --in ... --out ... --config ... --track ... --limit 0

``RUNNER=native`` starts the script with this Python at once. ``RUNNER=docker`` runs it in a container that sees its code
read-only, the directories and variables in :data:`STAGES` and nothing else. ``RUNNER=auto``, the default, is docker when
an engine answers and the stage's image is built from today's pins (``make images``), else native, and says which once.
A stage that needs this machine itself (MLX, a server on its loopback) runs natively whatever is asked.

Every path is mounted at the place it has on this machine, so flags, messages and reports read the same either way.
Standard library only: it starts with every stage.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNNERS = ("auto", "docker", "native")

# ---------------------------------------------------------------- the table: what each image and each stage gets


class Image(NamedTuple):
    """What an image is built from: exports in ``docker/requirements/``, and Debian packages besides."""

    groups: tuple[str, ...]
    system: str = ""


class Needs(NamedTuple):
    """What a stage gets.

    Attributes:
        image: key of :data:`IMAGES`.
        network: whether it has one when ``APIS=live``. Never when mock: its stand-in runs inside the container.
        variables: environment variables passed on when live. When mock, only :data:`STANDIN` ones are.
        reads: paths of the repository mounted read-only, besides the code and ``--in``.
        cache: whether ``data/cache`` is mounted, to write.
        memory: limit, as ``docker run --memory`` takes it; the memory file system /tmp counts towards it.
        pids: limit of processes and threads.
    """

    image: str
    network: bool = False
    variables: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    cache: bool = False
    memory: str = "4g"
    pids: int = 1024


IMAGES = {
    "llm": Image(("core", "llm", "tracing")),
    "data": Image(("core", "llm", "data", "embed", "tracing"), system="git"),
}

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
TRACING = (
    "LOGFIRE_TOKEN",
    "LOGFIRE_BASE_URL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "TRACE_TEXT",
)
NETWORKED = (*PROXIES, *TRACING)
HUB = ("HF_TOKEN", "HF_ENDPOINT")
MODELS = (
    "BUDGET_USD",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "GEMINI_API_KEY",
    "GOOGLE_API_KEY",
    "GOOGLE_GEMINI_BASE_URL",
    *NETWORKED,
)
ASKING = Needs("llm", network=True, variables=MODELS, cache=True, memory="2g")
OFFLINE = Needs("data")

STAGES = {
    "01_acquire": Needs("data", network=True, variables=(*HUB, *NETWORKED), reads=("data/inputs",), cache=True),
    "02_merge": OFFLINE._replace(memory="8g"),
    "03_compress": Needs(
        "data", network=True, variables=(*HUB, *MODELS, "ENDPOINT_API_KEY"), reads=("models",), cache=True
    ),
    "04_validate": ASKING,
    "05_extract_qa": ASKING._replace(reads=("data/inputs",)),
    "06_validate_qa": ASKING,
    "07_converse": ASKING,
    "08_pattern": ASKING._replace(reads=("data/inputs",)),
    "09_judge": ASKING,
    "10_embed": ASKING._replace(image="data", memory="4g"),
    "11_deduplicate": OFFLINE._replace(memory="8g"),
    "12_choose": OFFLINE,
    "13_format": OFFLINE,
}
STANDIN = ("STANDIN_FAULTS", "STANDIN_RATE", "STANDIN_LATENCY_S", "STANDIN_BAD_SHARE", "BUDGET_USD")
"""Passed on when mock, to the stages that have a network when live."""
STANDIN_NETWORK, STANDIN_INSIDE = "synthmill-standin", "http://standin:8080"
"""Network and address of the stand-in of ``docker/compose.yaml``, for containers on that network."""


# ---------------------------------------------------------------- which one


def main(arguments: list[str]) -> int:
    """Run the stage; its exit code. Does not return when it runs natively."""
    runner = os.environ.get("RUNNER", "").strip() or "auto"
    if runner == "native":
        natively(arguments)
    sys.path.insert(0, ROOT)
    from shared.errors import SettingsError, SynthmillError

    try:
        if runner not in RUNNERS:
            raise SettingsError(f"RUNNER must be one of {', '.join(RUNNERS)}, got {runner!r}", "RUNNER=auto make trial")
        return choose(runner, arguments)
    except SynthmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def natively(arguments: list[str]) -> None:
    """Become the script, with the Python that runs this one."""
    os.execv(sys.executable, [sys.executable, *arguments])


def choose(runner: str, arguments: list[str]) -> int:
    """Run in a container when that is asked for, or possible and ``auto``; else become the script.

    Raises:
        SettingsError: ``docker`` is asked for and cannot be had, or ``APIS`` is wrong.
    """
    from shared import apis
    from shared.errors import SettingsError

    script, flags = os.path.abspath(arguments[0]), parsed(arguments[1:])
    stage = os.path.basename(os.path.dirname(script))
    if not flags.out or not flags.config:
        natively(arguments)  # --help, or a usage error: the script's own to say
    mode = apis.decide()
    if stage not in STAGES:
        reason = f"docker/runner.py says nothing about {stage}"
    elif reason := only_here(stage, flags.config, mode):
        say(flags.out, f"{stage} runs natively: {reason}", once=False)
        natively(arguments)
    else:
        reason = missing(STAGES[stage].image)
    if reason and runner == "docker":
        raise SettingsError(f"RUNNER=docker, but {reason}", "make images, or RUNNER=native")
    if reason:
        say(flags.out, f"runner: native ({reason}); `make images` sets up the other, RUNNER=native is silent")
        natively(arguments)
    say(flags.out, "runner: docker; RUNNER=native for the other")
    name = f"synthmill-{stage}-{os.getpid()}"
    environment = variables(stage, mode)
    command = [client(), "run", "--name", name, *options(stage, flags, mode, environment)]
    command += [reference(STAGES[stage].image), "python", script, *arguments[1:]]
    code = attend(command, os.environ | environment, name)
    if code == 137:
        limit = STAGES[stage].memory
        print(
            f"error: {stage} was killed: by hand, or for using more than {limit} of memory; its previous output is untouched\n"
            f"  next: run the same command; if it happens again, raise the memory of {stage} in docker/runner.py (and of "
            "Docker Desktop), or RUNNER=native",
            file=sys.stderr,
        )
    return code


class Flags(NamedTuple):
    """The flags of a stage that name files, as absolute paths; ``""`` for one that is not given."""

    input: str
    out: str
    config: str


def parsed(arguments: list[str]) -> Flags:
    """Only what is mounted is looked at; the stage's own parser judges the rest."""
    values = dict.fromkeys(("--in", "--out", "--config"), "")
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in values:
            given = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
            values[name] = os.path.abspath(given) if given else ""
    return Flags(*values.values())


def only_here(stage: str, config: str, mode: str) -> str:
    """Why a stage must run on this machine itself; ``""`` when it need not."""
    if os.environ.get("ENGINE", "").strip() == "ray":
        return "ENGINE=ray: a container without a network cannot reach the cluster"
    settings = loaded(config)
    if stage == "03_compress":
        if settings.get("generator") == "mlx":
            return "MLX needs this machine's GPU"
        if settings.get("generator") == "endpoint" and is_loopback(settings.get("endpoint", {}).get("base_url", "")):
            return "its endpoint is on this machine's loopback"
    if mode == "mock" and STAGES[stage].network and os.environ.get("STANDIN_URL") and not standin_container():
        return "STANDIN_URL is on this machine's loopback"
    if mode == "live" and STAGES[stage].network:
        for name in STAGES[stage].variables:
            if name.endswith(("_BASE_URL", "_ENDPOINT")) and is_loopback(os.environ.get(name, "")):
                return f"{name} is on this machine's loopback"
    return ""


def is_loopback(url: object) -> bool:
    """Whether a URL's host is this machine, as a container could not reach it."""
    host = str(url).partition("://")[2].partition("/")[0].rpartition("@")[2]
    return host.startswith(("127.", "localhost", "[::1]"))


def loaded(config: str) -> dict[str, object]:
    """The settings, to see what to mount; ``{}`` for a file the stage itself will complain about."""
    import tomllib

    try:
        with open(config, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def say(out: str, line: str, once: bool = True) -> None:
    """Print a line; once for all stages of one ``make``, however many run at a time."""
    import fcntl

    directory = os.path.dirname(os.path.dirname(out))
    make = f"{os.getppid()} {line}" if "MAKELEVEL" in os.environ else ""
    try:
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, ".runner"), "a+", encoding="utf-8") as said:
            fcntl.flock(said, fcntl.LOCK_EX)
            said.seek(0)
            if once and make and said.read() == make:
                return
            said.truncate(0)
            said.write(make)
    except OSError:
        pass  # then it is said again; what is wrong with the directory is the stage's to say
    print(line, file=sys.stderr)
