"""Run one stage, in a container or natively: what the recipes of the Makefile call.

    python docker/runner.py stages/02_merge/main.py --in ... --out ... --config ... --track ... --limit 0

``RUNNER=native`` becomes the script, same process, with this Python. ``RUNNER=docker`` runs it in a container that has
the code read-only, what :data:`STAGES` says, and nothing else. ``RUNNER=auto``, the default, is docker when an engine
answers and the stage's image is built from today's pins (``make images``), else native, and says so once. What needs
this machine itself (MLX, a server on its loopback) runs natively whatever is asked. ``DOCKER`` names another client.

Every path is mounted where it is on this machine, so flags, messages and reports read the same either way.
Standard library only: it starts with every stage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNNERS = ("auto", "docker", "native")
PROBE_S = 10.0
"""How long an engine may take to say whether it has an image; a healthy one takes 0.05 s."""
SAID_S = 3600
"""For how long a `make` that has said where its stages run does not say it again."""
STOP_S = 200
"""How long `docker stop` waits: an interrupted stage keeps the answers under way (shared.llm.models.DRAIN_S)."""

# ---------------------------------------------------------------- the table: what each image and each stage gets


class Image(NamedTuple):
    """What an image is built from: exports in ``docker/requirements/``, and Debian packages besides."""

    groups: tuple[str, ...]
    system: str = ""


class Needs(NamedTuple):
    """What a stage gets.

    Attributes:
        image: key of :data:`IMAGES`.
        network: whether it has one when ``APIS=live``; when mock none has: the stand-in runs inside the container.
            A stage that is given ``PUSH`` has one, and the secrets for it, only when that is 1.
        lineage: whether it reads what the other stages of its track made, in every run: one run's adapter may have
            written the next one's data.
        variables: environment variables passed on.
        live: environment variables passed on when ``APIS=live`` only, secrets among them.
        reads: paths of the repository mounted read-only, besides ``shared/``, ``stages/`` and ``--in``.
        cache: whether ``data/cache`` is mounted, to write.
        memory: limit, as ``docker run --memory`` takes it; what lies in /tmp counts.
        pids: limit of processes and threads.
    """

    image: str
    network: bool = False
    lineage: bool = False
    variables: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    cache: bool = False
    memory: str = "4g"
    pids: int = 1024


IMAGES = {
    "llm": Image(("core", "llm", "tracing")),
    "data": Image(("core", "llm", "data", "embed", "tracing"), system="git"),
}

STANDIN = ("STANDIN_FAULTS", "STANDIN_RATE", "STANDIN_LATENCY_S", "STANDIN_BAD_SHARE")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
TRACING = (
    "LOGFIRE_TOKEN",
    "LOGFIRE_BASE_URL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "TRACE_TEXT",
)
HUB = ("HF_TOKEN", "HF_ENDPOINT")
MODELS = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "GEMINI_API_KEY",
    "GOOGLE_API_KEY",
    "GOOGLE_GEMINI_BASE_URL",
    "ENDPOINT_API_KEY",
)
ASKING = Needs(
    "llm",
    network=True,
    variables=("BUDGET_USD", "BATCH", *STANDIN),
    live=(*MODELS, *PROXIES, *TRACING),
    cache=True,
    memory="2g",
)
OFFLINE = Needs("data")

STAGES = {
    "01_acquire": Needs(
        "data",
        network=True,
        variables=("GIT_ALLOW_PROTOCOL", *STANDIN),
        live=(*HUB, *PROXIES, *TRACING),
        reads=("data/inputs",),
        cache=True,
    ),
    "02_merge": OFFLINE._replace(variables=("ENGINE",), memory="8g"),
    "03_compress": ASKING._replace(
        image="data",
        variables=("WITHOUT_MLX", *ASKING.variables),
        live=(*ASKING.live, *HUB),
        reads=("models",),
        memory="4g",
    ),
    "04_validate": ASKING,
    "05_extract_qa": ASKING._replace(variables=("FACTS", *ASKING.variables), reads=("data/inputs",)),
    "06_validate_qa": ASKING,
    "07_converse": ASKING,
    "08_pattern": ASKING._replace(reads=("data/inputs",)),
    "09_judge": ASKING,
    "10_embed": ASKING._replace(image="data", memory="4g"),
    "11_deduplicate": OFFLINE._replace(variables=("ENGINE",), memory="8g"),
    "12_choose": OFFLINE._replace(variables=("ENGINE",)),
    "13_format": OFFLINE,
    "16_release": Needs(
        "data",
        network=True,
        lineage=True,
        variables=("PUSH", "HF_REPO", "WITHOUT_MLX", *STANDIN),
        live=(*HUB, *PROXIES, *TRACING),
        reads=("data/inputs", "models/tiny"),
        cache=True,
    ),
}

NATIVE = {
    "14_train": "MLX, which trains or converts here, is in no image: it is for this machine's GPU",
    "15_evaluate": "MLX, which generates here, is in no image: it is for this machine's GPU",
}
"""Stages that never run in a container, and why."""

STANDIN_NETWORK, STANDIN_INSIDE = "synthmill-standin", "http://standin:8080"
"""The private network of ``docker/compose.yaml``, and the stand-in's address for containers on it."""


