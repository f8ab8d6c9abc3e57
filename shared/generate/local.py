"""The local generator: mlx-lm's continuous batching over many questions, every finished text stored at once.

Three things make a night's run safe to kill and its result independent of how it was batched:

- every question samples from its own key, made of the seed and its id, so neither order nor batch mates matter;
- every finished text is in the store before the next step, under a hash of all it depends on;
- only what the store lacks is generated, and when it lacks nothing the model is not even loaded.

On Metal the logits of a row can differ in their last bits with the size of its batch, so two *first* runs may differ
there in a few texts; what is stored stays. On the CPU they do not (tests/stages/test_03_compress.py).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from pydantic import Field

from shared.errors import SettingsError
from shared.generate.outcome import Ask, Outcome, Sampling, unfit
from shared.generate.store import Finished, GenerationStore
from shared.local_models import COMMIT, adapter_identity, load, local_adapter, model_identity, pinned_model
from shared.records import Message, content_id
from shared.stage import Settings

KV_STEP = 256
"""mlx-lm allocates the key-value cache in steps of this many tokens."""
RESERVE_BYTES = 1 << 30
"""Left free beside weights and key-value cache: activations of the prefill and the copies made when a batch changes."""
BATCH_CAP_16_GB, BATCH_CAP = 8, 32
"""At 32, mlx-lm's own default, Qwen3-4B runs out of memory on a 16 GB Mac (ml-explore/mlx-lm#1808)."""
PREFILL_ROWS = 8

SENTINELS = ("a", "Z", "7", " ", "\n\n", "{", "中")
"""Texts whose first characters differ in every way a tokenizer may care about, to find the prompts' common tokens."""


class MlxSettings(Settings):
    """What runs on this machine; see the comments in the TOML."""

    model: str
    revision: str = Field(default="", pattern=COMMIT)
    adapter: str = ""
    adapter_revision: str = Field(default="", pattern=COMMIT)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=0, ge=0)
    max_prompt_tokens: int = Field(default=4096, ge=64)


class Job(NamedTuple):
    """One text to generate: its key in the store, its prompt in tokens, the seed of its sampler."""

    key: str
    tokens: array[int]
    seed: int


# ---------------------------------------------------------------- what a generation depends on


def row_seed(seed: int, ask_id: str) -> int:
    """64 bits for one question's sampler."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{ask_id}".encode()).digest()[:8], "big")


def generation_key(
    model: str, adapter: str, messages: Sequence[Message], sampling: Sampling, top_p: float, seed: int
) -> str:
    """32 hex digits over all that decides the output; the seed only where tokens are drawn at all."""
    drawn = (repr(sampling.temperature), repr(top_p), str(seed)) if sampling.temperature else ("greedy",)
    said = (part for message in messages for part in (message.role, message.content))
    return content_id(model, adapter, str(sampling.max_tokens), *drawn, *said)


def opening(asks: Sequence[Ask]) -> tuple[Message, ...]:
    """The system message, when all begin with the same one: its part of the prompt is computed once for all."""
    first = asks[0].messages[0]
    return (first,) if first.role == "system" and all(ask.messages[0] == first for ask in asks) else ()


# ---------------------------------------------------------------- the generator


class MlxGenerator:
    """Checks the settings when made; loads the model when there is something to generate.

    Args:
        services: called before the Hub client is imported (:meth:`shared.stage.Stage.services`).
        table: the settings' name of what ``settings`` holds, for messages.
        needed_by: the setting that asks for MLX, for messages; ``otherwise`` is what to do without it.
        without_adapter: what to do where there is no adapter yet, for messages.

    Raises:
        SettingsError: the model or the adapter is not where the settings say, or is not pinned.
    """

    def __init__(
        self,
        settings: MlxSettings,
        sampling: Sampling,
        services: Callable[[], None],
        *,
        table: str = "mlx",
        needed_by: str = "generator = 'mlx'",
        otherwise: str = "set generator = 'endpoint' in the settings",
        without_adapter: str = "make bootstrap",
    ) -> None:
        self.settings, self.sampling, self.services = settings, sampling, services
        self.needed_by, self.otherwise = needed_by, otherwise
        self.model = pinned_model(f"{table}.model", settings.model, settings.revision, f"{table}.revision")
        self.adapter = f"{settings.adapter}@{settings.adapter_revision}" if settings.adapter_revision else ""
        if settings.adapter and not self.adapter:
            mend = (
                f"{without_adapter}; or train one and put it there; or set {table}.adapter_revision when it is a "
                "repository on the Hub"
            )
            self.adapter = local_adapter(settings.adapter, mend)
        self._identity = model_identity(self.model), adapter_identity(self.adapter)
        self.summary: dict[str, Any] = {}

    def outcomes(
        self, asks: Sequence[Ask], store: GenerationStore, progress: Callable[[int], Any]
    ) -> Iterator[Outcome]:
        """The outcome of each question, in input order, once all are generated.

        The input is held in memory (about 4 KB a text), because the longest texts go first: rows are padded to the
        longest of their batch, so sorting nearly halves the work, and a batch that does not fit fails at once and not
        in the middle of the night.
        """
        keys = [self._key(ask) for ask in asks]
        outcomes: dict[str, Outcome] = {}
        missing: dict[str, Ask] = {}
        for ask, key in zip(asks, keys, strict=True):
            if problem := unfit(ask.messages):
                outcomes[key] = problem
            else:
                missing[key] = ask
        stored = store.find(list(missing))
        outcomes |= {key: self._outcome(finished) for key, finished in stored.items()}
        missing = {key: ask for key, ask in missing.items() if key not in stored}
        self.summary = {"stored": len(stored), "generated": 0}
        if missing:
            engine = Engine(self._load(), self.settings, self.sampling, self.otherwise)
            jobs = []
            for key, ask in missing.items():
                tokens = engine.tokens(ask.messages)
                if len(tokens) > self.settings.max_prompt_tokens:
                    limit = f"the limit is max_prompt_tokens = {self.settings.max_prompt_tokens:,}"
                    outcomes[key] = Outcome("", "prompt_too_long", f"{len(tokens):,} tokens; {limit}")
                else:
                    jobs.append(Job(key, tokens, row_seed(self.sampling.seed, ask.id)))
            with progress(len(jobs)) as bar:
                for finished in engine.run(jobs, opening(asks)):
                    store.add(finished)
                    for key, generation in finished:
                        outcomes[key] = self._outcome(generation)
                        bar.step()
            self.summary |= engine.summary
        for key in keys:
            yield outcomes[key]

    def _key(self, ask: Ask) -> str:
        seed = row_seed(self.sampling.seed, ask.id)
        return generation_key(*self._identity, ask.messages, self.sampling, self.settings.top_p, seed)

    def _outcome(self, finished: Finished) -> Outcome:
        if finished.finish_reason == "length":
            return Outcome(finished.text, "truncated", f"not finished after max_tokens = {finished.tokens} tokens")
        return Outcome(finished.text)

    def _load(self) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            SettingsError: mlx-lm is not installed, the Hub does not give the files, or they are no model and adapter.
        """
        return load(self.model, self.adapter, self.services, needed_by=self.needed_by, otherwise=self.otherwise)


