"""Asking models, through the real SDKs against the stand-in: each answer paid once, in order, within the budget."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

from shared.errors import BudgetError, KeyMissingError, ProviderError, SettingsError
from shared.llm import Models, Reply, Request, Spending, Store, chat
from shared.llm.catalogue import NANO, PATH, Catalogue, ModelCard, Price
from shared.llm.models import WINDOW
from shared.llm.types import Usage, strict_schema
from shared.records import RawText, content_id
from shared.stage import ROOT
from tests.conftest import StandinLog, StandinWith, copy_of_repository

CLAUDE, GPT, GEMINI = "anthropic/claude-haiku-5-5", "openai/gpt-6-luna", "gemini/gemini-3.8-flash"
ENDPOINT = "endpoint/some-model"
ALL = (CLAUDE, GPT, GEMINI, ENDPOINT)
EMBEDDER = "openai/text-embedding-3-small"
TEXT = "The gauge shows 7 bar at 20 degrees. It must not exceed 9 bar. Ask Ada Lovelace before opening VALVE_B."


class Points(BaseModel):
    points: list[str]


def question(model: str = GPT, text: str = TEXT, **more: Any) -> Request:
    system = "You answer from one text only."
    prompt = f"List the key points of the text.\n\n<text>\n{text}\n</text>"
    return Request(model=model, messages=chat(system, prompt), response=Points, **more)


@contextmanager
def models(data: Path, *required: str, budget_usd: float | None = None) -> Iterator[Models]:
    cache = data.parent.parent / "cache"
    with Models(cache, "mock", "trial", "04_validate", "compression", budget_usd) as opened:
        opened.require(*(required or ALL))
        yield opened


def answers(log: StandinLog) -> list[dict[str, Any]]:
    """The requests to models (the Hub's and the lists of models left out)."""
    return [line for line in log.requests() if line["method"] == "POST"]


# ---------------------------------------------------------------- one answer


@pytest.mark.parametrize("model", ALL)
def test_an_answer_comes_parsed_with_its_tokens_and_its_price(standin: StandinLog, data: Path, model: str) -> None:
    with models(data) as m:
        reply = m.one(m.ask(question(model)))
        assert (reply.problem, reply.detail, reply.cached, reply.tries) == ("", "", False, 1)
        assert isinstance(reply.parsed, Points) and any("9 bar" in point for point in reply.parsed.points)
        assert Points.model_validate_json(reply.text) == reply.parsed
        (line,) = answers(standin)
        assert (line["input_tokens"], line["output_tokens"]) == (reply.usage.input, reply.usage.output)
        spent = m.spending()
        assert (spent.calls, spent.cached, spent.models) == (1, 0, {model: 1})
        price = Catalogue().card(model).price()
        assert spent.cost_usd == pytest.approx(
            (reply.usage.input * price.input + reply.usage.output * price.output) / 1_000_000, abs=1e-12
        )
        assert m.store.spent_usd("trial") == spent.cost_usd
        stored = m.store.answer(reply.key)
        assert stored is not None and stored.text == reply.text and stored.usage == reply.usage


def test_plain_text_needs_no_schema(standin: StandinLog, data: Path) -> None:
    with models(data) as m:
        for model in ALL:
            asked = Request(model=model, messages=chat("", f"Say what the text says.\n\n<text>\n{TEXT}\n</text>"))
            reply = m.one(m.ask(asked))
            assert reply.problem == "" and reply.text and reply.parsed is None


def test_a_stored_answer_is_sent_for_once(standin: StandinLog, data: Path) -> None:
    with models(data) as m:
        first = [m.one(m.ask(question(model))) for model in ALL]
    assert len(answers(standin)) == len(ALL)
    standin.mark()
    with models(data) as m:
        again = [m.one(m.ask(question(model))) for model in ALL]
        assert m.spending() == Spending(cached=len(ALL))
    assert standin.requests() == []
    assert all(reply.cached for reply in again)
    assert [reply.model_copy(update={"cached": False}) for reply in again] == first


def test_everything_that_can_change_the_answer_is_a_question_of_its_own(standin: StandinLog, data: Path) -> None:
    class Other(BaseModel):
        points: list[str]
        more: str

    variants = [
        question(),
        question(repeat=1),
        question(repeat=2),
        question(max_tokens=900),
        question(text=TEXT + " "),
        question(model="openai/gpt-5.6-luna"),
        question().model_copy(update={"response": Other}),
    ]
    with models(data, GPT, "openai/gpt-5.6-luna") as m:
        keys = [m.one(m.ask(request)).key for request in variants]
    assert len(set(keys)) == len(variants) == len(answers(standin))


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (CLAUDE, "8f01e9df7d124dedd71f51e8f10d3de770e8725147c3b1811ade0cf7a01835b4"),
        (GPT, "1311e00042801e9461e25b4c83ed69ab2ae05e0783fd38a5aa1625973516c496"),
        (GEMINI, "bd5766c1cca7acb6ed347139edee7c646891f8bf4486e429ce1b5816ff96f504"),
        (ENDPOINT, "d62427a2aea5072c47e8bd4531c17fcbbec906f7637639cc2d5bb0f94c9c0c2a"),
    ],
)
def test_the_key_of_a_question_is_the_same_in_every_version(
    standin: StandinLog, data: Path, model: str, key: str
) -> None:
    # Literal: with another key, every answer that was ever paid for is paid for again. Change it only for a reason.
    with models(data) as m:
        assert m.one(m.ask(question(model))).key == key


