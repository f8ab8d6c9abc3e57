"""BATCH=1: the same answers through the providers' batch APIs, at half price, paid once whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import shared.estimate as forecast
import shared.llm.batch as batch_module
import shared.llm.models as models_module
from shared.errors import BudgetError, KeyMissingError, ProviderError, SettingsError
from shared.llm import Models, Reply, Request, chat
from shared.llm.batch_apis import AnthropicBatches, GeminiBatches, Limits, OpenAIBatches, custom_id, name_of
from shared.llm.catalogue import NANO, catalogue
from shared.llm.journal import Journal, set_aside
from shared.llm.store import Store
from tests.conftest import ROOT, StandinLog, StandinWith, run_stage

CLAUDE, GPT, GEMINI = "anthropic/claude-haiku-5-5", "openai/gpt-6-luna", "gemini/gemini-3.5-flash-lite"
HOSTED = (CLAUDE, GPT, GEMINI)
APIS = {CLAUDE: AnthropicBatches, GPT: OpenAIBatches, GEMINI: GeminiBatches}
CREATES = {CLAUDE: "batches", GPT: "batches", GEMINI: "gemini-3.5-flash-lite:batchGenerateContent"}
ASKS = {CLAUDE: "messages", GPT: "completions", GEMINI: "gemini-3.5-flash-lite:generateContent"}
NUMBER = 6


class Points(BaseModel):
    points: list[str]


def question(model: str, n: int = 0, repeat: int = 0) -> Request:
    text = f"The Pebble cache keeps at most {n} entries. Values above 64 kilobytes are not cached."
    prompt = f"List the key points of the text.\n\n<text>\n{text}\n</text>"
    return Request(model=model, messages=chat("You list.", prompt), response=Points, repeat=repeat)


@contextmanager
def models(
    cache: Path, batch: bool = True, stage: str = "04_validate", budget_usd: float | None = None
) -> Iterator[Models]:
    with Models(cache, "mock", "trial", stage, "compression", budget_usd, batch) as opened:
        opened.require(*HOSTED)
        yield opened


def asked(opened: Models, model: str, number: int = NUMBER) -> list[Reply]:
    """The replies to so many questions, in order."""

    async def work(n: int) -> Reply:
        return await opened.ask(question(model, n))

    return [reply for _, reply in opened.map(work, range(number), concurrency=4)]


def texts(replies: list[Reply]) -> list[tuple[str, str, str]]:
    return [(reply.key, reply.text, reply.problem) for reply in replies]


def directly(tmp_path: Path, model: str, number: int = NUMBER) -> list[tuple[str, str, str]]:
    with models(tmp_path / "direct", batch=False) as opened:
        return texts(asked(opened, model, number))


def rows(cache: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(cache / "mock.sqlite") as db:
        return db.execute(query).fetchall()


def full_price(cache: Path) -> int:
    """What the ledger's calls cost one by one, in nanodollars, when sent directly."""
    total = 0
    for model, usage_in, usage_out in rows(cache, "SELECT model, input, output FROM ledger"):
        price = catalogue().card(model).price()
        total += round(usage_in * price.input * 1000) + round(usage_out * price.output * 1000)
    return total


def spent(cache: Path) -> int:
    return sum(nano for (nano,) in rows(cache, "SELECT nano FROM ledger"))


def settled(cache: Path) -> bool:
    """Nothing is reserved, nothing waits, and what the ledger says is what is counted as spent."""
    left = rows(cache, "SELECT COUNT(*) FROM reserved WHERE nano != 0") + rows(cache, "SELECT COUNT(*) FROM batched")
    return left == [(0,), (0,)] and rows(cache, "SELECT COALESCE(SUM(nano), 0) FROM spent") == [(spent(cache),)]


def served(log: StandinLog) -> Counter[str]:
    """How often each question was answered, in a batch or alone."""
    return Counter(line["sha256"] for line in log.requests() if line["served"])


def batches_of(log: StandinLog) -> list[str]:
    return sorted({line["batch"] for line in log.requests() if "batch" in line})


