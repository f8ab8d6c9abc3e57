"""The batch APIs of Anthropic, OpenAI and Gemini, through their SDKs, as one: create, look, results, find again.

A batch has a name, 12 hex digits, and each request in it a ``custom_id`` that begins with its key and the name: by them
it is known again when the process that created it was killed before it heard the provider's id for it.

Verified by running anthropic 2.11.0, openai 3.52.0 and google-genai 3.4.0; the limits are the vendors', dated below.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from shared.llm.providers import Anthropic, Gemini, NotFoundError, OpenAI, Provider, TransientError, Wire
from shared.llm.types import Answer

LONG_S = 900.0
"""To upload a batch, or to download its results: 200 MB at 2 Mbit/s."""
CLOCKS_S = 3600.0
"""How much the provider's clock may differ from ours: older batches are not looked at for one of ours."""
PAGE, PAGES = 100, 20
"""Batches listed at once, and how often, to find one again."""
MARGIN = 0.9
"""Share of a limit in bytes that we fill: what the SDK and the protocol put around a request is not counted."""
MARK = "synthmill"

Asked = tuple[str, Wire]
"""A request: its custom_id and its wire body."""


class Limits(NamedTuple):
    """What one batch may hold."""

    requests: int
    bytes: int


class State(NamedTuple):
    """How a batch stands.

    Attributes:
        ended: nothing more will be answered.
        said: for a person, ``in_progress, 12 of 340``.
        wrong: why it failed as a whole; ``""`` when it did not.
        full: because more of ours waits at the provider than it takes; later it may have room.
    """

    ended: bool
    said: str
    wrong: str = ""
    full: bool = False


class BatchApi(Protocol):
    """What the three have in common. All may raise what a call may; :class:`NotFoundError`: the batch is gone."""

    limits: Limits

    async def create(self, name: str, model: str, asked: Sequence[Asked]) -> str:
        """Submit; the provider's id."""

    async def find(self, name: str, since: float, count: int, known: Collection[str]) -> tuple[str, bool]:
        """The provider's id of a batch that may have been created after ``since``, or ``""``; and whether that is sure.

        ``count``: its requests; ``known``: ids of other batches of ours.
        """

    async def look(self, identity: str) -> State:
        """How it stands."""

    def results(self, identity: str) -> AsyncIterator[tuple[str, Answer | str]]:
        """custom_id, and the answer or why there is none, in any order; a request may be missing."""


def custom_id(key: str, name: str, again: str) -> str:
    """At most 64 of ``[a-zA-Z0-9_-]`` (Anthropic, believed); ``again`` is for logs, and for whoever answers by rule."""
    return "_".join([key[:32], name, again.replace(".", "-")][: 3 if again else 2])


def name_of(custom: str) -> str:
    """The batch of a custom_id; ``""`` when it is none of ours."""
    return custom.partition("_")[2].partition("_")[0]


# ---------------------------------------------------------------- Anthropic


class AnthropicBatches:
    """Message Batches. They have no name: one is known again by the custom_ids in its results, once it has ended."""

    # platform.claude.com/docs/en/build-with-claude/batch-processing, read 2026-11; results are kept for 29 days
    limits = Limits(100_000, 256_000_000)

    def __init__(self, provider: Anthropic) -> None:
        self.provider = provider

    @property
    def _batches(self) -> Any:
        return self.provider.client().messages.batches

    async def create(self, name: str, model: str, asked: Sequence[Asked]) -> str:
        requests = [{"custom_id": custom, "params": wire} for custom, wire in asked]
        with self.provider.errors():
            batch = await self._batches.create(requests=requests, timeout=LONG_S)
        return str(batch.id)

    async def find(self, name: str, since: float, count: int, known: Collection[str]) -> tuple[str, bool]:
        sure, listed = True, 0
        with self.provider.errors():
            async for batch in self._batches.list(limit=PAGE):
                listed += 1
                if batch.created_at.timestamp() < since - CLOCKS_S or listed > PAGE * PAGES:
                    break
                counts = batch.request_counts.model_dump(include=set(type(batch.request_counts).model_fields))
                if batch.id in known or sum(counts.values()) != count:
                    continue
                if batch.processing_status != "ended":
                    sure = False
                elif batch.results_url and await self._first(batch.id) == name:
                    return str(batch.id), True
        return "", sure

    async def _first(self, identity: str) -> str:
        """The name in a batch's first result: all of its requests have the same."""
        async for row in await self._batches.results(identity, timeout=LONG_S):
            return name_of(row.custom_id)
        return ""

    async def look(self, identity: str) -> State:
        with self.provider.errors():
            batch = await self._batches.retrieve(identity)
        ended = batch.processing_status == "ended"
        if ended and not batch.results_url:
            raise NotFoundError(f"the results of {identity} are archived")
        return State(ended, str(batch.processing_status))

    async def results(self, identity: str) -> AsyncIterator[tuple[str, Answer | str]]:
        with self.provider.errors():
            async for row in await self._batches.results(identity, timeout=LONG_S):
                if row.result.type == "succeeded":
                    yield row.custom_id, _answer(self.provider, row.result.message)
                else:
                    wrong = getattr(getattr(row.result, "error", None), "error", None)
                    yield row.custom_id, f"{row.result.type} {getattr(wrong, 'message', '')}".strip()


