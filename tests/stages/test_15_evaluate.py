"""15 evaluate: planted compressions are ordered as they must be, intervals, gates, refusals, kills, conversations."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.errors import SettingsError
from shared.generate import Outcome, store_path
from shared.llm.volume import Volume
from shared.receipts import (
    AdapterMade,
    BaseModelUsed,
    Checkpoint,
    Contestant,
    Counts,
    EvaluateReceipt,
    TrainingData,
    TrainReceipt,
)
from shared.records import Conversation, Example, Generation, Grounding, Message, Pair, content_id
from shared.stage import load_settings, sha256_of
from shared.text import Tokenizer
from tests.conftest import StandinLog, run_stage
from tests.tiny_qwen3 import make_adapter, make_model

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "stages" / "15_evaluate"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
rules: Any = importlib.import_module("rules")
intervals: Any = importlib.import_module("intervals")
figures: Any = importlib.import_module("figures")
scoring: Any = importlib.import_module("scoring")
compression: Any = importlib.import_module("compression")
_spec = importlib.util.spec_from_file_location("evaluate_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["evaluate_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

HAS_MLX = importlib.util.find_spec("mlx_lm") is not None
if not HAS_MLX:
    warnings.warn("mlx-lm is not installed: local generation is NOT TESTED; `make setup` installs it", stacklevel=1)
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason="mlx-lm is not installed: local generation is NOT TESTED")

SYSTEM, USER = "Rewrite the text in fewer tokens.", "Compress:\n{text}"
TEXTS = [
    f"The number {7 * n + 3} train leaves the station of {city} at {n + 5}:15 and it must not stop in {other}. "
    f"There are {n + 2} carriages and all of the seats in the first of them are reserved for people with a ticket to "
    f"{city}."
    for n, (city, other) in enumerate(
        [
            ("Bern", "Basel"),
            ("Oslo", "Bergen"),
            ("Turin", "Genoa"),
            ("Lyon", "Nice"),
            ("Porto", "Faro"),
            ("Graz", "Linz"),
        ]
    )
]


# ---------------------------------------------------------------- records


def provenance(text: str, domain: str = "prose") -> dict[str, Any]:
    place = {"source": "test", "origin": "file#1", "language": "en", "category": "note", "licence": "MIT"}
    return {"id": content_id(text), "domain": domain, **place}


def pair(text: str, tokenizer: Path, domain: str = "prose") -> Pair:
    made = Generation(
        generator="endpoint",
        model="m",
        prompt="0" * 16,
        tokenizer=str(tokenizer),
        verbose_tokens=20,
        compressed_tokens=10,
        compression_ratio=0.5,
    )
    return Pair.model_validate({**provenance(text, domain), "verbose": text, "compressed": "short", "generation": made})


def example_of(item: Pair | Conversation, split: str) -> Example:
    values = {name: getattr(item, name) for name in provenance("")}
    messages = item.chat(SYSTEM, USER)
    return Example.model_validate(
        {**values, "messages": messages, "split": split, "group": item.id, "quality": 1.0, "compression_ratio": None}
    )


def receipt_for(data: Path, model: Path, adapter: Path, apis: str = "mock") -> TrainReceipt:
    """A receipt as 14 writes it, for an adapter that lies in the run's directory already."""
    files = {f"adapter_mlx/{path.name}": sha256_of(path) for path in sorted(adapter.iterdir())}
    return TrainReceipt(
        run="trial",
        track="compression",
        run_id="0123456789abcdef",
        backend="mlx",
        apis=apis,
        data=TrainingData(path=str(data), sha256=sha256_of(data), limit=0, train=1, valid=0, test=1),
        base_model=BaseModelUsed(model=str(model), identity="i", name="tiny"),
        settings={},
        counts=Counts(planned=1, kept=1, rejected=0, reasons={}),
        steps=1,
        trained_tokens=1,
        train_loss=1.0,
        valid_loss_before=None,
        checkpoints=(Checkpoint(name="best", step=1, valid_loss=None, directory="adapter_mlx"),),
        adapter=AdapterMade(rank=4, scale=4.0, modules=(), tensors=28),
        files=files,
        cost_usd=0.0,
        seconds=0.0,
        finished_at="",
        git="",
        python="",
        platform="",
        packages={},
    )


