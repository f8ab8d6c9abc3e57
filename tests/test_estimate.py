"""`make estimate`: volumes, the stages' own arithmetic, prices; and how near it comes to what the ledger says."""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared import estimate as forecast
from shared import stats
from shared.errors import SettingsError
from shared.llm.catalogue import catalogue
from shared.llm.types import Usage, strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.panel import TASKS
from shared.records import Domain, Generation, Merged, Pair, RawText, Record, content_id
from shared.stage import ROOT
from tests.conftest import run_stage

TRACK = "compression"


def raw(text: str, domain: str = "prose", merged: bool = True) -> RawText:
    return RawText(
        id=content_id(text),
        domain=domain,  # type: ignore[arg-type]
        source="test",
        origin="test#1",
        language="en" if domain == "prose" else "python",
        category="passage",
        licence="MIT",
        text=text if not merged else f"{text}\n",
        merged=Merged(text=text) if merged else None,
    )


def pair(number: int, verbose_tokens: int) -> Pair:
    verbose, compressed = "v" * 4 * verbose_tokens, "c" * 2 * verbose_tokens
    record = raw(f"{verbose}{number}", merged=False)
    generation = Generation(
        generator="endpoint",
        model="endpoint/small",
        prompt="0" * 16,
        tokenizer="models/tiny",
        verbose_tokens=verbose_tokens,
        compressed_tokens=verbose_tokens // 2,
        compression_ratio=0.5,
    )
    provenance = record.model_dump(exclude={"kind", "text", "merged", "schema_version"})
    return Pair(**provenance, verbose=verbose, compressed=compressed, generation=generation)


def write(path: Path, records: Sequence[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record.line() for record in records))
    return path


def directory(tmp_path: Path, run: str = "trial") -> Path:
    path = tmp_path / "data" / run / TRACK
    path.mkdir(parents=True, exist_ok=True)
    return path


def of_track(rows: list[forecast.Row], track: str = TRACK) -> dict[tuple[str, str], forecast.Row]:
    """Of the stages that make records: what training and measuring cost is another matter."""
    return {(row.stage, row.model): row for row in rows if row.track == track and row.stage < "14"}


# ---------------------------------------------------------------- the spine


def test_the_spine_is_what_make_has_rules_for() -> None:
    database = subprocess.run(["make", "-npq", "help"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    named = re.sub(r"^# Not a target:\n.*\n", "", database, flags=re.MULTILINE)  # .PRECIOUS names what has no rule
    rules = re.findall(r"^data/trial/([a-z]+)/(\d\d_[a-z_]+)\.jsonl:", named, re.MULTILINE)

    assert rules
    after = {"compression": ["14_train", "15_evaluate", "16_release"]}  # what `make trial` goes on to
    assert forecast.spine("trial") == {
        track: sorted(stage for on, stage in rules if on == track) + after.get(track, []) for track, _ in sorted(rules)
    }
    assert forecast.spine("bootstrap")["compression"][-1] == "14_train"


def test_a_stage_is_loaded_without_leaving_its_neighbours_names_behind() -> None:
    path, names = list(sys.path), set(sys.modules)
    module = forecast.load_stage("03_compress")

    assert module.Params.__name__ == "Params"
    assert sys.path == path
    assert not {"cleaning", "generation", "mlx_generator"} & (set(sys.modules) - names)


def test_a_run_has_the_tracks_that_it_has_settings_for() -> None:
    assert sorted(forecast.spine("full")) == ["compression", "grounded", "patterns"]
    assert list(forecast.spine("bootstrap")) == ["compression"]


def test_a_run_without_settings_is_refused_with_the_runs_there_are() -> None:
    with pytest.raises(SettingsError, match="no stage has settings for RUN=huge") as raised:
        forecast.estimate("huge")
    assert raised.value.mend == "one of: bootstrap, full, trial"


# ---------------------------------------------------------------- volumes


def test_the_volume_of_a_file_is_counted_by_domain_in_bytes_over_four(tmp_path: Path) -> None:
    texts = [raw("a" * 400), raw("b" * 800), raw("é" * 100, "code", merged=False)]
    path = write(tmp_path / "02_merge.jsonl", texts)

    volumes = forecast.measured(path)

    assert volumes["prose"] == Volume(records=2, tokens=150.0, evenness=2 / (1 / 100 + 1 / 200) / 150)
    assert volumes["code"] == Volume(records=1, tokens=50.0)


def test_lines_that_are_no_records_are_not_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "02_merge.jsonl", [raw("a" * 400)])
    with open(path, "ab") as file:
        file.write(b'not json\n{"schema_version":1}\n\n')

    assert forecast.measured(path)["prose"].records == 1


def test_a_pairs_volume_has_both_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "03_compress.jsonl", [pair(1, 100), pair(2, 100)])

    assert forecast.measured(path)["prose"] == Volume(records=2, tokens=100.0, compressed=50.0)