@pytest.fixture
def cloud(standin: StandinLog, standin_with: StandinWith, tmp_path: Path) -> StandinWith:
    """The stand-in of all tests, or one of this test's own with these settings."""
    return lambda **settings: standin_with(**{"state": tmp_path / "state"} | settings) if settings else standin


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---------------------------------------------------------------- the same, for half


@pytest.mark.parametrize("model", HOSTED)
def test_a_batch_brings_what_direct_calls_bring_at_half_price(
    cloud: StandinWith, tmp_path: Path, cache: Path, model: str
) -> None:
    log = cloud()
    expected = directly(tmp_path, model)
    alone = served(log)
    log.mark()
    with models(cache) as opened:
        assert texts(asked(opened, model)) == expected
        assert opened.spending().calls == NUMBER and opened.spending().cost_usd == spent(cache) / NANO
    assert served(log) == alone, "the same bodies, each once"
    assert len(batches_of(log)) == 1
    assert rows(cache, "SELECT DISTINCT batch FROM ledger") == [(1,)]
    assert spent(cache) == full_price(cache) // 2 == full_price(tmp_path / "direct") // 2 > 0
    assert settled(cache)
    log.mark()
    with models(cache) as again:
        assert texts(asked(again, model)) == expected and again.spending().cached == NUMBER
    assert not log.requests()


