"""``BATCH=1``: the same questions through the providers' batch APIs, at half price, answered within a day.

A question that is not in the store waits for others: when none has come for a moment, because everybody waits, those of
each model go out together, as one batch or several. Its answers enter the store as any do, so what a batch brings and
what direct calls bring is the same, byte for byte; what it leaves open (expired, refused, failed, gone) is asked
directly. Whoever asks several questions in turn takes as many rounds of batches.

The life of a batch, with what a kill at any moment leaves to the next process (:mod:`shared.llm.journal`):

1. written down, its worst price reserved: look for it at the provider; not there, then it was never created
2. created: as before, and there it is
3. its id written down: wait for it
4. ended, its answers stored some at a time: fetch it again for the rest
5. done

``endpoint/`` models and embeddings have no batches here: those calls go on as they always do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from shared.errors import ProviderError, SettingsError, SynthmillError
from shared.llm.batch_apis import APIS, MARGIN, BatchApi, State, batch_api, custom_id
from shared.llm.catalogue import catalogue
from shared.llm.journal import Ask, Batch, Journal
from shared.llm.providers import BadRequestError, NotFoundError, Provider, TransientError, check_key
from shared.llm.store import Entry, Store
from shared.llm.types import Answer

QUESTIONS = 20_000
"""Questions of a ``map()`` under way at once, in place of its ``concurrency`` items: all wait for their batches. One of
1 KiB takes 16 to 32 KiB while it does, by SDK (measured): 300 to 600 MiB in all, more where texts are longer."""
GROUP = 128
"""Answers stored in one transaction."""
PATIENCE_S = 900.0
"""How long a provider may be out of reach before the run ends; its batches go on."""
TRIES = 8
"""To create one batch, when it is not known whether it was."""
ROOM = 4
"""Parts that fail because too many requests wait at the provider are made a fourth as large."""


class Pace(NamedTuple):
    """Seconds.

    Attributes:
        quiet: without a new question, until those that wait are sent.
        poll: between two looks at a batch; half as long again after each, up to ``most``.
        settle: until a batch that was created must be in the provider's list.
        known: until a batch that the provider does not know is believed to be gone; before, the key is another one.
        tell: between two lines about what is waited for.
    """

    quiet: float
    poll: float
    most: float
    settle: float
    known: float
    tell: float


PACES = {"live": Pace(5.0, 30.0, 60.0, 60.0, 86_400.0, 60.0), "mock": Pace(0.05, 0.05, 0.5, 0.0, 0.0, 10.0)}


def batch_from_env() -> bool:
    """``BATCH``: 1 or nothing.

    Raises:
        SettingsError: it is something else.
    """
    value = os.environ.get("BATCH", "").strip()
    if value not in ("", "0", "1"):
        raise SettingsError(f"BATCH must be 1 (half price, within a day) or empty, got {value!r}", "make trial BATCH=1")
    return value == "1"


def has_batches(model: str) -> bool:
    """Whether ``BATCH=1`` halves a model's price: a hosted one that writes."""
    return model.partition("/")[0] in APIS and catalogue().card(model).price().output > 0