class Place:
    """A run with data, a trained adapter and settings, as the repository has them."""

    def __init__(self, root: Path, tiny: SimpleNamespace, items: Sequence[Any], track: str = "compression") -> None:
        self.root, self.tiny, self.track = root, tiny, track
        self.input = root / "data" / "trial" / track / "13_format.jsonl"
        self.output = root / "models" / "trial" / track / "15_evaluate.json"
        self.config = root / "trial.toml"
        run = self.output.parent / "0123456789abcdef"
        for directory in (self.input.parent, run):
            directory.mkdir(parents=True, exist_ok=True)
        make_adapter(run / "adapter_mlx")
        self.write(items)
        self.train()

    def write(self, items: Sequence[Any], train: Sequence[Any] = (), more: bytes = b"") -> None:
        examples = [example_of(item, "test") for item in items] + [example_of(item, "train") for item in train]
        self.input.write_bytes(b"".join(example.line() for example in examples) + more)
        self.input.with_name("12_choose.jsonl").write_bytes(b"".join(item.line() for item in [*items, *train]))

    def train(self, apis: str = "mock") -> None:
        adapter = self.output.parent / "0123456789abcdef" / "adapter_mlx"
        receipt = receipt_for(self.input, self.tiny.model, adapter, apis)
        self.output.with_name("14_train.json").write_bytes(receipt.line())

    def settle(self, **more: str) -> None:
        """Settings: MLX with a baseline unless ``more`` says otherwise; values are TOML, keys with dots are tables."""
        values = {
            "written_by": '"mlx"',
            "max_tokens": "48",
            "batch_size": "4",
            "task.kind": '"compression"',
            "task.judged_by": '"stages/04_validate/trial.toml"',
            "task.track": f'"{self.track}"',
            "baseline.adapter": json.dumps(str(self.tiny.adapter)),
        } | more
        self.config.write_text("".join(f"{key} = {value}\n" for key, value in values.items() if value), "utf-8")

    @property
    def flags(self) -> list[str]:
        files = ["--in", self.input, "--out", self.output, "--config", self.config, "--track", self.track]
        return list(map(str, files))

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_stage(STAGE / "main.py", *self.flags, **environment)

    def receipt(self) -> EvaluateReceipt:
        return EvaluateReceipt.model_validate_json(self.output.read_bytes())

    def contestants(self) -> dict[str, Contestant]:
        return {contestant.name: contestant for contestant in self.receipt().contestants}

    def answers(self) -> list[dict[str, Any]]:
        path = self.output.with_name("15_evaluate.answers.jsonl")
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def without_times(self) -> dict[str, Any]:
        gone = {"seconds", "finished_at", "cost_usd"}
        return {name: value for name, value in json.loads(self.output.read_bytes()).items() if name not in gone}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(model=make_model(directory / "model"), adapter=make_adapter(directory / "adapter", seed=2))


# ---------------------------------------------------------------- a server with planted answers


