"""An installed distribution, read through its metadata and never imported: its code, or its long description.

The wheel's own record of hashes pins the bytes: a file that was edited after the installation is left out.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
from importlib.metadata import Distribution, PackagePath
from pathlib import Path
from typing import Literal, cast

import licences
from extract import language_of, spread
from prose import Sizes, passages
from pydantic import Field

from shared.errors import SettingsError
from shared.records import Domain
from sources import Acquire, Candidate, Candidates, CodeSource, from_file, is_wanted

_CLASSIFIER = "License :: OSI Approved :: "


class Package(CodeSource):
    """``kind = "package"``.

    Attributes:
        package: name of the distribution, as it is installed.
        version: the version that must be installed; for the trial this is the locked one.
        domain: ``code`` reads the files, ``prose`` the long description.
        sizes: for prose, how long a passage is.
    """

    kind: Literal["package"]
    domain: Domain = "code"
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(min_length=1)
    sizes: Sizes = Sizes()


def read(source: Package, acquire: Acquire) -> Candidates:
    """The distribution's candidates, files in an order drawn by the seed.

    Raises:
        SettingsError: it is not installed, or another version is.
    """
    try:
        installed = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise SettingsError(
            f"source {source.name!r}: package {source.package!r} is not installed", "make setup, or remove the source"
        ) from None
    if installed.version != source.version:
        raise SettingsError(
            f"source {source.name!r}: {source.package} {installed.version} is installed, expected {source.version}",
            "make setup, or correct version in the settings",
        )
    name = installed.metadata["Name"]
    licence = licence_of(installed)
    acquire.note(source, version=installed.version, licence=licence)
    prefix = f"{name}=={installed.version}"
    if source.domain == "prose":
        return _description(source, installed, prefix, licence)
    return _files(source, acquire, installed, prefix, licence)


def _files(source: Package, acquire: Acquire, installed: Distribution, prefix: str, licence: str) -> Candidates:
    files = {path.as_posix(): path for path in installed.files or () if ".." not in path.parts}
    for path in spread((path for path in files if is_wanted(path, source.include)), acquire.seed):
        origin = f"{prefix}:{path}"
        data, problem = _checked(files[path], acquire.limits.max_file_bytes)
        if problem:
            yield Candidate(origin, reason=problem[0], detail=problem[1])
            continue
        language = cast(str, language_of(path))
        yield from from_file(path, data, language, origin, licence, source, acquire)


def _checked(path: PackagePath, most: int) -> tuple[bytes, tuple[str, str] | None]:
    """The bytes of an installed file when they are those of the wheel, otherwise why not.

    The hash is what makes a symbolic link harmless, and some installers link every file to their cache.
    """
    if path.hash is None or path.hash.mode != "sha256":
        return b"", ("unverified", "the wheel's record has no SHA-256 of it")
    try:
        with open(os.fspath(path.locate()), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        return b"", ("unreadable", error.strerror or str(error))
    if len(data) > most:
        return b"", ("file_too_large", f"more than {most:,} bytes")
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")
    if digest != path.hash.value:
        return b"", ("unverified", "it was changed after the installation")
    return data, None


def _description(source: Package, installed: Distribution, prefix: str, licence: str) -> Candidates:
    text = _stated(installed, "Description")
    for piece in passages(text, source.sizes):
        yield Candidate(
            origin=f"{prefix}:description#L{piece.first}-L{piece.last}",
            text=piece.text,
            language="en",
            category="readme",
            licence=licence,
            reason=piece.reason,
            detail=piece.detail,
        )


def licence_of(installed: Distribution) -> str:
    """SPDX expression from License-Expression, then License, then the classifiers, then the licence files' text."""
    if expression := _stated(installed, "License-Expression"):
        return expression  # SPDX by definition, and the last word even where a part of it is not in our table
    if (known := licences.of_name(_stated(installed, "License"))) != licences.UNKNOWN:
        return known
    classifiers = [
        value.removeprefix(_CLASSIFIER)
        for value in installed.metadata.get_all("Classifier") or ()
        if value.startswith(_CLASSIFIER)
    ]
    if (known := licences.of_names(classifiers)) != licences.UNKNOWN:
        return known
    texts = {"License": _stated(installed, "License")}
    for path in installed.files or ():
        if any(part.endswith(".dist-info") for part in path.parts) and licences.is_licence_file(path.name):
            data, problem = _checked(path, 200_000)
            texts[path.as_posix()] = "" if problem else data.decode("utf-8", "ignore")
    return licences.of_files({Path(name).name: text for name, text in texts.items()})


def _stated(installed: Distribution, field: str) -> str:
    """A field of the metadata, the long description as ``Description`` too; "" when it is not there."""
    values = installed.metadata.get_all(field)
    return str(values[0]) if values else ""
