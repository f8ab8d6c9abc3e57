"""The Hugging Face Hub: data sets read by row at a pinned commit, files at a pinned revision, folders uploaded.

::

    data = open_dataset("OpenAssistant/oasst1", revision="main")     # .commit is what main is now
    for place, row in data.rows(seed=13, buffer=1_000): ...          # ("data/train-00000.parquet:17", {...})
    folder = download("org/model", revision="<commit hash>", patterns=("*.json",), kind="model")
    done = upload("org/model", Path("release/model"), token=token, mark="synthmill", message="v2")
    verify("org/model", done.commit, Path("release/model"), token=token)

Call :meth:`shared.stage.Stage.services` first: the libraries read where the Hub is when they are imported, which here
is on first use.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from shared.errors import KeyMissingError, ProviderError, SettingsError
from shared.stage import sha256_of

Kind = Literal["dataset", "model"]

_PINNED = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<commit>[^/]+)/(?P<path>.+)")
_FORMATS = ("parquet", "json", "csv", "text")


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set at one commit.

    Attributes:
        id: ``org/name``.
        commit: the commit the revision was when it was opened; rows are read from this one.
        files: paths in the repository, in the Hub's order.
        format: name of the reader: ``parquet``, ``json`` (also JSON lines), ``csv`` or ``text``.
    """

    id: str
    commit: str
    files: tuple[str, ...]
    format: str

    def rows(self, seed: int | None = None, buffer: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """``(place, row)`` of every row, streamed; the place is ``path:row`` with rows counted from 0 in each file.

        Args:
            seed: with a seed, files come in an order drawn by it; ``None`` = the Hub's order.
            buffer: rows held back to draw the next one from; 0 = rows in file order. Memory is this many rows. The
                draw depends on the seed and on the rows' positions alone.

        Raises:
            SettingsError: the data set or one of its files cannot be had or read.
            ProviderError: the Hub does not answer.
        """
        files = list(self.files)
        draw = random.Random(f"{self.id}\0{seed}")
        if seed is not None:
            _shuffle(files, draw)
        stream = (item for file in files for item in self._rows_of(file))
        return _drawn(stream, draw, buffer) if seed is not None and buffer else stream

    def _rows_of(self, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
        datasets = _datasets()
        url = f"hf://datasets/{self.id}@{self.commit}/{file}"
        with _explained(self.id, self.commit):
            stream = iter(datasets.load_dataset(self.format, data_files=[url], split="train", streaming=True))
        number = 0
        while True:
            with _explained(self.id, self.commit):
                row = next(stream, None)
            if row is None:
                return
            yield f"{file}:{number}", row
            number += 1


def open_dataset(
    dataset: str,
    revision: str,
    config: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
) -> HubDataset:
    """One split of a data set at the commit that ``revision`` is now; no row is read yet.

    Args:
        revision: branch, tag, ``refs/convert/parquet`` or commit hash.
        config: name of a configuration, when the data set has several.
        data_dir: folder inside the repository.
        data_files: paths or patterns inside the repository, instead of ``data_dir``.

    Raises:
        KeyMissingError: the token is refused, or the data set is gated and its terms are not accepted with it.
        SettingsError: there is no such data set, revision, configuration, folder or split, or it is a script.
        ProviderError: the Hub does not answer.
    """
    datasets = _datasets()
    files_wanted = [data_files] if isinstance(data_files, str) else list(data_files) if data_files else None
    with _explained(dataset, revision):
        builder = datasets.load_dataset_builder(
            dataset, name=config, data_dir=data_dir, data_files=files_wanted, revision=revision
        )
    by_split = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in by_split:
        raise SettingsError(f"{dataset} has no split {split!r}: it has {', '.join(sorted(by_split))}", "correct split")
    if builder.name not in _FORMATS:
        raise SettingsError(
            f"{dataset} holds files of the kind {builder.name}; rows of text are read from {', '.join(_FORMATS)}",
            "choose another config, data_dir or data_files",
        )
    places = [_PINNED.fullmatch(url) for url in by_split[split]]
    if not places or not all(place and place["id"] == dataset for place in places):
        raise SettingsError(f"{dataset}: its files are not in its own repository", "give data_files inside it")
    (commit,) = {place["commit"] for place in places if place}
    return HubDataset(dataset, commit, tuple(place["path"] for place in places if place), builder.name)


def download(repo_id: str, revision: str, patterns: Sequence[str], kind: Kind = "model") -> Path:
    """A local folder with the files of a repository that match, at a pinned revision.

    Args:
        revision: commit hash of 40 hex digits; nothing else is reproducible, so nothing else is taken.
        patterns: shell patterns of paths in the repository, at least one.

    Raises:
        SettingsError: the revision is not a commit hash, there is no such repository or commit, or no file matches.
        KeyMissingError: the token is refused, or the repository is gated and its terms are not accepted with it.
        ProviderError: the Hub does not answer.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise SettingsError(
            f"{repo_id}: the revision must be a commit hash of 40 hex digits, got {revision!r}",
            "copy the hash from the repository's history: a branch or tag would move",
        )
    _prepare()
    from huggingface_hub import snapshot_download

    with _explained(repo_id, revision, kind):
        path = Path(snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    # The folder also holds what earlier calls asked for, so only a file that matches counts.
    files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    if not any(fnmatch(file, pattern) for file in files for pattern in patterns):
        raise SettingsError(
            f"{repo_id} at {revision[:12]} has no file that matches {', '.join(patterns)}", "correct the patterns"
        )
    return path


# ---------------------------------------------------------------- uploads

GIT_ATTRIBUTES = ".gitattributes"
"""The Hub's own file in every repository, which says what Git LFS keeps."""


@dataclass(frozen=True)
class Uploaded:
    """A folder on the Hub.

    Attributes:
        commit: that holds it; the one there was when nothing had changed.
        private: whether the repository is.
        url: its page.
    """

    commit: str
    private: bool
    url: str


def endpoint() -> str:
    """The address of the Hub that this process reads and writes, as ``https://host``."""
    _prepare()
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def upload(repo_id: str, folder: Path, *, token: str, mark: str, message: str, kind: Kind = "model") -> Uploaded:
    """Make a repository hold exactly the files of a folder; a missing one is made first, and private.

    Files that are there and not in the folder go (Git keeps them); so a repository that somebody else's work is in is
    refused: the card of ours has the tag ``mark``. The same bytes again make no commit.

    Args:
        token: that may write there.
        message: of the commit.

    Raises:
        KeyMissingError: the token is refused, or may not write there.
        SettingsError: the repository holds something else.
        ProviderError: the Hub does not answer, or changes underneath.
    """
    _prepare()
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id, "main", kind):
        api.create_repo(repo_id, repo_type=kind, private=True, exist_ok=True)
        private = bool(api.repo_info(repo_id, repo_type=kind).private)
        there = set(api.list_repo_files(repo_id, repo_type=kind)) - {GIT_ATTRIBUTES}
        if there and mark not in _card_tags(repo_id, kind, token, there):
            raise SettingsError(
                f"{kind} {repo_id} holds {len(there)} files, and its card lacks the tag {mark!r}: it was not made by "
                "this pipeline, and what it holds would be replaced",
                "give the name of a repository that does not exist yet",
            )
        done = api.upload_folder(
            repo_id=repo_id, repo_type=kind, folder_path=folder, commit_message=message, delete_patterns="*"
        )
        return Uploaded(str(done.oid), private, _page(repo_id, kind))


def verify(repo_id: str, commit: str, folder: Path, *, token: str, kind: Kind = "model") -> dict[str, str]:
    """Download a commit afresh and compare it with the folder it was made from; SHA-256 by path.

    Raises:
        ProviderError: a file is missing, one too many or different, or the Hub does not answer.
        KeyMissingError, SettingsError: as for :func:`download`.
    """
    _prepare()
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(prefix="synthmill-verify-") as fresh, _explained(repo_id, commit, kind):
        # A cache of its own: one that is shared could hold the very bytes that were uploaded.
        got = snapshot_download(repo_id, repo_type=kind, revision=commit, cache_dir=fresh, token=token)
        here, there = _hashes(folder), _hashes(Path(got))
    there.pop(GIT_ATTRIBUTES, None)
    if differing := sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
        raise ProviderError(
            f"{kind} {repo_id} at {commit[:12]} is not what was uploaded: {', '.join(differing[:5])} "
            f"{'is' if len(differing) == 1 else 'are'} missing, new or different",
            "run the same command: it uploads again what differs",
        )
    return here


def _card_tags(repo_id: str, kind: Kind, token: str, there: set[str]) -> list[str]:
    """The tags of a repository's card; none when it has no card, or one that cannot be read."""
    from huggingface_hub import RepoCard

    if "README.md" not in there:
        return []
    try:
        return list(RepoCard.load(repo_id, repo_type=kind, token=token).data.get("tags") or [])
    except (ValueError, TypeError):  # no front matter, or none that is YAML
        return []


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


# ---------------------------------------------------------------- the libraries


def _prepare() -> None:
    """What must be set before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # datasets would ask a host of its own to count
    if os.environ.get("SYNTHMILL_CONNECTED") and "huggingface_hub" not in sys.modules:
        # What the stand-in says must never be found in the cache by a later live run, nor the other way round.
        os.environ["HF_HOME"] = cache = tempfile.mkdtemp(prefix="synthmill-hub-")
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE"):
            os.environ.pop(name, None)  # each would win over HF_HOME
        atexit.register(shutil.rmtree, cache, ignore_errors=True)


def _datasets() -> Any:
    _prepare()
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _shuffle(items: list[str], draw: random.Random) -> None:
    # Only random() is promised to give the same numbers on every version of Python; shuffle() is not.
    for last in range(len(items) - 1, 0, -1):
        other = int(draw.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def _drawn(
    stream: Iterator[tuple[str, dict[str, Any]]], draw: random.Random, size: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stream through a buffer from which the next item is drawn at random."""
    buffer: list[tuple[str, dict[str, Any]]] = []
    for item in stream:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draw.random() * size)
        buffer[place], item = item, buffer[place]
        yield item
    while buffer:
        yield buffer.pop(int(draw.random() * len(buffer)))