@contextmanager
def server(answers: dict[str, Callable[[str], str]]) -> Iterator[tuple[str, list[str]]]:
    """An OpenAI-compatible server on this machine: by model, its answer to the last user turn; and who was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["model"])
            assert body["temperature"] == 0
            text = answers[body["model"]](body["messages"][-1]["content"].removeprefix("Compress:\n"))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
            data = json.dumps(reply | {"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        http.server_close()


def good(text: str) -> str:
    """Shorter, and nothing is lost."""
    for filler in ("The ", " the", " of them", " There are", " all of", " it", " people with a"):
        text = text.replace(filler, "")
    return text


def bad(text: str) -> str:
    """As short, and the facts are others."""
    return good(text).replace("not ", "").replace(":15", ":30").replace("number ", "number 1")[: len(good(text)) - 2]


SERVED = {
    "written_by": '"endpoint"',
    "candidate.served_as": '"good"',
    "baseline.served_as": '"bad"',
    "base.served_as": '"parrot"',
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace) -> Place:
    """A finished run in which the candidate is good, the baseline bad, and the base model says the text again."""
    place = Place(tmp_path_factory.mktemp("served"), tiny, [pair(text, tiny.model) for text in TEXTS])
    with server({"good": good, "bad": bad, "parrot": lambda text: text}) as (url, _):
        gates = {"gates.pass_rate": "{low = 0.9}", "gates.compression_ratio": "{low = 0.5, high = 0.6}"}
        against = {"gates.mean_equivalence_minus_baseline": "{low = 0.05}", "targets.pass_rate": "{low = 0.95}"}
        place.settle(**SERVED, **gates, **against, base_url=json.dumps(url))
        done = place.run(APIS="mock", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    (place.root / "stderr").write_text(done.stderr, "utf-8")
    return place


# ---------------------------------------------------------------- compressions are ordered as they must be


def test_good_compressions_beat_bad_ones_and_no_compression_is_a_failure(served: Place) -> None:
    by_name = served.contestants()
    assert list(by_name) == ["candidate", "baseline", "base", "truncation", "stop_words"]
    candidate, baseline, base = (by_name[name].metrics for name in ("candidate", "baseline", "base"))
    assert candidate["pass_rate"].value == 1.0 and candidate["min_equivalence"].value > 0.9
    assert baseline["pass_rate"].value < 0.5
    assert candidate["mean_equivalence"].value > by_name["truncation"].metrics["mean_equivalence"].value
    assert candidate["mean_equivalence"].value > baseline["mean_equivalence"].value > 0
    for name, contestant in by_name.items():
        m = contestant.metrics
        assert all(interval.n == len(TEXTS) for interval in m.values()), "nothing is dropped"
        assert m["min_equivalence"].value <= m["mean_equivalence"].value
        assert all(interval.low <= interval.value <= interval.high for interval in m.values()), name
    assert {name: interval.value for name, interval in base.items()} == {
        "usable": 0.0,
        "pass_rate": 0.0,
        "compression_ratio": 1.0,
        "mean_equivalence": 0.0,
        "min_equivalence": 0.0,
    }
    failed = [answer for answer in served.answers() if answer["contestant"] == "base"]
    assert {answer["problem"] for answer in failed} == {"not_shorter"} and len(failed) == len(TEXTS)


def test_the_rules_keep_to_the_candidates_ratio(served: Place) -> None:
    ratios = {name: c.metrics["compression_ratio"].value for name, c in served.contestants().items()}
    assert ratios["truncation"] == pytest.approx(ratios["candidate"], abs=0.01)
    assert ratios["stop_words"] == pytest.approx(ratios["candidate"], abs=0.02)


def test_differences_are_the_candidates_less_the_others_and_paired(served: Place) -> None:
    receipt, by_name = served.receipt(), served.contestants()
    assert list(receipt.differences) == ["baseline", "base", "truncation", "stop_words"]
    for other, metrics in receipt.differences.items():
        for name, change in metrics.items():
            expected = by_name["candidate"].metrics[name].value - by_name[other].metrics[name].value
            assert change.value == pytest.approx(expected, abs=2e-6) and change.n == len(TEXTS)
    assert receipt.differences["baseline"]["mean_equivalence"].low > 0, "better on every draw of the texts"
    assert receipt.differences["base"]["compression_ratio"].high < 0, "and shorter"


def test_the_receipt_says_what_was_measured(served: Place) -> None:
    receipt = served.receipt()
    candidate, baseline, base, truncation, _ = receipt.contestants
    assert (receipt.run_id, receipt.apis, receipt.run, receipt.track) == (
        "0123456789abcdef",
        "mock",
        "trial",
        "compression",
    )
    assert receipt.data.sha256 == sha256_of(served.input) and receipt.data.test == len(TEXTS)
    assert receipt.train_sha256 == sha256_of(served.output.with_name("14_train.json"))
    assert [c.kind for c in receipt.contestants] == ["adapter", "adapter", "model", "rule", "rule"]
    assert (candidate.model, base.model, truncation.model) == ("endpoint/good", "endpoint/parrot", "")
    assert candidate.adapter.endswith("0123456789abcdef/adapter_mlx") and baseline.adapter == str(served.tiny.adapter)
    assert list(candidate.by_group) == ["prose"]
    assert receipt.counts.planned == receipt.counts.kept == len(TEXTS)
    assert receipt.cost_usd > 0 and receipt.settings["resamples"] == 2000


def test_a_failed_gate_is_no_error_but_said_in_table_and_receipt(served: Place) -> None:
    receipt = served.receipt()
    gates = {gate.metric: gate for gate in receipt.gates}
    ratio = receipt.contestants[0].metrics["compression_ratio"].value
    assert gates["pass_rate"].passed and gates["mean_equivalence_minus_baseline"].passed
    assert ratio > 0.6 and not gates["compression_ratio"].passed and not receipt.passed
    said = (served.root / "stderr").read_text("utf-8")
    assert f"NOT fit for release: compression_ratio is {ratio:.3f}, wanted 0.50 to 0.60" in said
    assert "in production" in said and ">= 0.95" in said and "base failed: not_shorter 6" in said
    assert "6 examples are few" in said


def test_a_second_run_asks_nobody_and_says_the_same(served: Place, standin: StandinLog) -> None:
    before, answers = served.without_times(), served.answers()
    done = served.run()  # the server with the planted answers is gone
    assert done.returncode == 0, done.stderr
    assert served.without_times() == before and served.answers() == answers
    assert served.receipt().cost_usd > 0, "what was paid once is still said"
    assert not standin.requests()


def test_without_gates_and_without_other_models_it_measures_the_candidate_alone(
    tmp_path: Path, tiny: SimpleNamespace, standin: StandinLog
) -> None:
    place = Place(tmp_path, tiny, [pair(TEXTS[0], tiny.model)])
    with server({"good": good}) as (url, asked):
        alone = {"baseline.adapter": "", "baseline.served_as": "", "base.served_as": "", "task.rules": "[]"}
        place.settle(**(SERVED | alone), base_url=json.dumps(url), gates="{}")
        place.config.write_text(f"base = {{served_as = 'good'}}\n{place.config.read_text('utf-8')}", "utf-8")
        done = place.run()
    assert done.returncode == 0, done.stderr
    assert [c.name for c in place.receipt().contestants] == ["candidate", "base"]
    assert place.receipt().passed and "no gates are set" in done.stderr
    one = place.contestants()["candidate"].metrics["mean_equivalence"]
    assert one.n == 1 and one.low == one.value == one.high
    assert asked == ["good"], "the same question to the same model is one question"


def test_what_04_was_answered_about_the_texts_is_not_asked_again(
    tmp_path: Path, tiny: SimpleNamespace, standin: StandinLog
) -> None:
    place = Place(tmp_path, tiny, [pair(text, tiny.model) for text in TEXTS[:3]])
    written = [pair(text, tiny.model).model_copy(update={"compressed": good(text)}) for text in TEXTS[:3]]
    pairs, four = place.input.with_name("03_compress.jsonl"), ROOT / "stages" / "04_validate"
    pairs.write_bytes(b"".join(one.line() for one in written))
    files = ("--in", pairs, "--out", place.input.with_name("04_validate.jsonl"), "--config", four / "trial.toml")
    done = run_stage(four / "main.py", *files, "--track", "compression")
    assert done.returncode == 0 and standin.requests(), done.stderr
    standin.mark()
    with server({"good": good}) as (url, _):  # writes what 04 was asked about
        alone = {"baseline.adapter": "", "baseline.served_as": "", "base.served_as": '"good"', "task.rules": "[]"}
        place.settle(**(SERVED | alone), base_url=json.dumps(url))
        done = place.run()
    assert done.returncode == 0, done.stderr
    assert place.contestants()["candidate"].metrics["pass_rate"].value == 1.0
    assert not standin.requests(), "the same questions, in the same words, with the same limits"


# ---------------------------------------------------------------- the tiny model


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace) -> Place:
    """A finished run on this machine's random model."""
    place = Place(tmp_path_factory.mktemp("local"), tiny, [pair(text, tiny.model) for text in TEXTS])
    place.settle()
    done = place.run(APIS="mock", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return place


@needs_mlx
def test_the_adapter_of_14_an_older_one_and_none_write_apart(local: Place) -> None:
    texts = {name: [a["text"] for a in local.answers() if a["contestant"] == name] for name in local.contestants()}
    assert len(texts["candidate"]) == len(TEXTS)
    assert len({tuple(texts[name]) for name in ("candidate", "baseline", "base")}) == 3
    by_name = local.contestants()
    assert by_name["candidate"].model == by_name["base"].model == str(local.tiny.model)
    assert by_name["base"].adapter == "" and by_name["base"].kind == "model"


@pytest.mark.slow
@needs_mlx
def test_a_killed_run_generates_and_asks_nothing_twice(local: Place, tmp_path: Path, standin: StandinLog) -> None:
    place = Place(tmp_path, local.tiny, [pair(text, local.tiny.model) for text in TEXTS])
    place.settle(batch_size="1")
    store = store_path(tmp_path / "data" / "cache", "mock")
    command = [sys.executable, str(STAGE / "main.py"), *place.flags]
    replies = tmp_path / "data" / "cache" / "mock.sqlite"
    for path, table, enough in ((store, "generations", 4), (replies, "replies", 10)):
        process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while stored(path, table) < enough and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        assert not place.output.exists()
    assert place.run().returncode == 0
    generated = stored(store, "generations")
    assert generated == 3 * len(TEXTS)
    answered = [line["sha256"] for line in standin.requests() if line["served"]]
    # What was under way when the process was killed was answered to nobody, and is asked again.
    assert len(answered) - len(set(answered)) <= 32
    want, got = local.without_times(), place.without_times()
    assert [c["metrics"] for c in got["contestants"]] == [c["metrics"] for c in want["contestants"]]
    assert got["differences"] == want["differences"]
    standin.mark()
    assert place.run().returncode == 0 and not standin.requests()
    assert stored(store, "generations") == generated


def stored(path: Path, table: str) -> int:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
    except sqlite3.OperationalError:  # it is being made
        return 0


# ---------------------------------------------------------------- refusals


@pytest.fixture
def place(tmp_path: Path, tiny: SimpleNamespace) -> Place:
    made = Place(tmp_path, tiny, [pair(text, tiny.model) for text in TEXTS[:2]])
    made.settle()
    return made


def refused(place: Place, *says: str) -> None:
    done = place.run()
    assert done.returncode == 2, done.stderr
    for words in says:
        assert words in done.stderr
    assert "Traceback" not in done.stderr and not place.output.exists()


def test_data_that_changed_since_training_is_refused(place: Place) -> None:
    place.write([pair(text, place.tiny.model) for text in TEXTS[1:]])
    refused(place, "changed since 0123456789abcdef was trained", "may have been trained on", "make stage14")


def test_an_adapter_of_the_other_apis_is_refused(place: Place) -> None:
    place.train("live")
    refused(place, "was made with APIS=live; this command has APIS=mock", "run with APIS=live")


def test_a_missing_receipt_says_how_to_train(place: Place) -> None:
    place.output.with_name("14_train.json").unlink()
    refused(place, "no receipt of training", "make stage14")


def test_a_changed_adapter_is_not_the_one_that_was_trained(place: Place) -> None:
    make_adapter(place.output.parent / "0123456789abcdef" / "adapter_mlx", seed=9)
    refused(place, "is not what 14 trained", "make stage14")


def test_a_missing_baseline_names_the_way_to_one(place: Place) -> None:
    place.settle(**{"baseline.adapter": '"models/nowhere"'})
    refused(place, "no adapter at 'models/nowhere'", "make bootstrap", "baseline.adapter_revision")


def test_a_gate_on_a_figure_there_is_not_is_refused_before_anything_is_asked(place: Place, standin: StandinLog) -> None:
    place.settle(**{"gates.equivalence": "{low = 0.8}"})
    refused(place, "no figure is called equivalence", "mean_equivalence")
    place.settle(**{"gates.usable_minus_nobody": "{low = 0.8}"})
    refused(place, "no figure is called usable_minus_nobody", "baseline, base, truncation, stop_words")
    assert not standin.requests() and not store_path(place.root / "data" / "cache", "mock").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"resamples": "100"}, "resamples"),
        ({"gates.usable": "{}"}, "low or high must be given"),
        ({"candidate.adapter": '"x"'}, "unknown key"),
        ({"written_by": '"endpoint"'}, "candidate.served_as is empty"),
        ({"task.kind": '"chat"'}, "task"),
    ],
)
def test_wrong_settings_stop_before_anything(place: Place, settings: dict[str, str], says: str) -> None:
    place.settle(**settings)
    refused(place, says)


