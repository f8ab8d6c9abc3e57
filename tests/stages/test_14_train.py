"""14 train: which tokens count, the loop, a killed run, what is written, what is refused; on a tiny random Qwen3."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.adapters import LINEARS
from shared.errors import SettingsError
from shared.receipts import TrainReceipt, read_train_receipt
from shared.records import Example, Message, content_id
from shared.stage import load_settings
from tests.conftest import copy_of_repository, make, run_stage
from tests.tiny_qwen3 import CHAT_TEMPLATE, CORPUS, LAYERS, make_model

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "stages" / "14_train"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
rendering: Any = importlib.import_module("rendering")
losses: Any = importlib.import_module("losses")
mlx_backend: Any = importlib.import_module("mlx_backend")
_spec = importlib.util.spec_from_file_location("train_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["train_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

HAS_MLX = importlib.util.find_spec("mlx_lm") is not None
if not HAS_MLX:
    warnings.warn("mlx-lm is not installed: local training is NOT TESTED; `make setup` installs it", stacklevel=1)
pytestmark = pytest.mark.skipif(not HAS_MLX, reason="mlx-lm is not installed: local training is NOT TESTED")

PLAIN = """\
{%- for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML as models without a switch for thinking have it."""
HYBRID = """\
{%- for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m['content'] }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""As Qwen3's hybrid models show answers: the last one with its think block, earlier ones without."""


# ---------------------------------------------------------------- models, examples, runs


def model_at(directory: Path, template: str = PLAIN) -> Path:
    """The tiny model with another chat template."""
    make_model(directory)
    (directory / "chat_template.jinja").write_text(template, "utf-8")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_at(tmp_path_factory.mktemp("tiny") / "model")


def example(*contents: str, split: str = "train", system: str = "Rewrite.") -> Example:
    """A conversation: system, then user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    turns = [Message.model_validate({"role": r, "content": c}) for r, c in zip(roles, contents, strict=False)]
    place = content_id(*contents, split)
    provenance = {"source": "test", "origin": "file#1", "language": "en", "category": "note", "licence": "MIT"}
    return Example.model_validate(
        {
            "id": place,
            "domain": "prose",
            "messages": (Message(role="system", content=system), *turns),
            "split": split,
            "group": place,
            "quality": 1.0,
            **provenance,
        }
    )


def corpus(count: int, split: str = "train") -> list[Example]:
    """Short examples with something to learn: the answer is always the same word and the text's first words."""
    return [
        example(f"{CORPUS[i % len(CORPUS)][:48]} {i}", f"note {CORPUS[i % len(CORPUS)][:12].strip()}", split=split)
        for i in range(count)
    ]


EXAMPLES = [*corpus(14), *corpus(4, "valid"), *corpus(3, "test")]
LONG = example(CORPUS[0] * 12, "too long to train on")
SETTINGS = {
    "iterations": 24,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "eval_every": 8,
    "save_every": 4,
    "rank": 4,
    "alpha": 8,
}


class Place:
    """A directory with data and settings, as the repository has them."""

    def __init__(self, root: Path, base: Path, examples: Sequence[Example], **settings: Any) -> None:
        self.root, self.model = root, base
        self.input = root / "data" / "trial" / "compression" / "13_format.jsonl"
        self.output = root / "models" / "trial" / "compression" / "14_train.json"
        self.config = root / "trial.toml"
        self.input.parent.mkdir(parents=True, exist_ok=True)
        self.write(examples)
        self.report("mock")
        self.settle(**settings)

    def write(self, examples: Sequence[Example], more: bytes = b"") -> None:
        self.input.write_bytes(b"".join(e.line() for e in examples) + more)

    def report(self, apis: str) -> None:
        self.input.with_name("13_format.report.json").write_text(json.dumps({"apis": apis}), "utf-8")

    def settle(self, head: str = 'backend = "mlx"\nmax_length = 160\n', **settings: Any) -> None:
        table = {"model": str(self.model), **SETTINGS} | settings
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.config.write_text(f"{head}[mlx]\n" + "\n".join(lines) + "\n", "utf-8")

    @property
    def flags(self) -> list[str]:
        files = ["--in", self.input, "--out", self.output, "--config", self.config, "--track", "compression"]
        return list(map(str, files))

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_stage(STAGE / "main.py", *self.flags, **environment)

    def receipt(self) -> tuple[TrainReceipt, Path]:
        return read_train_receipt(self.output)

    def files(self) -> dict[str, bytes]:
        """Every file of the run but its receipt, which holds times."""
        _, directory = self.receipt()
        found = [path for path in directory.rglob("*") if path.is_file() and path.name != "14_train.json"]
        return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(found)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Place:
    """A run that was left alone."""
    place = Place(tmp_path_factory.mktemp("trained"), model, [*EXAMPLES, LONG])
    done = place.run(APIS="mock", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def again(tmp_path: Path, trained: Place) -> Place:
    """A copy of it to do things to."""
    shutil.copytree(trained.root, tmp_path / "again", symlinks=True)
    place = Place(tmp_path / "again", trained.model, [*EXAMPLES, LONG])
    assert place.input.read_bytes() == trained.input.read_bytes()
    return place


# ---------------------------------------------------------------- which tokens count


def renderer(model: Path) -> Any:
    settings = mlx_backend.MlxTraining(model=str(model))
    return mlx_backend.MlxBackend(settings, 0, lambda: None).renderer()


def spoken(made: Any, row: Any) -> list[str]:
    """What the loss counts, as text, turn by turn."""
    return [made.tokenizer.decode(list(row.tokens[start:end])) for start, end in row.turns]


def test_the_answer_and_its_end_count_and_nothing_else(model: Path) -> None:
    made = renderer(model)
    ((row,), problem, _) = made.rows(example("The long text.", "short"))
    assert problem == "" and spoken(made, row) == ["short<|im_end|>"]
    assert made.tokenizer.decode(list(row.tokens)) == (
        "<|im_start|>system\nRewrite.<|im_end|>\n<|im_start|>user\nThe long text.<|im_end|>\n"
        "<|im_start|>assistant\nshort<|im_end|>"
    )


def test_every_answer_of_a_conversation_counts(model: Path) -> None:
    made = renderer(model)
    ((row,), _, _) = made.rows(example("one?", "1", "two?", "2", "three?", "3"))
    assert spoken(made, row) == ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]


def test_a_template_that_shows_earlier_answers_otherwise_gives_a_row_for_each(tmp_path: Path) -> None:
    made = renderer(model_at(tmp_path / "hybrid", HYBRID))
    talk = example("one?", "1", "two?", "2")
    (rows, _, _) = made.rows(talk)
    assert [spoken(made, row) for row in rows] == [["1<|im_end|>"], ["2<|im_end|>"]]
    for row, turns in zip(rows, (2, 4), strict=True):  # each behind the very tokens the model is asked with
        asked = [message.model_dump() for message in talk.messages[:turns]]
        prompt = made.tokenizer.apply_chat_template(asked, add_generation_prompt=True, enable_thinking=False)
        assert list(row.tokens[: row.turns[0][0]]) == prompt
        assert "<think>" in made.tokenizer.decode(prompt)


def test_a_template_that_disagrees_with_itself_stops_all_and_names_the_example(tmp_path: Path) -> None:
    made = renderer(model_at(tmp_path / "torn", CHAT_TEMPLATE))
    talk = example("The long text.", "short")
    with pytest.raises(SettingsError, match="which tokens to train on cannot be told") as error:
        made.rows(talk)
    assert talk.id in str(error.value) and "<think>" in str(error.value) and "template" in error.value.mend


def test_a_template_without_an_end_of_turn_stops_all(tmp_path: Path) -> None:
    made = renderer(model_at(tmp_path / "endless", PLAIN.replace("<|im_end|>", "</turn>")))
    with pytest.raises(SettingsError, match="never learn to stop"):
        made.rows(example("The long text.", "short"))


def test_an_answer_whose_first_characters_merge_with_the_prompt_is_rejected(model: Path) -> None:
    rendered = renderer(model).rows(example("Indent.", "    return value"))
    assert (rendered.rows, rendered.problem) == ((), "merged_tokens") and "message 2" in rendered.detail


# ---------------------------------------------------------------- the loop


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    steps = [mlx_backend.rows_of_step(step, 3, 0, 7) for step in range(1, 8)]  # 21 places: three epochs of 7
    stream = [row for rows in steps for row in rows]
    epochs = [stream[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert steps != [mlx_backend.rows_of_step(step, 3, 1, 7) for step in range(1, 8)], "the seed draws the order"


def test_the_learning_rate_rises_and_stays() -> None:
    settings = mlx_backend.MlxTraining(model="m", iterations=40, learning_rate=1e-4, warmup=0.1)
    rates = [mlx_backend.learning_rate_of(step, settings) for step in (1, 2, 4, 5, 40)]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 1e-4, 1e-4, 1e-4])
    assert mlx_backend.learning_rate_of(1, settings.model_copy(update={"warmup": 0.0})) == 1e-4


def test_the_loss_is_the_mean_over_the_assistants_tokens_whatever_the_padding(model: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    loaded, made = load(str(model))[0], renderer(model)
    talks = [example("A", "b"), example(CORPUS[2], "for value in sorted", "And?", "total = total + value")]
    rows = [row for talk in talks for row in made.rows(talk).rows]
    expected = []
    for row in rows:
        logits = np.array(loaded(mx.array(list(row.tokens))[None]))[0].astype(np.float64)
        likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = [place for start, end in row.turns for place in range(start, end)]
        expected += [-likelihood[place - 1, row.tokens[place]] for place in places]
    loss, counted = mlx_backend.loss_of(loaded, mlx_backend.batch_of(rows))
    assert counted.item() == len(expected)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


# ---------------------------------------------------------------- a run


def test_it_writes_the_adapter_in_both_forms_losses_picture_and_receipt_last(trained: Place) -> None:
    receipt, directory = trained.receipt()
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["14_train.json", "adapter", "adapter_mlx", "checkpoints", "loss.jsonl", "loss.svg"]
    )
    assert (directory / "14_train.json").read_bytes() == trained.output.read_bytes()
    latest = trained.output.with_name("latest")
    assert latest.is_symlink() and os.readlink(latest) == receipt.run_id == directory.name
    assert sorted(p.name for p in trained.output.parent.iterdir() if not p.name.startswith(".")) == sorted(
        ["14_train.json", "14_train.rejects.jsonl", "14_train.report.json", "latest", receipt.run_id]
    )
    assert set(receipt.files) == set(trained.files())

    assert (receipt.run, receipt.track, receipt.backend, receipt.apis) == ("trial", "compression", "mlx", "mock")
    assert (receipt.data.train, receipt.data.valid, receipt.data.test) == (14, 4, 3)
    assert receipt.counts.model_dump() == {"planned": 19, "kept": 18, "rejected": 1, "reasons": {"too_long": 1}}
    assert (receipt.adapter.rank, receipt.adapter.scale, receipt.adapter.tensors) == (4, 2.0, 2 * 7 * LAYERS)
    assert receipt.cost_usd == 0 and receipt.seconds > 0 and receipt.packages["mlx-lm"]
    reject = json.loads(trained.output.with_name("14_train.rejects.jsonl").read_text("utf-8"))
    assert reject["record"]["id"] == LONG.id and "max_length is 160" in reject["detail"]
    report = json.loads(trained.output.with_name("14_train.report.json").read_text("utf-8"))
    assert report["counts"]["planned"] == 19 and report["summary"]["trained"] is True


def test_the_loss_falls_and_every_step_is_logged_once(trained: Place) -> None:
    receipt, directory = trained.receipt()
    logged = [json.loads(line) for line in (directory / "loss.jsonl").read_text("utf-8").splitlines()]
    train = [line for line in logged if line["split"] == "train"]
    valid = {line["step"]: line["loss"] for line in logged if line["split"] == "valid"}
    assert [line["step"] for line in train] == list(range(1, 25))
    assert sum(line["tokens"] for line in train) == receipt.trained_tokens
    assert list(valid) == [0, 8, 16, 24] and receipt.valid_loss_before == valid[0]
    best, last = receipt.checkpoints
    assert best.valid_loss == valid[best.step] == min(loss for step, loss in valid.items() if step)
    assert (last.step, last.valid_loss) == (24, valid[24])
    assert best.valid_loss is not None and best.valid_loss < 0.8 * valid[0]


def test_the_adapter_loads_in_mlx_lm_and_changes_what_the_model_writes(trained: Place) -> None:
    from mlx_lm import generate, load

    _, directory = trained.receipt()
    asked = [message.model_dump() for message in EXAMPLES[0].messages[:2]]
    texts = {}
    for name in (None, "adapter_mlx", "checkpoints/last"):
        loaded = load(str(trained.model), adapter_path=str(directory / name) if name else None)
        prompt = loaded[1].apply_chat_template(asked, add_generation_prompt=True, enable_thinking=False)
        texts[name] = generate(loaded[0], loaded[1], prompt, max_tokens=12)
    assert "note" in texts["adapter_mlx"], "what it was trained to begin with"
    assert "note" not in texts[None]


def test_the_peft_adapter_is_the_same_numbers_with_named_modules(trained: Place) -> None:
    _, directory = trained.receipt()
    mlx = load_file(directory / "adapter_mlx" / "adapters.safetensors")
    peft = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert len(peft) == len(mlx) == 2 * len(LINEARS) * LAYERS
    name = "model.layers.1.self_attn.v_proj"
    assert np.array_equal(peft[f"base_model.model.{name}.lora_A.weight"], mlx[f"{name}.lora_a"].T)
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 8, 7)


