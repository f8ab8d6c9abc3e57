"""What the stages after 13 say they made: a JSON file in ``models/<run>/<track>/``, and the only contract between them.

::

    receipt, directory = read_train_receipt(Path("models/trial/compression/14_train.json"))
    directory / "adapter_mlx"                    # the checkpoint with the lowest validation loss, as mlx-lm loads it
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import orjson
from pydantic import ValidationError

from shared.errors import MixedApisError, SettingsError
from shared.records import Part
from shared.stage import ROOT, git_revision, packages, shown

if TYPE_CHECKING:
    from shared.stage import Stage

R = TypeVar("R", bound="Receipt")


class Counts(Part):
    """The account of a stage: planned = kept + rejected; ``reasons`` count the rejects."""

    planned: int
    kept: int
    rejected: int
    reasons: dict[str, int]

    @classmethod
    def of(cls, stage: Stage[Any]) -> Counts:
        """That of a stage whose last record is decided."""
        reasons = dict(sorted(stage.rejected.items()))
        return cls(planned=stage.planned, kept=stage.kept, rejected=stage.rejected.total(), reasons=reasons)


class TrainingData(Part):
    """What was trained on.

    Attributes:
        path: the records, ``data/<run>/<track>/13_format.jsonl``; ``sha256`` is that file's.
        limit: at most this many records were read; 0 = all.
        train, valid: examples used of these splits; ``test`` is how many there were and were not looked at.
    """

    path: str
    sha256: str
    limit: int
    train: int
    valid: int
    test: int


class BaseModelUsed(Part):
    """The model an adapter was trained on.

    Attributes:
        model: a directory, relative to the repository, or ``org/name@<commit>``.
        identity: what must be the same for the adapter to fit: that, or a hash of the directory's files.
        name: what the PEFT adapter calls it.
    """

    model: str
    identity: str
    name: str


class Checkpoint(Part):
    """Weights that were kept; ``directory`` is relative to the run's and holds them in MLX form."""

    name: Literal["best", "last"]
    step: int
    valid_loss: float | None
    directory: str


class AdapterMade(Part):
    """The adapter in ``adapter/`` (PEFT) and ``adapter_mlx/``: y = W·x + scale · B·A·x."""

    rank: int
    scale: float
    modules: tuple[str, ...]
    tensors: int


