"""Limits: learnt from what providers answer, shared by processes, and nothing lost on the way to a clear end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shared.llm.limits as limits
import shared.llm.models as models_module
from shared.errors import ProviderError
from shared.llm import Models, Reply, Request, chat
from shared.llm.limits import LEASE, MARGIN, MAX_WAIT_S, START, Limiter, Shared, Ticket
from shared.stage import ROOT
from tests.conftest import StandinLog, StandinWith

CLAUDE, GPT, GEMINI = "anthropic/claude-haiku-5-5", "openai/gpt-6-luna", "gemini/gemini-3.8-flash"
PATHS = {CLAUDE: "messages", GPT: "completions", GEMINI: "gemini-3.8-flash:generateContent"}
ONE = (1.0, 0.0, 0.0, 0.0)


class Clock:
    """The time of day, under control."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("shared.llm.limits.time.time", found)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "limits-model"


def told(
    limit: float, remaining: float, bucket: str = "requests", form: str = "x-ratelimit-{}-" + "{}"
) -> dict[str, str]:
    return {form.format("limit", bucket): str(limit), form.format("remaining", bucket): str(remaining)}


def known(file: Path, limit: float, remaining: float) -> Shared:
    """A model whose headers were heard."""
    shared = Shared(file)
    _, ticket, _ = shared.take(ONE)
    assert ticket is not None
    shared.heard(ticket, told(limit, remaining), answered=True)
    return shared


def at_once(shared: Shared, costs: limits.Costs = ONE) -> int:
    """How many calls may be sent now; at most 1,000."""
    count = 0
    while count < 1000:
        wait, ticket, more = shared.take(costs)
        if wait or ticket is None:
            return count
        count += 1 + more
    return count


# ---------------------------------------------------------------- what is learnt


def test_before_anything_is_known_few_are_sent_by_all_processes_together(file: Path, clock: Clock) -> None:
    one, two = Shared(file), Shared(file)
    tickets: list[Ticket | None] = [shared.take(ONE)[1] for shared in (one, two) * START]
    assert sum(ticket is not None for ticket in tickets) == START
    assert tickets[0] is not None
    one.heard(tickets[0], {}, answered=True)
    assert at_once(two) == 1, "an answer that says nothing gives its place to the next"
    clock.now += 2 * limits.ROUND_S
    one.heard(tickets[0], {}, answered=True)
    assert at_once(two) > START, "and after a while there are twice as many"


@pytest.mark.parametrize("form", ["x-ratelimit-{}-{}", "anthropic-ratelimit-{1}-{0}"])
def test_what_remains_is_sent_at_once_and_then_what_comes_in(file: Path, clock: Clock, form: str) -> None:
    shared = Shared(file)
    _, ticket, _ = shared.take(ONE)
    assert ticket is not None
    shared.heard(ticket, told(600, 400, form=form), answered=True)
    other = Shared(file)  # another process has not heard it itself
    assert at_once(other) == 400
    waits = [other.take(ONE)[0] for _ in range(3)]
    assert waits == pytest.approx([0.2, 0.3, 0.4]), "600 a minute, booked one after the other"
    clock.now += 60
    assert at_once(shared) <= 600


def test_while_there_is_plenty_calls_are_taken_many_at_a_time(file: Path, clock: Clock) -> None:
    shared = known(file, 100_000, 99_999)
    assert shared.take(ONE) == (0.0, shared_ticket(shared), LEASE - 1)


def shared_ticket(shared: Shared) -> Ticket:
    return Ticket(tuple(bucket.taken for bucket in shared.look().buckets))


def test_tokens_are_limited_as_requests_are(file: Path, clock: Clock) -> None:
    shared = Shared(file)
    costs = (1.0, 3000.0, 2000.0, 1000.0)
    _, ticket, _ = shared.take(costs)
    assert ticket is not None
    shared.heard(ticket, told(6000, 5999) | told(60_000, 7000, "tokens"), answered=True)
    assert at_once(shared, costs) == 2
    assert shared.take(costs)[0] == pytest.approx(5.0), "5,000 tokens too many, 1,000 come in a second"


def test_what_others_took_meanwhile_is_not_taken_twice(file: Path, clock: Clock) -> None:
    shared = known(file, 600, 400)
    _, first, _ = shared.take(ONE)
    assert first is not None
    for _ in range(4):
        shared.take(ONE)
    shared.heard(first, told(600, 399), answered=True)  # said before the four others came in
    assert at_once(shared) == 399 - 4 * LEASE