class Batches:
    """All batches of one stage.

    Args:
        store: where the answers, the ledger and the journal are.
        provider: gives a provider by its name.
        apis, run, track, stage: as :class:`shared.llm.Models`.
        budget_nano: the most that may ever be spent for ``run``; None = no cap.
        billed: told of each answer that this process paid for.

    Attributes:
        creating: calls under way that create a batch; better not cut off.
        closing: set when nothing new is to be sent: what was refused is not tried again.
    """

    def __init__(
        self,
        store: Store,
        provider: Callable[[str], Provider],
        apis: str,
        run: str,
        track: str,
        stage: str,
        budget_nano: int | None,
        billed: Callable[[Entry], None],
    ) -> None:
        self.store, self.journal, self._provider, self._billed = store, Journal(store), provider, billed
        self._whose = (run, track, stage)
        self._run, self._stage, self._budget_nano, self._pace = run, stage, budget_nano, PACES[apis]
        self.creating: set[asyncio.Task[Any]] = set()
        self.closing = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._waiting: dict[str, list[tuple[Ask, asyncio.Future[str]]]] = {}
        self._asked_at = 0.0
        self._following: dict[str, asyncio.Task[bool]] = {}
        self._stands: dict[str, tuple[Batch, str]] = {}
        self._sending: dict[str, asyncio.Lock] = {}
        self._most: dict[str, int] = {}  # requests that a provider takes of us at once, where that was too many
        self._told_at = time.monotonic()
        self._swept_at = float("-inf")
        self._orphans: dict[str, float] = {}  # since when we know that nobody creates it any more
        self._adopted: set[str] = set()
        self._unseen: set[str] = set()  # of which we said that they cannot be looked at
        self._told_waiting = False

    async def answer(self, ask: Ask) -> Answer | None:
        """The answer to a question, from the batch that it is in, or is going to be in; None: ask directly.

        Raises:
            BudgetError, KeyMissingError, ProviderError: nothing more can be sent.
        """
        await self._opened()
        while True:
            name = self.journal.batch_of(ask.key) or await self._gather(ask)
            sent = not name or await asyncio.shield(self._follow(name))
            answer = self.store.answer(ask.key)
            if answer is not None or sent:
                return answer

    async def _opened(self) -> None:
        if self._opening is None:
            self._opening = self._spawn(self.journal.open())
            self.sweep()
        await asyncio.shield(self._opening)

    def sweep(self) -> None:
        """Begin to look at every batch of the run that nobody waits for: it may have ended, and free its budget."""
        if time.monotonic() - self._swept_at >= self._pace.poll:
            self._swept_at = float("inf")  # one at a time
            self._spawn(self._sweep())

    async def _sweep(self) -> None:
        try:
            await self._opened()
            for batch in self.journal.waiting(self._run):
                ours = batch.name in self._adopted or self.journal.abandoned(batch)
                if ours and batch.name not in self._following:
                    await self._look_once(batch)
        finally:
            self._swept_at = time.monotonic()

    async def _look_once(self, batch: Batch) -> None:
        over: bool | None = True
        try:
            provider = self._provider(batch.model.partition("/")[0])
            check_key(provider)
            over = await self._step(batch, batch_api(provider))
        except (SynthmillError, TransientError) as error:
            if batch.name not in self._unseen:
                self._unseen.add(batch.name)
                _say(f"batch {batch.id or batch.name} of {batch.model} keeps its part of BUDGET_USD: {error}")
        finally:
            if over is not None and batch.name not in self._following:
                self._stands.pop(batch.name, None)

    def under_way(self) -> str:
        """What is waited for here, ``2 batches with 340 requests``; ``""`` for nothing."""
        sizes = [batch.requests for batch, _ in self._stands.values()]
        return f"{len(sizes)} {'batch' if len(sizes) == 1 else 'batches'} with {sum(sizes):,} requests" * bool(sizes)

    # ------------------------------------------------------------ gathering

    def _gather(self, ask: Ask) -> asyncio.Future[str]:
        """The name of the batch that a question will have been put in."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._spawn(self._when_quiet())
        future: asyncio.Future[str] = loop.create_future()
        self._waiting.setdefault(ask.model, []).append((ask, future))
        self._asked_at = loop.time()
        return future

    async def _when_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._asked_at + self._pace.quiet - loop.time()) > 0:
            await asyncio.sleep(left)
        asked, self._waiting = self._waiting, {}
        for model, waiting in asked.items():
            self._spawn(self._send(model, waiting))

    async def _send(self, model: str, waiting: list[tuple[Ask, asyncio.Future[str]]]) -> None:
        """Send questions to one model, in as few batches as its limits, and the budget, allow."""
        futures = {ask.key: future for ask, future in waiting}
        asks = [ask for ask, _ in waiting]
        try:
            async with self._sending.setdefault(model, asyncio.Lock()):
                while asks:
                    name, placed = await self._send_some(model, asks)
                    for key in placed:
                        if not futures[key].done():
                            futures[key].set_result(placed[key])
                    asks = [ask for ask in asks if ask.key not in placed]
                    if not placed:
                        await self._wait_for_budget()
                    elif model in self._most and name in self._following:  # one at a time: more is too many
                        await asyncio.wait([self._following[name]])
        except Exception as error:
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    async def _send_some(self, model: str, asks: Sequence[Ask]) -> tuple[str, dict[str, str]]:
        """The name of a new batch, and where each of the first questions is now."""
        self.store.check_room()
        limits = batch_api(self._provider(model.partition("/")[0])).limits
        size, count = 0, 0
        for ask in asks[: min(limits.requests, self._most.get(model, limits.requests))]:
            size += ask.size + 150
            if count and size > limits.bytes * MARGIN:
                break
            count += 1
        name = uuid.uuid4().hex[:12]
        batch = Batch(name, "", self.store.owner, model, *self._whose, requests=0, at=time.time())
        placed = await self.journal.intend(batch, asks[:count], self._budget_nano)
        if mine := [ask for ask in asks if placed.get(ask.key) == name]:
            self._follow(name, mine)
        return name, placed

    async def _wait_for_budget(self) -> None:
        if not self._told_waiting:
            self._told_waiting = True
            _say("waiting: the rest of BUDGET_USD is set aside for batches and calls under way")
        self.sweep()
        await asyncio.sleep(self._pace.poll)

    # ------------------------------------------------------------ one batch

    def _follow(self, name: str, asks: Sequence[Ask] = ()) -> asyncio.Task[bool]:
        """The task that sees a batch through: False when it was never created, and its requests can be sent anew."""
        if name not in self._following:
            task = self._following[name] = self._spawn(self._through(name, asks))
            task.add_done_callback(lambda _: (self._following.pop(name, None), self._stands.pop(name, None)))
        return self._following[name]

    async def _through(self, name: str, asks: Sequence[Ask]) -> bool:
        pause, reached = self._pace.poll, time.monotonic()
        while (batch := self.journal.get(name)) is not None:
            api = batch_api(self._provider(batch.model.partition("/")[0]))
            try:
                if asks:
                    await self._create(batch, api, asks)
                    asks = ()
                    continue
                over = await self._step(batch, api)
                reached = time.monotonic()
                if over is not None:
                    return over
            except TransientError as error:
                if time.monotonic() - reached > PATIENCE_S:
                    raise _out_of_reach(error, f"batch {batch.id} goes on there") from error
            self._tell()
            await asyncio.sleep(pause)
            pause = min(self._pace.most, pause * 1.5)
        return False

    async def _create(self, batch: Batch, api: BatchApi, asks: Sequence[Ask]) -> None:
        """Create a batch once, or take it back; whoever is cancelled meanwhile, the call comes to its end."""
        asked = [(custom_id(ask.key, batch.name, ask.again), ask.wire) for ask in asks]
        task = self._spawn(self._created(batch, api, asked))
        self.creating.add(task)
        task.add_done_callback(self.creating.discard)
        self._stands[batch.name] = (batch, "not created yet")
        identity = await asyncio.shield(task)
        if identity:
            _say(f"batch {identity}: {len(asked):,} requests to {batch.model}, at half price")

    async def _created(self, batch: Batch, api: BatchApi, asked: Sequence[tuple[str, dict[str, Any]]]) -> str:
        pause, started, tries = self._pace.poll, time.monotonic(), 0
        while True:
            identity = ""
            try:
                identity = await api.create(batch.name, batch.model.partition("/")[2], asked)
            except TransientError as error:
                pause, tries = min(self._pace.most, pause * 2), tries + 1
                refused_for = time.monotonic() - started
                if error.limited and self.closing:
                    await self.journal.take_back(batch)
                    raise
                # Refused, it is not created, and may be taken when others of ours have ended.
                if error.limited and (refused_for < PATIENCE_S or len(self._following) > 1):
                    await asyncio.sleep(max(pause, error.after_s or 0.0))
                    continue
                await asyncio.sleep(max(pause, self._pace.settle))
                identity = await self._found(batch, api)
                if not identity and (error.limited or tries >= TRIES):
                    await self.journal.take_back(batch)
                    raise _out_of_reach(error, f"{len(asked):,} requests to {batch.model} were not sent") from error
            except BadRequestError as error:
                _say(f"{batch.model} takes no batch of {len(asked):,} requests, they are asked directly: {error}")
                await self.journal.finish(batch)
                return ""
            except SynthmillError:
                await self.journal.take_back(batch)
                raise
            if identity:
                await self.journal.created(batch.name, identity)
                return identity

    async def _found(self, batch: Batch, api: BatchApi) -> str:
        """The provider's id of a batch that may have been created; ``""``: it was not."""
        reached = time.monotonic()
        while True:
            try:
                identity, sure = await api.find(batch.name, batch.at, batch.requests, self.journal.ids())
                if identity or sure:
                    return identity
                reached = time.monotonic()
                self._stands[batch.name] = (batch, "one that may be it has not ended")
            except TransientError as error:
                if time.monotonic() - reached > PATIENCE_S:
                    raise _out_of_reach(error, "a batch may have been created") from error
            self._tell()
            await asyncio.sleep(self._pace.most)

    async def _step(self, batch: Batch, api: BatchApi) -> bool | None:
        """Do what can be done for a batch now: True when it is over, False when it never was, None: look again."""
        if batch.done:
            return True
        if not batch.id:
            return await self._look_for(batch, api)
        try:
            state = await api.look(batch.id)
            self._stands[batch.name] = (batch, state.said)
            return await self._fetch(batch, api, state) if state.ended else None
        except NotFoundError as error:
            if (age := time.time() - batch.at) < self._pace.known:
                raise TransientError(
                    f"{error.what}, which was created {age / 60:.0f} min ago: is the key another project's now?"
                ) from error
            missing = await self.journal.finish(batch, at_most=True)
            _say(
                f"batch {batch.id} of {batch.model} is not there any more ({error.what}): {missing:,} requests are "
                "asked directly, and the most they can have cost in it is counted as spent"
            )
            return True

    async def _look_for(self, batch: Batch, api: BatchApi) -> bool | None:
        """A batch without an id: its process is about to create it, or was killed."""
        if batch.owner != self.store.owner:
            if not self.journal.abandoned(batch):
                return None
            # It may have died in the call that creates it, and providers take a while to list what they have taken.
            since = self._orphans.setdefault(batch.name, time.monotonic())
            if time.monotonic() < since + self._pace.settle or not await self.journal.adopt(batch):
                return None
            self._adopted.add(batch.name)
        if identity := await self._found(batch, api):
            _say(f"batch {identity}: found again, {batch.requests:,} requests to {batch.model}")
            await self.journal.created(batch.name, identity)
            return None
        await self.journal.take_back(batch)
        return False

    async def _fetch(self, batch: Batch, api: BatchApi, state: State) -> bool:
        """Store the answers of a batch that has ended; say what it did not answer."""
        if state.full and batch.requests > 1:
            self._most[batch.model] = max(1, batch.requests // ROOM)
            _say(f"batch {batch.id}: {state.wrong}; {batch.model} gets {self._most[batch.model]:,} requests at a time")
            await self.journal.take_back(batch)
            return False
        keys = {key[:32]: key for key in self.journal.keys(batch.name)}
        wrong: Counter[str] = Counter({state.wrong: len(keys)} if state.wrong else {})
        group: list[tuple[Answer, Entry]] = []
        async for custom, found in api.results(batch.id):
            key = keys.pop(custom.partition("_")[0], "")
            if key and isinstance(found, Answer):
                group.append((found, _entry(key, batch, found)))
            elif key:
                wrong[str(found)[:100]] += 1
            if len(group) == GROUP:
                await self._keep(batch, group)
                group = []
        await self._keep(batch, group)
        wrong["no answer in it"] += 0 if state.wrong else len(keys)
        if missing := await self.journal.finish(batch):
            why = "; ".join(f"{count:,} {reason}" for reason, count in (+wrong).most_common(3))
            _say(
                f"batch {batch.id}: {missing:,} of {batch.requests:,} not answered ({why}); "
                f"{batch.model} is asked directly for them, at full price"
            )
        return True

    async def _keep(self, batch: Batch, group: Sequence[tuple[Answer, Entry]]) -> None:
        for entry in await self.journal.keep(batch, group) if group else ():
            if (entry.run, entry.track, entry.stage) == self._whose:
                self._billed(entry)

    def _tell(self) -> None:
        if time.monotonic() - self._told_at < self._pace.tell:
            return
        self._told_at = time.monotonic()
        oldest, said = min(self._stands.values(), default=(None, ""), key=lambda stand: stand[0].at)
        if oldest is not None:
            minutes = (time.time() - oldest.at) / 60
            first = f"the oldest, {oldest.id or oldest.name} of {oldest.model}, for {minutes:.0f} min: {said}"
            _say(f"{self._stage}  waiting for {self.under_way()}; {first}")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        def ended(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # whoever waited has heard of it

        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(ended)
        return task


def _entry(key: str, batch: Batch, answer: Answer) -> Entry:
    usage = answer.usage
    return Entry(
        key=key,
        model=batch.model,
        run=batch.run,
        track=batch.track,
        stage=batch.stage,
        input=usage.input,
        output=usage.output,
        cached=usage.cached,
        nano=catalogue().card(batch.model).price().nano(usage, batch=True),
        batch=True,
    )


def _out_of_reach(error: TransientError, what: str) -> ProviderError:
    return ProviderError(
        f"{error}; {what}", "everything answered is saved; when the provider is back, run the same command"
    )


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(line, file=sys.stderr)