def test_what_is_too_large_for_the_request_goes_in_a_file(
    cloud: StandinWith, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = cloud()
    expected = directly(tmp_path, GEMINI)
    alone = served(log)
    log.mark()
    monkeypatch.setattr(GeminiBatches, "inline_bytes", 0)
    with models(cache) as opened:
        assert texts(asked(opened, GEMINI)) == expected
    assert any(line["path"].startswith("/upload/") for line in log.requests())
    # The SDK writes a request in an order of its own; what it says must be the same.
    assert sum(served(log).values()) == sum(alone.values()) == NUMBER and settled(cache)


def test_a_question_asked_again_is_a_question_of_its_own_in_a_batch_too(
    cloud: StandinWith, tmp_path: Path, cache: Path
) -> None:
    log = cloud(faults="truncate=0.5,seed=3")

    async def work(opened: Models, n: int) -> list[Reply]:
        return [await opened.ask(question(GPT, n, repeat)) for repeat in range(2)]

    def all_of(opened: Models) -> list[Any]:
        return [
            [(reply.key, reply.text, reply.problem, reply.tries) for reply in replies]
            for _, replies in opened.map(lambda n: work(opened, n), range(NUMBER), concurrency=4)
        ]

    with models(tmp_path / "direct", batch=False) as opened:
        expected = all_of(opened)
    log.mark()
    with models(cache) as opened:
        assert all_of(opened) == expected
    tries = [reply[3] for replies in expected for reply in replies]
    assert max(tries) > 1, "some were cut off, and asked again with more room"
    assert max(served(log).values()) == 1 and settled(cache)
    assert spent(cache) == full_price(tmp_path / "direct") // 2
    assert len(batches_of(log)) <= 2 * max(tries), "each round is one batch"


def test_many_more_items_are_under_way_than_calls_would_be_and_come_in_order(cloud: StandinWith, cache: Path) -> None:
    log = cloud()
    with models(cache) as opened:
        replies = asked(opened, GPT, 150)
    assert len({reply.key for reply in replies}) == 150
    assert len(batches_of(log)) == 1
    with models(cache, batch=False) as again:
        assert texts(asked(again, GPT, 150)) == texts(replies), "in the order of the questions"


def test_no_more_questions_are_under_way_than_memory_is_meant_for(
    cloud: StandinWith, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = cloud()
    monkeypatch.setattr(models_module, "QUESTIONS", 20)
    monkeypatch.setattr(models_module, "BEGIN", 5)
    with models(cache) as opened:

        async def work(n: int) -> int:
            replies = await asyncio.gather(*(opened.ask(question(GPT, 3 * n + k)) for k in range(3)))
            return sum(bool(reply.text) for reply in replies)

        assert [answered for _, answered in opened.map(work, range(30), concurrency=4)] == [3] * 30
    sizes = Counter(line["batch"] for line in log.requests() if "batch" in line)
    assert sum(sizes.values()) == 90 and 15 <= max(sizes.values()) <= 20 + 2 * 3 * 5


def test_the_estimate_knows_what_is_half_price() -> None:
    tokens = [1e6, 1e6, 1e6]
    full = {model: forecast._usd(model, tokens, tokens) for model in (*HOSTED, "openai/text-embedding-3-small")}
    os.environ["BATCH"] = "1"
    half = {model: forecast._usd(model, tokens, tokens) for model in full}
    assert [half[model][1] / full[model][1] for model in full] == [0.5, 0.5, 0.5, 1.0]


def test_a_batch_holds_no_more_than_the_provider_takes(
    cloud: StandinWith, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = cloud()
    monkeypatch.setattr(AnthropicBatches, "limits", Limits(4, 10_000_000))
    monkeypatch.setattr(OpenAIBatches, "limits", Limits(100, 3_000))
    with models(cache) as opened:
        assert all(not reply.problem for model in (CLAUDE, GPT) for reply in asked(opened, model))
    sizes = Counter(line["batch"] for line in log.requests() if "batch" in line)
    by_api = [[n for name, n in sizes.items() if name.startswith(prefix)] for prefix in ("msgbatch_", "batch_")]
    assert sorted(by_api[0]) == [2, 4] and sum(by_api[1]) == NUMBER and len(by_api[1]) > 1


def test_what_has_no_batches_is_asked_directly(cloud: StandinWith, cache: Path) -> None:
    log = cloud()
    with models(cache) as opened:
        opened.require("endpoint/synthmill-compress")
        opened.require_embedder("openai/text-embedding-3-small")
        request = question("endpoint/synthmill-compress").model_copy(
            update={"base_url": os.environ["STANDIN_URL"] + "/v1"}
        )
        assert not opened.one(opened.ask(request)).problem
        assert opened.one(opened.embed("openai/text-embedding-3-small", ["a text"], 64))[0] is not None
    assert batches_of(log) == [] and rows(cache, "SELECT DISTINCT batch FROM ledger") == [(0,)]


def test_a_custom_id_is_one_that_every_provider_takes() -> None:
    made = custom_id("f" * 64, "0123456789ab", "2999.2")
    assert made == f"{'f' * 32}_0123456789ab_2999-2" and len(made) <= 64 and name_of(made) == "0123456789ab"
    assert custom_id("f" * 64, "0123456789ab", "") == f"{'f' * 32}_0123456789ab"
    assert name_of("somebody-elses") == ""


@pytest.mark.parametrize(("value", "wanted"), [("", False), ("0", False), ("1", True), ("yes", None)])
def test_batch_is_one_or_nothing(value: str, wanted: bool | None) -> None:
    os.environ["BATCH"] = value
    if wanted is None:
        with pytest.raises(SettingsError, match="BATCH"):
            batch_module.batch_from_env()
    else:
        assert batch_module.batch_from_env() is wanted


def test_the_stand_ins_list_page_by_page_and_cancel(cloud: StandinWith) -> None:
    cloud(faults="batch_slow@batches=1-,batch_slow@gemini-3.5-flash-lite:batchGenerateContent=1-,slow_s=60")
    url = os.environ["STANDIN_URL"]
    import anthropic
    import openai
    from google import genai
    from google.genai import types

    claude = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0).messages.batches
    wire: Any = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    made = [claude.create(requests=[{"custom_id": "a", "params": wire}]).id for _ in range(3)]
    assert [batch.id for batch in claude.list(limit=2)] == made[::-1]
    assert claude.cancel(made[0]).processing_status == "ended"
    assert [row.result.type for row in claude.results(made[0])] == ["canceled"]
    with pytest.raises(anthropic.BadRequestError, match="custom_id"):
        claude.create(requests=[{"custom_id": "not/one", "params": wire}])

    gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-6-luna"}}\n'
    file = gpt.files.create(file=("a.jsonl", line), purpose="batch").id
    assert gpt.files.content(file).content == line
    asks: Any = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = [gpt.batches.create(**asks, metadata={"n": str(n)}).id for n in range(3)]
    assert [(batch.id, batch.metadata) for batch in gpt.batches.list(limit=2)] == [
        (made[n], {"n": str(n)}) for n in (2, 1, 0)
    ]
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        gpt.batches.create(**asks | {"endpoint": "/v1/responses"})

    client = genai.Client(api_key="any", http_options=types.HttpOptions(base_url=url))  # closed when it is forgotten
    gemini = client.batches
    source = [types.InlinedRequest(contents="hi", metadata={"key": "a"})]
    jobs = [
        gemini.create(model="gemini-3.5-flash-lite", src=source, config={"display_name": str(n)}).name for n in range(3)
    ]
    assert [(job.name, job.display_name) for job in gemini.list(config={"page_size": 2})] == [
        (jobs[n], str(n)) for n in (2, 1, 0)
    ]
    gemini.cancel(name=str(jobs[0]))
    assert str(gemini.get(name=str(jobs[0])).state) == "JobState.JOB_STATE_CANCELLED"


# ---------------------------------------------------------------- killed


def killed_after(owner: type, name: str, run: Callable[[], Any]) -> None:
    """Run something in a process of its own, which is killed, -9, when this method has returned for the first time."""
    child = os.fork()
    if child == 0:
        original = getattr(owner, name)

        async def last(*args: Any, **kwargs: Any) -> Any:
            await original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, last)
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(ended(child)) == -signal.SIGKILL, f"it never came to {name}"


def ended(child: int, seconds: float = 30.0) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"still running after {seconds} s")