def test_a_limit_that_is_nearly_gone_at_the_first_answer_is_used_evenly(file: Path, clock: Clock) -> None:
    shared = Shared(file)
    tickets = [ticket for _, ticket, _ in (shared.take(ONE) for _ in range(START)) if ticket is not None]
    clock.now += 0.1
    shared.heard(tickets[0], told(1200, 19), answered=True)  # 20 in some window, where 1,200 a minute are told
    apart = 1 / (20 * MARGIN)
    assert shared.take(ONE)[0] == pytest.approx((START + 1) * apart - 0.05), "from the first call on, not from now"
    assert shared.take(ONE)[0] == pytest.approx((START + 2) * apart - 0.05)
    clock.now += limits.PACED_S + 60
    assert at_once(shared) > 100, "and is believed again after a while"


def test_a_refusal_against_the_headers_spreads_the_calls_evenly(file: Path, clock: Clock) -> None:
    shared = known(file, 1200, 1199)
    shared.refused(0.5, overloaded=False)
    waits = [shared.take(ONE)[0] for _ in range(4)]
    apart = 1 / (20 * MARGIN)
    assert waits == pytest.approx([0.5 + apart * n for n in (1, 2, 3, 4)]), "after what Retry-After says, one by one"
    clock.now += 0.5 + 10 * apart
    assert at_once(shared) <= 1, "what was not sent is not made up for in a burst"


def test_without_headers_the_rate_is_what_was_let_through(file: Path, clock: Clock) -> None:
    shared = Shared(file)
    for n in range(21):
        _, ticket, _ = shared.take(ONE)
        assert ticket is not None
        if n < 20:
            shared.heard(ticket, {}, answered=True)
    state = shared.refused(0.9, overloaded=False)
    assert state.buckets[0].rate == pytest.approx(20 * MARGIN)


def test_a_rate_that_was_lowered_comes_back_but_never_above_what_is_told(file: Path, clock: Clock) -> None:
    shared = known(file, 1200, 1199)
    for _ in range(6):
        shared.refused(0.0, overloaded=False)
        clock.now += 3
    low = shared.look().buckets[0].rate
    assert low < 0.7 * 20
    for _ in range(180):
        clock.now += 0.5
        shared.take(ONE)
    assert low < shared.look().buckets[0].rate == pytest.approx(20 * MARGIN)


def test_one_wave_of_refusals_is_one_signal(file: Path, clock: Clock) -> None:
    shared = known(file, 1200, 1199)
    rates = [shared.refused(0.1, overloaded=False).buckets[0].rate for _ in range(20)]
    assert set(rates) == {20 * MARGIN}
    factors = [shared.refused(0.1, overloaded=True).factor for _ in range(20)]
    assert set(factors) == {0.5}
    clock.now += 2
    assert shared.refused(0.1, overloaded=True).factor == 0.25


def test_retry_after_is_obeyed_by_all_and_has_a_cap(file: Path, clock: Clock) -> None:
    one, two = known(file, 1200, 1199), Shared(file)
    one.refused(3600.0, overloaded=False)
    wait, ticket, _ = two.take(ONE)
    assert ticket is None and wait == pytest.approx(MAX_WAIT_S)
    clock.now += MAX_WAIT_S + 1
    assert two.take(ONE)[1] is not None


def test_without_an_answer_it_is_asked_less_and_less_often(file: Path, clock: Clock) -> None:
    shared = known(file, 1200, 1199)
    start, tries = clock.now, 0
    while clock.now < start + 900:
        wait, ticket, _ = shared.take(ONE)
        clock.now += wait + 0.001
        if ticket is not None:
            tries += 1
            shared.refused(1.0, overloaded=True)
    assert 20 < tries < 80, "fifteen minutes of nothing but refusals"
    _, ticket, _ = shared.take(ONE)
    clock.now += 60
    _, ticket, _ = shared.take(ONE)
    assert ticket is not None
    assert shared.heard(ticket, {}, answered=True).refused == 0.0


def test_concurrency_grows_by_one_a_round(file: Path) -> None:
    shared = known(file, 1200, 1199)
    limiter = Limiter(shared, 16)
    for _ in range(3):
        limiter.refused(0.0, overloaded=True)
        limiter.shared._own.halved = 0.0
        shared.refused(0.0, overloaded=True)
    limiter.heard(Ticket(shared_ticket(shared).taken), {}, answered=True)
    before = limiter.allowed
    for _ in range(before + 1):
        limiter.heard(Ticket(shared_ticket(shared).taken), {}, answered=True)
    assert limiter.allowed == before + 1


# ---------------------------------------------------------------- the file


