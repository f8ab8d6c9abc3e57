"""What 15 writes: a line for every answer, and the receipt."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from contestants import Writer
from figures import figures
from scoring import Case, Score

from shared.generate import Outcome
from shared.llm.catalogue import NANO
from shared.receipts import Contestant, Counts, EvaluateReceipt, Gate, Metrics, TrainingData, TrainReceipt, closing
from shared.stage import Stage, sha256_of, shown

PACKAGES = ("mlx", "mlx-lm", "numpy", "pydantic", "tokenizers", "transformers")


def contestant_of(name: str, writer: Writer | None, scores: Sequence[Score], params: Any) -> Contestant:
    """A contestant with its figures; ``writer`` is None for a rule."""
    metrics, by_group = figures(scores, params.resamples, params.seed)
    return Contestant(
        name=name,
        kind="rule" if writer is None else "adapter" if writer.adapter else "model",
        model=writer.model if writer else "",
        adapter=writer.adapter if writer else "",
        metrics=metrics,
        by_group=by_group,
    )


def answer_line(case: Case, name: str, outcome: Outcome, score: Score) -> bytes:
    """One line of ``15_evaluate.answers.jsonl``."""
    why = {"problem": score.problem, "detail": score.detail} if score.problem else {}
    line = {"id": case.example.id, "contestant": name, "text": outcome.text, **why, "figures": score.values}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def ever_paid_usd(stage: Stage[Any]) -> float:
    """What the panel was ever paid for evaluating this track of this run; what is stored is not paid again."""
    query = "SELECT SUM(nano) AS nano FROM ledger WHERE run = ? AND track = ? AND stage = ?"
    rows = stage.models.store.rows(query, stage.run, stage.track, stage.name)
    return round((rows[0]["nano"] or 0) / NANO, 9)


def versions() -> dict[str, str]:
    """Of the packages that decide figures, as far as they are installed; which of them a run loads hangs on what is
    stored already, so loaded ones would not do."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def receipt_of(
    stage: Stage[Any],
    trained: TrainReceipt,
    trained_at: Path,
    splits: Mapping[str, int],
    contestants: tuple[Contestant, ...],
    changes: dict[str, Metrics],
    gates: tuple[Gate, ...],
    started: float,
) -> EvaluateReceipt:
    """All that is known. ``splits`` are the examples read; ``started`` is of ``time.monotonic()``."""
    assert stage.input is not None  # it has been read
    counted = {"train": splits["train"], "valid": splits["valid"], "test": stage.kept}
    return EvaluateReceipt(
        run=stage.run,
        track=stage.track,
        run_id=trained.run_id,
        train_sha256=sha256_of(trained_at),
        apis=stage.apis,
        data=TrainingData(path=shown(stage.input), sha256=trained.data.sha256, limit=stage.limit, **counted),
        settings=stage.params.model_dump(mode="json"),
        counts=Counts.of(stage),
        contestants=contestants,
        differences=changes,
        gates=gates,
        passed=all(gate.passed for gate in gates),
        **closing(ever_paid_usd(stage), time.monotonic() - started, versions()),
    )
