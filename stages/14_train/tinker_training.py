"""A training at Tinker: the loop, from where its journal is to the weights on this machine."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import Work, say
from downloads import fetch_all
from leaving import LEAVE_S, Leaving
from losses import Loss, LossLog
from rendering import Row
from tinker_journal import INFINITY, Journal, Ledger, Saved
from tinker_service import Waiting, goodbye, in_background, rest, sdk
from tinker_steps import (
    Costs,
    TinkerTraining,
    batch_of,
    counted,
    data_of,
    is_saved,
    learning_rate_of,
    loss_of,
    sent,
    steps_of,
)

from shared.errors import ProviderError, SynthmillError
from shared.llm.catalogue import NANO
from shared.stage import shown

AHEAD = 2
"""Steps under way at once: one that is computed, one that waits for it."""
BETAS, EPS = (0.9, 0.95), 1e-8
"""Of Adam, as the vendor's own recipes for supervised training have them."""
EXPORT_DAYS = 1
"""How long the service keeps an export that we fetch at once."""
BYTES_SAVED, BYTES_EXPORTED = 12, 4
"""Of each weight of an adapter: float32 with both moments of Adam; alone."""


@dataclass
class Sent:
    """What is under way; step 0 only measures. The futures are in the order in which they are answered."""

    step: int
    rows: list[Row]
    rate: float
    loss: Any = None
    update: Any = None
    state: Any = None
    valid: Any = None


