"""A model or adapter that runs on this machine: found here or pinned on the Hub, identified by content, loaded by MLX.

A *spec* is either a directory, relative to the repository, or ``org/name@<commit>`` on the Hub::

    spec = pinned("mlx.model", settings.model, settings.revision, "mlx.revision")
    key = model_identity(spec)                      # changes when what the model writes may change
    model, tokenizer = load(spec, "", stage.services, needed_by="backend = 'mlx'", otherwise="...")
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared import hub
from shared.errors import LeftOutError, SettingsError, SynthmillError
from shared.records import content_id
from shared.stage import ROOT, sha256_of

COMMIT = r"^([0-9a-f]{40})?$"
"""Pattern of a setting that holds a commit hash, or nothing for what is on this machine."""
ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json")
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Suffixes of the files that decide what a model writes; a changed README does not cost a night."""


# ---------------------------------------------------------------- where it is


def pinned(key: str, place: str, revision: str, revision_key: str) -> str:
    """``place`` when it is here, ``org/name@<commit>`` when ``revision`` says it is on the Hub.

    A path is relative to the repository. ``key`` and ``revision_key`` are the settings' names, for the message.

    Raises:
        SettingsError: no revision is given and there is no such path.
    """
    if revision:
        return f"{place}@{revision}"
    if (ROOT / place).exists():
        return place
    raise SettingsError(
        f"{key} = {place!r} is not on this machine, and {revision_key} is empty: what is on the Hub must be "
        "pinned to a commit, so that it stays the same",
        f"set {revision_key} to what this prints: "
        f"python -c \"import huggingface_hub as h; print(h.model_info('{place}').sha)\"",
    )


def pinned_model(key: str, place: str, revision: str, revision_key: str) -> str:
    """:func:`pinned`, for a model: what is here must be a directory.

    Raises:
        SettingsError: also when it is a file.
    """
    spec = pinned(key, place, revision, revision_key)
    if not on_hub(spec) and not place_of(spec).is_dir():
        raise SettingsError(f"{key} = {spec!r} is a file", "give the directory in MLX format that holds it")
    return spec


def local_adapter(place: str, mend: str) -> str:
    """``place`` when it holds an adapter in MLX form; ``mend`` is what to do when it does not.

    Raises:
        SettingsError: it does not.
    """
    missing = [name for name in ADAPTER_FILES if not (place_of(place) / name).is_file()]
    if missing:
        raise SettingsError(
            f"no adapter at {place!r}: expected a directory with {' and '.join(ADAPTER_FILES)}, "
            f"{'there is no such directory' if not place_of(place).is_dir() else f'{missing[0]} is missing'}",
            mend,
        )
    return place


def on_hub(spec: str) -> bool:
    """Whether a spec names a commit of a repository."""
    return "@" in spec and not place_of(spec).is_dir()


def place_of(spec: str) -> Path:
    """The path of a spec that is on this machine."""
    return ROOT / spec


def directory_of(spec: str, services: Callable[[], None], files: list[str] | None = None) -> Path:
    """The local directory of a spec; downloaded first when it is on the Hub.

    Args:
        services: called before the Hub client is imported (:meth:`shared.stage.Stage.services`).
        files: shell patterns of the files needed; ``None`` = all.

    Raises:
        SettingsError: the Hub does not give the files.
    """
    if not on_hub(spec):
        return place_of(spec)
    services()
    repository, _, revision = spec.partition("@")
    try:
        return hub.download(repository, revision, files or ["*"])
    except SynthmillError as error:
        raise SettingsError(
            f"{spec} cannot be had from the Hub: {error.what}",
            f"{error.mend}; offline, give a local directory",
        ) from error


# ---------------------------------------------------------------- what it is


def model_identity(spec: str) -> str:
    """``org/name@commit`` as it is; for a directory, a hash of the files that decide what the model writes."""
    if on_hub(spec):
        return spec
    return _files_identity(p for p in sorted(place_of(spec).iterdir()) if p.is_file() and p.suffix in MODEL_FILES)


def adapter_identity(spec: str) -> str:
    """The same for an adapter: only its final weights and configuration count, not its checkpoints. ``""`` for none."""
    if not spec or on_hub(spec):
        return spec
    return _files_identity(place_of(spec) / name for name in ADAPTER_FILES)


def _files_identity(paths: Iterable[Path]) -> str:
    return content_id(*(part for path in paths for part in (path.name, sha256_of(path))))


# ---------------------------------------------------------------- MLX


def leave_out_without_mlx(what: str) -> None:
    """Stop without an error where ``make trial`` set ``WITHOUT_MLX=skip`` and mlx-lm is not installed.

    Args:
        what: is left out, for the message.

    Raises:
        LeftOutError: it is so.
    """
    if mlx_is_spared():
        raise LeftOutError(
            f"{what}, because mlx-lm is not installed here: it runs on Apple silicon (macOS 14 or later) "
            "and on Linux (glibc 2.35 or later). The data is made all the same.",
            "make trial on such a machine (copy data/ there and nothing is made or paid again)",
        )


def mlx_is_spared() -> bool:
    """Whether mlx-lm is not installed, and whoever started us wants to go on without it."""
    return os.environ.get("WITHOUT_MLX") == "skip" and importlib.util.find_spec("mlx_lm") is None


def require_mlx(needed_by: str, otherwise: str) -> None:
    """Stop where mlx-lm is not installed.

    Args:
        needed_by: the setting that asks for it, for the message.
        otherwise: what to set instead, for the message.

    Raises:
        SettingsError: it is not.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise SettingsError(
            f"{needed_by} needs mlx-lm, which is not installed in this environment",
            f"make setup   (Apple silicon or Linux), or {otherwise}",
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that there is no PyTorch


def load(spec: str, adapter: str, services: Callable[[], None], *, needed_by: str, otherwise: str) -> tuple[Any, Any]:
    """Model and tokenizer, with an adapter unless that is ``""``; see :func:`require_mlx` for the last two.

    Raises:
        SettingsError: mlx-lm is not installed, the Hub does not give the files, or they are no model and adapter.
    """
    require_mlx(needed_by, otherwise)
    model_directory = directory_of(spec, services)
    adapter_directory = directory_of(adapter, services, list(ADAPTER_FILES)) if adapter else None
    from mlx_lm import load as mlx_load

    try:
        loaded = mlx_load(str(model_directory), adapter_path=str(adapter_directory) if adapter_directory else None)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise SettingsError(
            f"mlx-lm cannot load {spec}" + (f" with adapter {adapter}: {error}" if adapter else f": {error}"),
            "check that the adapter was trained on this model" if adapter else "give a model in MLX format",
        ) from error
    return loaded[0], loaded[1]


def load_tokenizer(spec: str, services: Callable[[], None], *, needed_by: str, otherwise: str) -> Any:
    """The tokenizer alone, as :func:`load` gives it; the weights are not read.

    Raises:
        SettingsError: mlx-lm is not installed, the Hub does not give the files, or they hold no tokenizer.
    """
    require_mlx(needed_by, otherwise)
    directory = directory_of(spec, services)
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer

    try:
        ends = load_config(directory).get("eos_token_id")
        return mlx_load_tokenizer(directory, eos_token_ids=ends if isinstance(ends, list | None) else [ends])
    except (ValueError, KeyError, OSError) as error:
        raise SettingsError(
            f"mlx-lm cannot load the tokenizer of {spec}: {error}", "give a model in MLX format"
        ) from error
