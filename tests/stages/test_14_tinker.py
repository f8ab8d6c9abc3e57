"""14 train at Tinker: the real SDK against the stand-in, which takes real LoRA steps on the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from shared import apis, preflight
from shared.errors import BudgetError, ProviderError, SettingsError, SynthmillError
from shared.estimate import load_params
from shared.llm.store import Store
from shared.receipts import TrainReceipt, read_train_receipt
from shared.records import Example
from shared.stage import load_settings
from tests.conftest import NOWHERE, StandinLog, patience, run_stage
from tests.stages.test_14_train import HAS_MLX, STAGE, example, main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
REVISION = "b968826d9c46dd6066d109eabc6255188de91218"
steps: Any = sys.modules["tinker_steps"]
backend: Any = sys.modules["tinker_backend"]
journals: Any = sys.modules["tinker_journal"]
service: Any = sys.modules["tinker_service"]
downloads: Any = sys.modules["downloads"]
backends: Any = sys.modules["backends"]
trainings: Any = sys.modules["tinker_training"]
leaving: Any = sys.modules["leaving"]

pytestmark = pytest.mark.skipif(
    not HAS_MLX or not (TINY / "model.safetensors").exists(),
    reason="no mlx-lm or no weights in models/tiny: the stand-in cannot train, NOT TESTED",
)


# ---------------------------------------------------------------- data and runs

NAMES = "alpha beta gamma delta value record orbit crew total note".split()


def corpus(count: int, split: str) -> list[Example]:
    """Short examples with something to learn: the answer is always the same word, a name and the number."""
    return [
        example(f"The {NAMES[i % 10]} is at {i} and the {NAMES[i * 3 % 10]}.", f"note {NAMES[i % 10]} {i}", split=split)
        for i in range(count)
    ]


EXAMPLES = [*corpus(12, "train"), *corpus(4, "valid"), *corpus(2, "test")]
SETTINGS = {
    "model": "Qwen/Qwen3-8B",
    "revision": REVISION,
    "rank": 4,
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup": 0.1,
    "save_every": 2,
}
STEPS = 6  # 2 epochs of 12 rows, 4 a step


class Place:
    """A directory with data and settings, as the repository has them, and with what the service keeps."""

    def __init__(self, root: Path, examples: Sequence[Example] = EXAMPLES, **settings: Any) -> None:
        self.root = root
        self.input = root / "data" / "trial" / "compression" / "13_format.jsonl"
        self.output = root / "models" / "trial" / "compression" / "14_train.json"
        self.config = root / "trial.toml"
        self.log = StandinLog(root / "requests.jsonl")
        self.input.parent.mkdir(parents=True, exist_ok=True)
        self.input.write_bytes(b"".join(e.line() for e in examples))
        self.input.with_name("13_format.report.json").write_text('{"apis": "mock"}', "utf-8")
        self.settle(**settings)

    def settle(self, **settings: Any) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in (SETTINGS | settings).items()]
        head = 'backend = "tinker"\nmax_length = 160\n[tinker]\n'
        self.config.write_text(head + "\n".join(lines) + "\n", "utf-8")

    @property
    def flags(self) -> list[str]:
        files = ["--in", self.input, "--out", self.output, "--config", self.config, "--track", "compression"]
        return list(map(str, files))

    def environment(self, faults: str = "") -> dict[str, str]:
        return {
            "STANDIN_STATE": str(self.root / "standin"),
            "STANDIN_LOG": str(self.log.path),
            "STANDIN_FAULTS": faults,
        }

    def run(self, faults: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.path.unlink(missing_ok=True)
        return run_stage(STAGE / "main.py", *self.flags, **self.environment(faults) | environment)

    def receipt(self) -> tuple[TrainReceipt, Path]:
        return read_train_receipt(self.output)

    @property
    def part(self) -> Path:
        (part,) = self.output.parent.glob("[0-9a-f]*.part")
        return part

    def asked(self, operation: str) -> int:
        """How many requests of one kind reached the service in the last run."""
        paths = [str(line["path"]) for line in self.log.everything()]
        return sum(path.rpartition("/")[2] == operation for path in paths)

    def ledger(self) -> list[dict[str, Any]]:
        store = Store(self.root / "data" / "cache" / "mock.sqlite")
        try:
            return [dict(row) for row in store.rows("SELECT * FROM ledger WHERE run = ? ORDER BY id", "trial")]
        finally:
            store.close()

    def losses(self) -> list[dict[str, Any]]:
        """What ``loss.jsonl`` holds, by step."""
        _, directory = self.receipt()
        lines = [json.loads(line) for line in (directory / "loss.jsonl").read_text("utf-8").splitlines()]
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        return lines

    def files(self) -> dict[str, bytes]:
        """Every file of the run but its receipt, which holds times."""
        _, directory = self.receipt()
        found = [path for path in directory.rglob("*") if path.is_file() and path.name != "14_train.json"]
        return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(found)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was left alone."""
    place = Place(tmp_path_factory.mktemp("trained"))
    done = place.run(APIS="mock", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "6 steps, about $" in done.stderr
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    """The training rows of the examples."""
    made = main.backend_of(params(), lambda: None)
    made.model = str(TINY)  # a directory, so that the Hub is not asked
    return [row for one in EXAMPLES if one.split == "train" for row in made.renderer().rows(one).rows]


def params(**settings: Any) -> Any:
    return main.Params(backend="tinker", max_length=160, tinker=steps.TinkerTraining(**SETTINGS | settings))


# ---------------------------------------------------------------- what a step is


def test_the_tokens_are_those_that_local_training_counts(rows: list[Any]) -> None:
    from tests.stages.test_14_train import renderer

    local = [row for one in EXAMPLES if one.split == "train" for row in renderer(TINY).rows(one).rows]
    assert rows == local


def test_every_epoch_sees_every_row_once_and_the_last_step_may_be_short(rows: list[Any]) -> None:
    settings = steps.TinkerTraining(**SETTINGS | {"epochs": 2, "batch_size": 5})
    assert steps.steps_of(settings, 12) == 5
    seen = [steps.batch_of(step, settings, 7, rows) for step in range(1, 6)]
    assert [len(batch) for batch in seen] == [5, 5, 5, 5, 4]
    stream = [row.example for batch in seen for row in batch]
    ids = sorted(row.example for row in rows)
    assert sorted(stream[:12]) == sorted(stream[12:]) == ids and stream[:12] != stream[12:]


def test_the_learning_rate_rises_and_falls_evenly_and_is_never_0() -> None:
    settings = steps.TinkerTraining(**SETTINGS | {"learning_rate": 1e-3, "warmup": 0.2})
    rates = [steps.learning_rate_of(step, settings, 10) for step in range(1, 11)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * left / 9 for left in range(8, 0, -1))])