POINTS = {
    "written down": (Journal, "intend"),
    "created, its id unknown": (None, "create"),
    "its id written down": (Journal, "created"),
    "some of its answers stored": (Journal, "keep"),
}


@pytest.mark.parametrize(
    ("model", "point"),
    [*((CLAUDE, point) for point in POINTS), (GPT, "created, its id unknown"), (GEMINI, "created, its id unknown")],
)
def test_a_killed_run_picks_its_batch_up_and_sends_nothing_twice(
    cloud: StandinWith, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, model: str, point: str
) -> None:
    log = cloud(state=tmp_path / "state")
    expected = directly(tmp_path, model)
    log.mark()
    monkeypatch.setattr(batch_module, "GROUP", 2)
    owner, name = POINTS[point]

    def first() -> None:
        with models(cache, stage="05_first") as opened:
            asked(opened, model)

    killed_after(owner or APIS[model], name, first)
    with sqlite3.connect(cache / "mock.sqlite") as db:  # whoever opens the store next frees what the dead had reserved
        (before,) = db.execute("SELECT COUNT(*) FROM ledger").fetchone()
    assert before == (2 if name == "keep" else 0)
    cloud_again = StandinLog(log.path)
    if point == "its id written down":
        cloud_again = cloud(state=tmp_path / "state")  # the one before need not be there any more
    with models(cache, stage="06_second") as opened:
        assert texts(asked(opened, model)) == expected
    lines = served(log) + (served(cloud_again) if cloud_again.path != log.path else Counter())
    assert max(lines.values()) == 1 and sum(lines.values()) == NUMBER, "each is answered, and paid, once"
    stages = rows(cache, "SELECT DISTINCT stage FROM ledger")
    assert stages == [("06_second" if name == "intend" else "05_first",)], "whose the batch was, pays"
    assert spent(cache) == full_price(tmp_path / "direct") // 2 and settled(cache)


def test_a_batch_without_a_name_is_told_from_others_of_its_size(
    cloud: StandinWith, cache: Path, tmp_path: Path
) -> None:
    log = cloud(faults="batch_slow@batches=2,slow_s=1.5")
    import anthropic

    wire = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    client = anthropic.Anthropic(base_url=os.environ["STANDIN_URL"], api_key="any", max_retries=0)
    requests = [{"custom_id": f"other{n}", "params": wire} for n in range(NUMBER)]

    def others() -> str:
        return client.messages.batches.create(requests=requests).id  # type: ignore[arg-type]

    quick, slow = others(), others()

    def first() -> None:
        with models(cache) as opened:
            asked(opened, CLAUDE)

    killed_after(AnthropicBatches, "create", first)
    client.messages.batches.retrieve(quick)
    with models(cache) as opened:
        asked(opened, CLAUDE)
    (row,) = rows(cache, "SELECT id FROM batches")
    assert row[0] not in (quick, slow)
    ours = Counter(line["sha256"] for line in log.requests() if line["served"] and line["batch"] == row[0])
    assert sum(ours.values()) == NUMBER and settled(cache), "each once"


