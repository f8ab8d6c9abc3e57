"""LoRA on this machine, with mlx-lm's model and our own loop.

mlx-lm's trainer would do, but for what a kill costs: it saves weights alone, so a resumed run starts its step count,
its data order and its optimizer anew. Here the state of a run is one file, replaced as a whole every ``save_every``
steps: adapter, optimizer, the best checkpoint so far and every loss. Nothing else is to be saved, because all chance is
a function of the seed: the first weights, and which rows a step sees. So a killed run ends as one that was left alone,
on the CPU to the last bit.

The loss is the mean over the assistant tokens of a batch. mlx-lm's own also counts one token of padding behind each
row, and its Adam has no bias correction, which makes the first steps three times as long. Its trainer also wires
memory, which can panic the macOS kernel (ml-explore/mlx#3186); this loop does not. Steps are not compiled: on a CPU the
compiler takes 17 s and saves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from backends import Trained, Work, say
from batches import rows_of_step
from losses import Loss, LossLog
from pydantic import Field
from rendering import Renderer, Row

from shared.adapters import LINEARS, MLX_FILES, Base, mlx_config, mlx_to_peft
from shared.errors import SettingsError, SynthmillError
from shared.local_models import COMMIT, directory_of, load, load_tokenizer, model_identity, on_hub, pinned_model
from shared.receipts import BaseModelUsed, Checkpoint
from shared.stage import Settings, atomic, shown

STATE = "state.safetensors"
STATE_FORMAT = "1"
PAD_TO = 32
"""Batches are padded to multiples of this many tokens, so that few different shapes are computed."""
NEEDS = {"needed_by": "backend = 'mlx'", "otherwise": "train on a machine that has it"}

Arrays = dict[str, Any]
"""mlx or numpy arrays by name."""


class MlxTraining(Settings):
    """What trains on this machine; see the comments in the TOML."""

    model: str
    revision: str = Field(default="", pattern=COMMIT)
    base_model: str = ""
    rank: int = Field(default=8, ge=1, le=256)
    alpha: float = Field(default=16, gt=0)
    iterations: int = Field(default=500, ge=1)
    batch_size: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    eval_every: int = Field(default=100, ge=1)
    valid_examples: int = Field(default=0, ge=0)
    save_every: int = Field(default=50, ge=1)
    gradient_checkpointing: bool = False


# ---------------------------------------------------------------- what a step sees


def learning_rate_of(step: int, settings: MlxTraining) -> float:
    """Rises evenly over the first ``warmup`` of the steps, then stays."""
    return settings.learning_rate * min(1.0, step / max(1, math.ceil(settings.warmup * settings.iterations)))


class Batch(NamedTuple):
    """Rows as arrays: tokens [rows, length], and for each next token [rows, length - 1] whether the loss counts it."""

    tokens: Any
    counted: Any


def batch_of(rows: Sequence[Row]) -> Batch:
    """Rows padded to one length; padding counts for nothing."""
    import mlx.core as mx
    import numpy as np

    length = 1 + PAD_TO * math.ceil((max(len(row.tokens) for row in rows) - 1) / PAD_TO)
    tokens = np.zeros((len(rows), length), np.int32)
    counted = np.zeros((len(rows), length - 1), np.float32)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
        for start, end in row.turns:
            counted[place, start - 1 : end - 1] = 1
    return Batch(mx.array(tokens), mx.array(counted))


# ---------------------------------------------------------------- the state of a run


@dataclass
class State:
    """All that the rest of a run depends on. ``best`` is empty until a validation loss is known."""

    adapter: Arrays
    optimizer: Arrays
    best: Arrays = field(default_factory=dict)
    best_step: int = 0
    best_loss: float | None = None
    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    losses: list[Loss] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replace the file as a whole.

        Raises:
            SynthmillError: a weight is not a finite number; the file stays as it was.
        """
        import numpy as np
        from safetensors.numpy import save

        parts = {"adapter": self.adapter, "optimizer": self.optimizer, "best": self.best}
        arrays = {f"{part}.{name}": np.array(value) for part, of in parts.items() for name, value in of.items()}
        broken = next((name for name, value in arrays.items() if not np.isfinite(value).all()), None)
        if broken:
            raise _diverged(self.step, f"{broken} holds a number that is not finite")
        facts = {
            "format": STATE_FORMAT,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "seconds": self.seconds,
            "losses": [tuple(loss) for loss in self.losses],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(save(arrays, {"run": orjson.dumps(facts).decode()}))

    @classmethod
    def load(cls, path: Path) -> State:
        """What :meth:`save` wrote.

        Raises:
            SettingsError: other code wrote it.
        """
        import mlx.core as mx

        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        facts: dict[str, Any] = orjson.loads(metadata.get("run", "{}"))
        if facts.pop("format", "") != STATE_FORMAT:
            raise SettingsError(
                f"{shown(path)} was written by another version of this code", f"rm -r {shown(path.parent.parent)}"
            )
        facts["losses"] = [Loss(*loss) for loss in facts["losses"]]
        parts: dict[str, Any] = {"adapter": {}, "optimizer": {}, "best": {}}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        return cls(**(parts | facts))


def _diverged(step: int, why: str) -> SynthmillError:
    return SynthmillError(
        f"training broke down at step {step}: {why}",
        "lower mlx.learning_rate in the settings (another run id, so it starts anew), or check the base model",
    )


# ---------------------------------------------------------------- the backend


class MlxBackend:
    """Checks its settings when made; loads the model when there is something to train.

    Args:
        services: called before the Hub client is imported (:meth:`shared.stage.Stage.services`).

    Raises:
        SettingsError: the model is not where the settings say, or is not pinned.
    """

    def __init__(self, settings: MlxTraining, seed: int, services: Callable[[], None]) -> None:
        self.settings, self.seed, self.services = settings, seed, services
        self.model = pinned_model("mlx.model", settings.model, settings.revision, "mlx.revision")

    @cached_property
    def base(self) -> BaseModelUsed:
        name = self.settings.base_model or self.settings.model
        return BaseModelUsed(model=self.model, identity=model_identity(self.model), name=name)

    def renderer(self) -> Renderer:
        tokenizer = load_tokenizer(self.model, self.services, **NEEDS)
        return Renderer(tokenizer, frozenset(tokenizer.eos_token_ids), self.model)

    def train(self, work: Work) -> Trained:
        settings = self.settings
        if len(work.train) < settings.batch_size:
            raise SettingsError(
                f"mlx.batch_size = {settings.batch_size}, and there are only {len(work.train)} rows to train on",
                "lower it, or make more data",
            )
        model = self._adaptable()
        work.directory.mkdir(exist_ok=True)
        training = Training(settings, self.seed, model, work)
        training.go()
        return self._export(training.state, work)

    def _adaptable(self) -> Any:
        """The model, frozen but for a new adapter that does nothing yet.

        Raises:
            SettingsError: it has not the linear layers of a dense model.
        """
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.trainer import grad_checkpoint
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model, _ = load(self.model, "", self.services, **NEEDS)
        model.freeze()
        mx.random.seed(self.seed)
        linear_to_lora_layers(model, len(model.layers), self._lora())
        names = {name for name, _ in tree_flatten(model.trainable_parameters())}
        layers = range(len(model.layers))
        expected = {f"model.layers.{n}.{m}.lora_{side}" for n in layers for m in LINEARS for side in "ab"}
        if lacking := sorted(expected ^ names):
            raise SettingsError(
                f"{self.model} is no model this can adapt: of the {len(expected)} tensors of an adapter on all its "
                f"linear layers, {len(lacking)} are not as expected, {lacking[0]} first",
                "choose a dense text model, as Qwen3 is",
            )
        if self.settings.gradient_checkpointing:
            grad_checkpoint(model.layers[0])
        return model

    def _lora(self) -> dict[str, Any]:
        rank = self.settings.rank
        return {"rank": rank, "scale": self.settings.alpha / rank, "dropout": 0.0, "keys": set(LINEARS)}

    def _export(self, state: State, work: Work) -> Trained:
        """Both checkpoints as mlx-lm loads them, and the best one as PEFT does."""
        settings = self.settings
        revision = settings.revision if on_hub(self.model) and not settings.base_model else None
        base = Base.of(directory_of(self.model, self.services), self.base.name, revision)
        config = mlx_config(settings.rank, settings.alpha / settings.rank, LINEARS, base)
        best = state.best or state.adapter
        final = [loss.loss for loss in state.losses if loss.split == "valid" and loss.step == state.step]
        checkpoints = (
            Checkpoint(
                name="best",
                step=state.best_step if state.best else state.step,
                valid_loss=state.best_loss,
                directory="adapter_mlx",
            ),
            Checkpoint(
                name="last", step=state.step, valid_loss=final[0] if final else None, directory="checkpoints/last"
            ),
        )
        for checkpoint, weights in zip(checkpoints, (best, state.adapter), strict=True):
            write_adapter(work.directory / checkpoint.directory, weights, config)
        adapter = mlx_to_peft(work.directory / "adapter_mlx", work.directory / "adapter", base)
        return Trained(
            adapter=adapter,
            checkpoints=checkpoints,
            losses=state.losses,
            steps=state.step,
            trained_tokens=state.trained_tokens,
            cost_usd=0.0,
            seconds=state.seconds,
        )


def write_adapter(directory: Path, weights: Arrays, config: dict[str, Any]) -> None:
    """An adapter in MLX form."""
    import numpy as np
    from safetensors.numpy import save

    directory.mkdir(parents=True, exist_ok=True)
    for name, content in zip(
        MLX_FILES,
        (
            save({name: np.array(value) for name, value in weights.items()}, {"format": "mlx"}),
            orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE),
        ),
        strict=True,
    ):
        with atomic(directory / name) as file:
            file.write(content)


