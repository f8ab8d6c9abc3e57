"""What a run says about itself: the tables of `make stats` and the life of a record of `make trace`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shared import stats, trace
from shared.errors import SettingsError
from shared.llm import ModelCard, Request, Store, chat
from shared.llm.catalogue import FREE, catalogue
from shared.llm.providers import PROVIDERS
from shared.llm.store import Entry
from shared.llm.types import Answer, Usage
from shared.records import (
    Generation,
    Merged,
    Pair,
    RawText,
    Record,
    TaskScore,
    Verdict,
    Verdicts,
    content_id,
)
from shared.stage import ROOT, Settings, Stage

TEXT = "The reservoir holds 2,000 litres and must never be filled above 90 %.\nIt is emptied each March."


def raw(text: str = TEXT, **changes: object) -> RawText:
    known = {
        "id": content_id(text),
        "domain": "prose",
        "source": "documents",
        "origin": "notes/water.md#L3-L4",
        "language": "en",
        "category": "document",
        "licence": "CC-BY-4.0",
        "text": text,
    }
    return RawText.model_validate(known | changes)


def pair(record: RawText, verdicts: Verdicts | None = None) -> Pair:
    generation = Generation(
        generator="endpoint",
        model="endpoint/small",
        prompt="0" * 16,
        tokenizer="models/tiny",
        verbose_tokens=24,
        compressed_tokens=12,
        compression_ratio=0.5,
    )
    provenance = record.model_dump(exclude={"kind", "text", "merged", "schema_version"})
    return Pair(
        **provenance,
        verbose=record.text,
        compressed="reservoir 2,000 l, never >90 %; emptied March",
        generation=generation,
        verdicts=verdicts,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty data directory."""
    return tmp_path / "data"