class Training:
    """A training from where its journal is to its end.

    Raises:
        SettingsError: the journal cannot be read.
        BudgetError: what is still to come costs more than is left.
    """

    def __init__(self, settings: TinkerTraining, seed: int, work: Work, costs: Costs, ledger: Ledger) -> None:
        self.settings, self.seed, self.work = settings, seed, work
        self.costs, self.ledger = costs, ledger
        self.steps = steps_of(settings, len(work.train))
        self.valid = work.measured(settings.valid_examples)
        # Made on disk only when all that can be checked has been, the model at the service included.
        self.journal = Journal(work.state / "journal.jsonl")
        self.saved = self.step = self.journal.saved[-1].step if self.journal.saved else 0
        self.left_nano = self._to_pay()
        self.budget = ledger.afford(
            self.left_nano / NANO, "the rest of the training" if self.saved else "this training"
        )

    def _to_pay(self) -> int:
        """Nanodollars of what is still to come."""
        steps = range(self.saved + 1, self.steps + 1)
        states = sum(is_saved(step, self.settings, self.steps) for step in steps)
        measures = (states + (not self.saved)) if self.valid else 0
        total = sum(self.costs.train(batch_of(s, self.settings, self.seed, self.work.train)) for s in steps)
        total += measures * self.costs.measure(self.valid)
        exports = 2 - len(self.journal.exports) if steps or not self.journal.exports else 0
        return total + states * self._state_nano() + exports * self._export_nano()

    def _state_nano(self) -> int:
        return self.costs.store(BYTES_SAVED, self.settings.keep_days)

    def _export_nano(self) -> int:
        return self.costs.store(BYTES_EXPORTED, EXPORT_DAYS)

    def announcement(self) -> str:
        """What is going to happen and to be paid."""
        rest = f"{self.steps - self.saved} of " if self.saved else ""
        return f"{rest}{self.steps} steps, about ${self.left_nano / NANO:,.4f}, states included; {self.budget}"

    def fetched(self, state: Saved) -> Path:
        """Where the weights of a state are once they are fetched."""
        return self.work.state / f"export-{state.step}"

    # -- training

    def go(self) -> None:
        """Train to the last step and fetch the weights.

        Raises:
            SynthmillError: see :mod:`tinker_service`; the journal says from where it goes on.
        """
        journal, saved = self.journal, self.journal.saved
        self.leaving, self.told, self.in_doubt = Leaving(), False, False
        if journal.training and self.step < self.steps:
            self._say_what_is_lost()
        self.client = sdk().ServiceClient(display_name=self.work.directory.stem)
        status = "errored"
        try:
            model = None
            if self.step < self.steps:
                model = self._loaded(saved[-1], optimizer=True) if saved else self._new()
            journal.begin()
            self.log = LossLog(self.work.directory / "loss.jsonl", journal.losses)
            self.fresh: list[Loss] = []
            self.tokens = saved[-1].trained_tokens if saved else 0
            self.clock = time.monotonic() - (saved[-1].seconds if saved else 0.0)
            if model:
                self._steps(model)
            for state in {state.step: state for state in (journal.best, saved[-1])}.values():
                self._fetch(state, model if state is saved[-1] else None)
            status = "success"
        except KeyboardInterrupt:
            status = "interrupted"
            say(f"stopped; {self._resume or 'nothing was spent'}")
            raise
        finally:
            goodbye(self.client, status)

    def _say_what_is_lost(self) -> None:
        lost, rows = self.journal.unsaved, self.step * self.settings.batch_size
        self.journal.write("resumed", step=self.step, lost=lost, rows=rows, seed=self.seed)
        words = f"; {lost} steps behind it were paid and are lost, and are taken again" if lost else ""
        say(f"goes on behind step {self.step} of {self.steps}{words}")

    def _new(self) -> Any:
        """A model with an adapter that does nothing yet."""
        settings, client = self.settings, self.client

        def make() -> Any:
            return client.create_lora_training_client(
                settings.model, rank=settings.rank, seed=self.seed, train_unembed=False
            ).result()

        return self._wait(in_background(make), "make a model to train")

    def _loaded(self, state: Saved, *, optimizer: bool) -> Any:
        """A model as a state left it."""
        client = self.client

        def load() -> Any:
            if optimizer:
                return client.create_training_client_from_state_with_optimizer(state.path).result()
            return client.create_training_client_from_state(state.path).result()

        try:
            return self._wait(in_background(load), f"load its state of step {state.step}")
        except ProviderError as error:
            if "cannot be reached" in error.what:
                raise
            raise ProviderError(
                f"{error.what}; states are kept for tinker.keep_days = {self.settings.keep_days} days",
                f"run the same command once more; if the state is gone, rm -r {shown(self.work.directory)} begins anew",
            ) from error

    def _steps(self, model: Any) -> None:
        """From behind the last state to the end, with the next step always sent before the last is answered.

        Interrupted, or out of money, it has the state kept first, so that only a kill loses what is paid.
        """
        self.under_way: deque[Sent] = deque()
        with self.leaving, self.work.progress(self.steps - self.step) as bar:
            try:
                if not self.step and self.valid:
                    self._measure(model, one := Sent(0, [], 0.0))
                    self.under_way.append(one)
                while (self.step < self.steps or self.under_way) and not self.leaving.asked:
                    while self.step < self.steps and len(self.under_way) < AHEAD:
                        self._send(model)
                    if self._settle():
                        bar.step()
            except Exception as error:
                if not self.in_doubt:
                    self._park(model)
                if not self.leaving.interrupted:
                    raise
                if self.in_doubt:
                    self._say_not_saved(error)
            else:
                self._park(model)
            if self.leaving.interrupted:
                raise KeyboardInterrupt

    def _park(self, model: Any) -> None:
        """Have the state behind the last step kept, unless it is; where that fails, say so."""
        if not self.journal.unsaved:
            return
        self.leaving.ask()
        self._leave_at()
        try:
            while self.under_way:
                self._settle()
            if self.journal.unsaved:
                self._keep(model, one := Sent(self.step, [], 0.0))
                self.under_way.append(one)
                self._settle()
            if not self.leaving.interrupted:
                say(self._resume)
        except Exception as error:
            self._say_not_saved(error)

    def _leave_at(self) -> float:
        """Until when to wait; says once that we are leaving."""
        if self.leaving.asked and not self.told and self.journal.unsaved:
            self.told = True
            say(
                f"leaving: the state behind step {self.step} of {self.steps} is saved first, in {LEAVE_S:.0f} s at "
                "most; Ctrl-C leaves at once"
            )
        return self.leaving.deadline

    def _say_not_saved(self, error: Exception) -> None:
        what = error.what if isinstance(error, SynthmillError) else f"{type(error).__name__}: {error}"
        say(f"not saved: {what}; {self.journal.unsaved} steps that were paid are lost")

    def _send(self, model: Any) -> None:
        from tinker import types

        step, settings = self.step + 1, self.settings
        rows = batch_of(step, settings, self.seed, self.work.train)
        rate = learning_rate_of(step, settings, self.steps)
        # With enough left to keep the state behind it, whatever other stages spend meanwhile.
        self._pay("step", step, self.costs.trained, sent(rows), self.costs.train(rows), aside=self._state_nano())
        adam = types.AdamParams(learning_rate=rate, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
        self.in_doubt = True
        loss, update = model.forward_backward(data_of(rows), "cross_entropy"), model.optim_step(adam)
        self.step, one = step, Sent(step, rows, rate, loss, update)
        self.under_way.append(one)
        self.in_doubt = False
        if is_saved(step, settings, self.steps):
            self._keep(model, one)
            if self.valid:
                self._measure(model, one)

    def _keep(self, model: Any, one: Sent) -> None:
        self._pay("keep", one.step, self.costs.stored, 0, self._state_nano(), until=lambda: self.leaving.deadline)
        one.state = model.save_state(f"step-{one.step:06d}", ttl_seconds=self.settings.keep_days * 86_400)

    def _measure(self, model: Any, one: Sent) -> None:
        self._pay("measure", one.step, self.costs.asked, sent(self.valid), self.costs.measure(self.valid))
        one.valid = model.forward(data_of(self.valid), "cross_entropy")

    def _settle(self) -> bool:
        """Wait for what was sent first, and log it; whether it was a step."""
        self.in_doubt = True  # until all is answered: what the model is like behind a step that failed, nobody knows
        one = self.under_way.popleft()
        if one.loss:
            loss = loss_of(one.rows, self._wait(one.loss, f"take step {one.step}"))
            self._wait(one.update, f"take step {one.step}")
            self.tokens += counted(one.rows)
            self._log(Loss(one.step, "train", round(loss, 6), counted(one.rows), one.rate))
        measured = None
        path = self._wait(one.state, f"save the state of step {one.step}").path if one.state else ""
        if one.valid:
            loss = loss_of(self.valid, self._wait(one.valid, f"measure the validation loss of step {one.step}"))
            measured = round(loss, 6)
            self._log(Loss(one.step, "valid", measured, counted(self.valid)))
            train = [loss.loss for loss in self.log.of("train")[-self.settings.save_every :]]
            mean = f"  train {sum(train) / len(train):.4f}" if train else ""
            say(f"step {one.step} of {self.steps}{mean}  validation {measured:.4f}  ${self.journal.nano / NANO:.4f}")
        if one.state:
            state = Saved(one.step, path, measured, self.tokens, time.monotonic() - self.clock)
            self.journal.write(
                "saved",
                **state._asdict(),
                rows=one.step * self.settings.batch_size,
                seed=self.seed,
                losses=[tuple(loss) for loss in self.fresh],
                cost_usd=self.journal.nano / NANO,
            )
            self.fresh = []
        self.in_doubt = False
        return bool(one.loss)

    def _log(self, loss: Loss) -> None:
        if not math.isfinite(loss.loss):
            raise SynthmillError(
                f"training broke down at step {loss.step}: the {loss.split} loss is {loss.loss}",
                "lower tinker.learning_rate in the settings (another run id, so it starts anew), or check the data",
            )
        self.log.add(loss)
        self.fresh.append(loss)

    def _pay(
        self,
        event: str,
        step: int,
        model: str,
        tokens: int,
        nano: int,
        aside: int = 0,
        until: Callable[[], float] | None = None,
    ) -> None:
        """Enter what is sent next, in the ledger and then in the journal.

        Raises:
            BudgetError: the budget is spent, or would not hold ``aside`` nanodollars more.
        """
        # Whoever wants to leave waits for no money, but for what saves what is paid.
        wait = until or (lambda: 0.0 if self.leaving.asked else INFINITY)
        self.ledger.pay(f"{self.journal.training}/{event}/{step}", model, tokens, nano, aside, wait)
        after = (self.journal.nano + nano) / NANO
        self.journal.write(event, step=step, tokens=tokens, nano=nano, cost_usd=after)

    # -- the weights

    def _fetch(self, state: Saved, model: Any) -> None:
        """Bring the weights of a state here, PEFT's two files; exported first where that is not done.

        ``model``: the one under training, when it is in that state.
        """
        place = self.fetched(state)
        if (place / "adapter_config.json").exists() and (place / "adapter_model.safetensors").exists():
            return
        if state.step not in self.journal.exports:
            self._export(state, model)

        def sign() -> dict[str, str]:
            path = self.journal.exports[state.step]
            links = in_background(lambda: rest().get_external_weights_urls(path).result().urls)
            return dict(self._wait(links, f"give links to the weights of step {state.step}"))

        try:
            fetch_all(sign, place)
        except ProviderError as error:
            if "(404)" not in error.what:
                raise
            say(f"the export of step {state.step} is gone; it is made again")
            self._export(state, model)
            fetch_all(sign, place)
        missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (place / name).exists()]
        if missing:
            names = ", ".join(sorted(path.name for path in place.iterdir()))
            raise ProviderError(f"the export of step {state.step} has no {missing[0]}, only {names}", self._resume)

    def _export(self, state: Saved, model: Any) -> None:
        model = model or self._loaded(state, optimizer=False)
        self._pay("export", state.step, self.costs.stored, 0, self._export_nano())
        asked = model.save_weights_external(f"step-{state.step:06d}", ttl_seconds=EXPORT_DAYS * 86_400)
        path = self._wait(asked, f"export the weights of step {state.step}").path
        self.journal.write("exported", step=state.step, path=path)

    # -- waiting

    def _wait(self, answer: Any, what: str) -> Any:
        return Waiting(self._resume, self._leave_at).until(answer, what)

    @property
    def _resume(self) -> str:
        """What is saved, and how to go on; ``""`` while nothing is paid."""
        saved, paid = self.journal.saved, self.journal.nano / NANO
        if not self.journal.training:
            return ""
        where = f"behind step {saved[-1].step} of {self.steps}" if saved else "from the start"
        return f"the same command goes on {where} (${paid:.4f} paid so far)"
