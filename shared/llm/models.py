"""Ask, replay, pay once: the one class stages use."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import orjson
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from shared import apis as cloud
from shared import tracing
from shared.errors import BudgetError, ProviderError, SettingsError
from shared.llm.batch import QUESTIONS, Batches, has_batches
from shared.llm.catalogue import NANO, catalogue
from shared.llm.journal import Ask, in_the_way, set_aside
from shared.llm.limits import MAX_WAIT_S, Costs, Limiter, Shared, file_of, forget_old
from shared.llm.providers import PROVIDERS, TIMEOUT_S, BadRequestError, OpenAI, Provider, TransientError, check_key
from shared.llm.store import Entry, Store
from shared.llm.types import Answer, Reply, Request, Spending, Usage, judge_answer, request_key
from shared.llm.volume import BYTES_PER_TOKEN
from shared.llm.wire import Answered, Hear

T = TypeVar("T")
R = TypeVar("R")

FAILURES = 8
"""Tries of one call that fail for another reason than speed, before it is given up: about two minutes of back-off."""
PATIENCE_S = 900.0
"""How long one call keeps trying while the provider says we are too fast; when it says so to every call of every
process for that long, the run ends."""
DRAIN_S = TIMEOUT_S + 5.0
"""After an interrupt, how long answers under way are awaited: they are paid for, so they are kept. As long as a call
may take; a second Ctrl-C does not wait."""
WINDOW = 32
"""Finished records that may wait behind a slow one, per record under way: bounds memory, not speed."""
BEGIN = 256
"""Items that begin at once in batches."""
DELIVER_S = 0.01
"""While calls are under way, results are handed over at most this often: each time the event loop stops."""
RESERVE_AGAIN_S = 0.1
"""While calls under way hold the rest of the budget, how often to look whether they cost less."""
EMBED_TEXTS, EMBED_TOKENS = 2048, 290_000
"""OpenAI takes at most 2,048 texts and 300,000 tokens a request (SDK docstring, openai 3.52.0)."""

_backoff = wait_exponential_jitter(initial=0.5, max=30, jitter=1)


class Models:
    """Ask models through this.

    Args:
        cache: directory of the reply store (``data/cache``).
        apis: ``mock`` or ``live``.
        run, track, stage: what the spending is for.
        budget_usd: the most that may ever be spent for ``run``; None = no cap.
        batch: send questions in batches, at half price, to models that have them; see :mod:`shared.llm.batch`.
    """

    def __init__(
        self,
        cache: Path,
        apis: str,
        run: str,
        stage: str,
        track: str = "",
        budget_usd: float | None = None,
        batch: bool = False,
    ) -> None:
        self.apis, self.run, self.stage, self.track = apis, run, stage, track
        self.budget_nano = None if budget_usd is None else round(budget_usd * NANO)
        self.store = Store(cache / f"{apis}.sqlite")
        self.concurrency = 8
        self._stack = ExitStack()
        self._providers: dict[str, Provider] = {}
        self._cache = cache
        self._limiters: dict[tuple[str, str], Limiter] = {}
        self._outputs: dict[str, float] = {}  # mean tokens of an answer, by model
        self._on_disk = 0  # calls that wait for the store, and keep nobody from asking
        self._on_wire = 0  # calls that wait for their answer
        self._windows: set[asyncio.Event] = set()
        self._inflight: dict[str, asyncio.Task[Any]] = {}
        self._sent: set[asyncio.Task[Any] | None] = set()
        self._closing = False
        self._rehearsal: asyncio.Task[None] | None = None
        self._required: set[str] = set()
        self._embedders: set[str] = set()
        self._runner = asyncio.Runner()
        self._spending = Spending()
        self._nano = 0
        self._told_waiting, self._purse = False, asyncio.Lock()
        self._counts: Counter[str] = Counter()
        self._batches: Batches | None = None
        if batch:
            whose = (run, track, stage)
            self._batches = Batches(self.store, self._provider, apis, *whose, self.budget_nano, self._count)

    def __enter__(self) -> Self:
        cloud.connect(self.apis, self._stack, self._cache / "standin")
        if self._batches is None and (nano := set_aside(self.store, self.run)):
            print(
                f"batches of RUN={self.run} are under way at their providers, for up to ${nano / NANO:.4f}: "
                "BATCH=1 picks them up; what is in them and asked now is paid twice",
                file=sys.stderr,
            )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self._close())
        finally:
            self._runner.close()
            self.store.close()
            for limiter in self._limiters.values():
                limiter.shared.close()
            self._stack.close()

    async def _close(self) -> None:
        """Keep the answers under way, send no new question, then close the clients."""
        self._closing = True
        if self._batches:
            self._batches.closing = True
        creating = self._batches.creating if self._batches else set()
        self._sent |= creating
        tasks = set(self._inflight.values()) | creating
        # Whatever else runs here asks: the items of a map() whose generator was not closed (an exception in the stage,
        # while a local name still holds it) would go on to their next questions.
        for task in asyncio.all_tasks() - (tasks & self._sent) - {asyncio.current_task()}:
            task.cancel()
        if self._batches and (waiting := self._batches.under_way()):
            with contextlib.suppress(OSError):
                print(f"{waiting} go on without us; the same command picks them up", file=sys.stderr)
        if under_way := tasks & self._sent:
            with contextlib.suppress(OSError):  # `make full 2>&1 | tee log`: Ctrl-C ends tee first
                print(f"waiting for {len(under_way)} answers under way, to keep them", file=sys.stderr)
        if tasks:
            await asyncio.wait(tasks, timeout=DRAIN_S)
        for provider in self._providers.values():
            with contextlib.suppress(Exception):
                await provider.close()

    # -- before anything is spent

    def require(self, *models: str) -> None:
        """Check that every model's price is known and its key set; ``ask`` refuses models that were not named here.

        Raises:
            BudgetError: a price is unknown.
            KeyMissingError: a key is not set.
            SettingsError: a model's name is not ``provider/name``.
        """
        for model in models:
            catalogue().card(model)
            check_key(self._provider(model.partition("/")[0]))
            self._required.add(model)

    def require_embedder(self, model: str) -> OpenAI:
        """As :meth:`require`, for a model that makes vectors.

        Raises:
            SettingsError: the provider has no embeddings we speak.
        """
        self.require(model)
        self._embedders.add(model.partition("/")[0])
        provider = self._provider(model.partition("/")[0])
        if not isinstance(provider, OpenAI):
            raise SettingsError(f"embeddings come from openai/ or endpoint/ models, got {model!r}", "edit the settings")
        if provider.name == "endpoint" and self.apis == "live" and not os.environ.get("OPENAI_BASE_URL"):
            # Without it the OpenAI client goes to OpenAI, with our texts and the other server's key.
            raise SettingsError(f"{model} has no address", "set OPENAI_BASE_URL to your server's, http://host:port/v1")
        return provider

    # -- many, in order

    def map(
        self, work: Callable[[T], Coroutine[Any, Any, R]], items: Iterable[T], concurrency: int
    ) -> Iterator[tuple[T, R]]:
        """Run ``work`` over ``items``; yield ``(item, result)`` in input order.

        At most ``concurrency`` items are under way and ``WINDOW`` times as many wait to be delivered, whatever the
        number of items. As many more may begin as have an answer being written to the store, and a few when all others
        wait for theirs, so that our latency does not add to the provider's. Of the calls to one model, never more than
        ``concurrency`` are under way. In batches, as many items are under way instead as ask
        :data:`shared.llm.batch.QUESTIONS` questions, and at most so many more wait to be delivered.
        The first fatal error stops everything; answers under way are kept.
        """
        if concurrency < 1:
            raise SettingsError(f"concurrency must be at least 1, got {concurrency}", "edit the stage's settings")
        self.concurrency = concurrency
        for limiter in self._limiters.values():
            limiter.resize(concurrency)
        stream = self._windowed(work, iter(items), concurrency)
        try:
            while (batch := self._runner.run(_await(anext(stream, None)))) is not None:
                yield from batch
        finally:
            if not self._closing:  # closed after us: the loop is gone, and the items with it
                self._runner.run(_await(stream.aclose()))

    async def _windowed(
        self, work: Callable[[T], Coroutine[Any, Any, R]], items: Iterator[T], concurrency: int
    ) -> AsyncGenerator[list[tuple[T, R]]]:
        window: deque[tuple[T, asyncio.Task[R]]] = deque()
        active: set[asyncio.Task[R]] = set()
        changed = asyncio.Event()
        self._windows.add(changed)
        failed: list[BaseException] = []
        timer: list[asyncio.TimerHandle] = []

        def ended(task: asyncio.Task[R]) -> None:
            active.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                failed.append(error)
            changed.set()

        more, loop, deliver_at = True, asyncio.get_running_loop(), 0.0

        def fill() -> None:
            nonlocal more
            deep, begun = self._in_batches, 0
            most = 2 * QUESTIONS if deep else concurrency * WINDOW
            while more and len(active) < self._items(concurrency) and len(window) < most:
                if deep and begun == BEGIN:  # how much they ask is known when they have begun
                    loop.call_soon(changed.set)
                    break
                try:
                    item = next(items)
                except StopIteration:
                    more = False
                    break
                begun += 1
                task = asyncio.create_task(work(item))
                task.add_done_callback(ended)
                active.add(task)
                window.append((item, task))

        async def next_ready() -> list[tuple[T, R]]:
            """Keep the window full until its head is done; [] at the end."""
            nonlocal deliver_at
            while True:
                fill()
                if failed:
                    raise failed[0]
                if not window:
                    return []
                if window[0][1].done():
                    if not active or loop.time() >= deliver_at - 0.001:  # timers may be early
                        break
                    if not timer:
                        timer.append(loop.call_at(deliver_at, changed.set))
                changed.clear()
                await changed.wait()
            for due in timer:
                due.cancel()
            timer.clear()
            ready = []
            while window and window[0][1].done():
                item, task = window.popleft()
                ready.append((item, task.result()))
            deliver_at = loop.time() + DELIVER_S
            return ready

        try:
            while True:
                with tracing.span("batch", stage=self.stage) as span:
                    ready = await next_ready()
                    span.set(records=len(ready))
                if not ready:
                    return
                yield ready
        finally:
            self._windows.discard(changed)
            for task in active:
                task.cancel()
            if active:
                await asyncio.wait(active)

    def _items(self, concurrency: int) -> int:
        """How many items may be under way, so that ``concurrency`` calls are."""
        if self._in_batches:
            return QUESTIONS if len(self._inflight) < QUESTIONS else 0
        # A few more when all wait for answers: the next question is then ready when a place is free.
        ahead = concurrency // 8 + 1 if self._on_wire >= concurrency else 0
        return concurrency + min(self._on_disk, concurrency) + ahead

    @property
    def _in_batches(self) -> bool:
        """Whether items wait for batches: those who ask no model that has them must not read all the input ahead."""
        return self._batches is not None and any(map(has_batches, self._required))

    def one(self, work: Awaitable[R]) -> R:
        """Run one awaitable on the loop all calls share."""
        return self._runner.run(_await(work))

    # -- one

    async def ask(self, request: Request, tries: int = 3) -> Reply:
        """The answer to a request, from the store if it was ever answered.

        An answer that is cut off, refused, empty or not the JSON asked for is paid and kept; the question is then asked
        again under another index (with twice the room when it was cut off), up to ``tries`` times.

        Returns:
            A reply whose ``problem`` is empty, or says why there is no usable answer.

        Raises:
            BudgetError, KeyMissingError, ProviderError: nothing more can be asked; what was answered is saved.
        """
        if request.provider == "endpoint" and not request.base_url and self.apis == "live":
            raise SettingsError(f"{request.model} has no base_url", "set base_url to your server's address, .../v1")
        assert request.model in self._required, f"{self.stage} must call models.require({request.model!r}) first"
        usage, cached, reply = Usage(), True, None
        for attempt in range(tries):
            reply = await self._attempt(request, attempt)
            usage, cached = usage + reply.usage, cached and reply.cached
            if reply.problem not in ("truncated", "refused", "invalid_json", "empty"):
                break
            if reply.problem == "truncated":
                request = request.model_copy(update={"max_tokens": request.max_tokens * 2})
        assert reply is not None
        return reply.model_copy(update={"usage": usage, "cached": cached, "tries": attempt + 1})

    async def _attempt(self, request: Request, attempt: int) -> Reply:
        card = catalogue().card(request.model)
        wire = self._provider(request.provider).wire(request, card)
        key = request_key(wire, request.model, request.base_url, request.repeat, attempt)
        answer = self.store.answer(key)
        cached = answer is not None
        bound = 0 if answer is not None else request.input_tokens_bound()
        if answer is None and card.max_input is not None and bound > card.max_input:
            detail = f"up to {bound:,} tokens; the price of {request.model} above {card.max_input:,} is not known"
            return Reply(key="", problem="bad_request", detail=detail)
        if answer is None:
            # The sending task is shared by everyone who asks the same thing now, and outlives whoever is cancelled.
            task: asyncio.Task[Answer] | None = self._inflight.get(key)
            cached = task is not None
            if task is None:
                again = f"{request.repeat}.{attempt}" if request.repeat or attempt else ""
                task = self._launch(self._send(request, wire, key, again, bound), [key])
            try:
                answer = await asyncio.shield(task)
            except BadRequestError as error:
                return Reply(key="", problem="bad_request", detail=str(error))
            except TransientError as error:
                return Reply(key="", problem="unavailable", detail=str(error))
        self._spending.cached += cached
        problem, detail, parsed = judge_answer(answer, request.response)
        return Reply(
            key=key, text=answer.text, parsed=parsed, problem=problem, detail=detail, usage=answer.usage, cached=cached
        )

    def _launch(self, work: Coroutine[Any, Any, R], keys: Iterable[str]) -> asyncio.Task[R]:
        """Start what brings the answers of these keys, on its own, so that it outlives whoever is cancelled."""
        task = asyncio.create_task(work)
        for key in keys:
            self._inflight[key] = task

        def landed(_: asyncio.Task[R]) -> None:
            for key in keys:
                self._inflight.pop(key, None)
            self._sent.discard(task)
            if not task.cancelled():
                task.exception()  # whoever waits sees it; nobody waiting is no warning

        task.add_done_callback(landed)
        return task

    async def _rehearse(self) -> None:
        """Before the first question, let every SDK that will be used load what it loads when it is first used.

        That takes up to seconds in which nothing else is done, and an answer that came meanwhile would not be kept yet.
        """
        for name, provider in list(self._providers.items()):
            await provider.rehearse()
            if isinstance(provider, OpenAI) and name in self._embedders:
                await provider.rehearse_embeddings()

    async def _send(self, request: Request, wire: dict[str, Any], key: str, again: str, bound: int) -> Answer:
        worst = catalogue().worst_nano(request, bound)
        provider, model = self._provider(request.provider), request.model
        if self._batches and has_batches(model):
            ask = Ask(model, key, again, wire, worst // 2, len(orjson.dumps(wire)))
            if (answered := await self._batches.answer(ask)) is not None:
                return answered
        expected = self._outputs.get(model, request.max_tokens / 4)
        self.store.check_room()
        reserved = await self._reserve(worst)
        try:
            with tracing.span("model call", model=model, stage=self.stage, repeat=request.repeat) as span:
                span.text(prompt="\n\n".join(message.content for message in request.messages))
                answer = await self._persist(
                    model,
                    request.base_url,
                    _costs(bound / BYTES_PER_TOKEN, expected),
                    lambda hear: provider.send(wire, request.base_url, again, hear),
                )
                span.set(input_tokens=answer.usage.input, output_tokens=answer.usage.output, stop=answer.stop)
                span.text(answer=answer.text)
        except BaseException:
            await self.store.release(reserved)
            raise
        self._outputs[model] = 0.9 * expected + 0.1 * answer.usage.output
        with self._waiting_for_the_disk():
            await self.store.put(self._entry(key, model, answer.usage), wire, answer, reserved)
        return answer

    @contextlib.contextmanager
    def _waiting_for_the_disk(self) -> Iterator[None]:
        """Let others ask meanwhile."""
        self._on_disk += 1
        for window in self._windows:
            window.set()
        try:
            yield
        finally:
            self._on_disk -= 1

    def _entry(self, key: str, model: str, usage: Usage) -> Entry:
        nano = catalogue().card(model).price().nano(usage)
        entry = Entry(
            key=key,
            model=model,
            run=self.run,
            track=self.track,
            stage=self.stage,
            input=usage.input,
            output=usage.output,
            cached=usage.cached,
            nano=nano,
        )
        self._count(entry)
        return entry

    def _count(self, entry: Entry) -> None:
        self._nano += entry.nano
        self._counts[entry.model] += 1
        s = self._spending
        s.calls, s.input_tokens, s.output_tokens = (
            s.calls + 1,
            s.input_tokens + entry.input,
            s.output_tokens + entry.output,
        )

    async def _reserve(self, nano: int) -> int:
        """Set money aside for a call; how much was. Nothing to do, and nothing to wait for, without a budget."""
        if self.budget_nano is None or nano == 0:
            return 0
        if await self._reserved(nano, self.budget_nano):
            return nano
        async with self._purse:  # one asks again and again, not thousands
            await self._wait_for_budget(nano, self.budget_nano)
        return nano

    async def _reserved(self, nano: int, budget_nano: int) -> bool:
        with self._waiting_for_the_disk():
            return await self.store.reserve(self.run, nano, budget_nano)

    async def _wait_for_budget(self, nano: int, budget_nano: int) -> None:
        while not await self._reserved(nano, budget_nano):
            if self._batches:
                self._batches.sweep()
            elif aside := in_the_way(self.store, self.run, nano, budget_nano):
                raise BudgetError(
                    f"BUDGET_USD={budget_nano / NANO:g} is reached for RUN={self.run}: ${aside / NANO:.4f} of it "
                    "are set aside for batches that are under way at their providers",
                    f"pick them up: BATCH=1 make {self.run}",
                )
            if not self._told_waiting:
                self._told_waiting = True
                print("waiting: the rest of BUDGET_USD is set aside for calls under way", file=sys.stderr)
            await asyncio.sleep(RESERVE_AGAIN_S)

    async def _persist(
        self, model: str, base_url: str, costs: Costs, send: Callable[[Hear], Coroutine[Any, Any, R]]
    ) -> R:
        """Send until answered: in its turn, back off, obey Retry-After, slow down when told to.

        Raises:
            TransientError: given up on this call while others were being answered.
            ProviderError: given up, and nothing was answered by this model meanwhile: the provider is down, or it has
                refused every call of every process for :data:`PATIENCE_S`.
        """
        if self._rehearsal is None:
            self._rehearsal = asyncio.create_task(self._rehearse())
        await asyncio.shield(self._rehearsal)
        limiter = self._limiter(model, base_url)
        answered = self._counts[model]
        task = asyncio.current_task()
        started = asyncio.get_running_loop().time()
        failures = refusals = 0

        async def once() -> R:
            async with limiter.slot(costs) as ticket:

                def hear(got: Answered) -> None:
                    limiter.heard(ticket, got.headers, got.status == 200)

                self._sent.add(task)
                self._on_wire += 1
                try:
                    return await send(hear)
                except TransientError as error:
                    self._sent.discard(task)
                    if error.limited:
                        limiter.refused(error.after_s, error.overloaded)
                    raise
                finally:
                    self._on_wire -= 1

        def stop(state: RetryCallState) -> bool:
            nonlocal failures, refusals
            error = state.outcome.exception() if state.outcome else None
            self._spending.retries += 1
            if self._closing:
                return True
            if isinstance(error, TransientError) and error.limited:
                refusals += 1
                tried = asyncio.get_running_loop().time() - started
                return limiter.refused_for() > PATIENCE_S or (refusals >= FAILURES and tried > PATIENCE_S)
            failures += 1
            return failures >= FAILURES

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, TransientError) and error.limited:
                return 0.0  # the limiter is closed for as long as it must be
            after = error.after_s if isinstance(error, TransientError) else None
            return _backoff(state) if after is None else min(after, MAX_WAIT_S)

        first: TransientError | None = None
        try:
            return await once()
        except TransientError as error:
            first = error
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TransientError), wait=wait, stop=stop, reraise=True
            ):
                with attempt:
                    if first is not None:  # the first try, made above: tenacity costs as much as the call itself
                        failure, first = first, None
                        raise failure
                    return await once()
        except TransientError as error:
            if self._counts[model] != answered or (error.limited and not limiter.refused_for()):
                raise
            seconds = asyncio.get_running_loop().time() - started
            if error.limited:
                raise ProviderError(
                    f"{error}; {model} has refused every call for {max(seconds, limiter.refused_for()):.0f} s",
                    "everything answered is saved; when your limits there have room again (or were raised), "
                    "run the same command",
                ) from error
            raise ProviderError(
                f"{error}; no answer in {seconds:.0f} s",
                "everything answered is saved; when the provider is back, run the same command",
            ) from error
        raise AssertionError("unreachable")

    def _limiter(self, model: str, base_url: str) -> Limiter:
        limiter = self._limiters.get((model, base_url))
        if limiter is None:
            if not self._limiters:
                forget_old(self._cache)
            where = os.environ.get("SYNTHMILL_CONNECTED", "") if self.apis == "mock" else "live"
            shared = Shared(file_of(self._cache, where, model, base_url))
            limiter = self._limiters[model, base_url] = Limiter(shared, self.concurrency)
        return limiter

    # -- embeddings

    async def embed(self, model: str, texts: list[str], dimensions: int) -> list[array.array[float] | None]:
        """Vectors of ``texts``, float32, in order; each text is paid for once, whoever asks.

        None for a text the provider refuses (too long for the model, say).

        Raises:
            SettingsError: the provider has no embeddings we speak.
            BudgetError, KeyMissingError, ProviderError: as :meth:`ask`.
        """
        assert model in self._required, f"{self.stage} must call models.require({model!r}) first"
        provider = self.require_embedder(model)
        name = model.partition("/")[2]
        keys = [request_key({"model": name, "dimensions": dimensions, "text": t}, model, "", 0, 0) for t in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if self.store.vector(key) is None}
        fresh = {key: text for key, text in missing.items() if key not in self._inflight}
        self._spending.cached += len(set(keys)) - len(fresh)
        for part in _parts(fresh):
            self._launch(self._embed_part(provider, model, part, dimensions), part)
        tasks = {self._inflight[key] for key in missing}
        try:
            await asyncio.gather(*(asyncio.shield(task) for task in tasks))
        except TransientError as error:
            raise ProviderError(
                f"no vectors: {error}", "everything answered is saved; when the provider is back, run the same command"
            ) from error
        return [_floats(self.store.vector(key)) for key in keys]

    async def _embed_part(self, provider: OpenAI, model: str, part: dict[str, str], dimensions: int) -> None:
        wire = {"model": model.partition("/")[2], "input": list(part.values()), "dimensions": dimensions}
        bound = sum(_bound(text) for text in part.values())
        self.store.check_room()
        reserved = await self._reserve(catalogue().card(model).price().nano(Usage(input=bound)))
        try:
            vectors, usage = await self._persist(
                model, "", _costs(bound / BYTES_PER_TOKEN, 0.0), lambda hear: provider.embed(wire, hear)
            )
        except BadRequestError:
            await self.store.release(reserved)
            # One text may spoil the request for all: ask for each half, down to the text that is refused alone.
            rows = list(part.items())
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ():
                await self._embed_part(provider, model, dict(half), dimensions)
            return
        except BaseException:
            await self.store.release(reserved)
            raise
        key = request_key(wire, model, "", 0, 0)
        packed = {k: v.tobytes() for k, v in zip(part, vectors, strict=True)}
        await self.store.put_vectors(self._entry(key, model, usage), packed, reserved)

    # -- after

    def spending(self) -> Spending:
        """What this process did so far."""
        return self._spending.model_copy(
            update={"cost_usd": self._nano / NANO, "models": dict(sorted(self._counts.items()))}
        )

    def _provider(self, name: str) -> Provider:
        if name not in PROVIDERS:
            raise SettingsError(
                f"{name} answers no questions; those who do: {', '.join(PROVIDERS)}", "edit the stage's settings"
            )
        if name not in self._providers:
            self._providers[name] = PROVIDERS[name]()
        return self._providers[name]


def _costs(input_tokens: float, output_tokens: float) -> Costs:
    return 1.0, input_tokens + output_tokens, input_tokens, output_tokens


async def _await(work: Awaitable[R]) -> R:
    return await work


def _bound(text: str) -> int:
    """No token is shorter than a byte."""
    return len(text.encode("utf-8", "replace")) + 1


def _floats(data: bytes | None) -> array.array[float] | None:
    if data is None:
        return None
    vector = array.array("f")
    vector.frombytes(data)
    return vector


def _parts(texts: dict[str, str]) -> Iterator[dict[str, str]]:
    """The texts in pieces a request may hold."""
    part: dict[str, str] = {}
    tokens = 0
    for key, text in texts.items():
        if part and (len(part) == EMBED_TEXTS or tokens + _bound(text) > EMBED_TOKENS):
            yield part
            part, tokens = {}, 0
        part[key] = text
        tokens += _bound(text)
    if part:
        yield part


def budget_from_env() -> float | None:
    """``BUDGET_USD`` as a number; None when it is not set.

    Raises:
        SettingsError: it is not a number, or negative.
    """
    text = os.environ.get("BUDGET_USD", "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SettingsError(f"BUDGET_USD must be dollars, 0 or more, got {text!r}", "BUDGET_USD=5 make trial")
    return value
