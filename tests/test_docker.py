"""The images and the containers stages run in, on a real engine. Without one, or before `make images`: skipped, loudly.

What needs no engine is in test_runner.py. docker/ci.sh runs these where it can have an engine.
"""

from __future__ import annotations

import importlib
import io
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from tests.conftest import ROOT, copy_of_repository
from tests.test_runner import OFFLINE, flags, runner

pytestmark = pytest.mark.slow
MB = 1_000_000


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The engine, through the `docker` package; it has the images of today's pins."""
    reason = next(filter(None, (runner.lacks(image) for image in runner.IMAGES)), "")
    if reason:
        warnings.warn(f"SKIPPED every test of containers: {reason}; next: make images", stacklevel=1)
        pytest.skip(reason)
    # Not `import docker`: for mypy that is our own directory of that name.
    client = importlib.import_module("docker").from_env()
    yield client
    client.close()


@pytest.fixture
def box(data: Path, engine: Any) -> Callable[..., Any]:
    """Run Python in the container that a stage would get: ``box("02_merge", code)``; what it prints, from JSON."""

    def run(stage: str, code: str, mode: str = "mock", **environment: str) -> Any:
        given = flags(stage, data)
        variables = runner.variables(given, mode) | environment
        name = f"synthmill-test-{os.getpid()}-{time.monotonic_ns()}"
        command = [*runner.container(given, mode, variables, name), "python", "-c", code]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


# ---------------------------------------------------------------- what a stage can do in there

INSIDE = """
import json, os, pathlib, subprocess
def attempt(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
    os.unlink(path)
    return "written"
script = pathlib.Path("/tmp/script")
script.write_text("#!/bin/sh\\n")
script.chmod(0o755)
try:
    runs = subprocess.run([script]).returncode == 0
except OSError as error:
    runs = error.strerror
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
root = os.environ["PYTHONPATH"]
def limit(name):
    old = {"memory.max": "memory/memory.limit_in_bytes", "pids.max": "pids/pids.max"}
    places = [pathlib.Path("/sys/fs/cgroup", place) for place in (name, old[name])]
    return int(next(place for place in places if place.exists()).read_text())
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "first_process": open("/proc/1/comm").read().strip(),
    "writes": {place: attempt(place + "/x") for place in ("/", "/tmp", "/venv", root + "/shared", root + "/stages")},
    "runs_from_tmp": runs,
    "sees": sorted(os.listdir(root)),
    "environment": sorted(os.environ),
    "memory": limit("memory.max"),
    "pids": limit("pids.max"),
}))
"""