# ---------------------------------------------------------------- the loop


class Training:
    """A training run from where its state is to its end.

    Raises:
        SettingsError: the state in its directory cannot be read.
    """

    def __init__(self, settings: MlxTraining, seed: int, model: Any, work: Work) -> None:
        import mlx.nn as nn
        import mlx.optimizers as optimizers

        self.settings, self.seed, self.model, self.work = settings, seed, model, work
        # Without decay this is Adam; AdamW is the one people expect here should a decay ever be wanted.
        self.optimizer = optimizers.AdamW(settings.learning_rate, weight_decay=0.0, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.gradient = nn.value_and_grad(model, loss_of)
        self.path = work.state / STATE
        self.state = State.load(self.path) if self.path.exists() else State({}, {})
        if self.state.step:
            self._restore()
        else:
            self._remember()
        self.log = LossLog(work.directory / "loss.jsonl", self.state.losses)
        self.valid = work.measured(settings.valid_examples)

    def go(self) -> None:
        """Train to the last step; the state is saved on the way and at the end.

        Raises:
            SynthmillError: a loss or a weight is no finite number.
        """
        settings, state = self.settings, self.state
        if state.step:
            say(f"goes on behind step {state.step} of {settings.iterations}")
        clock = time.monotonic() - state.seconds
        with self.work.progress(settings.iterations - state.step) as bar:
            if not state.step and not state.losses:
                self._evaluate()
            while state.step < settings.iterations:
                self._step()
                if state.step % settings.eval_every == 0 or state.step == settings.iterations:
                    self._evaluate()
                if state.step % settings.save_every == 0 or state.step == settings.iterations:
                    state.seconds = time.monotonic() - clock
                    self._remember()
                    state.save(self.path)
                bar.step()

    def _step(self) -> None:
        import mlx.core as mx

        state, settings = self.state, self.settings
        step, rows = state.step + 1, self.work.train
        batch = batch_of([rows[r] for r in rows_of_step(step, settings.batch_size, self.seed, len(rows))])
        rate = learning_rate_of(step, settings)
        self.optimizer.learning_rate = rate
        (loss, counted), gradients = self.gradient(self.model, batch)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, loss, counted)
        mx.clear_cache()  # batches differ in length: buffers of one size are of little use for the next
        self._check(step, "training", loss.item(), counted.item())
        state.step, tokens = step, int(counted.item())
        state.trained_tokens += tokens
        self._add(Loss(step, "train", round(loss.item(), 6), tokens, rate))

    def _evaluate(self) -> None:
        """Measure the validation loss; keep the weights when it is the lowest."""
        import mlx.core as mx

        if not self.valid:
            return
        state, total, tokens = self.state, 0.0, 0
        for rows in _chunks(sorted(self.valid, key=lambda row: -len(row.tokens)), self.settings.batch_size):
            batch_loss, counted = loss_of(self.model, batch_of(rows))
            mx.eval(batch_loss, counted)
            mx.clear_cache()
            total += batch_loss.item() * counted.item()
            tokens += int(counted.item())
        self._check(state.step, "validation", total, tokens)
        loss = round(total / tokens, 6)
        self._add(Loss(state.step, "valid", loss, tokens))
        train = [loss.loss for loss in self.log.of("train")[-self.settings.eval_every :]]
        mean = f"  train {sum(train) / len(train):.4f}" if train else ""
        say(f"step {state.step} of {self.settings.iterations}{mean}  validation {loss:.4f}")
        # Not step 0: there the adapter does nothing, and what is wanted is the best that was learnt.
        if state.step and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step = loss, state.step
            state.best = self._weights()

    @staticmethod
    def _check(step: int, what: str, loss: float, tokens: float) -> None:
        if not tokens or not math.isfinite(loss):
            raise _diverged(step, f"the {what} loss is {loss} over {int(tokens)} tokens")

    def _add(self, loss: Loss) -> None:
        self.state.losses.append(loss)
        self.log.add(loss)

    def _weights(self) -> Arrays:
        from mlx.utils import tree_flatten

        return dict(tree_flatten(self.model.trainable_parameters()))

    def _remember(self) -> None:
        """Put weights and optimizer into the state."""
        from mlx.utils import tree_flatten

        self.state.adapter = self._weights()
        self.state.optimizer = dict(tree_flatten(self.optimizer.state))

    def _restore(self) -> None:
        """Take weights and optimizer from the state."""
        from mlx.utils import tree_unflatten

        self.model.load_weights(list(self.state.adapter.items()), strict=False)
        self.optimizer.state = tree_unflatten(list(self.state.optimizer.items()))


def loss_of(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Mean negative log-likelihood of the tokens that count, in nats, and how many they are."""
    import mlx.core as mx
    import mlx.nn as nn

    logits = model(batch.tokens[:, :-1])
    each = nn.losses.cross_entropy(logits, batch.tokens[:, 1:]).astype(mx.float32) * batch.counted
    counted = batch.counted.sum()
    return each.sum() / counted, counted


def _chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