def test_a_measured_input_leaves_only_the_answers_to_guess(tmp_path: Path) -> None:
    write(directory(tmp_path) / "03_compress.jsonl", [pair(number, 100) for number in range(40)])

    rows = of_track(forecast.estimate("trial", tmp_path / "data"))
    row = rows["04_validate", "anthropic/claude-haiku-5-5"]

    expected = 40 * 2 * (1 + 0.65 + 0.35 * 0.7)
    assert row.calls == pytest.approx((expected,) * 3), "40 pairs, 2 texts, 2 tasks, the second not of all that fail"
    assert row.basis.endswith("03_compress.jsonl") and not row.basis.startswith("from ")
    assert row.usd[0] < row.usd[1] < row.usd[2]


def test_without_an_input_the_nearest_file_upstream_is_carried_on_by_keep_rates(tmp_path: Path) -> None:
    write(directory(tmp_path) / "01_acquire.jsonl", [raw("a" * 400 + str(n), merged=False) for n in range(100)])

    row = of_track(forecast.estimate("trial", tmp_path / "data"))["04_validate", "openai/gpt-6-luna"]

    reach = 0.65 + 0.35 * 0.35
    expected = [100 * forecast.KEPT["02_merge"][k] * forecast.KEPT["03_compress"][k] * 4 * reach for k in range(3)]
    assert row.calls == pytest.approx(expected)
    assert row.basis.startswith("from ") and row.basis.endswith("01_acquire.jsonl")


def test_keep_rates_of_this_runs_reports_replace_the_assumed_ones_and_pending_is_no_reject(tmp_path: Path) -> None:
    directory(tmp_path).joinpath("04_validate.report.json").write_text(
        '{"stage": "04_validate", "track": "compression", "apis": "mock", "seconds": 1.0, "counts":'
        '{"planned": 100, "kept": 30, "rejected": 70, "reasons": {"pending": 40, "not_equivalent": 30}}}'
    )

    low, expected, high = forecast.keep_rates(directory(tmp_path))["04_validate"]

    assert (low, expected, high) == pytest.approx((0.45, 0.5, 0.55))
    assert forecast.keep_rates(directory(tmp_path))["02_merge"] == forecast.KEPT["02_merge"]


def test_a_stage_that_kept_nothing_does_not_make_everything_after_it_free(tmp_path: Path) -> None:
    directory(tmp_path).joinpath("02_merge.report.json").write_text(
        '{"stage": "02_merge", "track": "compression", "apis": "mock", "seconds": 1.0, "counts":'
        '{"planned": 100, "kept": 0, "rejected": 100, "reasons": {"licence": 100}}}'
    )

    assert forecast.keep_rates(directory(tmp_path))["02_merge"] == forecast.KEPT["02_merge"]


def test_with_nothing_there_the_limits_of_the_sources_count(tmp_path: Path) -> None:
    _, params = forecast.load_params("01_acquire", "trial", TRACK)
    limits = sum(source.limit for source in params.sources)  # type: ignore[attr-defined]

    row = of_track(forecast.estimate("trial", tmp_path / "data"))["04_validate", "openai/gpt-6-luna"]

    assert row.calls[2] == pytest.approx(limits * 4 * 0.7725), "every source is full and every text goes on"
    assert 0 < row.calls[0] < row.calls[1] < row.calls[2]
    assert not (tmp_path / "data").exists(), "an estimate makes nothing"


# ---------------------------------------------------------------- the stages' arithmetic


def stage_calls(name: str, volumes: dict[Domain, Volume], **changes: object) -> list[Calls]:
    module, params = forecast.load_params(name, "full", TRACK)
    calls: list[Calls] = module.calls(params.model_copy(update=changes), volumes)
    return calls