# ---------------------------------------------------------------- which runner


def main(arguments: list[str]) -> int:
    """Run the stage; its exit code. Does not return when the stage runs natively."""
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
    os.environ.setdefault("PYTHONPATH", ROOT)  # as make sets it, for whoever calls this by hand
    os.execv(sys.executable, [sys.executable, *arguments])


def choose(runner: str, arguments: list[str]) -> int:
    """Run in a container when that is asked for, or possible and ``auto``; else become the script.

    Raises:
        SettingsError: ``docker`` is asked for and cannot be had, ``APIS`` is wrong, or another make has the run.
    """
    from shared import apis
    from shared.claim import claim
    from shared.errors import SettingsError

    flags = parsed(arguments)
    if not flags.out or not flags.config:
        natively(arguments)  # --help, or a usage error: the script's to say
    claim(data_of(flags.out), os.path.basename(os.path.dirname(os.path.dirname(flags.out))))
    mode = apis.decide()
    if flags.stage not in STAGES:
        if runner == "docker":
            reason = NATIVE.get(flags.stage, "docker/runner.py has no line for it")
            print(f"{flags.stage} runs natively: {reason}", file=sys.stderr)
        natively(arguments)
    here = only_here(flags, mode)
    lacking = "" if here and runner == "docker" else lacks(STAGES[flags.stage].image)
    if lacking and runner == "docker":
        raise SettingsError(f"RUNNER=docker, but {lacking}", "start Docker and `make images`, or RUNNER=native")
    if lacking:
        remedy = "`make images` sets up containers, RUNNER=native is silent"
        say_once(flags.out, "native", f"runner: native, {lacking}; {remedy}")
        natively(arguments)
    if here:
        print(f"{flags.stage} runs natively: {here}", file=sys.stderr)
        natively(arguments)
    say_once(flags.out, "docker", "runner: docker; RUNNER=native for the other")
    return contained(flags, mode, arguments)


class Flags(NamedTuple):
    """What a command names: the script, its stage, and files as absolute paths, ``""`` for one not given."""

    script: str
    stage: str
    input: str
    out: str
    config: str


def parsed(arguments: list[str]) -> Flags:
    """Only what is mounted is looked at; the stage's own parser judges the rest."""
    script = os.path.abspath(arguments[0])
    files = dict.fromkeys(("--in", "--out", "--config"), "")
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in files:
            files[name] = os.path.abspath(value if equals else following) if value or following else ""
    return Flags(script, os.path.basename(os.path.dirname(script)), *files.values())