# ---------------------------------------------------------------- the engine


def batch_size_for(
    memory_bytes: int, budget_bytes: int, weights_bytes: int, kv_bytes_per_token: int, row: int, otherwise: str
) -> int:
    """Rows that fit: (budget − weights − reserve) / (key-value bytes a token × tokens of the longest row), capped.

    Args:
        memory_bytes: of the machine; decides the cap, 8 up to 16 GB and 32 above.
        budget_bytes: what the model may use of it.
        row: tokens of the longest prompt and the longest output together.
        otherwise: what else to do, for the message.

    Raises:
        SettingsError: not even one row fits.
    """
    allocated = -(-row // KV_STEP) * KV_STEP
    fits = (budget_bytes - weights_bytes - RESERVE_BYTES) // (kv_bytes_per_token * allocated)
    if fits < 1:
        needed = weights_bytes + RESERVE_BYTES + kv_bytes_per_token * allocated
        raise SettingsError(
            f"the model needs {needed / 2**30:.1f} GiB for one text of {row:,} tokens, "
            f"and {budget_bytes / 2**30:.1f} GiB are there for it",
            f"lower max_prompt_tokens, take a smaller model, or {otherwise}",
        )
    return min(int(fits), BATCH_CAP_16_GB if memory_bytes <= 17 * 2**30 else BATCH_CAP)


@dataclass
class Engine:
    """A loaded model that generates a list of jobs."""

    loaded: tuple[Any, Any]
    settings: MlxSettings
    sampling: Sampling
    otherwise: str

    def __post_init__(self) -> None:
        self.model, self.tokenizer = self.loaded
        self.summary: dict[str, Any] = {}

    def tokens(self, messages: Sequence[Message]) -> array[int]:
        """The prompt, ready to be answered; 4 bytes a token, because all of them wait in memory."""
        turns = [message.model_dump() for message in messages]
        # Hybrid models get an empty think block; a template without the switch ignores it.
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
        return array("I", ids)

    def run(self, jobs: list[Job], shared: tuple[Message, ...]) -> Iterator[list[tuple[str, Finished]]]:
        """Generate every job; yields what finished in each step, in no particular order.

        ``shared``: the messages that all begin with.
        """
        if not jobs:
            return
        import mlx_lm.generate  # noqa: F401  (the name below is the function of the same name)
        from mlx_lm.generate import BatchGenerator

        # Wiring memory together with a churning prompt cache can panic the macOS kernel (ml-explore/mlx#3186), and a
        # model of a few gigabytes does not need it.
        sys.modules["mlx_lm.generate"].maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]

        batch_size = self.settings.batch_size or self._batch_size(max(len(job.tokens) for job in jobs))
        prefix = self._prefix(shared)
        cache = self._prefix_cache(prefix)
        queue = deque(sorted(jobs, key=lambda job: (-len(job.tokens), job.key)))
        live: dict[int, tuple[Job, list[int]]] = {}
        started, output_tokens = time.monotonic(), 0
        generator = BatchGenerator(
            self.model,
            max_tokens=self.sampling.max_tokens,
            stop_tokens=[[token] for token in sorted(self.tokenizer.eos_token_ids)],
            completion_batch_size=batch_size,
            prefill_batch_size=min(batch_size, PREFILL_ROWS),
        )
        try:
            with generator.stats() as stats:
                while queue or live:
                    while queue and len(live) < batch_size:  # no look-ahead: live rows are what memory was planned for
                        job = queue.popleft()
                        (uid,) = self._insert(generator, job, prefix, cache)
                        live[uid] = job, []
                    finished = []
                    for response in generator.next_generated():
                        job, tokens = live[response.uid]
                        if response.finish_reason != "stop":  # the token that ends the turn is no text
                            tokens.append(response.token)
                        if response.finish_reason:
                            finished.append(
                                (job.key, Finished(self._text(tokens), response.finish_reason, len(tokens)))
                            )
                            output_tokens += len(tokens)
                            del live[response.uid]
                    if finished:
                        yield finished
        except RuntimeError as error:
            if "memory" not in str(error).lower():
                raise
            raise SettingsError(
                f"out of memory with {batch_size} rows: {error}; every finished text is stored",
                f"set batch_size = {max(1, batch_size // 2)} and run the same command",
            ) from error
        finally:
            generator.close()
        seconds = time.monotonic() - started
        self.summary = {
            "generated": len(jobs),
            "batch_size": batch_size,
            "prefix_tokens": len(prefix),
            "prompt_tokens_read": stats.prompt_tokens,
            "output_tokens": output_tokens,
            "output_tokens_per_second": round(output_tokens / max(seconds, 1e-9), 1),
        }

    def _insert(self, generator: Any, job: Job, prefix: list[int], cache: Any) -> list[int]:
        """Queue a job behind the shared prefix, or whole when its prompt does not begin with it."""
        ids = job.tokens.tolist()
        shared = len(prefix) if len(ids) > len(prefix) and ids[: len(prefix)] == prefix else 0
        sampler = keyed_sampler(job.seed, self.sampling.temperature, self.settings.top_p)
        # The cache is copied into each row, but the list of tokens is appended to: every row needs its own.
        behind: dict[str, Any] = {"caches": [cache], "all_tokens": [ids[:shared]]} if shared else {}
        uids: list[int] = generator.insert([ids[shared:]], samplers=[sampler] if sampler else None, **behind)
        return uids

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def _prefix(self, shared: tuple[Message, ...]) -> list[int]:
        """The tokens every prompt begins with, whatever its text: the longest common *token* prefix.

        The last characters before the text may share a token with its first ones, so a string prefix would not do. It
        hangs on no text, so that a run that goes on after a kill computes what the whole run would have.
        """
        prompts = [self.tokens((*shared, Message(role="user", content=text))).tolist() for text in SENTINELS]
        columns = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
        return [column[0] for column in columns]

    def _prefix_cache(self, prefix: list[int]) -> Any:
        """The key-value cache of the shared prefix, computed once."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        if prefix:
            self.model(mx.array(prefix)[None], cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache

    def _batch_size(self, longest: int) -> int:
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.models.cache import make_prompt_cache

        device = mx.device_info()
        memory = int(device.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        budget = int(device.get("max_recommended_working_set_size") or memory // 2)
        weights = sum(value.nbytes for _, value in tree_flatten(self.model.parameters()))
        # Measured, because every architecture names its sizes differently: one token fills one step of the cache.
        cache = make_prompt_cache(self.model)
        self.model(mx.array([[0]]), cache=cache)
        per_token = sum(layer.nbytes for layer in cache) // KV_STEP
        return batch_size_for(
            memory, budget, weights, max(1, per_token), longest + self.sampling.max_tokens, self.otherwise
        )


def keyed_sampler(seed: int, temperature: float, top_p: float) -> Callable[[Any], Any] | None:
    """A sampler with a random stream of its own, so a row does not depend on its batch; None = greedy.

    The nucleus is cut before the temperature is applied, as mlx-lm's own sampler does.
    """
    if temperature == 0:
        return None
    import mlx.core as mx
    from mlx_lm.sample_utils import apply_top_p

    state = mx.random.key(seed)

    def sample(logprobs: Any) -> Any:
        nonlocal state
        state, key = mx.random.split(state)
        if top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        return mx.random.categorical(logprobs * (1 / temperature), key=key)

    return sample