def test_the_assistants_tokens_weigh_the_same_and_1_together_and_the_others_nothing(rows: list[Any]) -> None:
    data = steps.data_of(rows[:3])
    assert math.fsum(w for datum in data for w in datum.loss_fn_inputs["weights"].data) == pytest.approx(1)
    for row, datum in zip(rows, data, strict=False):
        tokens = datum.model_input.to_ints()
        assert [*tokens, datum.loss_fn_inputs["target_tokens"].data[-1]] == list(row.tokens)
        assert list(datum.loss_fn_inputs["target_tokens"].data) == list(row.tokens)[1:]
        ((start, end),) = row.turns
        counted = [place for place, weight in enumerate(datum.loss_fn_inputs["weights"].data) if weight]
        assert counted == list(range(start - 1, end - 1)), "the place before a token predicts it"


def test_the_loss_is_a_mean_over_the_assistants_tokens(rows: list[Any]) -> None:
    outputs = [{"logprobs": SimpleNamespace(data=[-9.0] * (len(row.tokens) - 1))} for row in rows[:2]]
    for number, (row, output) in enumerate(zip(rows, outputs, strict=False), 1):
        ((start, end),) = row.turns
        output["logprobs"].data[start - 1 : end - 1] = [-float(number)] * (end - start)
    spans = [end - start for row in rows[:2] for start, end in row.turns]
    expected = (spans[0] * 1 + spans[1] * 2) / sum(spans)
    assert steps.loss_of(rows[:2], SimpleNamespace(loss_fn_outputs=outputs)) == pytest.approx(expected)
    with pytest.raises(ProviderError, match="log-probabilities of"):
        steps.loss_of(rows[:2], SimpleNamespace(loss_fn_outputs=outputs[:1]))


def test_costs_are_tokens_times_the_dated_prices(rows: list[Any]) -> None:
    costs = steps.Costs("Qwen/Qwen3-8B", 1_000_000)
    tokens = sum(len(row.tokens) - 1 for row in rows)
    assert costs.train(rows) == tokens * 440 and costs.measure(rows) == tokens * 195
    assert costs.store(12, 30) == 1_200_000, "12 MB for a month at 0.10 USD a GB"
    with pytest.raises(BudgetError, match="price of tinker/Qwen/Qwen3-9B/train is unknown"):
        steps.Costs("Qwen/Qwen3-9B", 1)


def test_an_adapter_of_the_8b_model_is_as_large_as_the_vendors(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape | heads), "utf-8")
    assert backend.weights_of(tmp_path, 32) == 87_293_952
    (tmp_path / "config.json").write_text(json.dumps(heads), "utf-8")
    with pytest.raises(SettingsError, match="does not describe a dense text model"):
        backend.weights_of(tmp_path, 32)


# ---------------------------------------------------------------- a run


