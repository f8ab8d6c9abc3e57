"""14 train: Example -> a LoRA adapter, in PEFT and MLX form, and a receipt of what made it.

Trains on the answers of the ``train`` split, measures on ``valid``, never looks at ``test``. Left out, with the reason:
conversations longer than ``max_length``, which would be trained without their end. Backend ``mlx``: LoRA on this
machine, no money; the trial's tiny model in under a minute, a 4B model on a Mac in hours. Backend ``tinker``: an 8B
model at a training service, some dollars, shown and held against ``BUDGET_USD`` first. Written, the receipt last:

    models/<run>/<track>/<run-id>/       adapter/ (PEFT), adapter_mlx/, checkpoints/last/, loss.jsonl, loss.svg and
                                         14_train.json
    models/<run>/<track>/latest          -> <run-id>
    models/<run>/<track>/14_train.json   a copy of the receipt

The run-id is a hash of data, settings and base model. A killed run goes on behind its last saved step; one that is
finished is not trained again unless ``RETRAIN=1``, as ``make stage14`` says.

    python stages/14_train/main.py --in data/trial/compression/13_format.jsonl \\
        --out models/trial/compression/14_train.json --config stages/14_train/trial.toml --track compression
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import orjson
from backends import Backend, Trained, Work
from losses import draw, recent
from mlx_backend import MlxBackend, MlxTraining
from pydantic import Field
from rendering import Row
from run_directory import RECEIPT, RunDirectory
from tinker_backend import TinkerBackend
from tinker_journal import Ledger
from tinker_steps import PROMPT_TOKENS, TinkerTraining

from shared.errors import MixedApisError, SettingsError
from shared.llm.models import budget_from_env
from shared.llm.volume import Calls, Volume
from shared.local_models import leave_out_without_mlx
from shared.receipts import AdapterMade, BaseModelUsed, Counts, TrainingData, TrainReceipt, closing, read_train_receipt
from shared.records import Domain, Example, Split, content_id
from shared.stage import Settings, Stage, atomic, run, sha256_of, shown


class Params(Settings):
    """See the comments in the TOML."""

    backend: Literal["mlx", "tinker"]
    max_length: int = Field(default=2048, ge=16)
    seed: int = 0
    mlx: MlxTraining | None = None
    tinker: TinkerTraining | None = None

    def used(self) -> dict[str, Any]:
        """What the result depends on: the backend's own table and what all share."""
        return self.model_dump(mode="json", include={"backend", "max_length", "seed", self.backend})