def test_04_asks_every_member_every_task_from_both_texts_and_embeds_the_answers() -> None:
    calls = stage_calls("04_validate", {"code": Volume(10, 100, 50)}, limit=0, exhaustive=True)
    by_model = {model: [c for c in calls if c.model == model] for model in {c.model for c in calls}}
    prompts = ROOT / "stages" / "04_validate" / "prompts"
    system = tokens_of((prompts / "system.txt").read_text())
    tasks = sum(
        tokens_of((prompts / f"{name}.txt").read_text()) + tokens_of(str(strict_schema(TASKS[name])))
        for name in ("explain", "write")
    )

    luna = by_model["openai/gpt-6-luna"]
    assert sum(c.calls for c in luna) == 10 * 2 * 2
    assert sum(c.input_tokens for c in luna) == pytest.approx(10 * (4 * system + 2 * tasks + 300))
    embedded = by_model["openai/text-embedding-3-small"]
    answered = sum(c.output_tokens for c in calls)
    assert sum(c.input_tokens for c in embedded) == pytest.approx(answered)
    assert sum(c.output_tokens for c in embedded) == 0


def test_a_panel_that_stops_early_is_expected_to_ask_less_and_at_most_as_much() -> None:
    volumes: dict[Domain, Volume] = {"code": Volume(10, 100, 50)}
    every, fewer = (stage_calls("04_validate", volumes, limit=0, exhaustive=exhaustive) for exhaustive in (True, False))

    assert sum(c.calls for c in fewer) < sum(c.calls for c in every)
    assert sum(c.output_tokens * c.high for c in fewer) == pytest.approx(sum(c.output_tokens * c.high for c in every))


def test_a_judge_is_asked_about_every_two_answers() -> None:
    every = {"limit": 0, "exhaustive": True}
    without = stage_calls("04_validate", {"prose": Volume(10, 100, 50)}, **every)
    judged = stage_calls("04_validate", {"prose": Volume(10, 100, 50)}, **every, judge="anthropic/claude-opus-5-5")

    extra = [c for c in judged if c.model == "anthropic/claude-opus-5-5"]
    assert sum(c.calls for c in extra) == 10 * 2 * 2, "panel of two, two tasks"
    assert len(judged) == len(without) + len(extra)


@pytest.mark.parametrize("limit", [200, 700, 2000])
def test_the_subset_that_a_limit_takes_is_as_long_as_the_estimate_says(tmp_path: Path, limit: int) -> None:
    draw = random.Random(5)
    sizes = [min(max(round(150 * draw.lognormvariate(0, 0.65)), 40), 500) for _ in range(2000)]
    path = write(tmp_path / "03_compress.jsonl", [pair(number, size) for number, size in enumerate(sizes)])
    module = forecast.load_stage("04_validate")
    chosen = module.subset(path, limit, 42)
    real = sum(size for number, size in enumerate(sizes) if pair(number, size).id in chosen) / limit

    asked = stage_calls("04_validate", forecast.measured(path), limit=limit, exhaustive=True)
    luna = [c for c in asked if c.model == "openai/gpt-6-luna"]
    mean = sum(c.output_tokens for c in luna) / limit / 4 / module.ANSWER_SHARE["key_points"]

    assert sum(c.calls for c in luna) == limit * 4
    assert mean == pytest.approx(real, rel=0.1)


def test_10_packs_texts_into_requests_and_costs_nothing_when_local() -> None:
    volumes: dict[Domain, Volume] = {"code": Volume(600, 100), "prose": Volume(500, 50)}

    (call,) = stage_calls("10_embed", volumes, batch=512)
    assert (call.calls, call.input_tokens) == (3, 85_000)
    assert stage_calls("10_embed", volumes, model="local/hashed-ngrams") == []


def test_dollars_are_tokens_at_the_price_of_the_day(tmp_path: Path) -> None:
    write(directory(tmp_path) / "03_compress.jsonl", [pair(number, 100) for number in range(40)])

    for row in forecast.estimate("trial", tmp_path / "data"):
        price = catalogue().card(row.model).price()
        usage = Usage(input=round(row.input_tokens[1]), output=round(row.output_tokens[1]))
        assert row.usd[1] == price.nano(usage) / 1e9


def test_every_stage_that_asks_models_says_how_much() -> None:
    assert forecast.unforeseen("trial") == []


def test_a_stage_can_say_in_one_line_what_it_is_about_to_ask(tmp_path: Path) -> None:
    path = write(tmp_path / "03_compress.jsonl", [pair(number, 100) for number in range(40)])
    module, params = forecast.load_params("04_validate", "trial", TRACK)

    whole = forecast.announcement(module, "04_validate", params, path)
    some = forecast.announcement(module, "04_validate", params, path, limit=10)

    assert re.fullmatch(
        r"04_validate  about 413 calls, \$0\.\d{4} \(\$0\.\d{4} to \$0\.\d{4}\), less what is stored", whole
    )
    assert "about 103 calls" in some
    assert forecast.announcement(forecast.load_stage("02_merge"), "02_merge", params, path) == ""