def test_asked_at_once_by_many_it_is_sent_once(standin: StandinLog, data: Path) -> None:
    async def together(m: Models) -> list[Reply]:
        return await asyncio.gather(*(m.ask(question()) for _ in range(20)))

    with models(data) as m:
        replies = m.one(together(m))
    assert len(answers(standin)) == 1
    assert sum(not reply.cached for reply in replies) == 1
    assert len({reply.text for reply in replies}) == 1


def test_a_model_must_be_required_first(standin: StandinLog, data: Path) -> None:
    with models(data, GPT) as m, pytest.raises(AssertionError, match="require"):
        m.one(m.ask(question(CLAUDE)))
    assert standin.requests() == []


# ---------------------------------------------------------------- embeddings


def test_each_text_is_embedded_once_whoever_asks(standin: StandinLog, data: Path) -> None:
    async def together(m: Models) -> list[list[Any]]:
        calls = (["a text", "b text"], ["b text", "c text"], ["a text", "a text"])
        return await asyncio.gather(*(m.embed(EMBEDDER, call, 64) for call in calls))

    with models(data, EMBEDDER) as m:
        (a, b), (b2, c), (a2, a3) = m.one(together(m))
        assert a == a2 == a3 and b == b2 and len(a) == len(c) == 64
        (before,) = m.store.rows("SELECT SUM(input) AS tokens FROM ledger")
    assert sum(line["input_tokens"] for line in answers(standin)) == before["tokens"]
    standin.mark()
    with models(data, EMBEDDER) as m:
        assert m.one(m.embed(EMBEDDER, ["c text", "a text", "b text"], 64)) == [c, a, b]
        assert m.spending().calls == 0 and answers(standin) == []
        m.one(m.embed(EMBEDDER, ["d text"], 64))
        assert before["tokens"] == 3 * m.spending().input_tokens, "three texts of one length, each paid for once"


