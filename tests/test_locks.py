"""What is installed is what was locked: exact pins, uv.lock and its exports agree, every file has its hash."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXPORTS = sorted((ROOT / "docker" / "requirements").glob("*.txt"))
REQUIREMENT = re.compile(r"^(?P<name>[a-z0-9._-]+)==(?P<version>\S+)", re.I)


def script(name: str) -> Any:
    """A script of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GROUPS: tuple[str, ...] = script("lock").GROUPS


def requirements(text: str) -> list[str]:
    """The requirements of an export, each with its continuation lines."""
    return [block for block in re.split(r"\n(?=\S)", text.strip()) if block]


def pins(text: str) -> set[tuple[str, str]]:
    """``{(name, version)}`` of an export."""
    found = set()
    for block in requirements(text):
        match = REQUIREMENT.match(block)
        assert match is not None, f"not an exact pin: {block.splitlines()[0]}"
        found.add((match["name"].lower(), match["version"]))
    return found


def test_there_is_one_export_for_every_group_and_one_for_uv() -> None:
    optional = {"parity"}  # torch and peft: never in a set-up or an image, so not exported
    assert set(GROUPS) == {"core", *PROJECT["dependency-groups"]} - optional
    assert {path.stem for path in EXPORTS} == {*GROUPS, "uv"}


@pytest.mark.parametrize("group", GROUPS)
def test_the_export_is_what_uv_lock_says(group: str) -> None:
    assert (ROOT / "uv.lock").exists(), "uv.lock is made by: make setup"
    committed = (ROOT / "docker" / "requirements" / f"{group}.txt").read_text("utf-8")
    assert script("lock").exported(group) == committed, "they differ: make lock, then commit docker/requirements"


@pytest.mark.parametrize("path", EXPORTS, ids=lambda p: p.stem)
def test_every_package_is_pinned_with_hashes_and_from_no_named_host(path: Path) -> None:
    text = path.read_text("utf-8")
    for block in requirements(text):
        assert REQUIREMENT.match(block), block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"no hash: {block.splitlines()[0]}"
    assert "://" not in text and not re.search(r"--(extra-)?index|--find-links|@ ", text), "an export names no host"


@pytest.mark.parametrize("group", GROUPS)
def test_what_pyproject_asks_for_is_what_is_exported(group: str) -> None:
    asked = PROJECT["project"]["dependencies"] if group == "core" else PROJECT["dependency-groups"][group]
    exported = pins((ROOT / "docker" / "requirements" / f"{group}.txt").read_text("utf-8"))
    for requirement in asked:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^;\s]+)(?:\s*;.*)?", requirement)
        assert match is not None, f"not an exact pin: {requirement}"
        assert (match[1].lower(), match[2]) in exported, f"{requirement} is not in {group}.txt: make lock"


def test_no_two_groups_want_different_versions_of_a_package() -> None:
    # All groups install into one environment. A version may differ by platform or Python inside an export, so the sets
    # are compared.
    versions: dict[str, dict[str, set[str]]] = {}
    for group in GROUPS:
        for name, version in pins((ROOT / "docker" / "requirements" / f"{group}.txt").read_text("utf-8")):
            versions.setdefault(name, {}).setdefault(group, set()).add(version)
    clashes = {name: found for name, found in versions.items() if not set.intersection(*found.values())}
    assert clashes == {}


def test_uv_has_one_version_everywhere() -> None:
    required = PROJECT["tool"]["uv"]["required-version"].removeprefix("==")
    assert pins((ROOT / "docker" / "requirements" / "uv.txt").read_text("utf-8")) == {("uv", required)}


def test_the_lock_is_made_as_of_a_day_for_the_machines_we_run_on() -> None:
    settings = PROJECT["tool"]["uv"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}T00:00:00Z", settings["exclude-newer"])
    assert any("linux" in environment for environment in settings["environments"])
    assert any("darwin" in environment for environment in settings["environments"])


def test_uv_lock_is_not_committed_because_it_names_a_host() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


NO_WHEELS = """error: No solution found when resolving dependencies
  cause: Because mlx{sys_platform == 'linux'}==0.32.4 has no wheels with a matching platform tag (e.g.,
  `manylinux_2_28_x86_64`) and you require mlx{sys_platform == 'linux'}==0.32.4, we can conclude that ..."""
"""What uv 0.13.8 says with `--python-platform x86_64-manylinux_2_28`."""
NO_INDEX = """error: No solution found when resolving dependencies
  cause: Because there is no version of mlx{sys_platform == 'linux'}==0.32.4 and you require ..."""
"""The same with `--offline`."""


def test_set_up_leaves_mlx_out_only_where_it_is_not_made_for_the_machine() -> None:
    has_no_wheels = script("setup").has_no_wheels
    assert has_no_wheels("mlx", NO_WHEELS)
    assert not has_no_wheels("mlx", NO_INDEX), "an index that cannot be reached is a failure"
    assert not has_no_wheels("mlx", NO_WHEELS.replace("mlx", "daft")), "another package is needed"
    assert not has_no_wheels("mlx", "")