# ---------------------------------------------------------------- OpenAI


class OpenAIBatches:
    """Batches of chat completions, from an uploaded file; the name is in their metadata."""

    # openai 3.52.0, docstring of batches.create; output files are kept for 30 days
    limits = Limits(50_000, 200_000_000)

    def __init__(self, provider: OpenAI) -> None:
        self.provider = provider

    async def create(self, name: str, model: str, asked: Sequence[Asked]) -> str:
        url = "/v1/chat/completions"
        file = _jsonl({"custom_id": custom, "method": "POST", "url": url, "body": wire} for custom, wire in asked)
        client = self.provider.client()
        with self.provider.errors():
            uploaded = await client.files.create(file=(f"{name}.jsonl", file), purpose="batch", timeout=LONG_S)
            batch = await client.batches.create(
                input_file_id=uploaded.id, endpoint=url, completion_window="24h", metadata={MARK: name}
            )
        return str(batch.id)

    async def find(self, name: str, since: float, count: int, known: Collection[str]) -> tuple[str, bool]:
        listed = 0
        with self.provider.errors():
            async for batch in self.provider.client().batches.list(limit=PAGE):
                listed += 1
                if (batch.metadata or {}).get(MARK) == name:
                    return str(batch.id), True
                if batch.created_at < since - CLOCKS_S or listed > PAGE * PAGES:
                    break
        return "", True

    async def look(self, identity: str) -> State:
        with self.provider.errors():
            batch = await self.provider.client().batches.retrieve(identity)
        ended = batch.status in ("completed", "failed", "expired", "cancelled")
        counts, wrong = batch.request_counts, (batch.errors.data or []) if batch.errors else []
        said = f"{batch.status}, {counts.completed + counts.failed} of {counts.total}" if counts else str(batch.status)
        why = "; ".join(f"{error.code} {error.message}" for error in wrong[:3]) or "it failed"
        full = any(error.code == "token_limit_exceeded" for error in wrong)
        return State(ended, said, why if batch.status == "failed" else "", full)

    async def results(self, identity: str) -> AsyncIterator[tuple[str, Answer | str]]:
        from openai.types.chat import ChatCompletion

        client = self.provider.client()
        with self.provider.errors():
            batch = await client.batches.retrieve(identity)
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                content = await client.files.content(file, timeout=LONG_S)
                for row in _rows(content.content):
                    answer, wrong = row.get("response") or {}, row.get("error") or {}
                    if answer.get("status_code") == 200:
                        yield row["custom_id"], _answer(self.provider, ChatCompletion.construct(**answer["body"]))
                    else:
                        wrong = wrong or (answer.get("body") or {}).get("error") or {}
                        code = wrong.get("code") or answer.get("status_code") or "errored"
                        yield row["custom_id"], f"{code} {wrong.get('message') or ''}".strip()


# ---------------------------------------------------------------- Gemini