def test_no_test_example_is_an_error_that_says_what_to_do(place: Place, tiny: SimpleNamespace) -> None:
    place.write([], train=[pair(text, tiny.model) for text in TEXTS])
    place.train()
    refused(place, "none of 6 examples", "raise test in stages/13_format")


def test_without_the_records_behind_the_examples_it_stops(place: Place) -> None:
    place.input.with_name("12_choose.jsonl").unlink()
    refused(place, "12_choose.jsonl", "it holds what the examples were made from")


def test_what_cannot_be_measured_is_rejected_for_all_and_the_rest_goes_on(
    tmp_path: Path, tiny: SimpleNamespace, standin: StandinLog
) -> None:
    items = [pair(text, tiny.model) for text in TEXTS[:4]]
    place = Place(tmp_path, tiny, items)
    lost, changed = items[0], items[1].model_copy(update={"verbose": "Another text."})
    place.write(items, more=b"not json\n")
    place.input.with_name("12_choose.jsonl").write_bytes(b"".join(item.line() for item in [changed, *items[2:]]))
    place.train()
    with server({"good": good, "bad": bad, "parrot": str.upper}) as (url, _):
        place.settle(**SERVED, base_url=json.dumps(url))
        done = place.run()
    assert done.returncode == 0, done.stderr
    receipt = place.receipt()
    assert receipt.counts.model_dump() == {
        "planned": 5,
        "kept": 2,
        "rejected": 3,
        "reasons": {"another_text": 1, "no_origin": 1, "not_json": 1},
    }
    assert receipt.data.test == 2 and {i.n for c in receipt.contestants for i in c.metrics.values()} == {2}
    assert lost.id not in {answer["id"] for answer in place.answers()}