def test_a_clock_set_back_closes_nothing_for_longer(file: Path, clock: Clock) -> None:
    shared = known(file, 1200, 1199)
    shared.refused(100.0, overloaded=False)
    for back in (30.0, 3600.0):
        clock.now -= back
        wait, _, _ = shared.take(ONE)
        assert wait <= MAX_WAIT_S


@pytest.mark.parametrize("content", [b"", b"limits-0" + b"\1" * 700, b"\xff" * 776, os.urandom(5000)])
def test_a_damaged_file_is_begun_anew(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    shared = known(file, 1200, 1199)
    assert shared.look().buckets[0].rate == 20
    assert Shared(file).look().buckets[0].rate == 20


def test_what_is_old_is_forgotten(file: Path, clock: Clock) -> None:
    known(file, 1200, 1199).refused(1.0, overloaded=False)
    clock.now += limits.FORGET_S + 1
    assert at_once(Shared(file)) == START


def test_files_that_say_nothing_any_more_are_removed(tmp_path: Path) -> None:
    fresh, old = (limits.file_of(tmp_path, where, GPT, "") for where in ("http://127.0.0.1:1", "http://127.0.0.1:2"))
    for file in (fresh, old):
        known(file, 1200, 1199)
    os.utime(old, (0, time.time() - limits.FORGET_S - 1))
    limits.forget_old(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_whoever_dies_before_anything_is_known_blocks_the_next_one_for_a_moment_only(file: Path, clock: Clock) -> None:
    assert at_once(Shared(file)) == START
    clock.now += 1.1
    assert at_once(Shared(file)) == 1


def test_a_place_that_cannot_be_written_to_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    shared = known(tmp_path / "file" / "limits", 600, 400)
    assert at_once(shared) == 400


def test_a_process_stopped_in_the_middle_does_not_stop_the_others(file: Path) -> None:
    shared = known(file, 1200, 1199)
    with open(file, "rb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        started = time.monotonic()
        assert shared.take(ONE)[1] is not None
        assert time.monotonic() - started < 10
    assert shared.look().buckets[0].rate == 20


@pytest.mark.slow
def test_processes_together_take_no_more_than_there_is(file: Path) -> None:
    known(file, 60, 59)
    code = (
        "import pathlib, sys\n"
        "from tests.test_limits import ONE, at_once\n"
        "from shared.llm.limits import Shared\n"
        "print(at_once(Shared(pathlib.Path(sys.argv[1]))))\n"
    )
    pipes: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, file], **pipes) for _ in range(4)]
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert 59 <= sum(counts) <= 59 + 10, f"{counts}: one more comes in a second"


# ---------------------------------------------------------------- against the stand-in


def question(model: str, n: int, who: str = "") -> Request:
    return Request(model=model, messages=chat("", f"Say what line {n} {who} says."))


def ask_many(data: Path, model: str, count: int, concurrency: int) -> list[Reply]:
    with Models(data.parent.parent / "cache", "mock", "trial", "04_validate", "compression") as models:
        models.require(model)

        async def work(n: int) -> Reply:
            return await models.ask(question(model, n))

        return [reply for _, reply in models.map(work, range(count), concurrency)]


def refusals(log: StandinLog) -> int:
    return sum(line["status"] == 429 for line in log.requests())


@pytest.mark.slow
@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI])
def test_twenty_a_second_are_used_and_hardly_ever_exceeded(standin_with: StandinWith, data: Path, model: str) -> None:
    log = standin_with(rate=20)
    started = time.monotonic()
    replies = ask_many(data, model, 100, 50)
    seconds = time.monotonic() - started
    assert [reply.problem for reply in replies] == [""] * 100, "no row is lost"
    lines = [line for line in log.requests() if line["method"] == "POST"]
    assert sum(line["served"] for line in lines) == 100, "none is asked twice"
    assert refusals(log) <= 8
    # `python -m benchmarks.rate` measures it (5.2 s); here other tests may share the machine.
    assert 4.0 < seconds < 9.0


@pytest.mark.slow
def test_two_processes_share_twenty_a_second(standin_with: StandinWith, data: Path) -> None:
    log = standin_with(rate=20)
    code = (
        "import pathlib, sys\n"
        "from shared.llm import Models\n"
        "from tests.test_limits import GPT, question\n"
        "with Models(pathlib.Path(sys.argv[1]), 'mock', 'trial', sys.argv[2]) as models:\n"
        "    models.require(GPT)\n"
        "    async def work(n):\n"
        "        return await models.ask(question(GPT, n, sys.argv[2]))\n"
        "    print(sum(not reply.problem for _, reply in models.map(work, range(50), 50)))\n"
    )
    cache = data.parent.parent / "cache"
    pipes: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, cache, name], **pipes) for name in ("one", "two")]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["50\n", "50\n"]
    assert refusals(log) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI])
