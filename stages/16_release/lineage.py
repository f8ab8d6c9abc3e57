"""Who made what is to be published: the reports and receipts of every stage, and of the adapter that wrote.

Stages 01 to 13 leave reports in ``data/<run>/<track>``, 14 and 15 beside their receipts in ``models/<run>/<track>``.
The adapter that 03 wrote with may be of an earlier run: then that run is part of the lineage, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from shared.receipts import EvaluateReceipt, TrainReceipt, read_train_receipt
from shared.stage import ROOT, shown

TRAINED = "14_train.json"


@dataclass(frozen=True)
class Link:
    """One stage of one run.

    Attributes:
        name: ``trial/compression/02_merge``.
        apis: ``mock`` (the stand-in answered), ``live``, or ``""`` when its report does not say.
        planned, kept: its account.
        inputs, output: SHA-256 by path, as the stage saw them.
        summary: what it said about itself.
    """

    name: str
    apis: str
    planned: int
    kept: int
    inputs: dict[str, str]
    output: dict[str, str]
    summary: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.name.rpartition("/")[2]


def lineage(data: Path, models: Path) -> list[Link]:
    """The links of a run and of the runs before it, the run's own first and in stage order.

    Args:
        data, models: ``data/<run>/<track>`` and ``models/<run>/<track>``.
    """
    links: list[Link] = []
    seen: set[Path] = set()
    waiting = [(data, models)]
    while waiting:
        at, made = waiting.pop(0)
        if at.resolve() in seen:
            continue
        seen.add(at.resolve())
        for path, report in [*_reports(at), *_reports(made)]:
            links.append(_link(path, report))
            adapter = _adapter_of(report)
            if adapter is not None:
                receipt, where = adapter
                links.append(of_receipt(receipt))
                waiting.append(((ROOT / receipt.data.path).parent, where))
    return links


def of_receipt(receipt: TrainReceipt | EvaluateReceipt) -> Link:
    """The link that a receipt is, whatever the report beside it says."""
    counts = receipt.counts
    return Link(f"{receipt.run}/{receipt.track}/{receipt.stage}", receipt.apis, counts.planned, counts.kept, {}, {}, {})


def broken(links: list[Link]) -> Iterator[str]:
    """Where a stage read another version of a file than the stage before it left."""
    left = {path: (link.name, sha) for link in links for path, sha in link.output.items()}
    for link in links:
        for path, sha in link.inputs.items():
            maker, now = left.get(path, ("", sha))
            if now != sha:
                yield f"{link.name} read {path} before {maker} wrote it anew"


def _reports(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(directory.glob("[0-9][0-9]_*.report.json")):
        if path.name.startswith("16_"):
            continue  # our own, of last time
        try:
            report = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError:
            report = {}
        yield path, report if isinstance(report, dict) else {}


def _link(path: Path, report: dict[str, Any]) -> Link:
    name = f"{path.parent.parent.name}/{path.parent.name}/{path.name.removesuffix('.report.json')}"
    counts = report.get("counts") or {}
    account = int(counts.get("planned", 0)), int(counts.get("kept", 0))
    parts = (report.get(key) or {} for key in ("inputs", "output", "summary"))
    return Link(name, str(report.get("apis", "")), *account, *parts)


def _adapter_of(report: dict[str, Any]) -> tuple[TrainReceipt, Path] | None:
    """The receipt of the adapter that 03 wrote with, and the directory ``models/<run>/<track>`` it lies in."""
    settings = report.get("settings") or {}
    used = settings.get(settings.get("generator", ""))
    if report.get("stage") != "03_compress" or not isinstance(used, dict):
        return None
    place = used.get("adapter")
    if not place or used.get("adapter_revision"):  # what is pinned on the Hub says itself what it was made of
        return None
    for directory in (ROOT / place, (ROOT / place).resolve().parent):
        if (directory / TRAINED).exists():
            receipt, _ = read_train_receipt(directory / TRAINED)
            return receipt, directory.resolve().parent
    return None


def missing(links: list[Link], data: Path) -> str:
    """What must be known of the run itself and is not; ``""`` when all is."""
    own = {link.stage for link in links if link.name.startswith(f"{data.parent.name}/{data.name}/")}
    if "13_format" not in own or "14_train" not in own or len(own & {"01_acquire", "05_extract_qa", "08_pattern"}) != 1:
        return f"{shown(data)} lacks reports of the stages that made it; there are {', '.join(sorted(own)) or 'none'}"
    return ", ".join(link.name for link in links if not link.apis)
