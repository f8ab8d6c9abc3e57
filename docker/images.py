"""Build the images that are stale, say their sizes, and write what is in each: ``make images``.

    python docker/images.py            # all
    python docker/images.py llm

An image's tag is the hash of what it is built from, so a change of a pin makes another image; ``.images/NAME.iid``
holds its id, ``.images/NAME.packages.txt`` every package in it. Settings, all from the environment: ``BASE_IMAGE`` (a
tag is resolved to its digest first), ``PACKAGE_INDEX`` (its URL, a build secret), ``DOCKER`` (the client; it needs
BuildKit), ``DOCKER_BUILD_FLAGS`` (more flags, for example ``--network host``).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner import IMAGES, asked, client, reference, revision  # noqa: E402

from shared.errors import SettingsError, SynthmillError  # noqa: E402

WHERE = ROOT / ".images"
BASE_NAME, BASE_DIGEST = "org.opencontainers.image.base.name", "org.opencontainers.image.base.digest"
LISTING = "cat /venv/packages.txt; dpkg-query --show --showformat '${Package}==${Version} (deb)\\n' 2>/dev/null || true"


def base_name() -> str:
    """``BASE_IMAGE``, or the default of the Dockerfile."""
    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "docker" / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert default
    return os.environ.get("BASE_IMAGE", "").strip() or default[1]


def inspected(name: str, template: str) -> str:
    """What the engine says of an image; ``""`` when it has none of that name."""
    return asked("image", "inspect", "--format", template, name)[1]


def digest_of(name: str) -> str:
    """The digest of the base this engine has under that name; its id for one made here; ``""`` when it has none."""
    if "@" in name:
        return name.partition("@")[2]
    folder, slash, last = name.rpartition("/")
    repository = folder + slash + last.partition(":")[0]
    pulled = inspected(name, "{{range .RepoDigests}}{{println .}}{{end}}").split()
    found = [digest for digest in pulled if digest.startswith(f"{repository}@")]  # one image may have many names
    return found[0].partition("@")[2] if found else inspected(name, "{{.Id}}")


def is_current(image: str, base: str) -> bool:
    """Whether the image is there, on this base, as far as can be told without asking a registry."""
    made_on = f"{{{{index .Config.Labels {BASE_NAME!r}}}}} {{{{index .Config.Labels {BASE_DIGEST!r}}}}}"
    name, _, digest = inspected(reference(image), made_on.replace("'", '"')).partition(" ")
    return name == base and (digest_of(base) or digest) == digest


def pinned(base: str) -> str:
    """What to build from: ``name@digest``, pulled when this engine has none; the name itself for an image made here.

    Raises:
        SettingsError: there is no such image here, and it cannot be pulled.
    """
    if "@" in base:
        return base
    if not inspected(base, "{{.Id}}") and docker("pull", base):
        raise SettingsError(f"the base image {base} cannot be pulled", "BASE_IMAGE=<an image you have> make images")
    digest = digest_of(base)
    return base if digest == inspected(base, "{{.Id}}") else f"{base}@{digest}"


def docker(*arguments: str) -> int:
    """Run the client with its output on our stderr; its exit code."""
    command = [client(), *arguments]
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode


def build(image: str, base: str) -> None:
    """Build one image.

    Raises:
        SettingsError: it does not build.
    """
    groups, system = IMAGES[image]
    arguments = {
        "BASE_IMAGE": pinned(base),
        "BASE_NAME": base,
        "BASE_DIGEST": digest_of(base),
        "DEPENDENCY_GROUPS": " ".join(groups),
        "SYSTEM_PACKAGES": system,
        "REVISION": revision(),
    }
    flags = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    flags += ["--file", "docker/Dockerfile", "--tag", reference(image), "--iidfile", str(WHERE / f"{image}.iid")]
    index = next((os.environ[name] for name in ("PACKAGE_INDEX", "UV_DEFAULT_INDEX") if os.environ.get(name)), "")
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8"
    ) as secret:  # 0600; in a file, so that no process list has it
        secret.write(index)
        secret.flush()
        flags += ["--secret", f"id=index,src={secret.name}"] if index else []
        code = docker("build", *flags, *shlex.split(os.environ.get("DOCKER_BUILD_FLAGS", "")), ".")
    if code:
        mend = "look at the message above; BuildKit comes with docker-buildx (or DOCKER=<a client that has it>)"
        raise SettingsError(f"the image {image} was not built", mend)


def list_packages(image: str) -> int:
    """Write the list of packages in the image; how many there are."""
    command = ["run", "--rm", "--network", "none", "--pull", "never", reference(image), "sh", "-c", LISTING]
    code, listed, message = asked(*command)
    if code:
        raise SettingsError(f"the image {image} does not run: {message}", "docker system info")
    (WHERE / f"{image}.packages.txt").write_text(listed + "\n", "utf-8")
    return listed.count("\n") + 1


def size(image: str, base: str) -> str:
    """Megabytes of an image, and how many of them are ours."""
    total, below = (int(inspected(name, "{{.Size}}") or 0) for name in (reference(image), base))
    return f"{total / 1e6:,.0f} MB" + (f", {(total - below) / 1e6:,.0f} MB of it above the base" if below else "")


def main(names: list[str]) -> int:
    """Build what is stale. Exit code 0, or the error's own."""
    try:
        if unknown := sorted(set(names) - set(IMAGES)):
            raise SettingsError(f"no image is called {unknown[0]!r}", f"one of {', '.join(IMAGES)}")
        code, _, message = asked("version", "--format", "{{.Server.Version}}")
        if code:
            raise SettingsError(f"no Docker engine answers: {message}", "start Docker, or RUNNER=native")
        WHERE.mkdir(exist_ok=True)
        for image in names or IMAGES:
            base, started, done = base_name(), time.monotonic(), "up to date"
            if not is_current(image, base):
                build(image, base)
                done = f"built in {time.monotonic() - started:.0f} s"
            (WHERE / f"{image}.iid").write_text(inspected(reference(image), "{{.Id}}"), "utf-8")
            count = list_packages(image)
            print(f"{image:5} {reference(image)}  {size(image, base)}  {count} packages  {done}", file=sys.stderr)
        settings = [f"SYNTHMILL_{image.upper()}_IMAGE={reference(image)}\n" for image in IMAGES]
        (WHERE / "compose.env").write_text("".join(settings), "utf-8")
    except SynthmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