@contextmanager
def _explained(repo_id: str, revision: str, kind: Kind = "dataset") -> Iterator[None]:
    """Turn what the libraries raise into errors that say what to do."""
    import httpx2
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError:
        raise _gated(repo_id, kind) from None
    except hub.RevisionNotFoundError:
        raise _no_revision(repo_id, revision, kind) from None
    except hub.RepositoryNotFoundError:
        raise _missing(repo_id, kind) from None
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, httpx2.HTTPError, ConnectionError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code == 401:
            raise KeyMissingError(
                f"the Hub refuses the token in HF_TOKEN when asked for {repo_id}",
                "put a valid read token in .env; to push, one that may write",
            ) from None
        if response is not None and response.status_code == 403:
            raise KeyMissingError(
                f"the owner of HF_TOKEN may not do this with {kind} {repo_id}: {_told(error)}",
                "put a token with the role write of somebody who may into .env, or give another name",
            ) from None
        if response is not None and response.status_code == 412:
            raise ProviderError(
                f"{kind} {repo_id} got another commit meanwhile", "see who writes to it, then run the same command"
            ) from None
        raise _unreachable(repo_id, error) from None
    except Exception as error:
        if kind != "dataset" or (told := _dataset_error(error, repo_id, revision)) is None:
            raise
        raise told from None