def test_an_embedder_that_is_down_is_an_error_for_a_person(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.llm.models.FAILURES", 2)
    standin_with(faults="500=1")
    with models(data, EMBEDDER) as m, pytest.raises(ProviderError, match="500") as refused:
        m.one(m.embed(EMBEDDER, ["a text"], 64))
    assert "run the same command" in refused.value.mend


def test_a_text_the_embedder_refuses_has_no_vector_and_the_others_have(standin: StandinLog, data: Path) -> None:
    with models(data, EMBEDDER) as m:
        one, none, two = m.one(m.embed(EMBEDDER, ["a text", "word " * 9000, "b text"], 64))
        assert one is not None and none is None and two is not None
        assert m.one(m.embed(EMBEDDER, ["b text", "a text"], 64)) == [two, one]


def test_texts_are_packed_to_what_a_request_may_hold(standin: StandinLog, data: Path) -> None:
    with models(data, EMBEDDER) as m:
        vectors = m.one(m.embed(EMBEDDER, [f"text number {n}" for n in range(2100)], 16))
    assert len(vectors) == 2100
    assert sorted(line["status"] for line in answers(standin)) == [200, 200], "2,048 a request at most"


def test_only_openai_embeds(standin: StandinLog, data: Path) -> None:
    with models(data) as m, pytest.raises(SettingsError, match="embeddings come from openai/"):
        m.one(m.embed(CLAUDE, ["a"], 64))


# ---------------------------------------------------------------- many


def test_results_come_in_input_order_whatever_the_latency(standin: StandinLog, data: Path) -> None:
    latency = random.Random(7)

    async def work(n: int) -> tuple[int, Reply]:
        await asyncio.sleep(latency.random() * 0.05)
        return n, await m.ask(question((CLAUDE, GPT)[n % 2], f"Line {n % 7} says {n}."))

    with models(data) as m:
        results = list(m.map(work, range(60), concurrency=8))
    assert [item for item, _ in results] == [n for _, (n, _) in results] == list(range(60))
    assert all(reply.problem == "" for _, (_, reply) in results)


def test_never_more_under_way_than_asked_for(data: Path, standin: StandinLog) -> None:
    under_way, most = 0, 0

    async def work(n: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return n

    with models(data) as m:
        assert len(list(m.map(work, range(300), concurrency=5))) == 300
    assert most == 5


def test_a_slow_record_holds_up_reading_but_not_memory(data: Path, standin: StandinLog) -> None:
    read = 0
    release = asyncio.Event()

    def items() -> Iterator[int]:
        nonlocal read
        for n in range(10_000):
            read += 1
            yield n

    async def work(n: int) -> int:
        if n == 0:
            asyncio.get_running_loop().call_later(0.5, release.set)
            await release.wait()
            assert read <= 4 * WINDOW, f"{read} records were read while the first one was waited for"
        return n

    with models(data) as m:
        assert sum(result for _, result in m.map(work, items(), concurrency=4)) == sum(range(10_000))
    assert read == 10_000


def test_memory_is_flat_in_the_number_of_records(data: Path, standin: StandinLog) -> None:
    async def work(n: int) -> str:
        await asyncio.sleep(0)
        return f"{n}" * 50

    most_tasks = 0

    def peak(count: int) -> int:
        nonlocal most_tasks
        tracemalloc.start()
        try:
            for n, _ in m.map(work, range(count), concurrency=8):
                if n % 500 == 0:
                    most_tasks = max(most_tasks, len(asyncio.all_tasks(m._runner.get_loop())))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with models(data) as m:
        peak(100)
        small, large = peak(1_000), peak(10_000)
    assert large < small + 300_000, f"{small} bytes for 1,000 records, {large} for 10,000"
    assert most_tasks <= 8 * WINDOW + 8


def test_the_first_fatal_error_stops_the_rest(data: Path, standin: StandinLog) -> None:
    started: list[int] = []

    async def work(n: int) -> int:
        started.append(n)
        await asyncio.sleep(0.01)
        if n == 3:
            raise ProviderError("down")
        return n

    done: list[int] = []
    with models(data) as m, pytest.raises(ProviderError, match="down"):
        for n, _ in m.map(work, range(1000), concurrency=4):
            done.append(n)
    assert done == [0, 1, 2] or done == []
    assert len(started) < 20


def test_a_concurrency_of_none_is_refused(data: Path, standin: StandinLog) -> None:
    async def work(n: int) -> int:
        return n

    with models(data) as m, pytest.raises(SettingsError, match="concurrency must be at least 1, got 0"):
        list(m.map(work, [1], concurrency=0))


# ---------------------------------------------------------------- what goes wrong on the way


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["429", "529", "500", "503", "reset"])
def test_what_may_pass_is_tried_again(standin_with: StandinWith, data: Path, fault: str) -> None:
    log = standin_with(faults=f"{fault}=1,retry_after=0.4")  # the stand-in lets the third try through
    started = time.monotonic()

    async def together() -> list[Reply]:
        return await asyncio.gather(*(m.ask(question(model)) for model in ALL))

    with models(data) as m:
        replies = m.one(together())
        assert m.spending().retries == 2 * len(ALL) and m.spending().calls == len(ALL)
    assert [reply.problem for reply in replies] == [""] * len(ALL)
    assert len(answers(log)) == 3 * len(ALL), "and the SDKs retried nothing by themselves"
    if fault in ("429", "529"):
        assert 0.8 <= time.monotonic() - started < 8, "twice what Retry-After says, not what back-off would"


@pytest.mark.slow
def test_a_time_out_is_tried_again(standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.llm.providers.TIMEOUT_S", 0.5)
    log = standin_with(faults="timeout=1,timeout_s=30")

    async def together() -> list[Reply]:
        return await asyncio.gather(*(m.ask(question(model)) for model in (CLAUDE, GPT, GEMINI)))

    with models(data) as m:
        assert [reply.problem for reply in m.one(together())] == [""] * 3
        assert m.spending().retries == 6
    assert len([line for line in answers(log) if line["served"]]) == 3


@pytest.mark.slow
def test_limits_are_kept_to_under_load(standin_with: StandinWith, data: Path) -> None:
    log = standin_with(rate=20)

    async def work(n: int) -> Reply:
        return await m.ask(question(GPT, f"Line {n}."))

    with models(data) as m:
        replies = [reply for _, reply in m.map(work, range(60), concurrency=16)]
    assert [reply.problem for reply in replies] == [""] * 60
    lines = answers(log)
    refused = [line for line in lines if line["status"] == 429]
    assert len(lines) - len(refused) == 60
    assert len(refused) <= 8, "it slows down instead of knocking on the door"


@pytest.mark.parametrize(
    ("fault", "model", "error", "says"),
    [
        ("quota", GPT, ProviderError, "add credit"),
        ("quota", CLAUDE, ProviderError, "add credit"),
        ("401", GPT, KeyMissingError, "OPENAI_API_KEY"),
        ("401", CLAUDE, KeyMissingError, "ANTHROPIC_API_KEY"),
        ("401", GEMINI, KeyMissingError, "GEMINI_API_KEY"),
        ("403", CLAUDE, KeyMissingError, "ANTHROPIC_API_KEY"),
        ("404", GPT, ProviderError, "models.toml"),
    ],
)
def test_what_cannot_pass_is_fatal_at_once(
    standin_with: StandinWith, data: Path, fault: str, model: str, error: type[Exception], says: str
) -> None:
    log = standin_with(faults=f"{fault}=1")
    with models(data) as m, pytest.raises(error) as fatal:
        m.one(m.ask(question(model)))
    assert says in str(fatal.value) and "next:" in str(fatal.value)
    assert len(answers(log)) == 1, "asking again would not help"


def test_the_400_that_gemini_answers_to_a_wrong_key_is_about_the_key() -> None:
    from google.genai import errors

    from shared.llm.providers import _status_error

    info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
    body = {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT", "details": [info]}}
    error = _status_error("gemini", errors.ClientError(400, body), 400, spent=False)
    assert isinstance(error, KeyMissingError) and "GEMINI_API_KEY" in str(error)


def test_a_bad_request_is_that_records_own_problem(standin_with: StandinWith, data: Path) -> None:
    log = standin_with(faults="400=1")
    with models(data) as m:
        replies = [m.one(m.ask(question(model))) for model in ALL]
        assert m.spending().calls == 0 and m.store.spent_usd("trial") == 0
    assert [reply.problem for reply in replies] == ["bad_request"] * len(ALL)
    assert all(reply.detail and reply.key == "" for reply in replies)
    assert len(answers(log)) == len(ALL)


@pytest.mark.parametrize(
    ("fault", "problem"), [("truncate", "truncated"), ("refuse", "refused"), ("broken_json", "invalid_json")]
)
@pytest.mark.parametrize("model", ALL)
def test_an_unusable_answer_is_an_outcome_asked_again_and_paid(
    standin_with: StandinWith, data: Path, model: str, fault: str, problem: str
) -> None:
    log = standin_with(faults=f"{fault}=1")
    with models(data) as m:
        reply = m.one(m.ask(question(model, max_tokens=500), tries=3))
        assert (reply.problem, reply.tries, reply.parsed) == (problem, 3, None)
        assert reply.detail
        rows = m.store.rows("SELECT * FROM ledger ORDER BY id")
        lines = answers(log)
        assert len(rows) == len(lines) == 3
        assert sum(row["input"] for row in rows) == reply.usage.input == sum(line["input_tokens"] for line in lines)
        assert sum(row["output"] for row in rows) == reply.usage.output == sum(line["output_tokens"] for line in lines)
        assert m.store.spent_usd("trial") == sum(row["nano"] for row in rows) / NANO == m.spending().cost_usd
        wires = [m.store.request(row["key"]) for row in rows]
        rooms = [_room(wire) for wire in wires if wire is not None]
        assert rooms == ([500, 1000, 2000] if problem == "truncated" else [500] * 3), "twice the room when it was cut"
    log.mark()
    with models(data) as m:
        again = m.one(m.ask(question(model, max_tokens=500), tries=3))
        assert again == reply.model_copy(update={"cached": True})
    assert answers(log) == [], "and it is not asked a fourth time"


def _room(wire: dict[str, Any]) -> int:
    flat = wire | wire.get("config", {})
    found: list[int] = [flat[k] for k in ("max_tokens", "max_completion_tokens", "max_output_tokens") if k in flat]
    return found[0]


@pytest.mark.slow
def test_a_provider_that_is_down_ends_the_run_although_another_one_answers(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shared.llm.models as module

    monkeypatch.setattr(module, "FAILURES", 3)
    standin_with()

    async def work(n: int) -> tuple[Reply, Reply]:
        both = await asyncio.gather(m.ask(question(GPT, f"Line {n}.")), m.ask(question(CLAUDE, f"Line {n}.")))
        return both[0], both[1]

    with models(data) as m:
        os.environ["ANTHROPIC_BASE_URL"] = "http://127.0.0.1:1"  # Claude is down, GPT is not
        with pytest.raises(ProviderError) as down:
            list(m.map(work, range(30), concurrency=2))
        assert m.spending().calls > 0
    assert "anthropic" in str(down.value) and "run the same command" in down.value.mend


# ---------------------------------------------------------------- money


def test_what_has_no_price_is_never_called(standin: StandinLog, data: Path) -> None:
    with models(data, GPT) as m, pytest.raises(BudgetError) as unknown:
        m.require("anthropic/claude-next")
    assert "the price of anthropic/claude-next is unknown" in str(unknown.value)
    assert "shared/llm/models.toml" in unknown.value.mend and CLAUDE in unknown.value.mend
    assert standin.requests() == []


@pytest.mark.parametrize("name", ["claude", "claude/haiku", "openai/", "/gpt"])
def test_a_model_is_provider_and_name(standin: StandinLog, data: Path, name: str) -> None:
    with models(data, GPT) as m, pytest.raises(SettingsError, match="a model is provider/name"):
        m.require(name)


def test_a_text_too_long_for_a_known_price_is_not_sent(standin: StandinLog, data: Path) -> None:
    with models(data) as m:
        reply = m.one(m.ask(question(CLAUDE, "word " * 200_000)))
    assert reply.problem == "bad_request" and "above 100,000 is not known" in reply.detail
    assert answers(standin) == []


def test_the_bound_on_a_price_is_above_what_any_tokenizer_counts() -> None:
    # No byte-pair encoding merges across a space, and every emoji, symbol and digit may be a token of its own.
    for text in ("a b c d " * 2000, "{}[]();:" * 500, "0 1 2 3 4 5 " * 500, "x=1;y=2;" * 400):
        pieces = len(text.split()) if " " in text else len(text)
        assert Request(model=GPT, messages=chat("", text)).input_tokens_bound() >= pieces


def test_a_price_is_the_one_of_the_day() -> None:
    import datetime

    gemini = Catalogue().card(GEMINI)
    assert gemini.price(datetime.date(2026, 12, 31)).input == 0.75
    assert gemini.price(datetime.date(2027, 1, 1)).input == 1.50


def test_money_is_counted_in_whole_nanodollars() -> None:
    price = Price(input=0.10, cached=0.01, output=0.50)
    assert price.nano(Usage(input=1_000_000, output=1_000_000, cached=400_000)) == 564_000_000
    assert price.nano(Usage(input=1, output=1)) == 600
    assert price.nano(Usage(input=10, output=10), batch=True) == 3_000


def test_every_model_has_a_source_for_its_price_and_the_table_a_date() -> None:
    catalogue = Catalogue()
    assert catalogue.checked.count("-") == 2
    assert all(isinstance(card, ModelCard) and card.source for card in catalogue.cards.values())


def test_a_broken_price_table_says_so(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    for text in (
        "checked = ",
        'checked = "2026"\n["openai/x"]\nprise = 1',
        PATH.read_text().replace("checked = ", "x = "),
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match=r"shared/llm/models\.toml"):
            Catalogue(path)


def test_schemas_are_what_all_providers_enforce() -> None:
    class Inner(BaseModel):
        name: str
        score: float = 0.0

    class Outer(BaseModel):
        """Doc."""

        inner: Inner
        rows: list[Inner]
        note: str | None = None

    schema = strict_schema(Outer)
    assert schema["required"] == ["inner", "rows", "note"] and schema["additionalProperties"] is False
    assert schema["$defs"]["Inner"]["required"] == ["name", "score"]

    class Free(BaseModel):
        anything: dict[str, int]

    with pytest.raises(TypeError, match="Free"):
        strict_schema(Free)


# ---------------------------------------------------------------- whole stages: keys, budget, interrupts

SCRIPT = '''"""RawText -> RawText, after asking `models` about each `times` times."""

import asyncio
import sys

from shared.llm import Request, chat
from shared.records import RawText
from shared.stage import Settings, Stage, run


class Params(Settings):
    models: tuple[str, ...]
    times: int = 1
    concurrency: int = 4
    max_tokens: int = 1000


def main(stage: Stage[Params]) -> None:
    p = stage.params
    stage.models.require(*p.models)

    async def ask(record):
        print("asking", flush=True)
        requests = [
            Request(model=model, messages=chat("", record.text), repeat=time, max_tokens=p.max_tokens)
            for model in p.models
            for time in range(p.times)
        ]
        return await asyncio.gather(*(stage.models.ask(request) for request in requests))

    for record, replies in stage.models.map(ask, stage.read(RawText), p.concurrency):
        if any(reply.problem for reply in replies):
            stage.reject(record, replies[0].problem, replies[0].detail)
        else:
            stage.keep(record)
    stage.summary["sdks"] = sorted({"anthropic", "openai", "google.genai", "httpx2", "aiohttp"} & set(sys.modules))


if __name__ == "__main__":
    run(main, Params)
'''


class Asking:
    """A stage of our own that asks; several may share one directory."""

    def __init__(self, tmp_path: Path, data: Path, records: int) -> None:
        self.tmp_path, self.data = tmp_path, data
        self.input = data / "01_acquire.jsonl"
        self.input.write_bytes(
            b"".join(
                RawText(
                    id=content_id(str(n)),
                    domain="prose",
                    source="s",
                    origin=f"file#{n}",
                    language="en",
                    category="note",
                    licence="MIT",
                    text=f"Repeat that line {n} of the report weighs {n * 37} grams and must not get wet.",
                ).line()
                for n in range(records)
            )
        )

    def command(self, name: str, **settings: Any) -> list[str]:
        root = self.tmp_path / "stages" / name
        root.mkdir(parents=True, exist_ok=True)
        (root / "main.py").write_text(SCRIPT)
        settings = {"models": [CLAUDE, GPT]} | settings
        (root / "trial.toml").write_text(
            "\n".join(f"{key} = {orjson.dumps(v).decode()}" for key, v in settings.items())
        )
        files = ["--in", self.input, "--out", self.data / f"{name}.jsonl", "--config", root / "trial.toml"]
        return [sys.executable, *map(str, [root / "main.py", *files]), "--track", "compression"]

    def start(self, name: str, env: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            self.command(name, **settings), cwd=ROOT, env=os.environ | (env or {}), start_new_session=True, **pipes
        )

    def run(self, name: str, env: dict[str, str] | None = None, **settings: Any) -> tuple[int, str]:
        process = self.start(name, env, **settings)
        _, said = process.communicate(timeout=120)
        return process.returncode, said

    def report(self, name: str) -> dict[str, Any]:
        return dict(orjson.loads((self.data / f"{name}.report.json").read_bytes()))

    def spent_usd(self) -> float:
        store = Store(self.data.parent.parent / "cache" / "mock.sqlite")
        try:
            return store.spent_usd("trial")
        finally:
            store.close()


NewAsking = Callable[[int], Asking]


@pytest.fixture
def asking(tmp_path: Path, data: Path) -> NewAsking:
    return lambda records: Asking(tmp_path, data, records)


def test_a_missing_key_stops_a_live_run_before_anything_is_sent(
    standin: StandinLog, asking: NewAsking, tmp_path: Path
) -> None:
    url = os.environ["STANDIN_URL"]
    clone = copy_of_repository(tmp_path / "clone")  # no .env there, whatever lies in this checkout
    live = {
        "APIS": "live",
        "PYTHONPATH": str(clone),
        "ANTHROPIC_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "a-key",
    }
    code, said = asking(3).run("04_ask", live)
    assert code == 2
    assert "ANTHROPIC_API_KEY is not set" in said and ".env" in said and "APIS=mock" in said
    assert "Traceback" not in said
    assert standin.requests() == []


def test_a_live_run_with_keys_uses_them(standin: StandinLog, asking: NewAsking, tmp_path: Path) -> None:
    url = os.environ["STANDIN_URL"]
    clone = copy_of_repository(tmp_path / "clone")
    (clone / ".env").write_text("ANTHROPIC_API_KEY=bad-key\nexport OPENAI_API_KEY=good\n")
    live = {"APIS": "live", "PYTHONPATH": str(clone), "ANTHROPIC_BASE_URL": url, "OPENAI_BASE_URL": f"{url}/v1"}
    code, said = asking(3).run("04_ask", live, models=[GPT])
    assert code == 0, said
    code, said = asking(3).run("05_ask", live, models=[CLAUDE])  # the stand-in knows that key for a bad one
    assert code == 2
    assert "401" in said and "check ANTHROPIC_API_KEY in .env" in said


def test_an_unknown_price_stops_a_run_before_anything_is_sent(standin: StandinLog, asking: NewAsking) -> None:
    code, said = asking(3).run("04_ask", models=[GPT, "openai/gpt-99"])
    assert code == 5
    assert "the price of openai/gpt-99 is unknown" in said and "Traceback" not in said
    assert standin.requests() == []


@pytest.mark.parametrize("budget", ["much", "-1", "nan", "inf"])
def test_a_budget_that_is_no_sum_is_refused(standin: StandinLog, asking: NewAsking, budget: str) -> None:
    code, said = asking(1).run("04_ask", {"BUDGET_USD": budget})
    assert code == 2 and "BUDGET_USD must be dollars" in said
    assert standin.requests() == []


@pytest.mark.slow
def test_two_processes_together_never_exceed_the_budget(standin_with: StandinWith, asking: NewAsking) -> None:
    log = standin_with(latency_s=0.02)
    stage = asking(50)
    budget = 0.002
    rooms = {"04_ask": 400, "05_ask": 401}  # so that no question is asked by both
    both = [stage.start(name, {"BUDGET_USD": str(budget)}, times=3, max_tokens=room) for name, room in rooms.items()]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert [code for _, code in ended] == [5, 5]
    for said, _ in ended:
        assert f"BUDGET_USD={budget:g} is reached for RUN=trial" in said
        assert "everything answered is saved; go on with BUDGET_USD=<more> make trial" in said
        assert "Traceback" not in said
    spent = stage.spent_usd()
    assert 0.8 * budget < spent <= budget, f"${spent:.6f} of ${budget}: it uses what there is, and no more"
    code, said = stage.run("04_ask", {"BUDGET_USD": "100"}, times=3, max_tokens=400)
    assert code == 0, said
    assert stage.report("04_ask")["spending"]["cached"] > 0, "with more money it goes on where it stopped"
    served = Counter(line["sha256"] for line in answers(log) if line["served"])
    assert max(served.values()) == 1, "no answer was paid twice"


def test_of_those_who_wait_for_the_budget_one_asks_for_all(
    standin: StandinLog, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, reserve = [0], Store.reserve
    other = Store(data.parent.parent / "cache" / "mock.sqlite")

    async def counting(self: Store, *of: Any) -> bool:
        asked[0] += self is not other
        return await reserve(self, *of)

    monkeypatch.setattr(Store, "reserve", counting)
    with models(data, GPT, budget_usd=1.0) as m:

        async def work(n: int) -> Reply:
            return await m.ask(question(text=f"Line {n}. {TEXT}"))

        async def together() -> list[Reply]:
            assert await other.reserve("trial", NANO, NANO)
            waiting = asyncio.gather(*(work(n) for n in range(100)))
            await asyncio.sleep(2)
            assert not answers(standin)
            await other.release(NANO)
            return await waiting

        assert [reply.problem for reply in m.one(together())] == [""] * 100
    other.close()
    assert 200 <= asked[0] < 400, "each once, one of them while there is no room, and each of the others once more"


@pytest.mark.slow
def test_a_budget_holds_over_stages_processes_kills_and_retries(standin_with: StandinWith, asking: NewAsking) -> None:
    log = standin_with(faults="429=0.05,500=0.05,reset=0.05,truncate=0.1,retry_after=0.05,seed=3", latency_s=0.05)
    stage, budget, concurrency, kills = asking(40), 0.002, 4, 2
    settings: dict[str, Any] = {"times": 3, "concurrency": concurrency}
    money = {"BUDGET_USD": str(budget)}
    for _ in range(kills):
        before = len(log._lines())
        victim = stage.start("04_ask", money, max_tokens=100, **settings)
        deadline = time.monotonic() + 20
        while len(log._lines()) < before + 12 and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()
    rooms = {"04_ask": 100, "05_ask": 101}
    both = [stage.start(name, money, max_tokens=room, **settings) for name, room in rooms.items()]
    for process in both:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 5 and "BUDGET_USD=0.002 is reached for RUN=trial" in said, said
    assert stage.run("06_ask", money, max_tokens=102, **settings)[0] == 5, "a later stage has what the others left"
    spent = stage.spent_usd()
    # What the killed ones had reserved was free at once: nearly all of the budget was used.
    assert 0.8 * budget < spent <= budget
    cards = {model.partition("/")[2]: Catalogue().card(model) for model in (CLAUDE, GPT)}
    served = [line for line in answers(log) if line["served"]]
    paid = sum(
        cards[line["model"]].price().nano(Usage(input=line["input_tokens"], output=line["output_tokens"]))
        for line in served
    )
    wave = (
        concurrency
        * 3
        * max(
            Catalogue().worst_nano(Request(model=model, messages=chat("", "x" * 80), max_tokens=400))
            for model in (CLAUDE, GPT)
        )
    )
    assert round(spent * NANO) <= paid <= budget * NANO + kills * wave, "a kill loses one wave of answers at most"


def test_no_sdk_is_imported_before_it_is_needed(standin: StandinLog, asking: NewAsking) -> None:
    code = "import sys, shared.llm; print(sorted({'anthropic', 'openai', 'google.genai', 'httpx2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

    stage = asking(6)
    three: dict[str, Any] = {"models": [CLAUDE, GPT, GEMINI]}
    assert stage.run("04_ask", **three)[0] == 0
    assert {"anthropic", "openai", "google.genai"} <= set(stage.report("04_ask")["summary"]["sdks"])
    standin.mark()
    started = time.monotonic()
    assert stage.run("04_ask", **three)[0] == 0
    seconds = time.monotonic() - started
    report = stage.report("04_ask")
    assert report["summary"]["sdks"] == [], "everything was stored"
    assert report["spending"]["calls"] == 0 and report["spending"]["cached"] == 18
    assert standin.requests() == []
    assert seconds < 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_answers_under_way_and_sends_no_new_ones(
    standin_with: StandinWith, asking: NewAsking, kind: signal.Signals
) -> None:
    log = standin_with(latency_s=1.5)
    stage = asking(40)
    process = stage.start("04_ask", models=[GPT], times=5, concurrency=4)
    assert process.stdout is not None and process.stdout.readline() == "asking\n"
    deadline = time.monotonic() + 20
    while not log._lines() and time.monotonic() < deadline:  # the first wave is answered, so the second is under way
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(kind)
    interrupted = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert time.monotonic() - interrupted < 5, "it waits for answers, not for the rest of the work"
    assert "waiting for 4 answers under way, to keep them" in said
    assert "interrupted: every answer received is saved" in said and "Traceback" not in said
    served = [line["sha256"] for line in answers(log) if line["served"]]
    assert 4 < len(served) <= 8, "the two waves that were under way, and none after the interrupt"
    store = Store(stage.data.parent.parent / "cache" / "mock.sqlite")
    assert store.rows("SELECT COUNT(*) AS n FROM replies")[0]["n"] == len(served)
    assert store.rows("SELECT COUNT(*) AS n FROM reserved WHERE nano != 0")[0]["n"] == 0
    store.close()
    assert not (stage.data / "04_ask.jsonl").exists()


def test_the_key_of_openai_is_not_sent_to_other_servers(
    standin: StandinLog, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.llm.providers import Endpoint

    monkeypatch.setenv("OPENAI_API_KEY", "sk-dear")
    assert Endpoint()._key() != "sk-dear"
    monkeypatch.setenv("ENDPOINT_API_KEY", "theirs")
    assert Endpoint()._key() == "theirs"