# ---------------------------------------------------------------- conversations


def talk(n: int, **more: Any) -> Conversation:
    turns = [
        ("user", f"How is pump {n} started?"),
        ("assistant", f"Open valve {n} first."),
        ("user", f"And which of the two ways to stop pump {n} would you take?"),
        ("assistant", "The held-out answer."),
    ]
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns)
    values = {
        **provenance(f"talk {n}", "code" if n % 2 else "prose"),
        "messages": messages,
        "generated_by": "openai/gpt-6-luna",
    }
    return Conversation.model_validate(values | more)


def conversations(place: Place, url: str, **more: str) -> None:
    place.settle(
        **(SERVED | {"baseline.adapter": "", "baseline.served_as": ""}),
        **{
            "task.kind": '"conversation"',
            "task.judged_by": '"stages/09_judge/trial.toml"',
            "base_url": json.dumps(url),
        },
        **more,
    )


def test_adherence_is_measured_pattern_by_pattern_on_the_last_answer_alone(
    tmp_path: Path, tiny: SimpleNamespace, standin: StandinLog
) -> None:
    both = ("Tradeoff Analysis", "Production Readiness")
    # The first answer, which is the data's own, shows a pattern: nobody is credited with that.
    items = [talk(n, patterns=both[: 1 + n % 2]) for n in range(4)]
    turns = items[0].messages
    shows = turns[1].model_copy(update={"content": "Speed comes at the cost of safety: a trade-off."})
    items[0] = items[0].model_copy(update={"messages": (turns[0], shows, *turns[2:])})
    place = Place(tmp_path, tiny, items, "patterns")
    tradeoff = "Either way is a trade-off: the valve is slower, and in exchange for that nothing wears out."
    with server({"good": lambda _: f"<think>hm</think>\n{tradeoff}", "parrot": lambda _: "Take the first."}) as (
        url,
        _,
    ):
        conversations(place, url, **{"gates.adherence_minus_base": "{low = 0.3}"})
        done = place.run()
    assert done.returncode == 0, done.stderr
    receipt, by_name = place.receipt(), place.contestants()
    candidate, base = by_name["candidate"], by_name["base"]
    assert candidate.by_group["Tradeoff Analysis"]["adherence"].value == 1.0
    assert candidate.by_group["Tradeoff Analysis"]["adherence"].n == 4
    assert candidate.by_group["Production Readiness"]["adherence"].value == 0.0
    assert candidate.by_group["Production Readiness"]["adherence"].n == 2
    assert candidate.metrics["adherence"].value == 0.75, "two show their only pattern, two show one of two"
    assert base.metrics["adherence"].value == 0.0 and base.metrics["usable"].value == 1.0
    assert receipt.differences["base"]["adherence"].value == 0.75 and receipt.passed
    assert {a["text"] for a in place.answers() if a["contestant"] == "candidate"} == {tradeoff}, "without its reasoning"
    assert "production quality" in candidate.metrics