def test_the_best_checkpoint_is_kept_when_the_last_is_worse(tmp_path: Path, model: Path) -> None:
    # Learnt by heart: one answer to every question. Measured: another answer, which becomes ever less likely.
    learnt = [example(f"Say it {i}.", "note note note note note note note note") for i in range(4)]
    measured = [example(f"Say it {i}.", "value total record orbit crew", split="valid") for i in range(3)]
    place = Place(tmp_path, model, [*learnt, *measured], eval_every=4)
    assert place.run().returncode == 0
    receipt, directory = place.receipt()
    best, last = receipt.checkpoints
    assert best.step < last.step == 24
    assert best.valid_loss is not None and last.valid_loss is not None and best.valid_loss < last.valid_loss
    weights = [directory / c.directory / "adapters.safetensors" for c in receipt.checkpoints]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_without_a_validation_split_the_last_checkpoint_is_the_adapter(tmp_path: Path, model: Path) -> None:
    place = Place(tmp_path, model, corpus(4), iterations=3)
    done = place.run()
    assert done.returncode == 0 and "no validation" in done.stderr
    receipt, _ = place.receipt()
    assert [(c.name, c.step, c.valid_loss) for c in receipt.checkpoints] == [("best", 3, None), ("last", 3, None)]
    assert receipt.valid_loss_before is None