def test_two_processes_that_ask_the_same_at_once_pay_once(cloud: StandinWith, cache: Path) -> None:
    log = cloud()
    Store(cache / "mock.sqlite").close()
    child = os.fork()
    if child == 0:
        try:
            with models(cache, stage="05_other") as opened:
                replies = asked(opened, CLAUDE)
            os._exit(0 if all(reply.text for reply in replies) else 1)
        finally:
            os._exit(2)
    with models(cache) as opened:
        replies = asked(opened, CLAUDE)
    assert all(reply.text for reply in replies) and ended(child) == 0
    assert max(served(log).values()) == 1 and len(rows(cache, "SELECT key FROM ledger")) == NUMBER and settled(cache)


def paced(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setitem(batch_module.PACES, "mock", batch_module.PACES["mock"]._replace(**seconds))


def killed_when_created(cache: Path) -> None:
    def run() -> None:
        with models(cache) as opened:
            asked(opened, CLAUDE)

    killed_after(AnthropicBatches, "create", run)


def test_a_batch_that_is_not_listed_yet_after_a_kill_is_waited_for_however_long_its_upload_took(
    cloud: StandinWith, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = cloud()
    killed_when_created(cache)
    with contextlib.closing(sqlite3.connect(cache / "mock.sqlite")) as db, db:
        db.execute("UPDATE batches SET at = at - 300")
    paced(monkeypatch, settle=1.0)
    find, listed_at = AnthropicBatches.find, time.monotonic() + 0.7

    async def late(*of: Any) -> tuple[str, bool]:
        return await find(*of) if time.monotonic() > listed_at else ("", True)

    monkeypatch.setattr(AnthropicBatches, "find", late)
    with models(cache) as opened:
        assert all(reply.text for reply in asked(opened, CLAUDE))
    assert len(batches_of(log)) == 1 and max(served(log).values()) == 1 and settled(cache)


def test_whoever_asks_other_things_brings_in_what_a_killed_one_left_and_says_nothing_of_it_at_the_end(
    cloud: StandinWith, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud()
    killed_when_created(cache)
    with models(cache) as opened:

        async def until_all_is_in() -> None:
            assert (await opened.ask(question(GPT, 99))).text
            assert opened._batches
            while not settled(cache):
                opened._batches.sweep()  # as whoever waits for the budget does
                await asyncio.sleep(0.05)

        opened.one(asyncio.wait_for(until_all_is_in(), 20))
    said = capsys.readouterr().err
    assert "found again" in said and "go on without us" not in said
    assert len(rows(cache, "SELECT key FROM replies")) == NUMBER + 1


def test_a_store_without_batches_is_swept_before_anything_was_asked(cloud: StandinWith, cache: Path) -> None:
    cloud()
    Store(cache / "mock.sqlite").close()
    with models(cache) as opened:

        async def sweep() -> None:
            assert opened._batches
            opened._batches.sweep()
            await asyncio.gather(*opened._batches._tasks)

        opened.one(sweep())
    assert rows(cache, "SELECT COUNT(*) FROM batches") == [(0,)]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("model", "fault"),
    [(CLAUDE, "cut"), (CLAUDE, "reset"), (GPT, "cut"), (GPT, "429"), (GEMINI, "cut"), (GEMINI, "500")],
)
def test_a_creation_without_an_answer_is_looked_for_before_it_is_tried_again(
    cloud: StandinWith, cache: Path, model: str, fault: str
) -> None:
    log = cloud(faults=f"{fault}@{CREATES[model]}=1,retry_after=0.1")
    with models(cache) as opened:
        assert all(reply.text for reply in asked(opened, model))
    assert len(batches_of(log)) == 1 and max(served(log).values()) == 1 and settled(cache)
    created = [line for line in log.requests() if line["path"].endswith(CREATES[model]) and line["method"] == "POST"]
    assert len(created) == (1 if fault == "cut" else 2)


@pytest.mark.parametrize("model", HOSTED)
def test_what_a_batch_leaves_open_is_asked_directly(
    cloud: StandinWith, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    log = cloud(faults=f"expired@{ASKS[model]}=2,errored@{ASKS[model]}=3")
    with models(cache) as opened:
        replies = texts(asked(opened, model))
    assert f"2 of {NUMBER} not answered" in capsys.readouterr().err
    assert rows(cache, "SELECT batch, COUNT(*) FROM ledger GROUP BY 1 ORDER BY 1") == [(0, 2), (1, NUMBER - 2)]
    assert max(served(log).values()) == 1 and settled(cache)
    assert replies == directly(tmp_path, model)


@pytest.mark.parametrize("model", HOSTED)
def test_a_batch_that_fails_or_is_gone_is_asked_directly(
    cloud: StandinWith, cache: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    log = cloud(faults=f"batch_failed@{CREATES[model]}=1,batch_gone@{CREATES[model]}=2")
    with models(cache) as opened:
        assert all(reply.text for reply in asked(opened, model))
        assert f"{NUMBER} of {NUMBER} not answered" in capsys.readouterr().err and settled(cache)
        before = spent(cache)
        assert opened.one(opened.ask(question(model, 99))).text
    assert "not there any more" in capsys.readouterr().err
    assert batches_of(log) == [] or model == CLAUDE
    (at_most,) = rows(cache, "SELECT nano FROM ledger WHERE key LIKE 'batch %'")
    assert spent(cache) > before + at_most[0] and settled(cache), "what it may have cost is counted"


@pytest.mark.parametrize("model", HOSTED)
def test_a_young_batch_that_the_key_does_not_know_is_not_paid_again(
    cloud: StandinWith, cache: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    paced(monkeypatch, known=3600.0)
    monkeypatch.setattr(batch_module, "PATIENCE_S", 0.5)
    log = cloud(faults=f"batch_gone@{CREATES[model]}=1")
    said = r"0 min ago: is the key another project's now\?; batch \S+ goes on there"
    with pytest.raises(ProviderError, match=said), models(cache) as opened:
        asked(opened, model)
    assert not any(line["path"].endswith(ASKS[model]) for line in log.requests())
    assert len(rows(cache, "SELECT key FROM batched")) == NUMBER, "they are still waited for"


def test_a_provider_that_takes_fewer_at_once_gets_fewer_at_once(
    cloud: StandinWith, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = cloud(faults="batch_full@batches=1")
    with models(cache) as opened:
        assert all(reply.text for reply in asked(opened, GPT, 8))
    assert "2 requests at a time" in capsys.readouterr().err
    assert Counter(Counter(line["batch"] for line in log.requests() if "batch" in line).values()) == {2: 4}
    assert rows(cache, "SELECT DISTINCT batch FROM ledger") == [(1,)] and settled(cache), "at half price still"


@pytest.mark.parametrize(
    ("model", "fault", "error"),
    [(CLAUDE, "401", KeyMissingError), (GPT, "402", ProviderError), (GEMINI, "quota", ProviderError)],
)
def test_a_refused_account_stops_before_anything(
    cloud: StandinWith, cache: Path, model: str, fault: str, error: type[Exception]
) -> None:
    log = cloud(faults=f"{fault}@{CREATES[model]}=1-")
    with pytest.raises(error), models(cache) as opened:
        asked(opened, model)
    assert not served(log) and settled(cache)
    assert rows(cache, "SELECT COUNT(*) FROM batches") == [(0,)]


# ---------------------------------------------------------------- the budget


def worst(model: str, n: int = 0) -> int:
    return catalogue().worst_nano(question(model, n)) // 2


def test_a_budget_sends_what_it_has_room_for_and_the_rest_later(cloud: StandinWith, cache: Path) -> None:
    log = cloud()
    budget = 2 * worst(CLAUDE) + worst(CLAUDE) // 2
    with models(cache, budget_usd=budget / NANO) as opened:
        assert all(reply.text for reply in asked(opened, CLAUDE))
    sizes = Counter(line["batch"] for line in log.requests() if "batch" in line)
    assert max(sizes.values()) == 2 and sum(sizes.values()) == NUMBER
    assert spent(cache) <= budget and settled(cache)


def test_a_budget_that_is_used_up_stops_with_what_is_done_saved(cloud: StandinWith, cache: Path) -> None:
    log = cloud()
    budget = worst(CLAUDE) + worst(CLAUDE) // 20
    with pytest.raises(BudgetError, match="BUDGET_USD="), models(cache, budget_usd=budget / NANO) as opened:
        asked(opened, CLAUDE, 60)
    done = sum(served(log).values())
    assert 0 < done < 60 and len(rows(cache, "SELECT key FROM replies")) == done
    assert spent(cache) <= budget and settled(cache)


def test_what_a_batch_may_cost_stays_reserved_when_its_process_is_killed(cloud: StandinWith, cache: Path) -> None:
    cloud()
    budget = round(NUMBER * worst(CLAUDE) * 1.01) / NANO

    def first() -> None:
        with models(cache, budget_usd=budget) as opened:
            asked(opened, CLAUDE)

    killed_after(Journal, "created", first)
    store = Store(cache / "mock.sqlite")
    reserved = set_aside(store, "trial")
    store.close()
    assert sum(worst(CLAUDE, n) for n in range(NUMBER)) == reserved
    with pytest.raises(BudgetError, match="BATCH=1"), models(cache, batch=False, budget_usd=budget) as opened:
        opened.one(opened.ask(question(CLAUDE, 99)))
    with models(cache, budget_usd=budget) as opened:
        assert opened.one(opened.ask(question(CLAUDE, 99))).text, "the batch ends, and makes room"
    with models(cache, budget_usd=budget) as opened:
        assert all(reply.cached for reply in asked(opened, CLAUDE))
    assert settled(cache) and spent(cache) / NANO <= budget


# ---------------------------------------------------------------- stopped by a person


def test_an_interrupt_does_not_wait_for_a_batch_and_a_cancelled_one_is_asked_directly(
    cloud: StandinWith, cache: Path, tmp_path: Path
) -> None:
    log = cloud(faults="batch_slow@batches=1,slow_s=60")
    said = tmp_path / "said"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open(said, "w", buffering=1)
        try:
            with models(cache) as opened:
                asked(opened, GPT)
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    until = time.monotonic() + 20
    while not any(line["method"] == "GET" for line in log.everything()) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(ended(child)) == 130 and time.monotonic() - started < 20
    assert f"1 batch with {NUMBER} requests go on" in said.read_text()
    ((identity,),) = rows(cache, "SELECT id FROM batches")

    import openai

    client = openai.OpenAI(base_url=os.environ["STANDIN_URL"] + "/v1", api_key="any", max_retries=0)

    def cancel() -> None:
        time.sleep(0.5)
        client.batches.cancel(identity)

    thread = threading.Thread(target=cancel)
    thread.start()
    with models(cache) as opened:
        replies = asked(opened, GPT)
    thread.join()
    assert all(reply.text for reply in replies) and sum(served(log).values()) == NUMBER
    assert rows(cache, "SELECT DISTINCT batch FROM ledger") == [(0,)] and settled(cache)


# ---------------------------------------------------------------- a stage


def test_a_stage_makes_the_same_files_either_way(cloud: StandinWith, tmp_path: Path) -> None:
    log = cloud(faults="truncate=0.1,broken_json=0.1,seed=5")
    made: dict[str, list[bytes]] = {}
    for batch in ("", "1"):
        out = tmp_path / f"data{batch}" / "trial" / "patterns" / "08_pattern.jsonl"
        config = ROOT / "stages" / "08_pattern" / "trial.toml"
        flags = ("--out", out, "--config", config, "--track", "patterns")
        done = run_stage(ROOT / "stages" / "08_pattern" / "main.py", *flags, BATCH=batch)
        assert done.returncode == 0, done.stderr
        assert ("at half price" in done.stderr) == bool(batch)
        made[batch] = [out.read_bytes(), out.with_name("08_pattern.rejects.jsonl").read_bytes()]
        if not batch:
            alone = served(log)
            log.mark()
    assert made[""] == made["1"] and made["1"][0]
    assert served(log) == alone
    assert asyncio.iscoroutinefunction(Models.ask)