def test_grounded_answers_are_judged_by_the_facts_and_silence_fails(
    tmp_path: Path, tiny: SimpleNamespace, standin: StandinLog
) -> None:
    fact = "The pump stops when its casing reaches 41 degrees."
    grounding = (Grounding(question="When does the pump stop?", answer=fact, chunk=f"# Pump\n- {fact}"),)
    place = Place(tmp_path, tiny, [talk(n, grounding=grounding) for n in range(3)], "grounded")
    with server({"good": lambda _: fact, "parrot": lambda _: "<think>What do I know?"}) as (url, asked):
        conversations(place, url)
        done = place.run()
    assert done.returncode == 0, done.stderr
    assert sorted(asked) == ["good"] * 3 + ["parrot"] * 3
    by_name = place.contestants()
    assert by_name["candidate"].metrics["factually accurate"].value == 1.0
    assert set(by_name["candidate"].by_group) == {"code", "prose"}
    assert {m: i.value for m, i in by_name["base"].metrics.items()} == dict.fromkeys(by_name["base"].metrics, 0.0)
    assert {a["problem"] for a in place.answers() if a["contestant"] == "base"} == {"empty"}
    assert "adherence" not in by_name["candidate"].metrics


# ---------------------------------------------------------------- rules


def test_the_stop_words_are_the_published_ones() -> None:
    assert len(rules.STOP_WORDS) == 174
    assert {"the", "not", "cannot", "ourselves", "i'm", "very"} <= rules.STOP_WORDS
    assert not {"will", "us", "one", "never"} & rules.STOP_WORDS


