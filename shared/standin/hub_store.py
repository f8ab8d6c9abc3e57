"""What was pushed to the stand-in Hub: repositories with their history, kept for a later process to download.

::

    <state>/hub/model/<org>/<name>.json       private, gated, and every commit: its files, by their SHA-256
    <state>/hub/blobs/<sha256>                what is in them

The directory is ``STANDIN_STATE``; without one, all is kept in memory and ends with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from shared.standin.hub_data import Repository, Snapshot

_NAME = re.compile(r"[\w-][\w.-]*")
_memory: dict[str, bytes] = {}

# ---------------------------------------------------------------- repositories


def repository(kind: str, repo_id: str) -> Repository | None:
    """A repository that was pushed; None when there is none."""
    data = _read(_place(kind, repo_id))
    if data is None:
        return None
    state = orjson.loads(data)
    snapshots = {commit["sha"]: _snapshot(orjson.dumps(commit)) for commit in state["commits"]}
    head = snapshots[state["commits"][-1]["sha"]]
    return Repository({"main": head}, snapshots, gated=state["gated"], private=state["private"])


@lru_cache(maxsize=32)
def _snapshot(commit: bytes) -> Snapshot:
    value = orjson.loads(commit)
    files = {path: blob(digest) or b"" for path, digest in value["files"].items()}
    return Snapshot(files, frozenset(value["large"]), value["sha"])


def create(kind: str, repo_id: str, *, private: bool, files: dict[str, bytes]) -> bool:
    """Make a repository with a first commit of these files; False when there is one."""
    with _locked():
        if _read(_place(kind, repo_id)) is not None:
            return False
        state = {"private": private, "gated": False, "commits": []}
        _add_commit(state, repo_id, {path: keep(data) for path, data in files.items()}, frozenset(), "initial commit")
        _write(_place(kind, repo_id), orjson.dumps(state, option=orjson.OPT_INDENT_2))
    return True


def change(kind: str, repo_id: str, settings: dict[str, bool]) -> None:
    """Set ``private`` or ``gated``."""
    with _locked():
        state = orjson.loads(_read(_place(kind, repo_id)) or b"{}")
        _write(_place(kind, repo_id), orjson.dumps(state | settings, option=orjson.OPT_INDENT_2))


def commit(
    kind: str, repo_id: str, parent: str | None, title: str, files: dict[str, tuple[str, bool]], gone: list[str]
) -> str | None:
    """Put files into ``main``; returns the new commit, or the old one when nothing differs.

    Args:
        parent: what ``main`` must be at, unless None.
        files: SHA-256 of the content (see :func:`keep`) by path, and whether the file is large.
        gone: paths to remove; one that ends in ``/`` with all below it.

    Returns:
        None when ``main`` is not at ``parent``.
    """
    with _locked():
        state = orjson.loads(_read(_place(kind, repo_id)) or b"{}")
        head = state["commits"][-1]
        if parent and parent != head["sha"]:
            return None
        content, large = dict(head["files"]), set(head["large"])
        for path in [p for p in content if any(p == one or (one.endswith("/") and p.startswith(one)) for one in gone)]:
            del content[path]
        for path, (digest, is_large) in files.items():
            content[path] = digest
            (large.add if is_large else large.discard)(path)
        large &= set(content)
        if content == head["files"] and large == set(head["large"]):
            return str(head["sha"])
        sha = _add_commit(state, repo_id, content, frozenset(large), title)
        _write(_place(kind, repo_id), orjson.dumps(state, option=orjson.OPT_INDENT_2))
        return sha


def _add_commit(state: dict[str, Any], repo_id: str, files: dict[str, str], large: frozenset[str], title: str) -> str:
    commits = state["commits"]
    value = {"files": dict(sorted(files.items())), "large": sorted(large), "title": title}
    parent = commits[-1]["sha"] if commits else ""
    sha = hashlib.sha1(f"{repo_id}\0{parent}\0".encode() + orjson.dumps(value)).hexdigest()
    commits.append({"sha": sha, **value})
    return sha


# ---------------------------------------------------------------- contents


def keep(data: bytes) -> str:
    """Keep a content; returns its SHA-256."""
    digest = hashlib.sha256(data).hexdigest()
    if blob(digest) is None:
        _write(f"blobs/{digest}", data)
    return digest


def blob(digest: str) -> bytes | None:
    """A content by its SHA-256."""
    return _read(f"blobs/{digest}")


# ---------------------------------------------------------------- files


def _place(kind: str, repo_id: str) -> str:
    organization, _, name = repo_id.partition("/")
    if not (_NAME.fullmatch(organization) and _NAME.fullmatch(name)):  # it becomes a path
        return "no/such/place"
    return f"{kind}/{organization}/{name}.json"


def _root() -> Path | None:
    state = os.environ.get("STANDIN_STATE")
    return Path(state) / "hub" if state else None


def _read(place: str) -> bytes | None:
    root = _root()
    if root is None:
        return _memory.get(place)
    try:
        return (root / place).read_bytes()
    except FileNotFoundError:
        return None


def _write(place: str, data: bytes) -> None:
    root = _root()
    if root is None:
        _memory[place] = data
        return
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


@contextmanager
def _locked() -> Iterator[None]:
    """One writer at a time, among all stand-ins that share the directory."""
    root = _root()
    if root is None:
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