class Run:
    """Runs stages for real, without their scripts: what they keep and reject is given."""

    def __init__(self, data: Path, run: str = "trial", track: str = "compression", apis: str = "mock") -> None:
        self.directory, self.track, self.apis = data / run / track, track, apis
        self.config = data / "settings.toml"

    def stage(
        self,
        name: str,
        kept: Sequence[Record],
        rejected: Sequence[tuple[Record, str, str, str | None]] = (),
        costs: Sequence[float] = (),
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.touch()
        (self.directory.parent / ".apis").write_text(f"{self.apis}\n")
        output = self.directory / f"{name}.jsonl"
        made = Stage(name, self.config, None, output, self.config, self.track, 0, Settings(), self.apis)
        made.plan(len(kept) + len(rejected))
        for record in kept:
            made.keep(record)
        for record, reason, detail, match in rejected:
            made.reject(record, reason, detail, match)
        made.finish()


def put(data: Path, entries: Sequence[tuple[Entry, dict[str, object], str]], apis: str = "mock") -> None:
    """Store answers and their ledger lines."""
    store = Store(data / "cache" / f"{apis}.sqlite")

    async def write() -> None:
        for entry, request, text in entries:
            usage = Usage(input=entry.input, output=entry.output)
            await store.put(entry, request, Answer(text=text, stop="stop", usage=usage))

    asyncio.run(write())
    store.close()


def entry(key: str, model: str, stage: str = "04_validate", run: str = "trial", nano: int = 1_000_000) -> Entry:
    return Entry(
        key=key, model=model, run=run, track="compression", stage=stage, input=100, output=20, cached=0, nano=nano
    )


def command(module: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as `make` runs it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("APIS", "BUDGET_USD")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment | {"APIS": "mock", "PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---------------------------------------------------------------- stats


def test_a_track_table_has_every_stage_in_order_with_its_account_and_a_total(data: Path) -> None:
    run = Run(data)
    many = [raw(f"{TEXT} {number}") for number in range(7)]
    run.stage("02_merge", many[:4], [(r, "too_short", "", None) for r in many[4:6]] + [(many[6], "nul", "", None)])
    run.stage("01_acquire", many)

    lines = stats.track_table(run.directory).splitlines()

    assert [line.split()[:4] for line in lines[2:5]] == [
        ["01_acquire", "7", "7", "0"],
        ["02_merge", "7", "4", "3"],
        ["total", "7", "4", "3"],
    ]
    assert lines[3].endswith("too_short 2, nul 1")
    assert "APIS=mock" in lines[-1] and "stand-in" in lines[-1]


def test_only_the_most_frequent_reasons_are_named_and_the_rest_is_counted(data: Path) -> None:
    run = Run(data)
    many = [raw(f"{TEXT} {number}") for number in range(11)]
    reasons = ["a"] * 4 + ["b"] * 3 + ["c"] + ["d"] + ["e"]
    run.stage("02_merge", many[:1], [(r, reason, "", None) for r, reason in zip(many[1:], reasons, strict=True)])

    assert "a 4, b 3, c 1, 2 more kinds 2" in stats.track_table(run.directory)


def test_a_live_run_says_that_its_dollars_are_real(data: Path) -> None:
    run = Run(data, apis="live")
    run.stage("01_acquire", [raw()])

    assert "the dollars are real" in stats.track_table(run.directory)


def test_an_older_report_of_the_stage_that_asks_is_left_out(data: Path) -> None:
    run = Run(data)
    run.stage("12_choose", [raw()])
    run.stage("13_format", [raw()])

    assert "13_format" in stats.track_table(run.directory)
    assert "13_format" not in stats.track_table(run.directory, running="13_format")


def test_a_broken_report_names_the_command_that_writes_it_again(data: Path) -> None:
    run = Run(data)
    run.stage("02_merge", [raw()])
    (run.directory / "02_merge.report.json").write_text('{"stage": "02_merge"}')

    with pytest.raises(SettingsError, match="make stage2"):
        stats.track_table(run.directory)


def test_without_a_run_stats_says_what_to_type_and_makes_nothing(data: Path) -> None:
    said = command("shared.stats", "--run", "trial", "--data", str(data))

    assert said.returncode == 0
    assert "make trial" in said.stdout
    assert not data.exists()


def test_spending_is_summed_by_stage_provider_model_and_day_for_one_run_only(data: Path) -> None:
    put(
        data,
        [
            (entry("a", "anthropic/claude-haiku-5-5", nano=2_000_000), {}, "x"),
            (entry("b", "openai/gpt-6-luna", nano=1_000_000), {}, "x"),
            (entry("c", "openai/text-embedding-3-small", "10_embed", nano=500_000), {}, "x"),
            (entry("d", "openai/gpt-6-luna", run="full", nano=9_000_000_000), {}, "x"),
        ],
    )
    store = stats.open_store(data, "mock")
    assert store is not None
    lines = stats.spending_table(store, "trial")
    store.close()

    cells = [" ".join(line.split()) for line in lines]
    assert "stage compression 04_validate 2 200 40 0.0030" in cells
    assert "compression 10_embed 1 100 20 0.0005" in cells
    assert "provider anthropic 1 100 20 0.0020" in cells
    assert "openai 2 200 40 0.0015" in cells
    assert "openai/gpt-6-luna 1 100 20 0.0010" in cells
    assert sum(cell.startswith("day (UTC)") and cell.endswith("3 300 60 0.0035") for cell in cells) == 1
    assert not any("9.0000" in cell for cell in cells)


def test_the_rest_of_the_budget_counts_what_this_kind_of_run_has_paid(data: Path) -> None:
    put(data, [(entry("a", "openai/gpt-6-luna", nano=250_000_000), {}, "x")])
    put(data, [(entry("a", "openai/gpt-6-luna", nano=100_000_000), {}, "x")], apis="live")

    mock = command("shared.stats", "--data", str(data), BUDGET_USD="1")
    live = command("shared.stats", "--data", str(data), BUDGET_USD="0.05", APIS="live")

    assert "BUDGET_USD=1 for RUN=trial: 0.2500 spent, 0.7500 left" in mock.stdout
    assert "BUDGET_USD=0.05 for RUN=trial: 0.1000 spent, 0.0000 left" in live.stdout
    assert "0.2500" in live.stdout, "what the stand-in counted is shown too, apart"


def test_a_wrong_budget_is_an_error_and_no_traceback(data: Path) -> None:
    said = command("shared.stats", "--data", str(data), BUDGET_USD="lots")

    assert said.returncode == 2
    assert said.stderr.startswith("error: BUDGET_USD must be dollars")


# ---------------------------------------------------------------- trace


@pytest.fixture
def judged(data: Path) -> Iterator[tuple[Path, Pair]]:
    """A record that went from 01 to 04, where the panel failed it; with the panel's prompts and answers stored."""
    run, record = Run(data), raw()
    other = raw("Entirely different text about a lighthouse, built in 1881 and never lit again.")
    merged = record.with_field(merged=Merged(text=record.text, edits=("trim",)))
    replies = {"full": "holds 2,000 litres; never above 90 %", "short": "holds 2,000 litres"}
    wires = {
        side: PROVIDERS["anthropic"]().wire(
            Request(model="anthropic/claude-haiku-5-5", messages=chat("Answer from one text.", f"Key points: {text}")),
            catalogue().card("anthropic/claude-haiku-5-5"),
        )
        for side, text in (("full", record.text * 4), ("short", "reservoir 2,000 l"))
    }
    keys = {side: f"{side}-key" for side in replies}
    put(data, [(entry(keys[s], "anthropic/claude-haiku-5-5"), wires[s], replies[s]) for s in replies])
    score = TaskScore(task="key_points", similarity=0.41, verbose_reply=keys["full"], compressed_reply=keys["short"])
    verdicts = Verdicts(
        panel=(Verdict(model="anthropic/claude-haiku-5-5", equivalence=0.41, tasks=(score,)),),
        min_equivalence=0.41,
        mean_equivalence=0.41,
        threshold=0.8,
        passed=False,
    )
    failed = pair(merged, verdicts)
    run.stage("01_acquire", [record, other])
    run.stage("02_merge", [merged, other])
    run.stage("03_compress", [pair(merged), pair(other)])
    run.stage("04_validate", [pair(other)], [(failed, "not_equivalent", "haiku: 0.410 of 0.8", None)])
    yield data, failed


def story(data: Path, prefix: str, full: bool = False) -> list[str]:
    store = stats.open_store(data, "mock")
    try:
        return list(trace.Teller(store, full).tell(trace.life(data / "trial", prefix)))
    finally:
        if store:
            store.close()


def test_a_trace_tells_source_licence_and_what_each_stage_decided_and_added(judged: tuple[Path, Pair]) -> None:
    data, failed = judged
    lines = story(data, failed.id[:6])

    assert lines[0] == f"record {failed.id}"
    assert any(line.split() == ["origin", "notes/water.md#L3-L4"] for line in lines)
    assert any(line.split() == ["licence", "CC-BY-4.0"] for line in lines)
    stages = [line.strip() for line in lines if line.startswith("\n")]
    assert stages == [
        "compression/01_acquire  kept",
        "compression/02_merge  kept",
        "compression/03_compress  kept",
        "compression/04_validate  rejected: not_equivalent (haiku: 0.410 of 0.8)",
    ]
    last = lines[[line.strip() for line in lines].index(stages[-1]) :]
    assert not any("reservoir 2,000 l, never" in line for line in last), (
        "03 wrote that, so 04's part does not repeat it"
    )
    assert any("similarity  0.41" in line for line in last)


def test_a_trace_shows_the_panels_prompts_and_answers_short_and_with_full_whole(judged: tuple[Path, Pair]) -> None:
    data, failed = judged
    short, full = "\n".join(story(data, failed.id)), "\n".join(story(data, failed.id, full=True))

    assert "answer  holds 2,000 litres; never above 90 %" in short
    assert "user  Key points: The reservoir" in short and "… (" in short
    assert "Answer from one text." not in short
    assert "Answer from one text." in full and "… (" not in full
    assert full.count("It is emptied each March.") > short.count("It is emptied each March.")


def test_a_reply_that_is_gone_is_said_to_be_gone(judged: tuple[Path, Pair]) -> None:
    data, failed = judged
    (data / "cache" / "mock.sqlite").unlink()

    assert "not in the reply store any more: full-key" in "\n".join(story(data, failed.id))


def test_a_trace_finds_what_was_made_from_a_record_and_what_repeats_it(data: Path) -> None:
    run, record = Run(data), raw()
    copy, child = raw(TEXT + " "), raw("made from it", parents=(content_id(TEXT),))
    run.stage("01_acquire", [record, copy])
    run.stage("02_merge", [record], [(copy, "near_duplicate", "0.98", record.id)])
    Run(data, track="patterns").stage("08_pattern", [child])

    lines = story(data, record.id)

    assert any(child.id in line and "08_pattern" in line for line in lines)
    assert any(copy.id in line and "near_duplicate" in line for line in lines)


@pytest.mark.parametrize("given", ["", "3f2a", "not-hex", "ffffff"])
def test_an_id_that_cannot_be_followed_is_answered_with_one_that_can(data: Path, given: str) -> None:
    record = raw()
    Run(data).stage("01_acquire", [record])

    said = command("shared.trace", "--data", str(data), *([given] if given else []))

    assert said.returncode == 2
    assert f"make trace RUN=trial ID={record.id[:12]}" in said.stderr


def test_an_id_that_begins_two_records_asks_for_more_digits(data: Path) -> None:
    one, two = raw(id="abcdef" + "0" * 26), raw(id="abcdef" + "1" * 26)
    Run(data).stage("01_acquire", [one, two])

    with pytest.raises(SettingsError, match=r"(?s)2 records.*more digits"):
        trace.life(data / "trial", "abcdef")
    assert trace.life(data / "trial", "abcdef0").id == one.id


def test_without_records_a_trace_says_how_to_make_some(data: Path) -> None:
    said = command("shared.trace", "--data", str(data), "abcdef")

    assert said.returncode == 2
    assert "make trial" in said.stderr


@pytest.mark.parametrize("provider", ["anthropic", "openai", "gemini", "endpoint"])
def test_the_question_is_read_from_every_providers_wire_body(provider: str) -> None:
    card: ModelCard = FREE
    wire = PROVIDERS[provider]().wire(Request(model=f"{provider}/m", messages=chat("Be brief.", "Why?")), card)

    assert trace.turns(wire) == [("system", "Be brief."), ("user", "Why?")]


def test_an_id_on_the_command_line_prints_the_story(judged: tuple[Path, Pair]) -> None:
    data, failed = judged
    said = command("shared.trace", "--data", str(data), failed.id[:8].upper())

    assert said.returncode == 0
    assert said.stdout.startswith(f"record {failed.id}")