def test_a_run_writes_both_forms_of_the_adapter_losses_and_a_receipt(trained: Place) -> None:
    receipt, directory = trained.receipt()
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["14_train.json", "adapter", "adapter_mlx", "checkpoints", "loss.jsonl", "loss.svg"]
    )
    assert not list(trained.output.parent.glob("*.part"))
    assert (receipt.backend, receipt.apis, receipt.steps) == ("tinker", "mock", STEPS)
    assert receipt.base_model.model == f"Qwen/Qwen3-8B@{REVISION}" and receipt.base_model.name == "Qwen/Qwen3-8B"
    assert receipt.settings["tinker"]["rank"] == receipt.adapter.rank == 4 and "mlx" not in receipt.settings
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert len(config["target_modules"]) == 7 and config["base_model_name_or_path"] == "Qwen/Qwen3-8B"
    assert config["revision"] == REVISION and config["r"] == 4
    assert receipt.packages["tinker"] and set(receipt.files) == set(trained.files())


def test_every_step_is_logged_once_and_the_loss_falls(trained: Place) -> None:
    receipt, directory = trained.receipt()
    logged = [json.loads(line) for line in (directory / "loss.jsonl").read_text("utf-8").splitlines()]
    train = [line for line in logged if line["split"] == "train"]
    valid = {line["step"]: line["loss"] for line in logged if line["split"] == "valid"}
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert sum(line["tokens"] for line in train) == receipt.trained_tokens
    assert list(valid) == [0, 2, 4, 6] and receipt.valid_loss_before == valid[0]
    best, last = receipt.checkpoints
    assert best.valid_loss == min(valid[step] for step in (2, 4, 6)) and last.valid_loss == valid[6]
    assert best.valid_loss is not None and best.valid_loss < 0.6 * valid[0]


def test_the_validation_loss_is_that_of_the_exported_adapter_here(trained: Place) -> None:
    import mlx.core as mx
    from mlx_lm import load

    from tests.stages.test_14_train import mlx_backend, renderer

    receipt, directory = trained.receipt()
    valid = [row for one in EXAMPLES if one.split == "valid" for row in renderer(TINY).rows(one).rows]
    for adapter, expected in (("adapter_mlx", receipt.checkpoints[0].valid_loss), (None, receipt.valid_loss_before)):
        model = load(str(TINY), adapter_path=str(directory / adapter) if adapter else None)[0]
        model.set_dtype(mx.float32)
        loss, _ = mlx_backend.loss_of(model, mlx_backend.batch_of(valid))
        assert loss.item() == pytest.approx(expected, rel=2e-3)


def test_what_is_paid_is_in_the_ledger_once_and_in_the_receipt(trained: Place) -> None:
    receipt, _ = trained.receipt()
    lines = trained.ledger()
    assert {(line["stage"], line["track"]) for line in lines} == {("14_train", "compression")}
    assert sum(line["nano"] for line in lines) == round(receipt.cost_usd * 1e9) > 0
    keys = [line["key"].partition("/")[2] for line in lines]
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if key.startswith("step/")] == [f"step/{n}" for n in range(1, STEPS + 1)]
    assert {line["model"] for line in lines} == {
        "tinker/Qwen/Qwen3-8B/train",
        "tinker/Qwen/Qwen3-8B",
        "tinker/Qwen/Qwen3-8B/storage",
    }
    assert trained.asked("forward_backward") == STEPS + 4, "and four looks at the validation rows"
    assert trained.asked("telemetry") == 0


@pytest.mark.slow
def test_the_next_step_is_sent_before_the_last_is_answered(tmp_path: Path) -> None:
    place = Place(tmp_path, [e for e in EXAMPLES if e.split == "train"], save_every=6)
    assert place.run("future_slow@optim_step=1,slow_s=2").returncode == 0
    order = [str(line["path"]).rpartition("/")[2] for line in place.log.everything()]
    first = order.index("optim_step")
    second = order.index("forward_backward", first)
    # Answered meanwhile may be the first step's loss, but not its update, which takes 2 s longer.
    assert order[first:second].count("retrieve_future") <= 1
    receipt, _ = place.receipt()
    assert [(c.step, c.valid_loss) for c in receipt.checkpoints] == [(6, None), (6, None)], "nothing to measure on"


