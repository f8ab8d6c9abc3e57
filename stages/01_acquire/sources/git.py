"""A git repository, pinned to a commit: functions, methods and classes of its files.

Nothing of a clone is ever executed or checked out: a bare, shallow repository without hooks, from which blobs are read
with ``git cat-file``. So no filter, LFS smudge, hook, submodule or symbolic link has a say.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

import licences
from extract import language_of, spread
from pydantic import Field, field_validator

from shared.errors import SettingsError
from sources import ROOT, Acquire, Candidate, Candidates, CodeSource, from_file, is_wanted

TIMEOUT_S = 1_800
"""For one fetch; the largest production source is about 100 MB in a shallow clone."""

_MAX_LICENCE_BYTES = 200_000
_CONFIG = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.symlinks": "false",
    "core.attributesFile": "/dev/null",
    "core.quotePath": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "fetch.recurseSubmodules": "false",
    "submodule.recurse": "false",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "credential.interactive": "false",
}


_PROTOCOLS = ("https", "http", "ssh", "git", "file")
"""Only transports that run no command of the URL's choosing: ``ext::`` and the like are refused."""


class Git(CodeSource):
    """``kind = "git"``.

    Attributes:
        url: URL, or path of a local repository; ``.`` is this repository itself, at a commit, never its work tree.
        ref: tag, branch or commit hash. A tag or branch is resolved at run time.
        commit: the 40 hex digits that ``ref`` must resolve to; a tag that was moved is refused, and a clone that is
            cached already needs no network. "" = whatever ``ref`` is today.
        repository: name in the origin; "" = the last part of the URL.
    """

    kind: Literal["git"]
    domain: Literal["code"] = "code"
    url: str = Field(min_length=1)
    ref: str = Field(min_length=1)
    commit: str = Field(default="", pattern=r"^([0-9a-f]{40})?$")
    repository: str = Field(default="", pattern=r"^[\w.+-]*$")

    @field_validator("url", "ref")
    @classmethod
    def _no_option(cls, value: str) -> str:
        if value.startswith("-") or any(ord(char) < 33 for char in value):
            raise ValueError("must not begin with '-' or hold spaces or control characters")
        return value

    @field_validator("url")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if re.match(r"\w+://[^/@]*:[^/@]*@", value) or re.match(r"https?://[^/@]+@", value):
            raise ValueError("must not hold a password or token: settings are copied into reports; use git credentials")
        return value


def read(source: Git, acquire: Acquire) -> Candidates:
    """The repository's candidates, files in an order drawn by the seed.

    Raises:
        SettingsError: the repository or the ref cannot be had, the ref is not at ``commit``, or ``.`` has no history.
    """
    if source.url == ".":
        git_dir, commit = _this_repository(source)
    else:
        git_dir, commit = _clone(source, acquire.cache)
    name = source.repository or source.url.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].removesuffix(".git")
    acquire.note(source, commit=commit)
    return _candidates(source, acquire, git_dir, commit, f"{name}@{commit}")


def _candidates(source: Git, acquire: Acquire, git_dir: Path, commit: str, prefix: str) -> Candidates:
    entries: dict[str, tuple[str, str]] = {}
    for mode, oid, raw in _tree(git_dir, commit):
        try:
            entries[raw.decode("utf-8")] = (mode, oid)
        except UnicodeDecodeError:
            shown = raw.decode("utf-8", "backslashreplace")
            if is_wanted(shown, source.include):
                yield Candidate(f"{prefix}:{shown}", reason="not_utf8", detail="the file's name is not UTF-8")
    with _Blobs(git_dir) as blobs:
        expression = _Licences(entries, blobs)
        for path in spread((path for path in entries if is_wanted(path, source.include)), acquire.seed):
            mode, oid = entries[path]
            origin = f"{prefix}:{path}"
            if mode in ("120000", "160000"):
                kind = "symlink" if mode == "120000" else "submodule"
                yield Candidate(origin, reason=kind, detail=f"a {kind} is never followed")
                continue
            data = blobs.read(oid, acquire.limits.max_file_bytes)
            if data is None:
                yield Candidate(
                    origin,
                    reason="unreadable",
                    detail=f"not in the clone, or above {acquire.limits.max_file_bytes:,} bytes",
                )
                continue
            language = cast(str, language_of(path))
            yield from from_file(path, data, language, origin, expression.of(path), source, acquire)


