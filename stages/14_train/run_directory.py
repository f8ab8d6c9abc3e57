"""The directory of a training run: ``<run-id>.part`` while it is made, ``<run-id>`` once it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from shared.errors import SettingsError
from shared.receipts import TrainReceipt, read_train_receipt
from shared.stage import atomic, replace_dir, sha256_of

RECEIPT = "14_train.json"
STATE = "state"
"""What only a run under way needs; gone when it is finished."""


class RunDirectory:
    """Where a run with this id is made, and where it goes.

    Attributes:
        part: to work in; what a killed process left there is gone on with.
        final: where it is once its receipt is written, which comes last.
    """

    def __init__(self, models: Path, run_id: str) -> None:
        self.part, self.final = models / f"{run_id}.part", models / run_id

    def begun(self) -> bool:
        """Whether a process has been killed while it made this run."""
        return self.part.exists()

    def made(self) -> bool:
        """Whether all is made, and only to be put in its place."""
        return (self.part / RECEIPT).exists()

    def is_whole(self) -> bool:
        """Whether the run is finished and every file of it is as it was."""
        try:
            receipt, _ = read_train_receipt(self.final / RECEIPT)
        except SettingsError:
            return False
        files = receipt.files.items()
        return all((self.final / name).is_file() and sha256_of(self.final / name) == sha for name, sha in files)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files made so far, by relative path."""
        files = sorted(path for path in self.part.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.part)): path for path in files}
        return {name: sha256_of(path) for name, path in names.items() if name.partition("/")[0] != STATE}

    def finish(self, receipt: TrainReceipt | None = None) -> None:
        """Write the receipt, unless it is there, and put all in its place.

        The state goes first: should this be killed, the receipt in ``part`` says that all else is made.
        """
        if receipt:
            with atomic(self.part / RECEIPT) as file:
                file.write(receipt.line())
        shutil.rmtree(self.part / STATE, ignore_errors=True)
        replace_dir(self.part, self.final)

    def point(self, name: str) -> None:
        """Make ``name`` beside the run a relative link to it, or turn one, in one step."""
        link = self.final.with_name(name)
        part = link.with_name(f".{name}.part")
        part.unlink(missing_ok=True)
        part.symlink_to(self.final.name)
        os.replace(part, link)