def test_gradient_checkpointing_changes_the_memory_not_the_losses(tmp_path: Path, model: Path, trained: Place) -> None:
    place = Place(tmp_path, model, [*EXAMPLES, LONG], gradient_checkpointing=True, iterations=8)
    assert place.run().returncode == 0

    def first(files: dict[str, bytes]) -> list[float]:
        return [json.loads(line)["loss"] for line in files["loss.jsonl"].splitlines()[:10]]

    assert first(place.files()) == pytest.approx(first(trained.files()), rel=1e-3)


# ---------------------------------------------------------------- kills


def train_lines(place: Place) -> int:
    logs = list(place.output.parent.glob("*.part/loss.jsonl"))
    return logs[0].read_bytes().count(b'"train"') if logs else 0


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path, model: Path, trained: Place) -> None:
    place = Place(tmp_path, model, [*EXAMPLES, LONG])
    command = [sys.executable, str(STAGE / "main.py"), *place.flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while train_lines(place) < 10 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not place.output.exists()
    (part,) = place.output.parent.glob("[0-9a-f]*.part")
    assert train_lines(place) >= 10 and (part / "state" / "state.safetensors").exists()
    with open(part / "loss.jsonl", "ab") as log:
        log.write(b'{"step":11,"spl')  # as a kill in the middle of a write leaves it

    done = place.run()
    assert done.returncode == 0, done.stderr
    went_on = re.search(r"goes on behind step (\d+) of 24", done.stderr)
    assert went_on and int(went_on[1]) in (8, 12, 16, 20)
    assert place.files() == trained.files(), "to the last bit"
    assert place.receipt()[0].run_id == trained.receipt()[0].run_id
    assert not list(place.output.parent.glob("*.part")), "nor is anything left over"


def test_a_run_killed_before_its_last_rename_is_put_in_its_place(again: Place) -> None:
    receipt, directory = again.receipt()
    directory.rename(directory.with_name(f"{directory.name}.part"))
    again.output.unlink()
    done = again.run()
    assert done.returncode == 0 and "step" not in done.stderr.partition("in 19")[0], "nothing is trained"
    assert again.receipt()[0] == receipt


def test_a_state_of_other_code_is_refused(again: Place) -> None:
    _, directory = again.receipt()
    state = directory.with_name(f"{directory.name}.part") / "state" / "state.safetensors"
    state.parent.mkdir(parents=True)
    save_file({"adapter.x": np.zeros(1, np.float32)}, state, {"run": '{"format": "0"}'})
    done = again.run()
    assert done.returncode == 2 and "another version" in done.stderr and "rm -r" in done.stderr


# ---------------------------------------------------------------- what is trained again, and what is not


def test_a_finished_run_is_not_trained_again_unless_asked(again: Place) -> None:
    before, files = again.output.read_bytes(), again.files()
    again.output.unlink()
    done = again.run()
    assert done.returncode == 0 and "trained before" in done.stderr
    assert again.output.read_bytes() == before

    done = again.run(RETRAIN="1")
    assert done.returncode == 0 and "step 24 of 24" in done.stderr and "trained before" not in done.stderr
    assert again.files() == files, "the same seed, the same bits"
    assert again.output.read_bytes() != before, "but another hour"


def test_a_damaged_run_is_trained_again(again: Place) -> None:
    files = again.files()
    _, directory = again.receipt()
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    done = again.run()
    assert done.returncode == 0 and "step 24 of 24" in done.stderr
    assert again.files() == files


def test_other_data_and_other_settings_are_other_runs_beside_it(again: Place) -> None:
    first, _ = again.receipt()
    again.write([*EXAMPLES, *corpus(2, "test")])
    again.settle(iterations=2)
    assert again.run().returncode == 0
    second, directory = again.receipt()
    again.settle(iterations=3)
    assert again.run().returncode == 0
    third, _ = again.receipt()
    assert len({first.run_id, second.run_id, third.run_id}) == 3
    assert directory.is_dir() and directory.with_name(first.run_id).is_dir()
    assert os.readlink(directory.with_name("latest")) == third.run_id


def test_the_run_id_hangs_on_data_settings_and_base_model_only(tmp_path: Path, model: Path) -> None:
    params = main.Params(backend="mlx", mlx=mlx_backend.MlxTraining(model=str(model)))
    data = main.TrainingData(path="a", sha256="s", limit=0, train=1, valid=1, test=1)
    base = main.BaseModelUsed(model="m", identity="i", name="n")
    first = main.run_id_of(params, data, base)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert first == main.run_id_of(params, data.model_copy(update={"path": "b"}), base)
    others = [
        main.run_id_of(params.model_copy(update={"seed": 1}), data, base),
        main.run_id_of(params, data.model_copy(update={"sha256": "t"}), base),
        main.run_id_of(params, data.model_copy(update={"limit": 5}), base),
        main.run_id_of(params, data, base.model_copy(update={"identity": "j"})),
    ]
    assert len({first, *others}) == 5


# ---------------------------------------------------------------- what is refused


def test_a_bad_line_is_rejected_and_the_rest_trained(tmp_path: Path, model: Path) -> None:
    place = Place(tmp_path, model, corpus(4), iterations=1)
    place.write(corpus(4), b"not json\n")
    assert place.run().returncode == 0
    assert place.receipt()[0].counts.model_dump() == {
        "planned": 5,
        "kept": 4,
        "rejected": 1,
        "reasons": {"not_json": 1},
    }


def test_a_run_with_nothing_to_train_on_leaves_its_rejects_and_no_receipt(tmp_path: Path, model: Path) -> None:
    place = Place(tmp_path, model, [LONG, *corpus(3, "valid")])
    done = place.run()
    assert done.returncode == 4 and "no example of the train split" in done.stderr
    assert place.output.with_name("14_train.rejects.jsonl").stat().st_size > 0
    assert not place.output.exists() and not list(place.output.parent.glob("*.part"))


def test_data_of_the_other_apis_or_of_nobody_is_refused(tmp_path: Path, model: Path) -> None:
    place = Place(tmp_path, model, corpus(4))
    place.report("live")
    done = place.run()
    assert done.returncode == 2 and "was made with APIS=live; this command has APIS=mock" in done.stderr
    place.input.with_name("13_format.report.json").unlink()
    done = place.run()
    assert done.returncode == 2 and "does not say who made" in done.stderr and "make stage13" in done.stderr


def test_a_missing_input_says_how_to_make_it(tmp_path: Path, model: Path) -> None:
    place = Place(tmp_path, model, [])
    place.input.unlink()
    done = place.run()
    assert done.returncode == 2 and "no input at" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "models/nowhere"}, "mlx.model = 'models/nowhere' is not on this machine"),
        ({"model": "Makefile"}, "is a file"),
        ({"batch_size": 5}, "mlx.batch_size = 5, and there are only 4 rows"),
        ({"iteration": 5}, "unknown key 'mlx.iteration'; the nearest valid key is 'iterations'"),
        ({"rank": 0}, "mlx.rank"),
    ],
)
def test_wrong_settings_stop_before_anything(tmp_path: Path, model: Path, settings: dict[str, Any], says: str) -> None:
    place = Place(tmp_path, model, corpus(4), **settings)
    done = place.run()
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not place.output.exists() and not list(place.output.parent.glob("*.part"))


