"""LoRA at Tinker, a training service: the loop runs here, the model there (https://tinker-docs.thinkingmachines.ai).

A step is two requests, ``forward_backward`` and ``optim_step``, sent together; the next step is sent before the last
is answered, so that the service never waits for us. Every ``save_every`` steps, and at the end, the service keeps the
state (weights and optimizer), and the validation loss is measured. There is a state for every validation loss but the
base model's, so the adapter is that of the state with the lowest: no other weights are ever exported but those of the
last step. A killed run goes on behind its last state; what was paid beyond it is lost, counted and said. One that
is interrupted, or whose budget others have spent, has its state kept first (:mod:`leaving`) and loses nothing.

The loss is the mean over the assistant tokens of a batch, in nats: every one of them weighs 1 / their number, and the
service sums. It is computed here from the log-probabilities that come back, because not every server sends it. The
learning rate rises evenly over the first ``warmup`` of the steps, then falls evenly towards 0, which it would reach one
step behind the last. Tokens are the chat template's, from the tokenizer pinned on the Hub; the service's own word on
which tokenizer to use is never asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from backends import Trained, Work, say
from rendering import Renderer
from tinker_journal import Ledger
from tinker_service import check
from tinker_steps import Costs, TinkerTraining
from tinker_training import Training

from shared.adapters import Base, normalise_peft, peft_to_mlx
from shared.errors import ProviderError, SettingsError
from shared.llm.catalogue import NANO
from shared.local_models import directory_of
from shared.receipts import BaseModelUsed, Checkpoint
from shared.stage import shown

TOKENIZER_FILES = ["*.json", "*.jinja", "merges.txt"]
"""Of the base model's repository; its weights stay where they are."""


def weights_of(directory: Path, rank: int) -> int:
    """Numbers in an adapter of all linear layers of the model whose ``config.json`` is in a directory.

    Raises:
        SettingsError: it is not such a model.
    """
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        hidden, inner, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
        head = config.get("head_dim") or hidden // heads
        queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
        ends = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        ends += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return int(config["num_hidden_layers"]) * rank * sum(map(sum, ends))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{shown(directory / 'config.json')} does not describe a dense text model: {type(error).__name__}: {error}",
            "set model and revision in [tinker] to one, as Qwen/Qwen3-8B is",
        ) from None


# ---------------------------------------------------------------- the backend


class TinkerBackend:
    """Checks its settings when made; reaches the service when there is something to train.

    Args:
        max_length: tokens of the longest row.
        services: called before an SDK is imported (:meth:`shared.stage.Stage.services`).
        ledger: opened when something is about to be paid; None for those who only look.
    """

    def __init__(
        self,
        settings: TinkerTraining,
        max_length: int,
        seed: int,
        services: Callable[[], None],
        ledger: Callable[[], Ledger] | None = None,
    ) -> None:
        self.settings, self.max_length, self.seed = settings, max_length, seed
        self.services, self.ledger = services, ledger
        self.model = f"{settings.model}@{settings.revision}"

    @cached_property
    def base(self) -> BaseModelUsed:
        return BaseModelUsed(model=self.model, identity=self.model, name=self.settings.model)

    def check(self) -> str:
        """What must hold before anything is paid, within :data:`tinker_service.PROBE_S` s; what was found.

        Raises:
            SynthmillError: see :func:`tinker_service.check`.
        """
        self.services()
        return check(self.settings.model, self.max_length)

    def renderer(self) -> Renderer:
        # jinja2 renders the template; transformers imports it only then, and says so in a page of its own.
        lacking = [name for name in ("transformers", "jinja2") if importlib.util.find_spec(name) is None]
        if lacking:
            raise SettingsError(f"backend = 'tinker' needs {' and '.join(lacking)}, not installed here", "make setup")
        directory = directory_of(self.model, self.services, TOKENIZER_FILES)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that there is no PyTorch
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise SettingsError(f"no tokenizer in {self.model}: {error}", "check model and revision") from error
        ends = _json(directory / "generation_config.json").get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        return Renderer(tokenizer, frozenset({*ends, tokenizer.eos_token_id} - {None}), self.model)

    def train(self, work: Work) -> Trained:
        if len(work.train) < self.settings.batch_size:
            raise SettingsError(
                f"tinker.batch_size = {self.settings.batch_size}, and there are only {len(work.train)} rows",
                "lower it, or make more data",
            )
        found = self.check()
        directory = directory_of(self.model, self.services, TOKENIZER_FILES)
        costs = Costs(self.settings.model, weights_of(directory, self.settings.rank))
        assert self.ledger, "whoever trains pays"
        ledger = self.ledger()
        try:
            training = Training(self.settings, self.seed, work, costs, ledger)
            say(f"{found}; {training.announcement()}")
            training.go()
        finally:
            ledger.close()
        return self._put_together(training, work, Base.of(directory, self.settings.model, self.settings.revision))

    def _put_together(self, training: Training, work: Work, base: Base) -> Trained:
        """Both forms of the best checkpoint, and the last as MLX has it, from what was fetched."""
        journal = training.journal
        best, last = journal.best, journal.saved[-1]
        try:
            adapter = normalise_peft(training.fetched(best), work.directory / "adapter", base)
            peft_to_mlx(work.directory / "adapter", work.directory / "adapter_mlx", base)
            peft_to_mlx(training.fetched(last), work.directory / "checkpoints" / "last", base)
        except SettingsError:
            for state in (best, last):  # what was fetched is no adapter of this model: the next try fetches it anew
                shutil.rmtree(training.fetched(state), ignore_errors=True)
            raise
        if adapter.rank != self.settings.rank:
            raise ProviderError(
                f"Tinker exported rank {adapter.rank}; asked for was {self.settings.rank}",
                "report it to the vendor; what was trained stays there for tinker.keep_days days",
            )
        checkpoints = (
            Checkpoint(name="best", step=best.step, valid_loss=best.valid_loss, directory="adapter_mlx"),
            Checkpoint(name="last", step=last.step, valid_loss=last.valid_loss, directory="checkpoints/last"),
        )
        return Trained(
            adapter=adapter,
            checkpoints=checkpoints,
            losses=journal.losses,
            steps=last.step,
            trained_tokens=last.trained_tokens,
            cost_usd=journal.nano / NANO,
            seconds=last.seconds,
        )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
