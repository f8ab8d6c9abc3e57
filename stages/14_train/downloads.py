"""Fetch files from signed links: whole or not at all, and what is there already is not fetched again.

A link is given without a key, and expires. A file is written beside its place and renamed into it once it has the
length the server announced; what a killed process left of it is gone on with (HTTP ranges, RFC 9110 section 14).
"""

from __future__ import annotations

import errno
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from shared.errors import ProviderError, SynthmillError
from shared.stage import shown

BLOCK = 1 << 20
SILENCE_S = 10.0
"""How long a server may send nothing; then it is asked once more from where it stopped."""
TRIES = 3
EXPIRED = (400, 401, 403, 404, 410)
"""How storage services say that a signature is no longer valid: 403 (S3), 400 (Google), 401, 404 or 410 (others)."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""The directory cannot be written: the stage says so for all its files."""

AGAIN = "what is fetched already is kept: run the same command"


class ExpiredLinkError(Exception):
    """The server no longer takes the link; ``args`` say how it said so."""


def fetch_all(sign: Callable[[], Mapping[str, str]], target: Path) -> None:
    """Fetch every file of ``sign()``, a link by relative path, into ``target``.

    An expired link is signed anew, once for each file.

    Raises:
        ProviderError: there are no files, one has a path that leads elsewhere, or cannot be had.
        SynthmillError: the disk is full; nothing half-written is left.
    """
    links = sign()
    if not links:
        raise ProviderError("the export holds no files", "remove the run's .part directory, then run the same command")
    places = {name: _inside(target, name) for name in sorted(links)}  # all of them before the first is fetched
    for name, path in places.items():
        if path.exists():
            continue
        try:
            _fetch(links[name], path, name)
        except ExpiredLinkError:
            links = sign()
            try:
                _fetch(links[name], path, name)
            except (ExpiredLinkError, KeyError) as error:
                raise ProviderError(f"a fresh link to {name} is refused too: {error}", AGAIN) from None


def _inside(target: Path, name: str) -> Path:
    """Where a file goes.

    Raises:
        ProviderError: its path is absolute or leaves the directory.
    """
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise ProviderError(
            f"the export names a file {name!r}, which would lie outside its directory; nothing was fetched",
            "do not use this export; report it to the service",
        )
    return target / parts


def _fetch(link: str, path: Path, name: str) -> None:
    """One file, in up to :data:`TRIES` pieces.

    Raises:
        ExpiredLinkError: the link is not valid any more.
        ProviderError: the server cannot be reached, or sends something else.
        SynthmillError: the disk is full.
    """
    if not link.startswith(("https://", "http://")):
        raise ProviderError(f"the link to {name} is no web address: {link[:40]!r}", "report it to the service")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    problem = ""
    for _ in range(TRIES):
        try:
            if _receive(link, part, name):
                os.replace(part, path)
                return
            problem = "the connection ended before the file did"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in EXPIRED:
                raise ExpiredLinkError(f"the server answered {error.code}") from None
            if error.code == 416:  # what is there is not the beginning of this file
                part.unlink(missing_ok=True)
            problem = f"the server answered {error.code}"
        except urllib.error.URLError as error:
            problem = str(error.reason)
        except (HTTPException, ConnectionError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        except OSError as error:
            if error.errno in NOT_OURS:
                raise
            if error.errno in NO_ROOM:
                part.unlink(missing_ok=True)
                raise _full(path, name, str(error.strerror)) from None
            problem = str(error)
    raise ProviderError(f"{name} cannot be fetched: {problem}", AGAIN)


def _receive(link: str, part: Path, name: str) -> bool:
    """Append what is missing; whether the file has its whole length now."""
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(link, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            part.unlink(missing_ok=True)
            return False
        if answer.status != 206:  # all of it, whatever was asked for
            there = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else there + int(length)
        if total is not None and (free := _free(part)) is not None and total - there > free:
            part.unlink(missing_ok=True)
            raise _full(part, name, f"{total - there:,} bytes to come, {free:,} free")
        with open(part, "ab" if there else "wb") as file:
            shutil.copyfileobj(answer, file, BLOCK)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if total is not None and size > total:
        part.unlink()
    return total is None or size == total


def _free(part: Path) -> int | None:
    try:
        return shutil.disk_usage(part.parent).free
    except OSError:
        return None


def _full(path: Path, name: str, why: Any) -> SynthmillError:
    return SynthmillError(
        f"no room for {name} in {shown(path.parent)}: {why}; nothing half-written is left",
        f"free some space there, then run the same command: {AGAIN.partition(':')[0]}",
    )