def only_here(flags: Flags, mode: str) -> str:
    """Why a stage must run on this machine itself; ``""`` when it need not."""
    needs, settings = STAGES[flags.stage], loaded(flags.config)
    tracks = settings.get("tracks")
    own = tracks.get(os.path.basename(os.path.dirname(flags.out))) if isinstance(tracks, dict) else None
    settings |= own if isinstance(own, dict) else {}
    if "ENGINE" in needs.variables and os.environ.get("ENGINE", "").strip() == "ray":
        return "ENGINE=ray needs a network, and its container has none"
    if flags.stage == "03_compress":
        generator, endpoint = settings.get("generator"), settings.get("endpoint")
        if generator == "mlx":
            return "MLX is in no image: it is for this machine's GPU"
        if generator == "endpoint" and isinstance(endpoint, dict) and is_loopback(endpoint.get("base_url")):
            return "the endpoint is on this machine's loopback"
    if mode == "mock":
        url = os.environ.get("STANDIN_URL") if needs.network else ""
        return "STANDIN_URL is on this machine's loopback" if url and not standin_is_contained() else ""
    urls = (name for name in (needs.live if connected(needs) else ()) if name.endswith(("_BASE_URL", "_ENDPOINT")))
    return next((f"{name} is on this machine's loopback" for name in urls if is_loopback(os.environ.get(name))), "")


def is_loopback(url: object) -> bool:
    """Whether a URL's host is this machine, which a container could not reach by that name."""
    host = str(url).partition("://")[2].partition("/")[0].rpartition("@")[2]
    return host.startswith(("127.", "localhost", "[::1]"))


def loaded(config: str) -> dict[str, Any]:
    """The settings, to see what they need; ``{}`` for a file the stage itself will complain about."""
    import tomllib

    try:
        with open(config, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def say_once(out: str, runner: str, line: str) -> None:
    """Print where stages run, once for all stages of one ``make``, however many run at a time."""
    import fcntl
    import time

    directory, make = data_of(out), f"{os.getppid()} {runner}"
    try:
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, ".runner"), "a+", encoding="utf-8") as said:
            fcntl.flock(said, fcntl.LOCK_EX)
            said.seek(0)
            # Numbers of processes come again, so an old note counts for nothing.
            is_old = time.time() - os.fstat(said.fileno()).st_mtime > SAID_S
            before = [] if is_old else said.read().splitlines()
            if "MAKELEVEL" in os.environ and make in before:
                return
            said.truncate(0)
            said.writelines(f"{entry}\n" for entry in [*before[-20:], make])
    except OSError:
        pass  # what is wrong with the directory is the stage's to say
    print(line, file=sys.stderr)


def data_of(out: str) -> str:
    """``data/`` of an output: above it, or for a receipt, in ``models/``, beside that."""
    above = os.path.dirname(os.path.dirname(os.path.dirname(out)))
    return os.path.join(os.path.dirname(above), "data") if out.endswith(".json") else above


# ---------------------------------------------------------------- the engine


def client() -> str:
    """The Docker client; podman's is not tried."""
    return os.environ.get("DOCKER", "").strip() or "docker"