class Receipt(Part):
    """What every receipt ends with, and how it is written.

    Attributes:
        cost_usd: dollars; each receipt says of what.
        seconds: that it took.
        finished_at: UTC, ISO 8601.
        git: commit of the code, ``-dirty`` behind it where that was changed.
        packages: versions of the packages that were loaded.
    """

    cost_usd: float
    seconds: float
    finished_at: str
    git: str
    python: str
    platform: str
    packages: dict[str, str]

    def line(self) -> bytes:
        """The receipt as it is on disk, these fields last."""
        values = self.model_dump(mode="json")
        last = {name: values.pop(name) for name in Receipt.model_fields}
        return orjson.dumps(values | last, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def closing(cost_usd: float, seconds: float, versions: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields of :class:`Receipt` for one that is written now; ``versions`` in the place of the packages loaded."""
    return {
        "cost_usd": cost_usd,
        "seconds": round(seconds, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages() if versions is None else versions,
    }


class TrainReceipt(Receipt):
    """14 train.

    Attributes:
        run_id: name of the run's directory, a hash of data, settings and base model.
        apis: who made the data: ``mock`` (the stand-in) or ``live``.
        settings: those of the backend used.
        steps, trained_tokens: optimizer steps, and the assistant tokens they saw.
        train_loss: mean of the last tenth of the steps; ``valid_loss_before`` is the base model's. Nats a token.
        files: SHA-256 of every other file of the run's directory, by relative path.
        cost_usd: what a training service charged; 0 on this machine.
        seconds: of training, over all the processes it took.
    """

    stage: Literal["14_train"] = "14_train"
    run: str
    track: str
    run_id: str
    backend: Literal["mlx", "tinker"]
    apis: str
    data: TrainingData
    base_model: BaseModelUsed
    settings: dict[str, Any]
    counts: Counts
    steps: int
    trained_tokens: int
    train_loss: float
    valid_loss_before: float | None
    checkpoints: tuple[Checkpoint, ...]
    adapter: AdapterMade
    files: dict[str, str]


class Interval(Part):
    """A figure with its 95 % bootstrap interval, over ``n`` records; ``low`` and ``high`` are ``value`` where n < 2."""

    value: float
    low: float
    high: float
    n: int


Metrics = dict[str, Interval]
"""Figures by name: ``pass_rate``, ``compression_ratio``, ``mean_equivalence``, ``min_equivalence``, ..."""


class Contestant(Part):
    """Who was measured on the test split.

    Attributes:
        name: ``candidate``, ``baseline``, ``base``, ``truncation``, ``stop_words``.
        kind: an adapter on a model, a model alone, or a rule that needs none.
        model, adapter: specs as :mod:`shared.local_models` has them; ``""`` for none.
        metrics: over all records, then by domain (or pattern) in ``by_group``.
    """

    name: str
    kind: Literal["adapter", "model", "rule"]
    model: str
    adapter: str
    metrics: Metrics
    by_group: dict[str, Metrics]


class Gate(Part):
    """A target of the settings: ``low <= figure of the candidate <= high``; ``None`` is no bound.

    ``metric`` names a figure of the candidate, or a difference: ``mean_equivalence_minus_baseline``.
    """

    metric: str
    low: float | None
    high: float | None
    value: float
    passed: bool


class EvaluateReceipt(Receipt):
    """15 evaluate.

    Attributes:
        run_id: of the candidate; ``train_sha256`` is its receipt's file, ``models/<run>/<track>/14_train.json``.
        apis: who answered: ``mock`` (the stand-in) or ``live``.
        data: what was read; its ``test`` counts the examples measured on.
        settings: all of the stage's.
        contestants: the candidate first.
        differences: candidate minus the other, paired by record, by the other's name and metric.
        passed: whether every gate is.
        cost_usd: what the panel was ever paid for evaluating this run and track; stored answers cost once.
        packages: versions of those that decide the figures.
    """

    stage: Literal["15_evaluate"] = "15_evaluate"
    run: str
    track: str
    run_id: str
    train_sha256: str
    apis: str
    data: TrainingData
    settings: dict[str, Any]
    counts: Counts
    contestants: tuple[Contestant, ...]
    differences: dict[str, Metrics]
    gates: tuple[Gate, ...]
    passed: bool


def read_train_receipt(path: Path) -> tuple[TrainReceipt, Path]:
    """The receipt at ``models/<run>/<track>/14_train.json``, and the directory of the run it is about.

    Raises:
        SettingsError: there is none, or it is not readable as one.
    """
    receipt = _read(path, TrainReceipt, "training", "make stage14")
    return receipt, path.parent / receipt.run_id


def read_evaluate_receipt(path: Path) -> EvaluateReceipt:
    """The receipt at ``models/<run>/<track>/15_evaluate.json``.

    Raises:
        SettingsError: there is none, or it is not readable as one.
    """
    return _read(path, EvaluateReceipt, "an evaluation", "make stage15")


def _read(path: Path, kind: type[R], what: str, mend: str) -> R:
    try:
        return kind.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        raise SettingsError(f"no receipt of {what} at {shown(path)}", mend) from None
    except (orjson.JSONDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"{shown(path)} is no receipt of {what}: {first}", mend) from None


class Reason(Part):
    """Why something is not published.

    Attributes:
        code: short and stable (``gate_failed``, ``standin``, ``licence``).
        blocks: ``staging``, so that nothing is even laid out; ``push``, to any Hub; ``real_hub``, to any but the
            stand-in's.
        text: for a person: the figures, the file, what to do.
    """

    code: str
    blocks: Literal["staging", "push", "real_hub"]
    text: str


class ReleasedRepository(Part):
    """A repository that was laid out, and pushed when ``commit`` says where.

    Attributes:
        directory: relative to the receipt's.
        repo: ``org/name`` on the Hub; a placeholder when nobody has said.
        files: SHA-256 of every file, by path in the repository.
        commit: of the push, downloaded again and found equal; ``None`` when it was staged only.
        private: whether it is, on the Hub.
        url: its page, ``""`` when it was staged only.
    """

    kind: Literal["model", "dataset"]
    directory: str
    repo: str
    files: dict[str, str]
    commit: str | None = None
    private: bool | None = None
    url: str = ""


class ReleaseReceipt(Receipt):
    """16 release.

    Attributes:
        run_id: of the adapter; ``train_sha256``, ``evaluate_sha256`` are the receipts', ``data_sha256`` the records'.
        apis: how the command was run; ``made_by_standin`` is about all that was used, and bars every real Hub.
        reasons: all that stands against a push, whether or not this was one.
        licences: examples by SPDX expression; ``obligations`` says what some of them ask of whoever publishes.
        repositories: the model's, then the data set's.
        pushed: whether they are on the Hub at ``endpoint``.
        cost_usd: ever paid for this run and track: data, training and evaluation.
    """

    stage: Literal["16_release"] = "16_release"
    run: str
    track: str
    run_id: str
    train_sha256: str
    evaluate_sha256: str
    data_sha256: str
    apis: str
    made_by_standin: bool
    reasons: tuple[Reason, ...]
    licences: dict[str, int]
    obligations: dict[str, str]
    repositories: tuple[ReleasedRepository, ...]
    pushed: bool
    endpoint: str
    settings: dict[str, Any]
    counts: Counts


def same_apis(adapter: str, apis: str) -> None:
    """Let only an adapter pass that was not trained on the other kind of data; what no receipt lies beside may.

    Args:
        adapter: a directory, relative to the repository, or ``""``; one in a run of 14 has its receipt beside it.

    Raises:
        MixedApisError: the stand-in made its data and this is live, or the other way round.
    """
    receipt = (ROOT / adapter).resolve().parent / "14_train.json"
    if not adapter or not receipt.is_file():
        return
    made = str(orjson.loads(receipt.read_bytes()).get("apis", apis))
    if made != apis:
        raise MixedApisError(
            f"the adapter {adapter} was trained on data of APIS={made}; this command has APIS={apis}. They never mix.",
            f"make clean RUN={receipt.parents[2].name}, then make {receipt.parents[2].name} APIS={apis}; "
            f"or run with APIS={made}",
        )