def _dataset_error(error: Exception, repo_id: str, revision: str) -> Exception | None:
    """The error to raise for one of ``datasets``; ``None`` for one it does not know.

    The library has one class for several causes, so the cause is read from the message.
    """
    from datasets import exceptions

    text = str(error)
    if isinstance(error, exceptions.DatasetNotFoundError):
        if "gated" in text:
            return _gated(repo_id, "dataset")
        return (
            _no_revision(repo_id, revision, "dataset") if text.startswith("Revision") else _missing(repo_id, "dataset")
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return SettingsError(
            f"{repo_id} is a data set script, which the datasets library does not run any more",
            'read its parquet conversion: revision = "refs/convert/parquet" and data_dir = "<config>/partial-train" '
            "(or <config>/train), or give data_files",
        )
    if isinstance(error, ValueError) and "BuilderConfig" in text:
        return SettingsError(f"{repo_id}: {_first_line(error)}", "set config to one of those")
    if isinstance(error, (FileNotFoundError, exceptions.DatasetsError)):
        return SettingsError(
            f"{repo_id} at {revision}: no readable data there: {_first_line(error)}",
            "correct config, data_dir or data_files: the data set's page lists its files",
        )
    return None


def _page(repo_id: str, kind: Kind) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def _gated(repo_id: str, kind: Kind) -> KeyMissingError:
    return KeyMissingError(
        f"{repo_id} is gated: its owner wants its terms accepted, and a token that shows who did",
        f"accept the terms at {_page(repo_id, kind)}, put a read token in .env as HF_TOKEN=..., run the same command; "
        "or remove the source",
    )


def _missing(repo_id: str, kind: Kind) -> SettingsError:
    return SettingsError(
        f"there is no {kind} {repo_id} on the Hub, or it is private and HF_TOKEN does not open it",
        "correct the id (org/name), or set HF_TOKEN",
    )


def _no_revision(repo_id: str, revision: str, kind: Kind) -> SettingsError:
    return SettingsError(
        f"{kind} {repo_id} has no revision {revision!r}", f"its history is at {_page(repo_id, kind)}/commits/main"
    )


def _unreachable(repo_id: str, error: Exception) -> ProviderError:
    return ProviderError(
        f"the Hub does not give {repo_id}: {_first_line(error)}", "check the network, then run the same command"
    )


def _told(error: Exception) -> str:
    """The Hub's own words."""
    return str(getattr(error, "server_message", None) or _first_line(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