class GeminiBatches:
    """Batches of generateContent: in the request itself while it stays small, else from an uploaded file."""

    # ai.google.dev/gemini-api/docs/batch-api, read 2026-11: inline below 20 MB, files to 2 GB (we stop at a tenth);
    # of a number of requests it says nothing; a job ends after 48 hours, its file is kept as long
    limits = Limits(50_000, 200_000_000)
    inline_bytes = 20_000_000

    def __init__(self, provider: Gemini) -> None:
        self.provider = provider

    def _options(self) -> Any:
        from google.genai import types

        # The pages give batches and files under v1beta alone; the SDK's default is v1.
        return types.HttpOptions(api_version="v1beta", timeout=int(LONG_S * 1000))

    async def create(self, name: str, model: str, asked: Sequence[Asked]) -> str:
        client = self.provider.client().aio
        from google.genai import types

        file = _jsonl({"key": custom, "request": _rest(wire)} for custom, wire in asked)
        source: Any = None
        if len(file) <= self.inline_bytes * MARGIN:
            configs = [types.GenerateContentConfig(**wire["config"]) for _, wire in asked]
            source = [
                types.InlinedRequest(contents=wire["contents"], config=config, metadata={"key": custom})
                for (custom, wire), config in zip(asked, configs, strict=True)
            ]
        with self.provider.errors():
            if source is None:
                config = types.UploadFileConfig(mime_type="application/jsonl", http_options=self._options())
                source = (await client.files.upload(file=io.BytesIO(file), config=config)).name
            options = types.CreateBatchJobConfig(display_name=f"{MARK}-{name}", http_options=self._options())
            job = await client.batches.create(model=model, src=source, config=options)
        return str(job.name)

    async def find(self, name: str, since: float, count: int, known: Collection[str]) -> tuple[str, bool]:
        listed = 0
        with self.provider.errors():
            options = {"page_size": PAGE, "http_options": self._options()}
            async for job in await self.provider.client().aio.batches.list(config=options):
                listed += 1
                if job.display_name == f"{MARK}-{name}":
                    return str(job.name), True
                if listed > PAGE * PAGES:  # in which order they come is not documented
                    break
        return "", True

    async def _get(self, identity: str) -> Any:
        with self.provider.errors():
            return await self.provider.client().aio.batches.get(name=identity, config={"http_options": self._options()})

    async def look(self, identity: str) -> State:
        job = await self._get(identity)
        state = str(getattr(job.state, "value", job.state)).removeprefix("JOB_STATE_").lower()
        ended = state in ("succeeded", "partially_succeeded", "failed", "cancelled", "expired")
        return State(ended, state, "it failed" if state == "failed" else "")

    async def results(self, identity: str) -> AsyncIterator[tuple[str, Answer | str]]:
        job = await self._get(identity)
        from google.genai import types

        for row in (job.dest.inlined_responses or []) if job.dest else []:
            custom = (row.metadata or {}).get("key", "")
            yield custom, _answer(self.provider, row.response) if row.response else _why(row.error)
        if job.dest and job.dest.file_name:
            with self.provider.errors():
                content = await self.provider.client().aio.files.download(
                    file=job.dest.file_name, config={"http_options": self._options()}
                )
            for found in _rows(content):
                if "response" in found:
                    reply = types.GenerateContentResponse._from_response(response=found["response"], kwargs={})
                    yield found["key"], _answer(self.provider, reply)
                else:
                    yield found["key"], _why(found.get("error") or found.get("status"))


def _rest(wire: Wire) -> Wire:
    """The body that the SDK sends for a request of its own, for a file that we write."""
    from google.genai import types

    config = types.GenerateContentConfig(**wire["config"]).model_dump(mode="json", by_alias=True, exclude_none=True)
    system = config.pop("systemInstruction", None)
    config.pop("automaticContinuation", None)  # how the SDK behaves, not the model
    named = {"systemInstruction": {"parts": [{"text": system}], "role": "user"}} if system else {}
    return {"contents": wire["contents"], **named, "generationConfig": config}


def _why(error: Any) -> str:
    found = error if isinstance(error, dict) else error.model_dump() if error is not None else {}
    return f"errored {found.get('message') or ''}".strip()


# ---------------------------------------------------------------- all three

APIS: dict[str, Any] = {"anthropic": AnthropicBatches, "openai": OpenAIBatches, "gemini": GeminiBatches}
"""By provider; whoever is not here has no batches, or none at half price."""


def batch_api(provider: Provider) -> BatchApi:
    """The batches of a provider of :data:`APIS`."""
    api: BatchApi = APIS[provider.name](provider)
    return api


def _answer(provider: Any, typed: Any) -> Answer | str:
    try:
        answer: Answer = provider.answer(typed)
    except TransientError as error:
        return str(error)
    return answer


def _jsonl(rows: Any) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def _rows(content: bytes) -> list[Wire]:
    """The objects of a JSONL file; a line that is none tells of nothing."""
    rows = []
    for line in content.split(b"\n"):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and ("custom_id" in row or "key" in row):
            rows.append(row)
    return rows