# ---------------------------------------------------------------- how near it comes


def texts() -> list[RawText]:
    """Functions and passages of this repository: real ones, of ordinary length."""
    found = []
    for path in sorted((ROOT / "shared").glob("*.py"))[:12]:
        source = path.read_text("utf-8")
        pieces = [ast.get_source_segment(source, node) or "" for node in ast.walk(ast.parse(source))
                  if isinstance(node, ast.FunctionDef)]  # fmt: skip
        found += [raw(piece, "code") for piece in pieces if 300 < len(piece) < 1500][:2]
    for path in sorted((ROOT / "data" / "inputs" / "trial" / "documents").glob("*.md")):
        pieces = [" ".join(piece.split()) for piece in path.read_text("utf-8").split("\n\n")]
        found += [raw(piece) for piece in pieces if 200 < len(piece) < 1200][:4]
    return found


def ran(name: str, source: str, into: Path) -> None:
    flags: list[str | Path] = ["--in", into / f"{source}.jsonl", "--out", into / f"{name}.jsonl", "--track", TRACK]
    stage = ROOT / "stages" / name
    said = run_stage(stage / "main.py", *flags, "--config", stage / "trial.toml")
    assert said.returncode == 0, said.stderr


@pytest.mark.usefixtures("standin")
def test_the_estimate_is_within_a_fifth_of_what_the_trial_then_costs(tmp_path: Path) -> None:
    into = directory(tmp_path)
    (into.parent / ".apis").write_text("mock\n")
    records = texts()
    assert len(records) >= 24
    write(into / "02_merge.jsonl", records)
    ran("03_compress", "02_merge", into)
    before = of_track(forecast.estimate("trial", tmp_path / "data"))
    for name, source in (("04_validate", "03_compress"), ("10_embed", "04_validate")):
        ran(name, source, into)

    after = of_track(forecast.estimate("trial", tmp_path / "data"))
    store = stats.open_store(tmp_path / "data", "mock")
    assert store is not None
    paid = store.spent_usd("trial")
    asked = {(row["stage"], row["model"]): row["calls"] for row in store.rows(
        "SELECT stage, model, COUNT(*) AS calls FROM ledger GROUP BY stage, model")}  # fmt: skip
    store.close()

    for name, rows in (("before", before), ("after", after)):
        low, expected, high = forecast.total_usd(list(rows.values()))
        print(f"{name}: {low:.5f} / {expected:.5f} / {high:.5f}, paid {paid:.5f}: {expected / paid - 1:+.1%}")
        assert low < paid < high
        assert expected == pytest.approx(paid, rel=0.2)
    for key in (("04_validate", "anthropic/claude-haiku-5-5"), ("04_validate", "openai/gpt-6-luna")):
        assert after[key].calls[1] == pytest.approx(asked[key], rel=0.2)
    still = forecast.still_to_pay(list(after.values()), "trial", tmp_path / "data", "mock")
    assert still < 0.2 * paid, "what is paid is not to be paid again"


def test_the_command_prints_the_table_and_the_rest_of_the_budget(tmp_path: Path) -> None:
    write(directory(tmp_path) / "03_compress.jsonl", [pair(number, 100) for number in range(4)])
    command = [sys.executable, "-m", "shared.estimate", "--run", "trial", "--data", str(tmp_path / "data")]
    env = os.environ | {"BUDGET_USD": "2"}
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert said.returncode == 0, said.stderr
    assert catalogue().checked in said.stdout
    assert re.search(r"04_validate +openai/gpt-6-luna +12 ", said.stdout)
    assert "BUDGET_USD=2 for RUN=trial: 0.0000 spent, 2.0000 left" in said.stdout
    assert not (tmp_path / "data" / "cache").exists()


def test_a_model_without_a_price_stops_the_estimate_with_the_mend(tmp_path: Path) -> None:
    checkout = tmp_path / "copy"
    for name in ("shared", "stages"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".ruff_cache"))
    shutil.copy2(ROOT / "Makefile", checkout / "Makefile")
    settings = checkout / "stages" / "04_validate" / "full.toml"
    settings.write_text(settings.read_text().replace("openai/gpt-6-luna", "openai/gpt-9-nova"))
    command = [sys.executable, "-m", "shared.estimate", "--run", "full"]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    said = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert said.returncode == 5
    assert said.stderr.startswith("error: the price of openai/gpt-9-nova is unknown")
    assert "shared/llm/models.toml" in said.stderr