@pytest.mark.parametrize("rule", ["truncation", "stop_words"])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.2])
def test_a_rule_hits_the_number_of_tokens_it_is_given(rule: str, share: float, tiny: SimpleNamespace) -> None:
    count = Tokenizer(str(tiny.model)).count
    code = "def is_valid(self, items):\n    # check all of the items\n    if not items:\n        return False\n"
    for text in [*TEXTS, code, code * 3, "Ünï→漢字 " * 20]:
        wanted = int(share * count(text))
        made = rules.RULES[rule](text, wanted, count)
        assert count(made) <= wanted
        assert wanted - count(made) <= 4, (text, made)  # a deleted word may have so many


def test_truncation_is_the_beginning(tiny: SimpleNamespace) -> None:
    count = Tokenizer(str(tiny.model)).count
    made = rules.truncation(TEXTS[0], count(TEXTS[0]) // 2, count)
    assert made and TEXTS[0].startswith(made)
    assert rules.truncation(TEXTS[0], 0, count) == ""
    assert rules.truncation(TEXTS[0], 10_000, count) == TEXTS[0]


def test_only_stop_words_go_and_only_as_many_as_it_takes() -> None:
    def words(text: str) -> int:
        return len(text.split())

    text = "The cat is on the mat and it isn’t is_valid(a.not) in the-end"
    assert rules.without_stop_words(text, 100, words) == text
    assert rules.without_stop_words(text, 10, words) == "cat on the mat and it isn’t is_valid(a.not) in the-end"
    assert rules.without_stop_words(text, 4, words) == "cat mat is_valid(a.not) the-end"
    assert rules.without_stop_words(text, 2, words) == "cat mat", "then it is cut"


def test_where_the_candidate_has_nothing_the_rules_keep_to_its_mean_ratio(tiny: SimpleNamespace) -> None:
    count = Tokenizer(str(tiny.model)).count
    cases = [scoring.Case(example_of(p, "test"), p) for p in (pair(text, tiny.model) for text in TEXTS[:3])]
    settings = compression.CompressionSettings(kind="compression", judged_by="x", track="compression")
    task = compression.Compression.__new__(compression.Compression)
    task.settings, task.tokenizer = settings, Tokenizer(str(tiny.model))
    half = [rules.truncation(text, count(text) // 2, count) for text in TEXTS[:2]]
    made = task.rules(cases, [*map(Outcome, half), Outcome("", "empty")])
    assert [count(outcome.text) for outcome in made["truncation"][:2]] == [count(text) for text in half]
    assert count(made["truncation"][2].text) == pytest.approx(0.5 * count(TEXTS[2]), abs=2)
    nothing = task.rules(cases, [Outcome("", "empty")] * 3)
    assert count(nothing["truncation"][0].text) == pytest.approx(0.55 * count(TEXTS[0]), abs=2)


# ---------------------------------------------------------------- intervals


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        sample = rng.normal(0.7, 0.2, 60)
        found = intervals.interval(list(sample), 2000, trial)
        assert found.low < found.value < found.high
        hits += found.low <= 0.7 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    sample = list(np.random.default_rng(2).normal(0.0, 1.0, 400))
    found = intervals.interval(sample, 4000, 0)
    error = float(np.std(sample)) / 400**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found == intervals.interval(sample, 4000, 0) != intervals.interval(sample, 4000, 1)


def test_a_paired_interval_is_narrower_and_has_the_sign_of_the_difference() -> None:
    hard = np.random.default_rng(3).uniform(0, 1, 80)
    ours, theirs = list(hard + 0.02), list(hard)
    found = intervals.paired(ours, theirs, 2000, 0)
    assert found.low == found.value == found.high == pytest.approx(0.02)
    assert intervals.paired(theirs, ours, 2000, 0).high < 0 < found.low
    apart = intervals.interval(ours, 2000, 0)
    assert apart.low < intervals.interval(theirs, 2000, 0).value, "which the two intervals alone would not show"


def test_one_case_has_no_width_and_equal_cases_neither() -> None:
    assert intervals.interval([0.4], 2000, 0).model_dump() == {"value": 0.4, "low": 0.4, "high": 0.4, "n": 1}
    assert intervals.interval([1.0] * 9, 2000, 0).low == 1.0


def test_a_gate_has_bounds_and_a_figure_that_nobody_has_fails() -> None:
    bounds = {
        "a": figures.Bounds(low=0.5),
        "b": figures.Bounds(low=0.1, high=0.2),
        "a_minus_base": figures.Bounds(high=0.0),
        "c": figures.Bounds(low=-1.0),
    }
    got = {"a": intervals.interval([0.5, 0.5], 2000, 0), "b": intervals.interval([0.3], 2000, 0)}
    change = {"base": {"a": intervals.interval([-0.1], 2000, 0)}}
    made = {gate.metric: (gate.value, gate.passed) for gate in figures.gates_of(bounds, got, change)}
    assert made == {"a": (0.5, True), "b": (0.3, False), "a_minus_base": (-0.1, True), "c": (0.0, False)}


# ---------------------------------------------------------------- settings and estimate


@pytest.mark.parametrize("run", ["trial", "full"])
@pytest.mark.parametrize("track", ["compression", "grounded", "patterns"])
def test_the_settings_of_both_runs_hold_for_every_track(run: str, track: str) -> None:
    params = load_settings(STAGE / f"{run}.toml", main.Params, track)
    stage = "04_validate" if track == "compression" else "09_judge"
    _, judges, _ = scoring.judging(stage, params.task.judged_by, params.task.track)
    assert params.task.track == track and run in str(params.task.judged_by)
    assert judges.panel if track == "compression" else judges.judge
    metrics = compression.METRICS if track == "compression" else ("usable", "pass_rate", "adherence")
    others = ["baseline", "base"] if track == "compression" else ["base"]
    figures.known([*params.gates, *params.targets], metrics, others)
    if (run, track) == ("full", "compression"):
        bounds = {name: (b.low, b.high) for name, b in params.gates.items()}
        wanted = {"pass_rate": (0.9, None), "compression_ratio": (0.5, 0.6), "mean_equivalence": (0.85, None)}
        assert wanted.items() <= bounds.items()


@pytest.mark.parametrize("run", ["trial", "full"])
def test_every_key_has_its_comment(run: str) -> None:
    explained = set()
    for line in (STAGE / f"{run}.toml").read_text("utf-8").splitlines():
        code, _, comment = line.partition("#")
        key = code.partition("=")[0].strip()
        if "=" in code:
            explained |= {key} if comment else set()
            assert comment or key in explained, line


def test_the_estimate_grows_with_contestants_and_counts_only_the_compressed_half() -> None:
    params = load_settings(STAGE / "trial.toml", main.Params, "compression")
    volumes = {"prose": Volume(10, 100, 50), "code": Volume(5, 100, 50)}
    asked = main.calls(params, volumes)
    panel = [c for c in asked if c.model.startswith(("anthropic", "openai/gpt"))]
    assert sum(c.calls for c in panel) == pytest.approx(5 * 15 * 2 * 2), "contestants x texts x models x tasks"
    alone = params.model_copy(update={"baseline": None, "base": None})
    assert sum(c.calls for c in main.calls(alone, volumes)) == pytest.approx(sum(c.calls for c in asked) * 3 / 5)
    talks = load_settings(STAGE / "trial.toml", main.Params, "grounded")
    assert sum(c.calls for c in main.calls(talks, volumes)) == 2 * 15


def test_a_figure_that_does_not_exist_is_named() -> None:
    with pytest.raises(SettingsError, match="no figure is called speed"):
        figures.known(["speed"], ["usable"], [])