@pytest.mark.slow
def test_the_adapter_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    # Learnt by heart: one answer to every question. Measured: another answer, which becomes ever less likely.
    learnt = [example(f"Say it {i}.", "note note note note note note") for i in range(4)]
    measured = [example(f"Say it {i}.", "value total record orbit crew", split="valid") for i in range(3)]
    place = Place(tmp_path, [*learnt, *measured], epochs=8, save_every=2, learning_rate=3e-3)
    done = place.run()
    assert done.returncode == 0, done.stderr
    receipt, directory = place.receipt()
    best, last = receipt.checkpoints
    assert best.step < last.step == 8
    assert best.valid_loss is not None and last.valid_loss is not None and best.valid_loss < last.valid_loss
    weights = [load_file(directory / c.directory / "adapters.safetensors") for c in receipt.checkpoints]
    assert any(not np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert place.asked("save_weights_external") == 2


# ---------------------------------------------------------------- kills


def killed_at_step_5(place: Place) -> None:
    """Kill -9 while step 5 is worked on and step 6 is sent; step 4 is saved."""
    command = [sys.executable, str(STAGE / "main.py"), *place.flags]
    environment = os.environ | place.environment("future_slow@optim_step=5,slow_s=60")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        found = list(place.output.parent.glob("*.part/state/journal.jsonl"))
        text = found[0].read_text("utf-8") if found else ""
        if '"step":4,"path"' in text and '"step":6' in text:
            break
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not place.output.exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_behind_its_last_state_and_ends_as_one_left_alone(place: Place, trained: Place) -> None:
    killed_at_step_5(place)
    paid = sum(line["nano"] for line in place.ledger())
    with open(place.part / "state" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event":"step","st')  # as a kill in the middle of a write leaves it

    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "goes on behind step 4 of 6; 2 steps behind it were paid and are lost" in done.stderr
    assert "2 of 6 steps, about $" in done.stderr
    assert place.asked("optim_step") == 2 and place.asked("create_model") == 0, "no step behind the state is repeated"
    assert place.files() == trained.files(), "the optimizer came back too: the same numbers to the last bit"
    receipt, _ = place.receipt()
    assert receipt.run_id == trained.receipt()[0].run_id
    assert receipt.cost_usd > trained.receipt()[0].cost_usd, "what was lost was paid"
    total = sum(line["nano"] for line in place.ledger())
    assert total == round(receipt.cost_usd * 1e9) > paid


@pytest.mark.slow
def test_a_training_without_a_state_yet_begins_anew_and_says_what_it_lost(place: Place) -> None:
    done = place.run("future_failed@optim_step=1")
    assert done.returncode == 6 and "Tinker failed to take step 1" in done.stderr and "Traceback" not in done.stderr
    assert "the same command goes on from the start" in done.stderr
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "goes on behind step 0 of 6; 2 steps behind it were paid and are lost" in done.stderr
    assert place.asked("optim_step") == STEPS


@pytest.mark.slow
def test_an_unpaid_bill_ends_the_run_which_goes_on_while_its_state_is_kept(place: Place, tmp_path: Path) -> None:
    started = time.monotonic()
    done = place.run("402@forward_backward=6-")
    assert time.monotonic() - started < patience(15), "the SDK alone waits an hour"
    assert done.returncode == 6 and "wants to be paid first (402)" in done.stderr and "Traceback" not in done.stderr
    assert "the same command goes on behind step 2 of 6" in done.stderr

    (place.root / "standin").rename(tmp_path / "kept")
    done = place.run()
    assert done.returncode == 6 and "states are kept for tinker.keep_days = 7 days" in done.stderr
    assert f"rm -r {place.part}" in done.stderr

    shutil.rmtree(place.root / "standin")
    (tmp_path / "kept").rename(place.root / "standin")
    done = place.run()
    assert done.returncode == 0 and place.asked("optim_step") == 4, done.stderr


# ---------------------------------------------------------------- leaving with what is paid saved


@contextlib.contextmanager
def at_work(place: Place, faults: str, until: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A run, and the lines it says, from when its journal holds some words."""
    command = [sys.executable, str(STAGE / "main.py"), *place.flags]
    environment = os.environ | place.environment(faults)
    place.log.path.unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    assert process.stderr is not None
    listening = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
    listening.start()
    wait_until(lambda: any(until in j.read_text("utf-8") for j in place.output.parent.glob("*.part/state/*.jsonl")))
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()
        listening.join(5)


def wait_until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def trained_steps(place: Place) -> list[int]:
    return [int(line["key"].rpartition("/")[2]) for line in place.ledger() if "/step/" in line["key"]]


@pytest.mark.slow
def test_an_interrupted_run_saves_a_state_first_and_no_step_is_ever_repeated(place: Place, trained: Place) -> None:
    place.settle(save_every=5)  # so that nothing is saved when the signal comes
    with at_work(place, "future_slow@optim_step=2,slow_s=1", '"step":3') as (process, said):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    words = "".join(said)
    assert words.count("the state behind step 3 of 6 is saved first, in 120 s at most") == 1, words
    assert "stopped; the same command goes on behind step 3 of 6" in words and "lost" not in words, words
    assert trained_steps(place) == [1, 2, 3] and place.asked("save_weights") == 1

    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "goes on behind step 3 of 6\n" in done.stderr and place.asked("optim_step") == 3
    assert trained_steps(place) == [1, 2, 3, 4, 5, 6], "each is paid once"
    logged, alone = place.losses(), trained.losses()
    assert [line for line in logged if line["split"] == "train"] == [x for x in alone if x["split"] == "train"]
    valid, others = ({x["step"]: x["loss"] for x in log if x["split"] == "valid"} for log in (logged, alone))
    assert list(valid) == [0, 5, 6] and (valid[0], valid[6]) == (others[0], others[6])
    last = "checkpoints/last/adapters.safetensors"
    assert place.files()[last] == trained.files()[last], "the same numbers to the last bit"
    assert sum(line["nano"] for line in place.ledger()) == round(place.receipt()[0].cost_usd * 1e9)


def free(ledger: Any) -> int:
    """Nanodollars that another stage can have: all that is neither spent nor set aside."""
    (aside,) = ledger._store.rows("SELECT COALESCE(SUM(nano), 0) FROM reserved WHERE run = ?", ledger.run)[0]
    return round(float(ledger.budget_usd - ledger._store.spent_usd(ledger.run)) * 1e9) - int(aside)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Any]:
    opened = journals.Ledger(tmp_path / "cache", "mock", "trial", "compression", 1.0)
    yield opened
    opened.close()


def test_what_calls_of_others_hold_is_waited_for_with_a_word_and_not_for_ever(
    ledger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Store(ledger.cache / "mock.sqlite")
    with asyncio.Runner() as runner:
        assert runner.run(other.reserve("trial", round(0.9e9), round(1e9)))
        started = time.monotonic()
        with pytest.raises(
            BudgetError, match=r"no room for the next \$0\.2000 of RUN=trial: the rest of it is set aside"
        ):
            ledger.pay("t/step/1", "m", 1, round(0.2e9), 0, lambda: started + 0.5)
        assert 0.5 <= time.monotonic() - started < 20
        assert capsys.readouterr().err.count("waiting: the rest of BUDGET_USD is set aside") == 1
        runner.run(other.release(round(0.9e9)))
        ledger.pay("t/step/1", "m", 1, round(0.2e9))
    other.close()
    assert ledger._store.spent_usd("trial") == 0.2 and free(ledger) == round(0.8e9)


def test_what_batches_hold_is_not_waited_for(ledger: Any) -> None:
    ledger.pay("t/step/0", "m", 1, round(0.1e9))
    with contextlib.closing(sqlite3.connect(ledger.cache / "mock.sqlite")) as db, db:
        db.execute("INSERT INTO reserved VALUES ('batch|abc', 'trial', 800000000, 0)")
    with pytest.raises(BudgetError, match=r"\$0\.8000 of it are set aside for batches") as error:
        ledger.pay("t/step/1", "m", 1, round(0.2e9))
    assert "BATCH=1 make trial" in error.value.mend
    with pytest.raises(BudgetError, match=r"costs about \$0\.2000, and \$0\.1000 of BUDGET_USD=1 are left"):
        ledger.afford(0.2, "it")


def test_what_is_set_aside_is_held_until_it_is_paid(ledger: Any) -> None:
    ledger.pay("t/step/1", "m", 1, round(0.2e9), round(0.1e9))
    assert free(ledger) == round(0.7e9)
    ledger.pay("t/step/2", "m", 1, round(0.2e9), round(0.1e9))
    assert free(ledger) == round(0.5e9), "once, not once a step"
    with pytest.raises(BudgetError, match=r"\$0\.1000 of it are set aside for keeping the state behind the last step"):
        ledger.pay("t/step/3", "m", 1, round(0.55e9), round(0.1e9))
    ledger.pay("t/keep/2", "m", 1, round(0.1e9))
    assert free(ledger) == round(0.5e9) and ledger._store.spent_usd("trial") == 0.5


def test_a_budget_that_others_spend_meanwhile_still_holds_what_saving_costs(
    place: Place, rows: list[Any], standin: StandinLog, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = steps.TinkerTraining(**SETTINGS | {"save_every": 6})

    class Shared(journals.Ledger):  # type: ignore[misc]
        """One beside which another stage spends all that it can have, behind step 3."""

        def pay(self, key: str, *args: Any) -> None:
            if key.endswith("/step/4"):
                other = journals.Ledger(self.cache, self.apis, self.run, self.track, self.budget_usd)
                other.pay("other/1", "anthropic/x", 1, free(self))
                other.close()
            super().pay(key, *args)

    with connected():
        bar = contextlib.nullcontext(SimpleNamespace(step=lambda: None))
        work = backends.Work(tuple(rows), (), place.root / "run.part", lambda _: bar)
        work.directory.mkdir()
        costs = steps.Costs(settings.model, backend.weights_of(TINY, settings.rank))
        ledger = Shared(place.root / "data" / "cache", "mock", "trial", "compression", 1.0)
        training = trainings.Training(settings, 0, work, costs, ledger)
        with pytest.raises(BudgetError, match=r"BUDGET_USD=1 is reached"):
            training.go()
        assert ledger._store.spent_usd("trial") == 1.0, "a state was paid with the last of it"
        ledger.close()
    saved = journals.Journal(work.state / "journal.jsonl")
    assert [state.step for state in saved.saved] == [3] and saved.unsaved == 0
    assert [loss.step for loss in saved.losses] == [1, 2, 3]
    assert "the same command goes on behind step 3 of 6" in capsys.readouterr().err


def test_the_first_ctrl_c_is_a_wish_the_second_a_blow_and_then_it_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with leaving.Leaving() as wish:
        assert not wish.asked
        signal.raise_signal(signal.SIGINT)
        assert wish.asked and wish.interrupted and wish.deadline < time.monotonic() + leaving.LEAVE_S + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_whoever_leaves_waits_no_longer_than_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    service.sdk()
    never, started = service.in_background(lambda: time.sleep(30)), time.monotonic()
    with pytest.raises(ProviderError, match="Tinker did not take step 9 in 1 s"):
        service.Waiting("the rest", lambda: started + 0.6).until(never, "take step 9")
    assert time.monotonic() - started < 20


# ---------------------------------------------------------------- before anything is paid


@pytest.mark.parametrize(
    ("faults", "settings", "code", "says"),
    [
        ("401@get_server_capabilities=1-", {}, 2, "Tinker refuses the key (401)"),
        ("402@get_server_capabilities=1-", {}, 6, "Tinker wants to be paid first (402)"),
        ("402@create_session=1-", {}, 6, "Tinker wants to be paid first (402)"),
        ("", {"rank": 64}, 2, "rank"),
        ("", {"batch_size": 13}, 2, "tinker.batch_size = 13, and there are only 12 rows"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once_and_nothing_is_left(
    place: Place, faults: str, settings: dict[str, Any], code: int, says: str
) -> None:
    place.settle(**settings)
    started = time.monotonic()
    done = place.run(faults)
    assert time.monotonic() - started < patience(15)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(place.output.parent.glob("*.part")) and not place.output.exists()
    assert place.ledger() == [], "nothing was paid"


def test_a_model_is_checked_for_what_it_takes(standin: StandinLog) -> None:
    with pytest.raises(SettingsError, match=r"Qwen3-8B-Base' is retired; trainable are: Qwen/Qwen3-8B"):
        checked("Qwen/Qwen3-8B-Base", 160)
    with pytest.raises(SettingsError, match=r"Qwen3-9B' is not offered \(any more\); trainable are: Qwen/Qwen3-8B"):
        checked("Qwen/Qwen3-9B", 160)
    with pytest.raises(SettingsError, match="offered for sampling, but no longer for training"):
        checked("Qwen/Qwen3-30B-A3B-Instruct-2507", 160)
    with pytest.raises(SettingsError, match="takes at most"):
        checked("Qwen/Qwen3-8B", 10**6)
    assert "trainable" in checked("Qwen/Qwen3-8B", 160)


def checked(model: str, max_length: int) -> str:
    with connected():
        found: str = service.check(model, max_length)
    return found


def test_a_server_that_is_not_there_is_said_within_seconds(place: Place, standin: StandinLog) -> None:
    hub = os.environ["STANDIN_URL"]
    dead = {"TINKER_BASE_URL": NOWHERE, "TINKER_API_KEY": "tml-standin"}
    started = time.monotonic()
    done = place.run(SYNTHMILL_CONNECTED=hub, HF_ENDPOINT=hub, **dead)
    assert time.monotonic() - started < patience(15), "the SDK alone waits five minutes"
    assert done.returncode == 6 and f"Tinker cannot be reached at {NOWHERE}" in done.stderr, done.stderr
    assert "nothing was spent" in done.stderr and not list(place.output.parent.glob("*.part"))


def test_a_missing_key_is_said_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="TINKER_API_KEY is not set"):
        service.check("Qwen/Qwen3-8B", 160)


def test_a_budget_that_is_too_small_stops_before_the_first_step(place: Place) -> None:
    done = place.run(BUDGET_USD="0.0003")
    assert done.returncode == 5 and "this training costs about $" in done.stderr
    assert "of BUDGET_USD=0.0003 are left for RUN=trial" in done.stderr
    assert place.ledger() == [] and place.asked("create_model") == place.asked("create_session") == 0
    assert not list(place.output.parent.glob("*.part"))


def test_what_other_stages_spent_counts(tmp_path: Path) -> None:
    ledger = journals.Ledger(tmp_path, "mock", "trial", "compression", 1.0)
    ledger.pay("a/step/1", "tinker/x/train", 10, 600_000_000)
    assert ledger.afford(0.4, "this") == "$0.4000 of BUDGET_USD=1 are left"
    with pytest.raises(BudgetError, match=r"costs about \$0.5000, and \$0.4000 of BUDGET_USD=1"):
        ledger.afford(0.5, "this")
    with pytest.raises(BudgetError, match="is reached"):
        ledger.pay("a/step/2", "tinker/x/train", 10, 500_000_000)
    ledger.pay("a/step/2", "tinker/x/train", 10, 400_000_000)
    ledger.close()
    store = Store(tmp_path / "mock.sqlite")
    assert store.spent_usd("trial") == 1.0 and store.rows("SELECT SUM(nano) FROM reserved")[0][0] in (None, 0)
    store.close()


# ---------------------------------------------------------------- waiting


@pytest.mark.slow
def test_a_service_without_capacity_is_waited_for_with_a_word(place: Place) -> None:
    done = place.run("paused_capacity@forward_backward=3,pause_s=8")
    assert done.returncode == 0, done.stderr
    assert "is paused" in done.stderr and "capacity" in done.stderr


def test_a_server_that_dies_in_the_middle_is_said_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(service, "SILENCE_S", 0.3)
    monkeypatch.setattr(service, "PATIENCE_S", 1.0)
    service.sdk()
    never = service.in_background(lambda: time.sleep(30))
    with pytest.raises(ProviderError, match=r"cannot be reached for \d s: .*refused") as error:
        service.Waiting("the same command goes on behind step 8").until(never, "take step 9")
    assert error.value.mend == "the same command goes on behind step 8"
    assert "waiting up to 1 s. the same command goes on behind step 8" in capsys.readouterr().err


# ---------------------------------------------------------------- the journal


def test_the_journal_knows_what_is_saved_paid_and_lost(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.jsonl"
    journal = journals.Journal(path)
    assert not path.exists(), "looking leaves nothing"
    journal.begin()
    saved = {"path": "tinker://r/weights/a", "trained_tokens": 5, "seconds": 1.0, "losses": [[1, "train", 2.0, 5, 0.1]]}
    for step in (1, 2, 3):
        journal.write("step", step=step, nano=10)
    journal.write("saved", step=2, valid_loss=0.5, nano=1, **saved)
    assert journal.unsaved == 1 and journal.nano == 31
    journal.write("saved", step=3, valid_loss=0.7, nano=1, **saved)
    journal.write("step", step=4, nano=10)
    with open(path, "ab") as file:
        file.write(b'{"event":"st')

    again = journals.Journal(path)
    assert (again.training, again.nano, again.unsaved, again.best.step) == (journal.training, 42, 1, 2)
    assert [loss.step for loss in again.losses] == [1, 1] and path.read_bytes().endswith(b"\n")
    again.write("resumed", step=3, lost=again.unsaved)
    assert (again.lost, again.unsaved) == (1, 0)
    assert journals.Journal(path).lost == 1

    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(SettingsError, match=r"journal.jsonl:1 is no line of a journal"):
        journals.Journal(path)


# ---------------------------------------------------------------- downloads


@pytest.mark.slow
def test_a_download_that_fails_is_gone_on_with_and_nothing_is_trained_or_paid_again(
    place: Place, trained: Place
) -> None:
    done = place.run("path_escape@external_weights_urls=1-")
    assert done.returncode == 6 and "would lie outside its directory" in done.stderr
    assert not list((place.part / "state").glob("export-*/*")), "nothing was fetched"
    paid = place.ledger()

    done = place.run("link_expired@external_weights_urls=1-")
    assert done.returncode == 6 and "a fresh link to adapter_config.json is refused too" in done.stderr
    assert "run the same command" in done.stderr and not place.output.exists()

    done = place.run("link_expired@external_weights_urls=1,cut@adapter_model.safetensors=1")
    assert done.returncode == 0, done.stderr
    assert place.asked("external_weights_urls") == 2, "signed again, once"
    assert place.asked("optim_step") == place.asked("save_weights_external") == 0 and place.ledger() == paid
    assert place.files() == trained.files()


class Files(http.server.BaseHTTPRequestHandler):
    """A storage service: a file that is sent in pieces, and takes ranges."""

    content = bytes(range(256)) * 64
    protocol_version = "HTTP/1.1"
    script: list[str] = []  # noqa: RUF012
    ranges: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        asked, how = self.headers.get("Range", ""), self.script.pop(0) if self.script else "whole"
        self.ranges.append(asked)
        if how.isdigit():
            self.send_response(int(how))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = self.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        assert self.headers.get("X-API-Key") is None and self.headers.get("Authorization") is None
        self.wfile.write(body[:1000] if how == "cut" else body)
        self.close_connection = how == "cut"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage() -> Iterator[str]:
    Files.script, Files.ranges = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_cut_file_is_gone_on_with_where_it_ended(tmp_path: Path, storage: str) -> None:
    Files.script = ["cut", "whole"]
    downloads.fetch_all(lambda: {"sub/a.bin": f"{storage}/a"}, tmp_path)
    assert (tmp_path / "sub" / "a.bin").read_bytes() == Files.content
    assert Files.ranges == ["", "bytes=1000-"] and [p.name for p in (tmp_path / "sub").iterdir()] == ["a.bin"]
    downloads.fetch_all(lambda: {"sub/a.bin": f"{storage}/a"}, tmp_path)
    assert len(Files.ranges) == 2, "what is there is not fetched again"


def test_a_file_that_stays_short_is_no_file(tmp_path: Path, storage: str) -> None:
    Files.script = ["500", "500", "500"]
    with pytest.raises(ProviderError, match=r"a.bin cannot be fetched: the server answered 500"):
        downloads.fetch_all(lambda: {"a.bin": f"{storage}/a"}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "", "a\\b", "a\0b"])
def test_a_path_that_leads_elsewhere_stops_all(tmp_path: Path, storage: str, name: str) -> None:
    with pytest.raises(ProviderError, match="would lie outside its directory"):
        downloads.fetch_all(lambda: {"a.bin": f"{storage}/a", name: f"{storage}/b"}, tmp_path / "in")
    assert not Files.ranges


def test_a_link_that_is_no_web_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="is no web address"):
        downloads.fetch_all(lambda: {"a": "file:///etc/passwd"}, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT TESTED: this system has no /dev/full")
def test_a_full_disk_leaves_nothing_half_written_and_says_what_to_do(tmp_path: Path, storage: str) -> None:
    (tmp_path / ".b.bin.part").symlink_to("/dev/full")
    files = {"a.bin": f"{storage}/a", "b.bin": f"{storage}/b"}
    with pytest.raises(SynthmillError, match=r"no room for b.bin .*No space left on device; nothing half") as error:
        downloads.fetch_all(lambda: files, tmp_path)
    assert "free some space" in error.value.mend
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"], "what is whole stays"
    downloads.fetch_all(lambda: files, tmp_path)
    assert (tmp_path / "b.bin").read_bytes() == Files.content


def test_a_file_larger_than_the_disk_is_not_begun(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_free", lambda part: 100)
    with pytest.raises(SynthmillError, match=r"16,384 bytes to come, 100 free"):
        downloads.fetch_all(lambda: {"a.bin": f"{storage}/a"}, tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- settings


def test_the_settings_of_the_full_run_hold() -> None:
    full = load_settings(STAGE / "full.toml", main.Params, "compression")
    assert (
        full.backend == "tinker"
        and full.max_length == 2048
        and set(full.used())
        == {
            "backend",
            "max_length",
            "seed",
            "tinker",
        }
    )
    table = full.tinker
    assert (table.model, table.revision, table.epochs, table.warmup) == ("Qwen/Qwen3-8B", REVISION, 3, 0.03)
    assert table.learning_rate == pytest.approx(5e-5 * 10 * (2000 / 4096) ** 0.0775, rel=0.01)


def test_an_estimate_before_there_is_data_prices_every_token_that_is_trained() -> None:
    from shared.llm.volume import Volume

    asked = {call.model: call for call in main.calls(params(batch_size=32), {"prose": Volume(1000, 200, 100)})}
    train = asked["tinker/Qwen/Qwen3-8B/train"]
    assert train.input_tokens == pytest.approx(2 * 0.9 * 1000 * (85 + 300)) and train.calls == 57
    assert main.calls(main.Params(backend="mlx"), {"prose": Volume(1000, 200, 100)}) == []


def test_the_table_must_be_there_and_pinned() -> None:
    with pytest.raises(SettingsError, match=r"no table \[tinker\]"):
        main.backend_of(main.Params(backend="tinker"), lambda: None)
    with pytest.raises(ValueError, match="revision"):
        steps.TinkerTraining(model="Qwen/Qwen3-8B", revision="main")


# ---------------------------------------------------------------- preflight


def connected() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    apis.connect("mock", stack)
    return stack


def test_preflight_says_that_the_service_takes_the_key_and_trains_the_model(standin: StandinLog) -> None:
    with connected():
        (check,) = preflight.service(main, params())
        assert check.state == "ok" and check.found == "key accepted, Qwen/Qwen3-8B is trainable, up to 2,048 tokens"
        os.environ["TINKER_API_KEY"] = "tml-bad-key"
        (check,) = preflight.at_once({"tinker": lambda: preflight.service(main, params())})
    assert check.state == "MISS" and "Tinker refuses the key (401)" in check.found and "TINKER_API_KEY" in check.mend


def test_preflight_says_within_its_limit_that_the_service_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    started = time.monotonic()
    (check,) = preflight.at_once({"tinker": lambda: preflight.service(main, params())})
    assert time.monotonic() - started < preflight.NETWORK_S
    assert check.state == "MISS" and f"Tinker cannot be reached at {NOWHERE}" in check.found


def test_preflight_warns_of_a_rank_that_may_be_refused_and_misses_a_table() -> None:
    assert {check.state for check in preflight.trainer(main, params(rank=32))} == {"ok"}
    (rank,) = [check for check in preflight.trainer(main, params(rank=64)) if check.name == "tinker.rank"]
    assert rank.state == "warn" and rank.found.startswith("64; above 32 a model may refuse")
    (check,) = preflight.trainer(main, main.Params(backend="tinker"))
    assert check.state == "MISS" and "no table [tinker]" in check.found


def test_preflight_holds_the_cost_of_training_against_the_budget(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.root / "data"

    def checked_cost() -> Any:
        (check,) = preflight.training_cost("compression", params(), place.input, "trial", data, "mock")
        return check

    monkeypatch.setenv("BUDGET_USD", "1")
    found = checked_cost()
    assert found.state == "ok" and "for 18 examples; $1.0000 of BUDGET_USD=1 are left" in found.found
    monkeypatch.setenv("BUDGET_USD", "0.0001")
    found = checked_cost()
    assert found.state == "MISS" and "fewer epochs" in found.mend
    place.input.unlink()
    assert "is not made yet" in checked_cost().found


def test_preflight_checks_training_whether_or_not_the_spine_has_it() -> None:
    loaded = {("compression", "13_format"): load_params("13_format", "full", "compression")}
    found, checks = preflight.beyond("full", loaded, preflight.TRAIN)
    assert list(found) == [("compression", "14_train")] and checks == []
    assert found["compression", "14_train"][1].backend == "tinker"
