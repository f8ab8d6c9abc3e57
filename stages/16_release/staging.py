"""The two repositories as directories, and what a person is told about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
from card_dataset import attribution, dataset_card
from card_model import example_file, model_card
from card_parts import EXAMPLE, Facts

from shared.adapters import MLX_FILES, PEFT_FILES
from shared.receipts import ReleasedRepository, ReleaseReceipt
from shared.stage import sha256_of, shown

RELEASE = "release"
"""The directory beside the receipt."""


def lay_out(directory: Path, adapter: Path, formatted: Path, facts: Facts) -> None:
    """Fill ``directory`` with ``model/`` and ``dataset/``.

    Args:
        adapter: the directory of the training run.
        formatted: 13's ``dataset/``.
    """
    model, mlx, data = directory / "model", directory / "model" / "mlx", directory / "dataset" / "data"
    for place in (mlx, data):
        place.mkdir(parents=True)
    for source, names, place in ((adapter / "adapter", PEFT_FILES, model), (adapter / "adapter_mlx", MLX_FILES, mlx)):
        for name in names:
            shutil.copyfile(source / name, place / name)
    if (adapter / "loss.svg").exists():
        shutil.copyfile(adapter / "loss.svg", model / "loss.svg")
    for path in sorted((formatted / "data").glob("*.parquet")):
        shutil.copyfile(path, data / path.name)
    example = orjson.dumps(example_file(facts.examples), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    (model / EXAMPLE).write_bytes(example)
    (model / "README.md").write_text(model_card(facts), "utf-8")
    (directory / "dataset" / "README.md").write_text(dataset_card(facts, formatted), "utf-8")
    (directory / "dataset" / "ATTRIBUTION.md").write_text(attribution(facts), "utf-8")


def repositories(directory: Path, facts: Facts) -> list[ReleasedRepository]:
    """What is laid out."""
    made: list[ReleasedRepository] = []
    for kind, repo in (("model", facts.repo), ("dataset", facts.dataset_repo)):
        files = sorted(path for path in (directory / kind).rglob("*") if path.is_file())
        hashes = {path.relative_to(directory / kind).as_posix(): sha256_of(path) for path in files}
        made.append(
            ReleasedRepository.model_validate(
                {"kind": kind, "directory": f"{RELEASE}/{kind}", "repo": repo, "files": hashes}
            )
        )
    return made


def told(receipt: ReleaseReceipt, directory: Path) -> str:
    """What was done, and what stands against more, for a terminal."""
    lines = []
    for item in receipt.repositories:
        where = f"{item.url} at {item.commit[:12]}, compared" if item.commit else f"for {item.repo}, not pushed"
        private = "" if item.private is None else ", private" if item.private else ", PUBLIC"
        lines.append(f"{shown(directory / item.kind)}  {len(item.files)} files  {where}{private}")
    if receipt.pushed and receipt.apis == "mock":
        lines.append("a rehearsal: pushed to the stand-in Hub of this machine; nothing was published")
    if receipt.made_by_standin:
        lines.append("made by a stand-in; cannot be pushed to a real Hub")
    lines += [f"{licence} asks for {asked}" for licence, asked in receipt.obligations.items()]
    if receipt.reasons:
        lines.append("what stands against a push:")
        lines += [f"  {reason.code}: {reason.text}" for reason in receipt.reasons]
    elif not receipt.pushed:
        lines.append("nothing stands against a push: PUSH=1 make release HF_REPO=org/name")
    return "\n".join(lines)
