"""Whether this run may publish, and where; then the push itself, and the proof of it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from shared import hub
from shared.errors import KeyMissingError, SettingsError
from shared.receipts import Reason, ReleasedRepository

MARK = "synthmill"
"""The tag of our cards: a repository whose card lacks it is somebody else's, and left alone."""
_REPO = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]{0,95}")


class Wish(NamedTuple):
    """What the caller's environment asks for: ``PUSH``, ``HF_REPO`` and ``HF_TOKEN``."""

    push: bool
    repo: str
    dataset_repo: str
    token: str

    @property
    def named(self) -> bool:
        """Whether somebody has said where it goes."""
        return bool(self.repo)


def wish(repo: str, dataset_repo: str, apis: str) -> Wish:
    """What is asked for; ``HF_REPO`` wins over the setting, the data set's name follows from the model's.

    Raises:
        SettingsError: a name is no ``org/name``, or a push is asked for without one.
        KeyMissingError: a push is asked for without ``HF_TOKEN``.
    """
    said = os.environ.get("PUSH", "").strip()
    if said not in ("", "0", "1"):
        raise SettingsError(
            f"PUSH must be 1, or empty to stage only, got {said!r}", "PUSH=1 make release HF_REPO=org/name"
        )
    push, named = said == "1", os.environ.get("HF_REPO", "").strip() or repo
    for name in filter(None, (named, dataset_repo)):
        if not _REPO.fullmatch(name):
            raise SettingsError(f"HF_REPO must be org/name, got {name!r}", "PUSH=1 make release HF_REPO=org/name")
    if push and not named:
        raise SettingsError("PUSH=1, but nobody says where to", "PUSH=1 make release HF_REPO=org/name")
    data = dataset_repo or (f"{named}-data" if named else "")
    if data and data == named:
        raise SettingsError(f"the model and its data set cannot both be {data}", "give dataset_repo another name")
    token = "standin" if apis == "mock" else os.environ.get("HF_TOKEN", "").strip()
    if push and not token:
        raise KeyMissingError("PUSH=1, but HF_TOKEN is not set", "put HF_TOKEN=... with the role write into .env")
    return Wish(push, named, data, token)


def target(apis: str, services: Callable[[], None]) -> tuple[str, bool]:
    """The address of the Hub, and whether it is the stand-in's; asks nobody but this process.

    The stand-in's is the one this process was connected to, on this machine: an address that was merely set to look
    like it does not count.
    """
    services()
    address = hub.endpoint()
    return address, apis == "mock" and address == os.environ.get("SYNTHMILL_CONNECTED") and _loopback(address)


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(urlsplit(address).hostname or "").is_loopback
    except ValueError:
        return False


def barred(reasons: Sequence[Reason], standin: bool) -> list[Reason]:
    """The reasons that bar a push to this Hub."""
    return [reason for reason in reasons if not (standin and reason.blocks == "real_hub")]


def refusal(reasons: Sequence[Reason], what: str, mend: str) -> SettingsError:
    """All reasons in one error, one a line."""
    lines = "\n".join(f"  {reason.code}: {reason.text}" for reason in reasons)
    count = f"{len(reasons)} reason{'s' if len(reasons) != 1 else ''}"
    return SettingsError(f"{what}, for {count}:\n{lines}", mend)


def push(
    repositories: Sequence[ReleasedRepository], directory: Path, token: str, message: str
) -> tuple[ReleasedRepository, ...]:
    """Upload each, download it again, compare; the data set first, so that the model's card never points at nothing.

    Raises:
        See :func:`shared.hub.upload` and :func:`shared.hub.verify`.
    """
    done: dict[str, ReleasedRepository] = {}
    for item in sorted(repositories, key=lambda item: item.kind):
        folder = directory / item.kind
        sent = hub.upload(item.repo, folder, token=token, mark=MARK, message=message, kind=item.kind)
        hub.verify(item.repo, sent.commit, folder, token=token, kind=item.kind)
        done[item.kind] = item.model_copy(update={"commit": sent.commit, "private": sent.private, "url": sent.url})
    return tuple(done[item.kind] for item in repositories)