def asked(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and message of a client's command; 127 when there is no client."""
    import subprocess

    try:
        done = subprocess.run([client(), *arguments], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except FileNotFoundError:
        return 127, "", "not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return 126, "", str(error)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def reference(image: str) -> str:
    """``synthmill-<image>:<hash>`` of all it is built from but the base: never ``latest``, never an older build."""
    import hashlib

    groups, system = IMAGES[image]
    digest = hashlib.sha256(f"{groups} {system}".encode())
    for name in ("Dockerfile", *(f"requirements/{group}.txt" for group in ("uv", *groups))):
        with open(os.path.join(ROOT, "docker", name), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return f"synthmill-{image}:{digest.hexdigest()[:12]}"


def lacks(image: str) -> str:
    """Why an image cannot be run; ``""`` when it can."""
    code, _, message = asked("image", "inspect", "--format", "{{.Id}}", reference(image))
    if code == 0:
        return ""
    if code == 127:
        return "Docker is not installed"
    if "no such image" in message.lower():
        return f"the image {reference(image)} is not built"
    return f"no Docker engine answers ({next(iter(message.splitlines()), 'it said nothing')})"


def standin_is_contained() -> bool:
    """Whether the stand-in of ``docker/compose.yaml`` is up: then its network is there."""
    return asked("network", "inspect", STANDIN_NETWORK)[0] == 0


def user() -> str:
    """Who the stage is inside: you, so that its files are yours. A rootless engine maps its root to you."""
    if "rootless" in asked("info", "--format", "{{.SecurityOptions}}")[1]:
        return "0:0"
    return f"{os.getuid()}:{os.getgid()}"


# ---------------------------------------------------------------- the container


def contained(flags: Flags, mode: str, arguments: list[str]) -> int:
    """Run the stage in a container; its exit code."""
    name = f"synthmill-{flags.stage}-{os.getpid()}"
    environment = variables(flags, mode)
    command = [*container(flags, mode, environment, name), "python", flags.script, *arguments[1:]]
    code = attend(command, os.environ | environment, name)
    if code == 137:
        print(
            f"error: {flags.stage} was killed: by hand, or for more than {STAGES[flags.stage].memory} of memory; its "
            f"previous output is untouched\n  next: run the same command; if it dies again, raise the memory of "
            f"{flags.stage} in docker/runner.py, or RUNNER=native",
            file=sys.stderr,
        )
    return code


def container(flags: Flags, mode: str, environment: Mapping[str, str], name: str) -> list[str]:
    """The client's command up to the image: what runs in it follows."""
    needs = STAGES[flags.stage]
    command = [
        *(client(), "run", "--rm", "--init", "--name", name, "--pull", "never", "--log-driver", "none"),
        *("--stop-timeout", str(STOP_S)),
        *("--user", user(), "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--tmpfs", "/tmp:rw,nosuid,nodev,noexec,mode=1777"),
        *("--memory", needs.memory, "--memory-swap", needs.memory, "--pids-limit", str(needs.pids)),
        *("--network", network(needs, environment), "--workdir", ROOT),
    ]
    for path, writable in mounts(flags, mode).items():
        command += ["--mount", mount(path, writable)]
    for variable in environment:
        command += ["--env", variable]  # its value travels in the client's environment: a command line is no secret
    return [*command, reference(needs.image)]


def network(needs: Needs, environment: Mapping[str, str]) -> str:
    """The network of the container: none unless the stage has one and there is somewhere to go."""
    if not connected(needs):
        return "none"
    if environment["APIS"] == "mock":
        return STANDIN_NETWORK if "STANDIN_URL" in environment else "none"
    return "bridge"


def connected(needs: Needs) -> bool:
    """Whether the stage asks anybody: one that only stages what it could push cannot push, whatever it does."""
    return needs.network and ("PUSH" not in needs.variables or os.environ.get("PUSH", "").strip() == "1")


def variables(flags: Flags, mode: str) -> dict[str, str]:
    """The environment of the container, besides what the image sets."""
    needs = STAGES[flags.stage]
    names = (*needs.variables, *(needs.live if mode == "live" and connected(needs) else ()))
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    found |= {"APIS": mode, "PYTHONPATH": ROOT, "SYNTHMILL_REVISION": revision()}
    if "HF_TOKEN" in needs.live:
        found["HF_HOME"] = os.path.join(cache(flags), "huggingface")
    if mode == "mock" and needs.network and os.environ.get("STANDIN_URL"):
        found["STANDIN_URL"] = STANDIN_INSIDE
    return found


def revision() -> str:
    """What the stage would find out itself if it had git and the repository."""
    from subprocess import run

    try:
        command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except Exception:  # no git, no repository, no answer: all the same here
        return "unknown"


def mount(path: str, writable: bool) -> str:
    """One ``--mount``: CSV, so a path with a comma or a quote is quoted."""
    fields = ["type=bind", f"source={path}", f"target={path}", *([] if writable else ["readonly"])]
    return ",".join('"' + field.replace('"', '""') + '"' if set(field) & set(',"') else field for field in fields)


def mounts(flags: Flags, mode: str) -> dict[str, bool]:
    """Directories and files the container sees, and whether it may write there; makes those it writes to.

    ``shared/`` and ``stages/`` are the code; one stage may read another's settings and prompts.
    """
    needs, run_directory = STAGES[flags.stage], os.path.dirname(os.path.dirname(flags.out))
    mark = os.path.join(run_directory, ".apis")
    # The first stage of a run leaves its mark there; later ones see the mark, and of the run their own track only.
    writes = [os.path.dirname(flags.out) if os.path.exists(mark) else run_directory]
    if needs.cache:
        writes.append(cache(flags))
    if flags.stage == "01_acquire":
        writes.append(os.path.join(ROOT, "data", "cache", "git"))
    for directory in (*writes, os.path.dirname(flags.out)):
        os.makedirs(directory, exist_ok=True)
    reads = [os.path.join(ROOT, name) for name in ("shared", "stages", *needs.reads)]
    reads += [mark, flags.config, *beside(flags.input)]
    if needs.lineage:
        for place in (data_of(flags.out), os.path.dirname(run_directory)):
            runs = sorted(os.listdir(place)) if os.path.isdir(place) else []
            reads += [os.path.join(place, run, os.path.basename(os.path.dirname(flags.out))) for run in runs]
    if "FACTS" in needs.variables and (facts := os.environ.get("FACTS")):  # read when there is no --in
        reads.append(os.path.join(ROOT, facts))
    if flags.stage == "01_acquire":
        reads += sources(loaded(flags.config))
    if mode == "live" and (certificates := os.environ.get("SSL_CERT_FILE")) and needs.network:
        reads.append(certificates)
    seen: dict[str, bool] = {}
    for path, writable in [*((path, True) for path in writes), *((path, False) for path in reads)]:
        for place in dict.fromkeys((path, os.path.realpath(path))):  # a link, and where it points
            # Never the whole repository, whatever a setting says: .env is in it.
            if os.path.exists(place) and not is_in(ROOT, place) and not any(is_in(place, other) for other in seen):
                seen[place] = writable
    return seen


def is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip(os.sep) + os.sep)


def cache(flags: Flags) -> str:
    """As :attr:`shared.stage.Stage.cache`."""
    return os.path.join(data_of(flags.out), "cache")


def beside(path: str) -> Iterator[str]:
    """An input file and those of the same stem: its report, its vectors."""
    if path:
        directory, name = os.path.split(path)
        stem = name.partition(".")[0] + "."
        for entry in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
            if entry.startswith(stem):
                yield os.path.join(directory, entry)


def sources(settings: Mapping[str, Any]) -> Iterator[str]:
    """What the sources of 01 read on this machine: files and folders they name, and repositories."""
    tables = settings.get("sources")
    for source in tables if isinstance(tables, list) else ():
        if not isinstance(source, dict):
            continue
        for pattern in source.get("files", ()):
            yield from matched(os.path.normpath(os.path.join(ROOT, str(pattern))))
        if "path" in source:
            yield os.path.normpath(os.path.join(ROOT, str(source["path"])))
        place = os.path.normpath(os.path.join(ROOT, str(source.get("url", "")).removeprefix("file://")))
        if source.get("kind") == "git" and os.path.isdir(place):
            yield from repository(place)


def matched(pattern: str) -> Iterator[str]:
    """The folder above the first wildcard; where this repository is in that folder, only the files that match."""
    import glob

    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    yield from glob.iglob(pattern, recursive=True) if is_in(ROOT, fixed) else [fixed]


def repository(place: str) -> Iterator[str]:
    """What git reads of a repository, and where a worktree's or a shared clone's objects lie; of this one, no files."""
    from subprocess import run

    yield os.path.join(place, ".git") if place == ROOT else place
    command = ["git", "-C", place, "rev-parse", "--path-format=absolute", "--git-dir", "--git-common-dir"]
    for directory in dict.fromkeys(run(command, capture_output=True, text=True, check=False).stdout.splitlines()):
        yield directory
        try:
            with open(os.path.join(directory, "objects", "info", "alternates"), encoding="utf-8") as file:
                yield from (os.path.join(directory, "objects", line) for line in file.read().splitlines() if line)
        except OSError:
            pass


def attend(command: list[str], environment: Mapping[str, str], name: str) -> int:
    """Run the client to its end, handing each signal on once; its exit code.

    The client is in a process group of its own: from the terminal's Ctrl-C it would get a second interrupt, and the
    stage would be interrupted while it cleans up.
    """
    import signal
    import subprocess

    child: subprocess.Popen[bytes] | None = None
    received = []

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    code = child.wait()
    if received:  # a signal between create and start ends the client and leaves the container
        subprocess.run([client(), "rm", "--force", name], capture_output=True, check=False)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