def backend_of(params: Params, services: Callable[[], None], ledger: Callable[[], Ledger] | None = None) -> Backend:
    """The backend that the settings choose, its settings checked.

    Raises:
        SettingsError: it has no table, or that does not hold.
    """
    if params.backend == "mlx" and params.mlx:
        return MlxBackend(params.mlx, params.seed, services)
    if params.backend == "tinker" and params.tinker:
        return TinkerBackend(params.tinker, params.max_length, params.seed, services, ledger)
    raise SettingsError(f"backend = {params.backend!r}, but there is no table [{params.backend}]", "add it")


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 14 pays for these records; nothing on this machine."""
    if params.backend != "tinker" or params.tinker is None:
        return []
    records = sum(volume.records for volume in volumes.values())
    tokens = sum(v.records * (PROMPT_TOKENS + v.tokens + v.compressed) for v in volumes.values())
    return params.tinker.calls(records, tokens)


# ---------------------------------------------------------------- the data


def made_by_the_same_apis(stage: Stage[Params]) -> None:
    """Let only an input pass whose report says that it was made as this command would.

    Raises:
        SettingsError: there is no such report, so nobody could say later what the adapter was trained on.
        MixedApisError: the stand-in made it and this is live, or the other way round.
    """
    if stage.input is None or not stage.input.exists():
        return  # reading it will say so
    path = stage.input.with_name(f"{stage.input.stem}.report.json")
    try:
        made = str(orjson.loads(path.read_bytes())["apis"])
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError):
        raise SettingsError(f"{shown(path)} does not say who made {shown(stage.input)}", "make stage13") from None
    if made != stage.apis:
        raise MixedApisError(
            f"{shown(stage.input)} was made with APIS={made}; this command has APIS={stage.apis}. They never mix.",
            f"run with APIS={made}",
        )


def rows_to_use(stage: Stage[Params], backend: Backend) -> tuple[dict[Split, list[Row]], dict[Split, int]]:
    """The rows of every split and of how many examples they are; what cannot be trained on is rejected."""
    renderer, longest = backend.renderer(), stage.params.max_length
    rows: dict[Split, list[Row]] = {"train": [], "valid": [], "test": []}
    examples = dict.fromkeys(rows, 0)
    for example in stage.read(Example, seeds=True):
        rendered = renderer.rows(example)  # those of test too: 15 asks for them with the same template
        if example.split == "test":
            examples["test"] += 1
            continue
        stage.plan()
        length = max((len(row.tokens) for row in rendered.rows), default=0)
        if rendered.problem:
            stage.reject(example, rendered.problem, rendered.detail)
        elif length > longest:
            stage.reject(example, "too_long", f"{length:,} tokens; max_length is {longest:,}")
        else:
            rows[example.split] += rendered.rows
            examples[example.split] += 1
            stage.keep(example)
    return rows, examples


# ---------------------------------------------------------------- the run


def run_id_of(params: Params, data: TrainingData, base: BaseModelUsed) -> str:
    """16 hex digits over data, settings and base model: the same inputs have the same id."""
    settings = orjson.dumps(params.used(), option=orjson.OPT_SORT_KEYS).decode()
    return content_id(data.sha256, str(data.limit), settings, base.identity)[:16]


def receipt_of(
    stage: Stage[Params], run_id: str, data: TrainingData, base: BaseModelUsed, trained: Trained, files: dict[str, str]
) -> TrainReceipt:
    """All that is known of a run whose files are written."""
    before = [loss.loss for loss in trained.losses if (loss.split, loss.step) == ("valid", 0)]
    adapter = trained.adapter
    return TrainReceipt(
        run=stage.run,
        track=stage.track,
        run_id=run_id,
        backend=stage.params.backend,
        apis=stage.apis,
        data=data,
        base_model=base,
        settings=stage.params.used(),
        counts=Counts.of(stage),
        steps=trained.steps,
        trained_tokens=trained.trained_tokens,
        train_loss=round(recent([loss for loss in trained.losses if loss.split == "train"]), 6),
        valid_loss_before=before[0] if before else None,
        checkpoints=trained.checkpoints,
        adapter=AdapterMade(rank=adapter.rank, scale=adapter.scale, modules=adapter.modules, tensors=adapter.tensors),
        files=files,
        **closing(trained.cost_usd, trained.seconds),
    )


def main(stage: Stage[Params]) -> None:
    # -- load
    if stage.params.backend == "mlx":
        leave_out_without_mlx("nothing is trained")
    account = (stage.cache, stage.apis, stage.run, stage.track)
    backend = backend_of(stage.params, stage.services, lambda: Ledger(*account, budget_from_env()))
    made_by_the_same_apis(stage)
    rows, examples = rows_to_use(stage, backend)
    if not rows["train"]:
        stage.no_go = "no example of the train split is left to train on"
        return
    assert stage.input is not None  # it has just been read
    data = TrainingData(path=shown(stage.input), sha256=sha256_of(stage.input), limit=stage.limit, **examples)
    base = backend.base
    run_id = run_id_of(stage.params, data, base)
    directory = RunDirectory(stage.output.parent, run_id)

    # -- process
    train = bool(os.environ.get("RETRAIN")) or directory.begun() or not directory.is_whole()
    if train and directory.made():
        directory.finish()
    elif train:
        work = Work(tuple(rows["train"]), tuple(rows["valid"]), directory.part, stage.progress)
        trained = backend.train(work)
        with atomic(directory.part / "loss.svg") as file:
            file.write(draw(trained.losses, f"{stage.run} / {stage.track} / {run_id}").encode())
        directory.finish(receipt_of(stage, run_id, data, base, trained, directory.hashes()))

    # -- save
    receipt, _ = read_train_receipt(directory.final / RECEIPT)
    directory.point("latest")
    stage.write_receipt(receipt.line())
    best = receipt.checkpoints[0]
    stage.summary |= {"run_id": run_id, "trained": train, "checkpoints": [c.model_dump() for c in receipt.checkpoints]}
    loss = f"validation loss {receipt.valid_loss_before} -> {best.valid_loss} at step {best.step} of {receipt.steps}"
    loss = loss if best.valid_loss is not None else f"training loss {receipt.train_loss}, no validation"
    before = "" if train else ", trained before: RETRAIN=1 trains again"
    cost = f"  ${receipt.cost_usd:.4f}" if receipt.cost_usd else ""
    stage.tables.append(f"{shown(directory.final)}  {loss}{cost}  {receipt.seconds:.0f} s{before}")


if __name__ == "__main__":
    run(main, Params, receipt=True)