def test_a_backend_without_its_table_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SettingsError, match=r"no table \[mlx\]"):
        main.backend_of(main.Params(backend="mlx"), lambda: None)


def test_a_broken_base_model_stops_at_once_with_its_loss(tmp_path: Path) -> None:
    broken = model_at(tmp_path / "broken")
    weights = dict(load_file(broken / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = Place(tmp_path, broken, EXAMPLES).run()
    assert done.returncode == 1 and "broke down at step 0: the validation loss is nan" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_of_another_build_is_refused(tmp_path: Path) -> None:
    sparse = model_at(tmp_path / "sparse")
    config = json.loads((sparse / "config.json").read_text("utf-8")) | {"model_type": "nothing"}
    (sparse / "config.json").write_text(json.dumps(config), "utf-8")
    done = Place(tmp_path, sparse, EXAMPLES).run()
    assert done.returncode == 2 and "mlx-lm cannot load" in done.stderr


def test_without_mlx_the_message_names_the_way_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(SettingsError, match="needs mlx-lm, which is not installed") as error:
        renderer(model)
    assert "make setup" in error.value.mend


HIDE_MLX = """import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name.startswith("mlx") else find(name, package)
"""
"""As a ``sitecustomize.py``: Python as it is on a machine where MLX cannot be installed."""


@pytest.mark.slow
def test_where_mlx_cannot_be_installed_the_trial_ends_well_and_says_what_it_left_out(tmp_path: Path) -> None:
    copy = copy_of_repository(tmp_path / "synthmill")
    (copy / "sitecustomize.py").write_text(HIDE_MLX, "utf-8")
    data = [f"data/trial/{track}/13_format.jsonl" for track in ("compression", "grounded", "patterns")]
    for name in data:
        (copy / name).parent.mkdir(parents=True)
        (copy / name).touch()
        (copy / name).with_name("13_format.report.json").write_text('{"apis": "mock"}', "utf-8")
    made = [argument for name in data for argument in ("-o", name)]  # as if all data were made

    done = make(copy, *made, "trial", RUNNER="native")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
    expected = ("nothing is trained", "nothing is measured", "nothing is laid out for release")
    assert [line.partition(", because mlx-lm is not installed here")[0] for line in said] == [
        f"left out: {what}" for what in expected
    ]
    assert not list((copy / "models" / "trial").rglob("1*.json")), "nothing pretends to be there"

    done = make(copy, *made, "stage14", RUNNER="native")
    assert done.returncode == 2 and "backend = 'mlx' needs mlx-lm" in done.stderr, "asked for by name, it fails"


# ---------------------------------------------------------------- losses and settings


def test_the_picture_has_axes_two_lines_and_their_last_values(trained: Place) -> None:
    _, directory = trained.receipt()
    picture = ElementTree.parse(directory / "loss.svg").getroot()
    names = [element.tag.rpartition("}")[2] for element in picture]
    texts = [element.text or "" for element in picture if element.tag.endswith("text")]
    lines = [element for element in picture if element.tag.endswith("polyline")]
    assert names.count("polyline") == 2 and "step" in texts and "loss (nats per token)" in texts
    assert [len(line.attrib["points"].split()) for line in lines] == [24, 4]
    logged = [json.loads(line) for line in (directory / "loss.jsonl").read_text("utf-8").splitlines()]
    assert f"validation: {logged[-1]['loss']:.4f} at step 24" in texts
    mean = float(np.mean([line["loss"] for line in logged if line["split"] == "train"][-5:]))
    assert f"train, mean of 5 steps: {mean:.4f} at step 24" in texts


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 1e-6], [1.0, 900.0], [0.5, 0.25, 0.125]])
def test_any_losses_can_be_drawn_inside_the_picture(values: list[float]) -> None:
    points = [losses.Loss(step, "train", value, 10, 1e-4) for step, value in enumerate(values, 1)]
    picture = ElementTree.fromstring(losses.draw(points, "<a> & b"))
    (line,) = [element for element in picture if element.tag.endswith("polyline")]
    for point in line.attrib["points"].split():
        x, y = map(float, point.split(","))
        assert losses.LEFT <= x <= losses.WIDTH - losses.RIGHT and losses.TOP <= y <= losses.HEIGHT - losses.BOTTOM
        assert math.isfinite(x) and math.isfinite(y)