def test_nothing_but_429_ends_with_a_sentence_and_few_calls(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(models_module, "PATIENCE_S", 3.0)
    log = standin_with(faults=f"429@{PATHS[model]}=1-,retry_after=0.3")
    started = time.monotonic()
    with pytest.raises(ProviderError) as end:
        ask_many(data, model, 200, 32)
    assert time.monotonic() - started < 20
    assert f"{model} has refused every call" in str(end.value) and "429" in str(end.value)
    assert "everything answered is saved" in end.value.mend and "run the same command" in end.value.mend
    assert len(log.requests()) < 40


def test_a_new_run_has_patience_of_its_own(file: Path, clock: Clock) -> None:
    first = Limiter(known(file, 1200, 1199), 4)
    for _ in range(100):
        first.refused(1.0, overloaded=False)
        clock.now += 10
    assert first.refused_for() > 900
    again = Limiter(Shared(file), 4)
    assert again.refused_for() == 0
    again.refused(1.0, overloaded=False)
    clock.now += 5
    assert again.refused_for() == 5
    assert first.refused_for() > 900
    again.heard(shared_ticket(again.shared), {}, answered=True)
    assert first.refused_for() == again.refused_for() == 0, "an answer to one is news for all"


@pytest.mark.parametrize("limit", ["0", "-1", "unlimited", "1e12", "nan"])
def test_a_header_that_says_no_limit_is_none(file: Path, clock: Clock, limit: str) -> None:
    shared = Shared(file)
    _, ticket, _ = shared.take(ONE)
    assert ticket is not None
    headers = {"x-ratelimit-limit-requests": limit, "x-ratelimit-remaining-requests": "0"}
    assert shared.heard(ticket, headers, answered=True).buckets[0].rate == 0


@pytest.mark.slow
def test_a_storm_of_529_is_waited_for(standin_with: StandinWith, data: Path) -> None:
    log = standin_with(faults="529@messages=5-40,retry_after=0.05", latency_s=0.02)
    replies = ask_many(data, CLAUDE, 60, 24)
    assert [reply.problem for reply in replies] == [""] * 60
    lines = log.requests()
    assert sum(line["status"] == 529 for line in lines) == 36
    assert sum(line["served"] for line in lines) == 60


@pytest.mark.slow
@pytest.mark.parametrize("model", [GPT, CLAUDE, GEMINI])
@pytest.mark.parametrize("fault", ["slow_loris", "half_closed"])
def test_an_answer_that_never_ends_is_given_up_and_asked_for_again(
    standin_with: StandinWith, data: Path, monkeypatch: pytest.MonkeyPatch, fault: str, model: str
) -> None:
    monkeypatch.setattr("shared.llm.providers.TIMEOUT_S", 1.0)
    # The first goes through the SDK, the third the short way.
    log = standin_with(faults=f"{fault}@{PATHS[model]}=1,{fault}@{PATHS[model]}=3,timeout_s=60")
    started = time.monotonic()
    replies = ask_many(data, model, 3, 1)
    assert [reply.problem for reply in replies] == [""] * 3
    assert time.monotonic() - started < 15
    lines = log.requests()
    assert sum(line["served"] for line in lines) == 3


def test_an_anthropic_account_without_credit_is_no_bad_request_of_every_record() -> None:
    import anthropic
    import httpx2

    from shared.llm.providers import _anthropic_limit

    said = {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}
    response = httpx2.Response(400, request=httpx2.Request("POST", "http://127.0.0.1"), json={"error": said})
    error: Callable[[str], Any] = lambda text: anthropic.BadRequestError(text, response=response, body=None)  # noqa: E731
    assert _anthropic_limit(error(said["message"]))
    assert not _anthropic_limit(error("prompt is too long"))


@pytest.mark.slow
def test_calls_wait_for_their_turn_in_the_order_they_came(file: Path) -> None:
    shared = known(file, 3000, 1)
    shared.refused(0.0, overloaded=False)
    limiter, order = Limiter(shared, 50), list[int]()

    async def call(n: int) -> None:
        async with limiter.slot(ONE):
            order.append(n)

    async def together() -> None:
        await asyncio.gather(*(call(n) for n in range(30)))

    asyncio.run(together())
    assert order == list(range(30))