class _Licences:
    """The licence of a file: that of the nearest directory above it that has licence files."""

    def __init__(self, entries: dict[str, tuple[str, str]], blobs: _Blobs) -> None:
        self._blobs = blobs
        self._files: dict[str, dict[str, str]] = {}
        for path, (mode, oid) in entries.items():
            parts = PurePosixPath(path)
            folder = str(parts.parent)
            if mode.startswith("100") and (licences.is_licence_file(parts.name) or folder == "LICENSES"):
                self._files.setdefault("." if folder == "LICENSES" else folder, {})[parts.name] = oid
        self._known: dict[str, str] = {}

    def of(self, path: str) -> str:
        for folder in map(str, PurePosixPath(path).parents):
            if folder in self._files:
                return self._in(folder)
        return licences.UNKNOWN

    def _in(self, folder: str) -> str:
        if folder not in self._known:
            texts = {}
            for name, oid in self._files[folder].items():
                texts[name] = (self._blobs.read(oid, _MAX_LICENCE_BYTES) or b"").decode("utf-8", "ignore")
            self._known[folder] = licences.of_files(texts)
        return self._known[folder]


# ---------------------------------------------------------------- git itself


def _git(*arguments: str | os.PathLike[str], git_dir: Path | None = None, trust: Path | None = None) -> list[str]:
    config = _CONFIG | ({"safe.directory": str(trust)} if trust else {})
    options = [part for key, value in config.items() for part in ("-c", f"{key}={value}")]
    where = [f"--git-dir={git_dir}"] if git_dir else []
    return ["git", "--no-pager", *options, *where, *map(str, arguments)]


def _environment() -> dict[str, str]:
    """Ours without what points git at another repository (a hook has that set), and nothing that asks or smudges."""
    allowed = os.environ.get("GIT_ALLOW_PROTOCOL", ":".join(_PROTOCOLS)).split(":")
    return {name: value for name, value in os.environ.items() if name not in _LOCAL} | {
        "GIT_ALLOW_PROTOCOL": ":".join(name for name in _PROTOCOLS if name in allowed),
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(ROOT.parent),
        "LC_ALL": "C",
    }