def test_the_log_forgets_what_a_killed_run_logged_beyond_its_state(tmp_path: Path) -> None:
    log = losses.LossLog(tmp_path / "loss.jsonl")
    kept = losses.Loss(0, "valid", 2.5, 10)
    log.add(kept)
    log.add(losses.Loss(1, "train", 2.4, 10, 1e-4))
    assert losses.LossLog(tmp_path / "loss.jsonl", [kept]).of("valid") == [kept]
    assert (tmp_path / "loss.jsonl").read_text("utf-8") == '{"step":0,"split":"valid","loss":2.5,"tokens":10}\n'


def test_recent_losses_weigh_tokens() -> None:
    steps = [losses.Loss(n, "train", 9.0, 1, 1e-4) for n in range(18)]
    assert losses.recent([*steps, losses.Loss(18, "train", 1.0, 30), losses.Loss(19, "train", 2.0, 10)]) == 1.25


@pytest.mark.parametrize("run", ["trial", "full"])
def test_the_settings_of_both_runs_hold(run: str) -> None:
    params = load_settings(STAGE / f"{run}.toml", main.Params, "compression")
    assert (params.mlx.rank, params.mlx.alpha, params.mlx.batch_size) == (8, 16, 1 if run == "trial" else 2)
    assert set(params.used()) == {"backend", "max_length", "seed", params.backend}
    if run == "full":
        assert (params.mlx.iterations, params.mlx.learning_rate, params.max_length) == (500, 1e-4, 2048)