def test_a_stage_can_do_nothing_in_its_container_but_its_work(
    box: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-never")
    monkeypatch.setenv("ENGINE", "embedded")
    found = box("02_merge", INSIDE)
    assert found["user"] == [os.getuid(), os.getgid()]
    assert found["capabilities"] == 0
    assert found["no_new_privileges"] == "1"
    assert found["first_process"] in ("docker-init", "tini")
    read_only = "Read-only file system"
    code = {f"{ROOT}/shared": read_only, f"{ROOT}/stages": read_only}
    assert found["writes"] == {"/": read_only, "/tmp": "written", "/venv": read_only, **code}
    assert found["runs_from_tmp"] == "Permission denied"
    assert found["sees"] == ["shared", "stages"], "no .env, no data of others, no .git"
    assert set(found["environment"]) - {"HOSTNAME"} == {
        *("PATH", "HOME", "LANG", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"),  # the image's
        *("APIS", "PYTHONPATH", "SYNTHMILL_REVISION", "ENGINE"),  # the runner's
    }
    assert (found["memory"], found["pids"]) == (8 << 30, 1024)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give the data to somebody else")
def test_files_come_out_owned_by_whoever_ran_the_stage(
    data: Path, box: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine is asked as it would be by user 12345, who is nobody in the image.
    os.chown(data.parent, 12345, 54321)
    os.chown(data, 12345, 54321)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(os, "getgid", lambda: 54321)
    box("02_merge", f"open({str(data / 'x')!r}, 'w'); print(1)")
    found = (data / "x").stat()
    assert (found.st_uid, found.st_gid) == (12345, 54321)


CONNECT = """
import json, socket, sys
try:
    socket.create_connection(("{host}", {port}), 5).close()
    print(json.dumps("connected"))
except OSError as error:
    print(json.dumps(error.strerror))
"""


@pytest.fixture
def listener(engine: Any) -> Iterator[tuple[str, int]]:
    """Host and port of a server on this machine that containers with a network can reach."""
    subnet = engine.networks.get("bridge").attrs["IPAM"]["Config"][0]["Subnet"]
    gateway = str(ipaddress.ip_network(subnet)[1])
    server = socket.socket()
    try:
        server.bind((gateway, 0))
    except OSError:
        pytest.skip(f"the engine's gateway {gateway} is not on this machine")
    server.listen()
    server.settimeout(120)

    def accept() -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield gateway, server.getsockname()[1]
    server.close()


@pytest.mark.parametrize(
    ("stage", "mode", "expected"),
    [
        *((stage, "live", "Network is unreachable") for stage in sorted(OFFLINE)),
        ("01_acquire", "mock", "Network is unreachable"),
        ("04_validate", "mock", "Network is unreachable"),
        ("04_validate", "live", "connected"),
    ],
)
def test_only_a_live_stage_that_needs_a_network_has_one(
    stage: str, mode: str, expected: str, box: Callable[..., Any], listener: tuple[str, int]
) -> None:
    assert box(stage, CONNECT.format(host=listener[0], port=listener[1]), mode) == expected


# ---------------------------------------------------------------- stages

PATTERN = "08_pattern"


def command(stage: str, out: Path, config: str | Path = "") -> list[str]:
    config = config or f"stages/{stage}/trial.toml"
    flags = ["--out", str(out), "--config", str(config), "--track", "patterns", "--limit", "4"]
    return [sys.executable, "docker/runner.py", f"stages/{stage}/main.py", *flags]


def run(
    stage: str, out: Path, config: str | Path = "", root: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a first stage of the repository at ``root`` through the runner."""
    env = os.environ | {"RUNNER": "docker", "PYTHONPATH": str(root)} | environment
    return subprocess.run(command(stage, out, config), cwd=root, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "trial" / "patterns" / f"{PATTERN}.jsonl"
    path.parent.mkdir(parents=True)
    return path


def test_a_stage_writes_the_same_bytes_and_reports_the_same_in_a_container(
    engine: Any, out: Path, tmp_path: Path
) -> None:
    native = tmp_path / "native" / "trial" / "patterns" / out.name
    native.parent.mkdir(parents=True)
    assert run(PATTERN, out).returncode == 0
    assert run(PATTERN, native, RUNNER="native").returncode == 0
    assert out.read_bytes() == native.read_bytes() != b""
    report, other = (orjson.loads(path.with_suffix(".report.json").read_bytes()) for path in (out, native))
    for key in ("counts", "settings", "shared", "git", "spending", "schema_version"):
        assert report[key] == other[key], key


def test_auto_is_docker_as_soon_as_the_images_are_there(engine: Any, out: Path) -> None:
    done = run(PATTERN, out, RUNNER="auto")
    assert done.returncode == 0
    assert done.stderr.startswith("runner: docker; RUNNER=native for the other\n")
    assert "Linux" in orjson.loads(out.with_suffix(".report.json").read_bytes())["platform"]


def test_auto_with_images_of_other_pins_runs_natively_and_says_how_to_make_them(
    engine: Any, out: Path, tmp_path: Path
) -> None:
    copy = copy_of_repository(tmp_path / "synthmill")
    with open(copy / "docker" / "requirements" / "core.txt", "a", encoding="utf-8") as pins:
        pins.write("# a pin has changed\n")
    first, second = (run(PATTERN, out, root=copy, RUNNER="auto", MAKELEVEL="1") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    said = r"runner: native, the image synthmill-llm:[0-9a-f]{12} is not built; `make images` sets up containers"
    assert re.match(said, first.stderr), first.stderr
    assert "runner:" not in second.stderr, "once a make"
    stopped = run(PATTERN, out, root=copy, RUNNER="docker")
    assert (stopped.returncode, "`make images`" in stopped.stderr) == (2, True), stopped.stderr


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [("no_such_key = 1", 2, "unknown key 'no_such_key'"), ("is not TOML", 2, "is not TOML")],
)
def test_the_exit_code_and_the_message_are_the_stage_s(
    engine: Any, out: Path, tmp_path: Path, settings: str, code: int, said: str
) -> None:
    config = tmp_path / "my.toml"
    config.write_text(settings)
    done = run(PATTERN, out, config)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_stage_that_keeps_nothing_exits_with_4_in_a_container_too(engine: Any, out: Path) -> None:
    records = out.with_name("records.jsonl")
    records.write_text("no record\n")
    line = [*command("12_choose", out.with_name("12_choose.jsonl")), "--in", str(records)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"RUNNER": "docker"}, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert out.with_name("12_choose.rejects.jsonl").read_bytes().count(b"\n") == 1


class Running:
    """A stage in a container, in the middle of its work: it waits for slow answers, and keeps them when interrupted."""

    def __init__(self, out: Path) -> None:
        env = os.environ | {"RUNNER": "docker", "STANDIN_LATENCY_S": "4"}
        self.process = subprocess.Popen(command(PATTERN, out), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        self.name = f"synthmill-{PATTERN}-{self.process.pid}"
        end = time.monotonic() + 60
        # The reply store is opened when the first question is about to be asked.
        while not (out.parent.parent.parent / "cache" / "mock.sqlite").exists() and self.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)
        assert self.process.poll() is None, self.process.communicate()[1]

    def end(self) -> tuple[int, str]:
        """Exit code and messages."""
        _, messages = self.process.communicate(timeout=30)
        return self.process.returncode, messages


@pytest.fixture
def running(engine: Any, out: Path) -> Iterator[Callable[[], Running]]:
    started: list[Running] = []

    def start() -> Running:
        started.append(Running(out))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        subprocess.run([runner.client(), "rm", "--force", one.name], capture_output=True)


def containers(engine: Any, name: str) -> list[Any]:
    found: list[Any] = engine.containers.list(all=True, filters={"name": name})
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_stage_cleanly(
    engine: Any, running: Callable[[], Running], number: signal.Signals, out: Path
) -> None:
    stage = running()
    stage.process.send_signal(number)
    code, messages = stage.end()
    assert (code, "interrupted: every answer received is saved" in messages) == (130, True), messages
    assert containers(engine, stage.name) == []
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".part")], "it cleaned up"


def test_docker_stop_is_a_clean_end_too(engine: Any, running: Callable[[], Running]) -> None:
    stage = running()
    engine.containers.get(stage.name).stop()
    code, messages = stage.end()
    assert (code, "interrupted" in messages) == (130, True), messages


def test_a_killed_container_leaves_the_previous_good_files_and_the_same_command_goes_on(
    engine: Any, running: Callable[[], Running], out: Path
) -> None:
    assert run(PATTERN, out).returncode == 0
    names = (".jsonl", ".rejects.jsonl", ".report.json")
    before = {name: out.with_suffix(name).read_bytes() for name in names}
    shutil.rmtree(out.parent.parent.parent / "cache")  # so that it asks again
    stage = running()
    engine.containers.get(stage.name).kill()
    code, messages = stage.end()
    assert (code, "its previous output is untouched" in messages) == (137, True), messages
    assert {name: out.with_suffix(name).read_bytes() for name in names} == before
    assert run(PATTERN, out).returncode == 0
    assert out.read_bytes() == before[".jsonl"]


# ---------------------------------------------------------------- images


def test_what_is_built_is_not_built_again(engine: Any, image: Any) -> None:
    name = image.tags[0].removeprefix("synthmill-").partition(":")[0]
    labels = image.attrs["Config"]["Labels"]
    env = os.environ | {"BASE_IMAGE": labels["org.opencontainers.image.base.name"]}
    done = subprocess.run([sys.executable, "docker/images.py", name], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert re.match(rf"{name} +{image.tags[0]}  [\d,]+ MB.*  \d+ packages  up to date$", done.stderr), done.stderr
    assert (ROOT / ".images" / f"{name}.iid").read_text("utf-8") == image.id


@pytest.fixture(params=list(runner.IMAGES))
def image(request: pytest.FixtureRequest, engine: Any) -> Any:
    return engine.images.get(runner.reference(request.param))


def test_an_image_is_for_nobody_in_particular_and_says_what_it_is(image: Any) -> None:
    configuration = image.attrs["Config"]
    assert configuration["User"] == "65532:65532"
    assert configuration["StopSignal"] == "SIGINT"
    labels = configuration["Labels"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")


def test_an_image_has_neither_uv_nor_a_compiler_nor_pip_for_its_packages(engine: Any, image: Any) -> None:
    look = "for name in uv gcc cc g++ make; do command -v $name; done; ls /venv/bin | grep -x pip; true"
    options = {"remove": True, "network_mode": "none", "command": ["sh", "-c", look]}
    assert engine.containers.run(image.id, **options) == b""


def test_the_image_for_asking_models_is_small(engine: Any) -> None:
    image = engine.images.get(runner.reference("llm"))
    try:
        base = engine.images.get(image.labels["org.opencontainers.image.base.name"])
    except importlib.import_module("docker").errors.ImageNotFound:
        pytest.skip("its base is not here to be compared")
    assert image.attrs["Size"] - base.attrs["Size"] <= 350 * MB


@pytest.mark.parametrize("name", list(runner.IMAGES))
def test_an_image_holds_the_pinned_packages_and_its_list_says_so(engine: Any, name: str) -> None:
    code = "from importlib.metadata import distributions as d; print(*sorted({f'{x.name}=={x.version}' for x in d()}))"
    options = {"remove": True, "network_mode": "none", "command": ["python", "-c", code]}

    def normal(pins: list[str]) -> set[str]:
        return {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() + "==" + pin.partition("==")[2] for pin in pins}

    there = normal(engine.containers.run(runner.reference(name), **options).decode().split())
    pinned: list[str] = []
    for group in runner.IMAGES[name].groups:
        text = (ROOT / "docker" / "requirements" / f"{group}.txt").read_text("utf-8")
        pinned += re.findall(r"^([\w.-]+==[\w.+!-]+)", text, re.MULTILINE)
    assert there <= normal(pinned), "nothing but what is pinned"
    assert normal([pin for pin in pinned if pin.startswith(("pydantic==", "anthropic==", "orjson=="))]) <= there
    listed = ROOT / ".images" / f"{name}.packages.txt"
    if not listed.exists():
        pytest.skip("made elsewhere: no list of its packages here")
    lines = listed.read_text("utf-8").splitlines()
    assert normal([line for line in lines if not line.endswith("(deb)")]) == there
    assert any(line.startswith("libc6==") for line in lines)


def test_no_secret_of_the_build_is_in_the_history_or_in_a_layer(image: Any) -> None:
    password = (urlsplit(os.environ.get("PACKAGE_INDEX", "")).password or "").encode()
    if not password:
        pytest.skip("the images were not built with a password in PACKAGE_INDEX; docker/ci.sh does")
    assert password not in json.dumps(image.history()).encode()
    assert password not in json.dumps(image.attrs).encode()
    last, overlap = b"", len(password)
    for chunk in image.save():  # uncompressed layers
        assert password not in last[-overlap:] + chunk
        last = chunk


def test_an_image_holds_nothing_of_the_repository(engine: Any) -> None:
    image = engine.images.get(runner.reference("llm"))  # one Dockerfile makes both; this is the small one
    top = json.loads(_member(image, "manifest.json"))[0]["Layers"][-1]
    with tarfile.open(fileobj=io.BytesIO(_member(image, top))) as layer:
        outside = [name for name in layer.getnames() if not (name == "venv" or name.startswith("venv/"))]
    assert outside == []


def _member(image: Any, wanted: str) -> bytes:
    """One file of what `docker save` writes."""
    with tarfile.open(fileobj=_Chunks(image.save()), mode="r|") as whole:
        for member in whole:
            if member.name == wanted:
                file = whole.extractfile(member)
                assert file is not None
                return file.read()
    raise AssertionError(f"no {wanted}")


class _Chunks(io.RawIOBase):
    """A stream of byte strings as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        given, self._rest = self._rest[:size], self._rest[size:]
        return given


def test_nothing_but_the_pins_enters_a_build(engine: Any, tmp_path: Path) -> None:
    copy = copy_of_repository(tmp_path / "synthmill")
    for name in (".env", "data/trial/compression/01_acquire.jsonl", "models/full/weights.safetensors", "notes.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("mine\n")
    context = tmp_path / "context"
    everything = tmp_path / "Dockerfile"
    everything.write_text("FROM scratch\nCOPY . /\n")
    build = [runner.client(), "build", "--file", str(everything), "--output", f"type=local,dest={context}", str(copy)]
    env = os.environ | {"DOCKER_BUILDKIT": "1"}
    done = subprocess.run(build, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sent = {path.relative_to(context).as_posix() for path in context.rglob("*") if path.is_file()}
    assert sent == {f"docker/requirements/{path.name}" for path in (ROOT / "docker/requirements").glob("*.txt")}


# ---------------------------------------------------------------- the stand-in as a container


@pytest.fixture
def composed(engine: Any) -> Iterator[str]:
    """The stand-in of docker/compose.yaml; its address on this machine."""
    plugin = subprocess.run([runner.client(), "compose", "version"], capture_output=True).returncode == 0
    if not plugin and not shutil.which("docker-compose"):
        pytest.skip("Docker Compose is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"STANDIN_PORT": str(port), "SYNTHMILL_DATA_IMAGE": runner.reference("data")}
    compose = [*([runner.client(), "compose"] if plugin else ["docker-compose"]), "-f", "docker/compose.yaml"]

    def do(*arguments: str) -> str:
        """What went wrong; nothing when all is well."""
        line = [*compose, "-p", "synthmill-test", *arguments]
        done = subprocess.run(line, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120)
        return done.stderr if done.returncode else ""

    assert do("up", "-d") == ""
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end = time.monotonic() + 20
        while (wrong := do("down")) and time.monotonic() < end:  # the stage's container is still leaving the network
            time.sleep(0.5)
        assert wrong == ""


def test_the_contained_stand_in_serves_contained_stages_privately_and_native_ones_on_loopback(
    composed: str, engine: Any, out: Path, tmp_path: Path
) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(composed, timeout=2)
        except urllib.error.HTTPError:
            break  # it answers that it serves nothing there
        except OSError:
            time.sleep(0.2)
    contained = run(PATTERN, out, STANDIN_URL=composed)
    assert contained.returncode == 0, contained.stderr
    assert "natively" not in contained.stderr
    native = tmp_path / "native" / "trial" / "patterns" / out.name
    native.parent.mkdir(parents=True)
    assert run(PATTERN, native, RUNNER="native", STANDIN_URL=composed).returncode == 0
    assert out.read_bytes() == native.read_bytes() != b""
    inside = engine.networks.get(runner.STANDIN_NETWORK).attrs
    assert inside["Internal"], "who is on it has no other way out"