# `git rev-parse --local-env-vars`, without the ones a person sets configuration with.
_LOCAL = frozenset(
    f"GIT_{name}"
    for name in (
        *("ALTERNATE_OBJECT_DIRECTORIES", "COMMON_DIR", "CONFIG", "DIR", "GRAFT_FILE", "IMPLICIT_WORK_TREE"),
        *("INDEX_FILE", "NAMESPACE", "OBJECT_DIRECTORY", "PREFIX", "REPLACE_REF_BASE", "SHALLOW_FILE", "WORK_TREE"),
    )
)


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Standard output of a git command.

    Raises:
        _GitError: it failed; the message is git's own last line.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        raise SettingsError("git is not installed", "install git, then run the same command") from None
    except subprocess.TimeoutExpired:
        raise _GitError(f"no answer within {TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        told = [line for line in lines if line.startswith(("fatal:", "error:", "remote:"))] or lines
        raise _GitError((told or [f"exit status {done.returncode}"])[0].removeprefix("fatal: "))
    return done.stdout.decode("utf-8", "surrogateescape")


class _GitError(Exception):
    pass


def _this_repository(source: Git) -> tuple[Path, str]:
    """The object store of the repository this code is in, and the commit that ``ref`` is there.

    Raises:
        SettingsError: there is no git history: a tarball, or a repository without a commit.
    """
    mend = f"git clone this repository instead of unpacking an archive, or remove source {source.name!r}"
    try:
        git_dir = Path(_run(_git("rev-parse", "--absolute-git-dir", trust=ROOT), ROOT).strip())
    except _GitError as error:
        raise SettingsError(
            f"source {source.name!r} reads this repository, but there is no git history: {error}", mend
        ) from None
    try:
        commit = _run(_git("rev-parse", "--verify", "--quiet", f"{source.ref}^{{commit}}", trust=ROOT), ROOT).strip()
    except _GitError:
        raise SettingsError(
            f"source {source.name!r} reads this repository at {source.ref!r}, but there is no such commit here",
            "git commit something first" if source.ref == "HEAD" else f"git fetch origin {source.ref}",
        ) from None
    _agree(source, commit)
    return git_dir, commit


def _clone(source: Git, cache: Path) -> tuple[Path, str]:
    """A bare shallow clone in ``cache``, made when it is not there, and the commit.

    Raises:
        SettingsError: the repository or the ref cannot be had, or the ref is not at ``commit``.
    """
    local = ROOT / source.url
    url = f"file://{local.resolve()}" if "://" not in source.url and local.is_dir() else source.url
    if source.commit and (known := _cached(cache, url, source.commit)):
        return known, source.commit
    try:
        name, commit = _resolve(url, source)
        _agree(source, commit)
        return _cached(cache, url, commit) or _fetch(cache, url, name, commit), commit
    except _GitError as error:
        raise SettingsError(
            f"source {source.name!r}: git cannot read {source.url} at {source.ref!r}: {error}",
            "check url, ref and the network, then run the same command: clones that are done stay in data/cache/git",
        ) from None


def _agree(source: Git, commit: str) -> None:
    if source.commit and source.commit != commit:
        raise SettingsError(
            f"source {source.name!r}: {source.ref!r} of {source.url} is at {commit}, expected {source.commit}",
            "someone moved the ref: look at what changed, then correct commit in the settings",
        )


def _resolve(url: str, source: Git) -> tuple[str, str]:
    """``(name to fetch, commit)``; a tag goes before a branch of the same name, an annotated tag is peeled."""
    ref = source.ref
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return ref, ref
    names = [f"refs/tags/{ref}", f"refs/heads/{ref}", ref]
    listed = _run(_git("ls-remote", "--", url, *(pattern for name in names for pattern in (name, f"{name}^{{}}"))))
    found = {name: oid for oid, _, name in (line.partition("\t") for line in listed.splitlines())}
    for name in names:
        if name in found:
            return name, found.get(f"{name}^{{}}", found[name])
    raise SettingsError(
        f"source {source.name!r}: {source.url} has no ref {ref!r}", f"git ls-remote {source.url}   lists what it has"
    )


def _place(cache: Path, url: str, commit: str) -> Path:
    return cache / hashlib.sha256(f"{url}\0{commit}".encode()).hexdigest()


def _cached(cache: Path, url: str, commit: str) -> Path | None:
    path = _place(cache, url, commit)
    if not path.is_dir():
        return None
    try:
        _run(_git("cat-file", "-e", f"{commit}^{{tree}}", git_dir=path))
    except _GitError:
        return None
    return path


def _fetch(cache: Path, url: str, name: str, commit: str) -> Path:
    """Clone beside the final place and rename, so that a clone that is there is whole."""
    path = _place(cache, url, commit)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(path.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if known := _cached(cache, url, commit):  # another process was faster
            return known
        for stale in (part, path):
            shutil.rmtree(stale, ignore_errors=True)
        _run(_git("init", "--quiet", "--bare", "--template=", part))
        options = ("--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")
        _run(_git("fetch", *options, "--", url, f"+{name}:refs/pinned", git_dir=part))
        got = _run(_git("rev-parse", "--verify", "refs/pinned^{commit}", git_dir=part)).strip()
        if got != commit:
            raise _GitError(f"{name} moved from {commit} to {got} while it was fetched")
        os.rename(part, path)
    return path


def _tree(git_dir: Path, commit: str) -> list[tuple[str, str, bytes]]:
    """``(mode, object id, path)`` of everything in a commit, in the byte order of the paths."""
    listed = _run(_git("ls-tree", "-r", "-z", "--full-tree", commit, git_dir=git_dir))
    entries = []
    for entry in listed.encode("utf-8", "surrogateescape").split(b"\0")[:-1]:
        meta, _, path = entry.partition(b"\t")
        mode, _, oid = meta.decode("ascii").split(" ")
        entries.append((mode, oid, path))
    return sorted(entries, key=lambda entry: entry[2])


class _Blobs:
    """``git cat-file --batch``: one process for all the blobs of a source; contents raw, no filter applied."""

    def __init__(self, git_dir: Path) -> None:
        self._git_dir = git_dir

    def __enter__(self) -> _Blobs:
        self._process = subprocess.Popen(
            _git("cat-file", "--batch", git_dir=self._git_dir),
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._in = cast(IO[bytes], self._process.stdin)
        self._out = cast(IO[bytes], self._process.stdout)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._in.close()
        self._out.close()
        self._process.wait()

    def read(self, oid: str, most: int) -> bytes | None:
        """A blob, or ``None`` when it is not in the store or longer than ``most`` bytes."""
        self._in.write(f"{oid}\n".encode())
        self._in.flush()
        header = self._out.readline().split()
        if len(header) != 3 or header[1] != b"blob":
            return None
        size = int(header[2])
        if size <= most:
            data = self._out.read(size)
            self._out.read(1)
            return data
        left = size + 1
        while left > 0 and (block := self._out.read(min(left, 1 << 20))):
            left -= len(block)
        return None
