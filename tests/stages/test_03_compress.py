"""03 compress: cleaning, rejecting, the local generator on a tiny random Qwen3, and a server over the wire."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import generate as generation
from shared.errors import SettingsError
from shared.generate import cleaning, local, store_path
from shared.generate import store as generation_store
from shared.local_models import adapter_identity, model_identity
from shared.records import Merged, Pair, RawText, content_id
from shared.stage import load_settings, read_records
from tests.tiny_qwen3 import CORPUS, make_adapter, make_model

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "stages" / "03_compress"
_spec = importlib.util.spec_from_file_location("compress_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["compress_main"] = main
_spec.loader.exec_module(main)

HAS_MLX = importlib.util.find_spec("mlx_lm") is not None
if not HAS_MLX:
    warnings.warn("mlx-lm is not installed: the local generator is NOT TESTED; `make setup` installs it", stacklevel=1)
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason="mlx-lm is not installed: the local generator is NOT TESTED")

PROMPT = main.Prompt("Rewrite text at the lowest token cost.", "Compress:\n{text}")


# ---------------------------------------------------------------- records, models, runs


def raw(text: str, domain: str = "prose", **more: Any) -> RawText:
    provenance = {"source": "test", "origin": "file#1", "language": "en", "category": "paragraph", "licence": "MIT"}
    return RawText.model_validate({"id": content_id(text), "domain": domain, "text": text, **provenance, **more})


def corpus(count: int) -> list[RawText]:
    """Records of different lengths, half of them as 02 merge leaves them."""
    records = []
    for i in range(count):
        text = CORPUS[i % len(CORPUS)] * (1 + i % 3) + f" {i}"
        merged = Merged(text=text) if i % 2 else None
        records.append(raw(f"{text}\r\n" if merged else text, "code" if i % 3 else "prose", merged=merged))
    return records


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(model=make_model(directory / "model"), adapter=make_adapter(directory / "adapter"))


def generator(
    tiny: SimpleNamespace, temperature: float = 0.2, max_tokens: int = 48, seed: int = 0, **settings: Any
) -> Any:
    table = local.MlxSettings(**{"model": str(tiny.model), "adapter": str(tiny.adapter)} | settings)
    sampling = generation.Sampling(temperature, max_tokens, seed)
    return local.MlxGenerator(table, sampling, lambda: None)


def asks(records: list[RawText]) -> list[generation.Ask]:
    return [generation.Ask(record.id, PROMPT.messages(main.source_text(record))) for record in records]


def generate(records: list[RawText], made: Any, store: Path | str = ":memory:") -> dict[str, Any]:
    """Outcomes by record id."""
    bar = SimpleNamespace(step=lambda: None)
    with closing(generation_store.GenerationStore(Path(store))) as kept:
        outcomes = list(made.outcomes(asks(records), kept, lambda total: nullcontext(bar)))
    return {record.id: outcome for record, outcome in zip(records, outcomes, strict=True)}


def write(path: Path, records: list[RawText]) -> Path:
    path.write_bytes(b"".join(record.line() for record in records))
    return path


def mlx_toml(path: Path, tiny: SimpleNamespace, **mlx: Any) -> Path:
    table = {"model": str(tiny.model), "adapter": str(tiny.adapter), "batch_size": 4} | mlx
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    head = f'generator = "mlx"\ntokenizer = {json.dumps(str(tiny.model))}\nmax_tokens = 64\n'
    path.write_text(head + "[mlx]\n" + "\n".join(lines) + "\n", "utf-8")
    return path


def command(directory: Path, config: Path, *more: str) -> list[str]:
    output = directory / "trial" / "compression" / "03_compress.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--in", str(directory / "in.jsonl"), "--out", str(output), "--config", str(config)]
    return [sys.executable, str(STAGE / "main.py"), *flags, "--track", "compression", *more]


def run_stage(directory: Path, config: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, config, *more), cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


def outputs(directory: Path) -> tuple[list[Pair], list[dict[str, Any]], dict[str, Any]]:
    """Pairs, rejects and the report of a finished run."""
    output = directory / "trial" / "compression" / "03_compress.jsonl"
    rejects = output.with_name("03_compress.rejects.jsonl").read_text("utf-8").splitlines()
    report = json.loads(output.with_name("03_compress.report.json").read_text("utf-8"))
    return list(read_records(output, Pair)), [json.loads(line) for line in rejects], report


# ---------------------------------------------------------------- cleaning

SOURCE = "The quick brown fox jumps over the lazy dog, and then it sleeps for eight hours."
SHORT = "quick brown fox jumps lazy dog → sleeps 8 h"
NASTY = {
    "nothing to clean": (SHORT, SHORT),
    "white space around": (f"\n\n  {SHORT} \n", SHORT),
    "windows newlines": ("a\r\nb", "a\nb"),
    "think block": (f"<think>\nThe user wants…\n</think>\n\n{SHORT}", SHORT),
    "empty think block": (f"<think>\n\n</think>\n\n{SHORT}", SHORT),
    "think block in capitals": (f"<THINK>hm</THINK>{SHORT}", SHORT),
    "two think blocks": (f"<think>a</think>{SHORT}<think>b</think>", SHORT),
    "nested think blocks": (f"<think>a<think>b</think>c</think>{SHORT}", SHORT),
    "think tag with attributes": (f'<think mode="deep">a</think>{SHORT}', SHORT),
    "think block the template opened": (f"The user wants a rewrite.\n</think>\n{SHORT}", SHORT),
    "unclosed think block": ("<think>\nThe user wants a rewrite of", ""),
    "unclosed think block at the end": (f"{SHORT}\n<think>Is this right? Wait,", SHORT),
    "reasoning block": (f"<reasoning>because</reasoning>\n{SHORT}", SHORT),
    "tool call": (f'<tool_call>\n{{"name": "compress"}}\n</tool_call>\n{SHORT}', SHORT),
    "unclosed tool call at the end": (f'{SHORT}<tool_call>{{"name"', SHORT),
    "closing tool tag alone": (f"{SHORT}\n</tool_call>", SHORT),
    "tool call only": ('<tool_call>{"name": "compress"}</tool_call>', ""),
    "chat marker at the end": (f"{SHORT}<|im_end|>", SHORT),
    "model goes on as the user": (f"{SHORT}<|im_end|>\n<|im_start|>user\nCompress:\nmore", SHORT),
    "chat marker and role at the start": (f"<|im_start|>assistant\n{SHORT}", SHORT),
    "llama header": (f"<|start_header_id|>assistant<|end_header_id|>\n\n{SHORT}<|eot_id|>", SHORT),
    "gemma turn": (f"<start_of_turn>model\n{SHORT}<end_of_turn>", SHORT),
    "sentence end token": (f"<s> {SHORT}</s>", SHORT),
    "instruction marker": (f"[/INST] {SHORT}", SHORT),
    "marker before a word like a role": ("<|im_start|>user guide: 3 steps", "user guide: 3 steps"),
    "role line": (f"assistant\n{SHORT}", SHORT),
    "label": (f"Compressed: {SHORT}", SHORT),
    "label in bold": (f"**Compressed:** {SHORT}", SHORT),
    "label in bold, colon outside": (f"**Compressed text**: {SHORT}", SHORT),
    "label as a heading": (f"### Compressed version\n\n{SHORT}", SHORT),
    "label in lower case": (f"compressed text:\n{SHORT}", SHORT),
    "label of another word": (f"The condensed version: {SHORT}", SHORT),
    "label on its own line": (f"Output:\n{SHORT}", SHORT),
    "a whole sentence as label": (f"Here is the compressed text:\n\n{SHORT}", SHORT),
    "with an opener": (f"Sure! Here's the compressed version of your text:\n{SHORT}", SHORT),
    "opener alone": (f"Certainly!\n\n{SHORT}", SHORT),
    "a word like a label that says something": ("Output: list of ids", "Output: list of ids"),
    "a label in the middle": (f"{SHORT}\nCompressed: 8 h", f"{SHORT}\nCompressed: 8 h"),
    "a sentence that begins like a label": ("Here is no text to spare", "Here is no text to spare"),
    "fence": (f"```\n{SHORT}\n```", SHORT),
    "fence with a language": ("```python\ndef f():\n    return 1\n```", "def f():\n    return 1"),
    "fence of tildes": (f"~~~text\n{SHORT}\n~~~", SHORT),
    "fence within a fence": ("````md\n```\ncode\n```\n````", "code"),
    "fence on one line": (f"```{SHORT}```", SHORT),
    "fence never closed": (f"```text\n{SHORT}", SHORT),
    "fence never opened": (f"{SHORT}\n```", SHORT),
    "empty fence": ("```\n```", ""),
    "two fences": ("```\na\n```\nand\n```\nb\n```", "```\na\n```\nand\n```\nb\n```"),
    "a fence inside": ("before\n```\na\n```\nafter", "before\n```\na\n```\nafter"),
    "wrapper tag": (f"<compressed>\n{SHORT}\n</compressed>", SHORT),
    "a tag that is no wrapper": ("<b>bold</b>", "<b>bold</b>"),
    "everything at once": (
        f"<think>hm</think>\nSure! Here is the compressed text:\n```text\nCompressed: {SHORT}\n```<|im_end|>",
        SHORT,
    ),
    "nothing": ("", ""),
    "only white space": (" \n\t ", ""),
}


@pytest.mark.parametrize(("output", "expected"), NASTY.values(), ids=NASTY.keys())
def test_cleaning_takes_off_what_is_no_answer(output: str, expected: str) -> None:
    assert cleaning.clean(output, SOURCE) == expected
    assert cleaning.clean(expected, SOURCE) == expected, "cleaning twice changes nothing more"


@pytest.mark.parametrize("piece", ["a b ", "<think>", "</think>", "```\n", "<|im_end|>", "Compressed: ", "\n", "<"])
def test_cleaning_a_runaway_output_takes_no_time(piece: str) -> None:
    started = time.process_time()
    cleaning.clean(piece * 20_000, SOURCE)
    assert time.process_time() - started < 2


CONTENT = {
    "think tags": ("strip <think>…</think> from text", "removes every <think> block, up to </think>, from the text"),
    "a chat marker": ("ends with <|eot_id|>", "every turn ends with the token <|eot_id|> in Llama"),
    "strike-through tags": ("<s>old</s> new", "it was <s>old</s> but now it is new"),
    "a label": ("Compressed: 4 MB, raw: 9 MB", "Compressed: the archive has 4 MB. Raw: it had 9 MB."),
    "a role line": ("assistant\nhelps the teacher", "assistant\nThis is a person who helps the teacher"),
    "a fence": ("```\nls\n```", "```\n# list the files\nls\n```"),
    "a wrapper tag": ("<text>hi</text>", "<svg><text>hi there</text></svg>"),
    "a tool tag": ("parse <tool_call> JSON", "the model writes <tool_call> and then JSON, which we parse"),
}


@pytest.mark.parametrize(("output", "source"), CONTENT.values(), ids=CONTENT.keys())
def test_cleaning_leaves_what_the_source_text_has_too(output: str, source: str) -> None:
    assert cleaning.clean(output, source) == output


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I’m really sorry, but I am unable to process this text.",
    "I cannot assist with that request.",
    "I can't compress this text.",
    "I am not able to rewrite this.",
    "Unfortunately, I cannot provide a rewrite.",
    "Sorry, but I can't do that.",
    "I apologize, but I won't be able to do this.",
    "As an AI language model, I do not",
    '"I must decline."',
    "Please provide the text you would like me to compress.",
    "It seems you haven't provided any text.",
    "**No text was provided.**",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_found_at_the_start(text: str) -> None:
    assert cleaning.refusal(text, SOURCE)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (SHORT, SOURCE),
        ("user: I'm sorry, can't log in", "A user wrote: I'm sorry, but I can't log in since Monday."),
        ("I'm sorry, can't log in", "I'm sorry, but I can't log in since Monday."),
        ("error text → I cannot help with that", SOURCE),
        ("sorry = apology", SOURCE),
        ("as an aide he served 3 y", SOURCE),
        ("I can read 3 files", SOURCE),
    ],
)
def test_what_is_no_refusal_is_not_found(text: str, source: str) -> None:
    assert cleaning.refusal(text, source) == ""


def test_outcomes_without_a_usable_text_have_a_reason() -> None:
    outcome, judge = generation.Outcome, generation.compressed_or_reason
    assert judge(SOURCE, outcome(f"Compressed: {SHORT}"), True) == outcome(SHORT)
    assert judge(SOURCE, outcome("<think>a</think>"), True).problem == "empty"
    assert judge(SOURCE, outcome(""), True).detail == "no output"
    assert judge(SOURCE, outcome("I can't help with that."), True).problem == "refused"
    assert judge(SOURCE, outcome("I can't help with that."), False).problem == "", "hosted models say it themselves"
    assert judge(SOURCE, outcome("half a th", "truncated", "512"), True) == ("half a th", "truncated", "512")


def test_a_text_that_is_not_shorter_is_rejected_with_the_figures() -> None:
    outcome = generation.Outcome("words")
    assert generation.in_fewer_tokens(outcome, 10, 9) == outcome
    same = generation.in_fewer_tokens(outcome, 10, 10)
    assert (same.problem, same.detail) == ("not_shorter", "compressed 10 tokens, verbose 10 tokens")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["trial.toml", "full.toml"])
def test_both_settings_files_load_and_every_key_has_its_comment(name: str) -> None:
    params = load_settings(STAGE / name, main.Params)
    assert main.table_of(params) is not None and params.max_tokens == 512 and params.temperature <= 0.2
    for line in (STAGE / name).read_text("utf-8").splitlines():
        assert "=" not in line.partition("#")[0] or "#" in line, line


def test_what_is_not_pinned_says_how_to_pin_it(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", corpus(1))
    config = tmp_path / "c.toml"
    config.write_text(
        'generator = "endpoint"\ntokenizer = "Qwen/Qwen3-8B"\n[endpoint]\nmodel = "endpoint/x"\n', "utf-8"
    )
    done = run_stage(tmp_path, config)
    assert done.returncode == 2
    assert "tokenizer_revision is empty" in done.stderr and "model_info('Qwen/Qwen3-8B').sha" in done.stderr


def test_a_model_that_is_not_here_and_not_pinned_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(SettingsError, match=r"mlx\.revision is empty") as error:
        generator(tiny, model="mlx-community/Qwen3-4B-Instruct-2507-8bit")
    assert "model_info('mlx-community/Qwen3-4B-Instruct-2507-8bit').sha" in error.value.mend


def test_a_model_is_a_directory(tiny: SimpleNamespace) -> None:
    with pytest.raises(SettingsError, match="is a file"):
        generator(tiny, model=str(tiny.model / "model.safetensors"))


def test_a_branch_is_no_revision(tmp_path: Path, tiny: SimpleNamespace) -> None:
    write(tmp_path / "in.jsonl", corpus(1))
    done = run_stage(tmp_path, mlx_toml(tmp_path / "c.toml", tiny, revision="main"))
    assert done.returncode == 2 and "mlx.revision" in done.stderr


def test_a_missing_adapter_is_named_before_anything_is_generated(tmp_path: Path, tiny: SimpleNamespace) -> None:
    write(tmp_path / "in.jsonl", corpus(2))
    done = run_stage(tmp_path, mlx_toml(tmp_path / "c.toml", tiny, adapter=str(tmp_path / "adapter")))
    assert done.returncode == 2
    assert "no adapter at" in done.stderr and "there is no such directory" in done.stderr
    assert "mlx.adapter_revision" in done.stderr and "make bootstrap" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_an_adapter_without_weights_is_named(tmp_path: Path, tiny: SimpleNamespace) -> None:
    broken = make_adapter(tmp_path / "adapter")
    (broken / "adapters.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"adapters\.safetensors is missing"):
        generator(tiny, adapter=str(broken))


def test_the_chosen_generator_needs_its_table(tmp_path: Path, tiny: SimpleNamespace) -> None:
    write(tmp_path / "in.jsonl", corpus(1))
    config = tmp_path / "c.toml"
    config.write_text(f'generator = "teacher"\ntokenizer = "{tiny.model}"\n', "utf-8")
    done = run_stage(tmp_path, config)
    assert done.returncode == 2 and "there is no table [teacher]" in done.stderr


def test_a_prompt_without_a_place_for_the_text_is_refused() -> None:
    with pytest.raises(SettingsError, match="exactly once"):
        main.Prompt("system", "Compress:")


def test_braces_in_a_text_are_text() -> None:
    (_, user) = PROMPT.messages("f'{text}' {0}")
    assert user.content == "Compress:\nf'{text}' {0}"


def test_without_mlx_the_message_names_the_way_out(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(SettingsError, match="mlx-lm, which is not installed") as error:
        generate(corpus(1), generator(tiny))
    assert "make setup" in error.value.mend and "endpoint" in error.value.mend


# ---------------------------------------------------------------- what a generation depends on


def test_a_generation_is_found_again_only_when_all_it_depends_on_is_the_same(tiny: SimpleNamespace) -> None:
    def key(model: str = "m", adapter: str = "a", prompt: Any = PROMPT, text: str = "t", **changed: Any) -> str:
        values = {"temperature": 0.2, "max_tokens": 48, "top_p": 1.0, "seed": 7} | changed
        sampling = generation.Sampling(values["temperature"], values["max_tokens"], 0)
        messages = prompt.messages(text)
        return local.generation_key(model, adapter, messages, sampling, values["top_p"], values["seed"])

    prompts = main.Prompt("other", PROMPT.user), main.Prompt(PROMPT.system, "Shorten:\n{text}")
    changed = [
        key(model="x"),
        key(adapter=""),
        key(prompt=prompts[0]),
        key(prompt=prompts[1]),
        key(text="u"),
        key(temperature=0.3),
        key(max_tokens=49),
        key(top_p=0.9),
        key(seed=8),
    ]
    assert len({key(), *changed}) == len(changed) + 1
    assert key() == key()
    assert key(temperature=0.0, seed=8, top_p=0.5) == key(temperature=0.0), "greedy draws nothing"


def test_a_models_identity_is_its_weights_not_its_place_or_readme(tmp_path: Path, tiny: SimpleNamespace) -> None:
    copy = make_model(tmp_path / "copy")
    (copy / "README.md").write_text("hello", "utf-8")
    assert model_identity(str(copy)) == model_identity(str(tiny.model))
    other = make_model(tmp_path / "other", seed=5)
    assert model_identity(str(other)) != model_identity(str(tiny.model))
    adapter = make_adapter(tmp_path / "adapter")
    before = adapter_identity(str(adapter))
    (adapter / "0000100_adapters.safetensors").write_bytes(b"a checkpoint")
    assert adapter_identity(str(adapter)) == before
    make_adapter(adapter, seed=2)
    assert adapter_identity(str(adapter)) != before


@pytest.mark.parametrize(
    ("gigabytes", "budget", "row", "rows"),
    [
        (16, 12.7, 1512, 8),  # (12.7 - 4.3 - 1) GiB / 144 KiB x 1,536 tokens = 35, capped for 16 GB
        (64, 48.0, 1512, 32),
        (16, 6.0, 1512, 3),  # 0.7 GiB / 216 MiB
        (64, 48.0, 32_000, 9),  # 42.7 GiB / 4.4 GiB
    ],
)
def test_the_batch_fits_into_memory(gigabytes: int, budget: float, row: int, rows: int) -> None:
    weights = int(4.3 * 2**30)
    made = local.batch_size_for(gigabytes * 2**30, int(budget * 2**30), weights, 144 * 1024, row, "")
    assert made == rows


def test_a_model_too_large_for_one_row_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"needs 5\.5 GiB for one text of 1,512 tokens, and 5\.0 GiB are there"):
        local.batch_size_for(16 * 2**30, 5 * 2**30, int(4.3 * 2**30), 144 * 1024, 1512, "")


# ---------------------------------------------------------------- the store


def test_the_store_returns_what_was_added_and_keeps_the_first(tmp_path: Path) -> None:
    finished = generation_store.Finished
    many = [(f"key{i}", finished(f"text {i} →", "stop", i)) for i in range(1200)]
    with closing(generation_store.GenerationStore(tmp_path / "new" / "g.sqlite")) as store:
        store.add(many)
        store.add([("key0", finished("another", "length", 9))])
    with closing(generation_store.GenerationStore(tmp_path / "new" / "g.sqlite")) as store:
        assert store.find([key for key, _ in many] + ["unknown"]) == dict(many)
        assert store.count() == 1200


@pytest.mark.parametrize("version", [2, 0])
def test_a_store_of_another_schema_is_refused_and_left_alone(tmp_path: Path, version: int) -> None:
    path = tmp_path / "g.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE generations (key TEXT, text TEXT)")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    with pytest.raises(SettingsError, match=f"schema version {version}; this code reads version 1") as error:
        generation_store.GenerationStore(path)
    assert f"mv {path}" in error.value.mend
    with closing(sqlite3.connect(path)) as db:
        assert [row[1] for row in db.execute("PRAGMA table_info(generations)")] == ["key", "text"]
        assert db.execute("PRAGMA user_version").fetchone() == (version,)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.sqlite"
    path.write_bytes(b"this is no database, however long one looks at it" * 40)
    with pytest.raises(SettingsError, match="no store of generations"):
        generation_store.GenerationStore(path)


def test_many_may_make_and_fill_the_store_at_once(tmp_path: Path) -> None:
    def fill(worker: int) -> None:
        with closing(generation_store.GenerationStore(tmp_path / "g.sqlite")) as store:
            for i in range(10):
                finished = generation_store.Finished
                store.add([(f"{worker}-{i}", finished("text", "stop", 1)), ("shared", finished(str(i), "stop", 1))])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(fill, worker) for worker in range(8)]:
            done.result()
    assert stored(tmp_path / "g.sqlite") == 81


# ---------------------------------------------------------------- the local generator


@needs_mlx
def test_a_record_gets_the_same_text_alone_in_a_batch_and_in_any_order(tiny: SimpleNamespace) -> None:
    records = corpus(10)
    together = generate(records, generator(tiny, batch_size=8))
    reversed_order = generate(records[::-1], generator(tiny, batch_size=3))
    one_by_one = generate(records, generator(tiny, batch_size=1))
    alone = generate(records[4:5], generator(tiny))
    assert together == reversed_order == one_by_one
    assert alone[records[4].id] == together[records[4].id]
    assert len({outcome.text for outcome in together.values()}) > 5, "the outputs differ, so equality says something"
    assert {outcome.problem for outcome in together.values()} == {"", "truncated"}


@needs_mlx
@pytest.mark.parametrize("leading", ["", "\n\n", " "])
def test_the_shared_prefix_changes_nothing(tiny: SimpleNamespace, leading: str) -> None:
    """Against mlx-lm's own single-stream generation, which has no batch and no shared prefix."""
    from mlx_lm import load, stream_generate

    records = [raw(leading + record.text) for record in corpus(5)]
    made = generator(tiny, temperature=0.0, max_tokens=24, batch_size=4)
    outcomes = generate(records, made)
    lengths = []
    model, tokenizer = load(str(tiny.model), adapter_path=str(tiny.adapter))[:2]
    for record in records:
        messages = [message.model_dump() for message in PROMPT.messages(record.text)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        lengths.append(len(ids))
        tokens, reason = [], None
        for response in stream_generate(model, tokenizer, ids, max_tokens=24):
            tokens += [response.token] if response.finish_reason != "stop" else []
            reason = response.finish_reason
        assert outcomes[record.id].text == tokenizer.decode(tokens)
        assert outcomes[record.id].problem == ("truncated" if reason == "length" else "")
    # Read of each prompt: what is behind the prefix, without the last token, which the first step of decoding reads.
    prefix = made.summary["prefix_tokens"]
    assert prefix > 20
    assert made.summary["prompt_tokens_read"] == sum(lengths) - len(records) * (prefix + 1)


@needs_mlx
def test_a_prompt_that_does_not_begin_with_the_prefix_is_read_whole(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = corpus(4)
    shared = generate(records, generator(tiny, batch_size=4))
    # Half a prompt more than is common to all: some rows share it, the others must not use its cache.
    common = local.Engine._prefix

    def too_long(engine: Any, shared: Any) -> list[int]:
        ids: list[int] = engine.tokens(asks(records)[2].messages).tolist()
        return ids[: len(common(engine, shared)) + 8]

    monkeypatch.setattr(local.Engine, "_prefix", too_long)
    assert generate(records, generator(tiny, batch_size=4)) == shared


@needs_mlx
def test_thinking_is_switched_off(tiny: SimpleNamespace) -> None:
    made = generator(tiny)
    engine = local.Engine(made._load(), made.settings, made.sampling, "")
    prompt = engine.tokenizer.decode(engine.tokens(PROMPT.messages("some text")).tolist())
    assert prompt.endswith("Compress:\nsome text<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@needs_mlx
def test_the_adapter_decides_the_output(tiny: SimpleNamespace, tmp_path: Path) -> None:
    records = corpus(4)
    endless = str(make_model(tmp_path / "endless", end_bias=-2.0))  # outputs of 48 tokens differ, or are the same text
    with_adapter = generate(records, generator(tiny, model=endless))
    without = generate(records, generator(tiny, model=endless, adapter=""))
    another = str(make_adapter(tmp_path / "another", seed=3))
    other = generate(records, generator(tiny, model=endless, adapter=another))
    for record in records:
        texts = {result[record.id].text for result in (with_adapter, without, other)}
        assert len(texts) == 3


@needs_mlx
def test_an_adapter_of_another_model_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    wrong = make_adapter(tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text("utf-8"))
    config["lora_parameters"]["rank"] = 7
    (wrong / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(SettingsError, match=r"mlx-lm cannot load .* with adapter") as error:
        generate(corpus(1), generator(tiny, adapter=str(wrong)))
    assert "trained on this model" in error.value.mend


@needs_mlx
def test_records_with_the_same_text_draw_apart_unless_greedy(tiny: SimpleNamespace) -> None:
    twins = [raw(CORPUS[0]), raw(CORPUS[0], id=content_id("another place"))]
    drawn = generate(twins, generator(tiny))
    assert drawn[twins[0].id] != drawn[twins[1].id]
    reseeded = generate(twins, generator(tiny, seed=1))
    assert reseeded[twins[0].id] != drawn[twins[0].id]
    made = generator(tiny, temperature=0.0)
    greedy = generate(twins, made)
    assert greedy[twins[0].id] == greedy[twins[1].id] and made.summary["generated"] == 1


@needs_mlx
def test_a_narrow_nucleus_is_greedy(tiny: SimpleNamespace) -> None:
    records = corpus(3)
    assert generate(records, generator(tiny, top_p=1e-6)) == generate(records, generator(tiny, temperature=0.0))


@needs_mlx
def test_an_output_that_reaches_the_limit_is_truncated(tiny: SimpleNamespace) -> None:
    (outcome,) = generate(corpus(1), generator(tiny, max_tokens=2)).values()
    assert (outcome.problem, outcome.detail) == ("truncated", "not finished after max_tokens = 2 tokens")


@needs_mlx
def test_texts_no_model_should_see_are_rejected_and_the_rest_goes_on(tiny: SimpleNamespace) -> None:
    records = [raw("if token == '<|im_end|>': break"), raw("long " * 400), *corpus(2)]
    made = generator(tiny, max_prompt_tokens=300)
    outcomes = list(generate(records, made).values())
    assert [outcome.problem for outcome in outcomes[:2]] == ["control_token", "prompt_too_long"]
    assert outcomes[0].detail.startswith("the text holds <|im_end|>")
    assert "the limit is max_prompt_tokens = 300" in outcomes[1].detail
    assert made.summary["generated"] == 2


@needs_mlx
def test_the_model_is_not_loaded_when_everything_is_stored(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, store = corpus(4), tmp_path / "g.sqlite"
    first = generate(records, generator(tiny), store)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    made = generator(tiny)
    assert generate(records, made, store) == first
    assert made.summary == {"stored": 4, "generated": 0}


@pytest.mark.slow
@needs_mlx
def test_a_killed_run_goes_on_from_what_it_stored(tmp_path: Path, tiny: SimpleNamespace) -> None:
    records = corpus(12)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for directory in (killed, whole):
        directory.mkdir()
        write(directory / "in.jsonl", records)
    assert run_stage(whole, mlx_toml(tmp_path / "whole.toml", tiny, batch_size=12)).returncode == 0
    config = mlx_toml(tmp_path / "killed.toml", tiny, batch_size=2)

    store = store_path(killed / "cache", "mock")
    process = subprocess.Popen(command(killed, config), cwd=ROOT, env=dict(os.environ), stderr=subprocess.DEVNULL)
    for _ in wait(60):
        if store.exists() and stored(store) >= 2:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    done = stored(store)
    assert 2 <= done < len(records)
    assert not (killed / "trial" / "compression" / "03_compress.jsonl").exists()

    again = run_stage(killed, config)
    assert again.returncode == 0, again.stderr
    _, _, report = outputs(killed)
    assert report["summary"]["mlx"]["stored"] == done
    assert report["summary"]["mlx"]["generated"] == len(records) - done
    assert stored(store) == len(records)
    for name in ("03_compress.jsonl", "03_compress.rejects.jsonl"):
        assert (killed / "trial/compression" / name).read_bytes() == (whole / "trial/compression" / name).read_bytes()


def stored(store: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute("SELECT COUNT(*) FROM generations").fetchone()[0])
    except sqlite3.OperationalError:  # the table is being made
        return 0


def wait(seconds: float) -> Iterator[None]:
    """Try again every few milliseconds until the caller leaves the loop; fails when the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.005)
    pytest.fail(f"did not happen within {seconds} s")


@needs_mlx
def test_pairs_keep_where_they_came_from_and_the_figures_add_up(tmp_path: Path, tiny: SimpleNamespace) -> None:
    records = corpus(12)
    write(tmp_path / "in.jsonl", records)
    (tmp_path / "in.jsonl").open("ab").write(b"not json\n")
    done = run_stage(tmp_path, mlx_toml(tmp_path / "c.toml", tiny))
    assert done.returncode == 0, done.stderr
    pairs, rejects, report = outputs(tmp_path)
    assert report["counts"]["planned"] == 13 == len(pairs) + len(rejects)
    by_id = {record.id: record for record in records}
    order = [record.id for record in records]
    assert [pair.id for pair in pairs] == [id for id in order if id in {pair.id for pair in pairs}]
    from shared.text import Tokenizer

    tokenizer = Tokenizer(str(tiny.model))
    for pair in pairs:
        record = by_id[pair.id]
        assert pair.verbose == (record.merged.text if record.merged else record.text)
        for name in ("parents", "domain", "source", "origin", "language", "category", "licence"):
            assert getattr(pair, name) == getattr(record, name)
        made = pair.generation
        assert (made.verbose_tokens, made.compressed_tokens) == tuple(tokenizer.counts([pair.verbose, pair.compressed]))
        assert made.compressed_tokens < made.verbose_tokens
        assert made.compression_ratio == round(made.compressed_tokens / made.verbose_tokens, 6)
        assert (made.generator, made.model, made.adapter) == ("mlx", str(tiny.model), str(tiny.adapter))
    reasons = {reject["reason"] for reject in rejects}
    assert "not_json" in reasons and reasons <= {"not_json", "truncated", "not_shorter", "empty"}
    assert not report["summary"]["mlx"]["stored"]


@pytest.mark.slow
@needs_mlx
def test_model_adapter_and_tokenizer_come_from_the_hub_at_their_commits(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """From the Hub client's own cache, offline: what it would have downloaded lies there."""
    commits = {"model": "1" * 40, "adapter": "2" * 40}
    for name, commit in commits.items():
        shutil.copytree(getattr(tiny, name), tmp_path / f"hf/hub/models--acme--{name}/snapshots/{commit}")
    write(tmp_path / "in.jsonl", corpus(6))
    config = mlx_toml(tmp_path / "c.toml", tiny)
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "APIS": "live"}
    assert run_stage(tmp_path, config, **offline).returncode == 0
    here, _, _ = outputs(tmp_path)

    hub = {"model": "acme/model", "revision": commits["model"]}
    mlx_toml(config, tiny, **hub, adapter="acme/adapter", adapter_revision=commits["adapter"])
    local_tokenizer = f"tokenizer = {json.dumps(str(tiny.model))}"
    pinned_tokenizer = f'tokenizer = "acme/model"\ntokenizer_revision = "{commits["model"]}"'
    config.write_text(config.read_text("utf-8").replace(local_tokenizer, pinned_tokenizer), "utf-8")
    done = run_stage(tmp_path, config, **offline)
    assert done.returncode == 0, done.stderr
    pairs, _, report = outputs(tmp_path)
    assert report["summary"]["mlx"]["generated"] == 6, "another identity, so nothing is taken from the store"
    assert [pair.compressed for pair in pairs] == [pair.compressed for pair in here]
    assert {(p.generation.model, p.generation.adapter, p.generation.tokenizer) for p in pairs} == {
        (f"acme/model@{commits['model']}", f"acme/adapter@{commits['adapter']}", f"acme/model@{commits['model']}")
    }

    mlx_toml(config, tiny, **hub, adapter="acme/lost", adapter_revision="3" * 40)
    lost = run_stage(tmp_path, config, **offline)
    assert lost.returncode == 2
    assert f"acme/lost@{'3' * 40} cannot be had from the Hub" in lost.stderr


# ---------------------------------------------------------------- a server, over the wire


def endpoint_toml(path: Path, tokenizer: Path, **endpoint: Any) -> Path:
    table = {"model": "endpoint/synthmill-compress"} | endpoint
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    head = f'generator = "endpoint"\ntokenizer = {json.dumps(str(tokenizer))}\n[endpoint]\n'
    path.write_text(head + "\n".join(lines) + "\n", "utf-8")
    return path


def test_a_server_compresses_and_is_asked_only_once(tmp_path: Path, tiny: SimpleNamespace, standin: Any) -> None:
    records = [raw("if token == '<|im_end|>': break"), *corpus(30)]
    write(tmp_path / "in.jsonl", records)
    config = endpoint_toml(tmp_path / "c.toml", tiny.model, concurrency=8)
    first = run_stage(tmp_path, config)
    assert first.returncode == 0, first.stderr
    pairs, rejects, report = outputs(tmp_path)
    assert len(pairs) >= 10
    assert {pair.generation.generator for pair in pairs} == {"endpoint"}
    assert {pair.generation.model for pair in pairs} == {"endpoint/synthmill-compress"}
    assert rejects[0]["reason"] == "control_token"
    assert {r["reason"] for r in rejects} <= {"control_token", "not_shorter"}
    order = [record.id for record in records]
    kept = {pair.id for pair in pairs}
    assert [pair.id for pair in pairs] == [id for id in order if id in kept]
    assert report["spending"]["calls"] == 30 == len(standin.requests())

    whole = (tmp_path / "trial/compression/03_compress.jsonl").read_bytes()
    endpoint_toml(config, tiny.model, concurrency=1)
    again = run_stage(tmp_path, config)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "trial/compression/03_compress.jsonl").read_bytes() == whole
    assert len(standin.requests()) == 30


@pytest.mark.slow
def test_faults_of_a_server_are_reasons_and_the_same_at_any_concurrency(tmp_path: Path, tiny: SimpleNamespace) -> None:
    files = {}
    faults = "refuse=0.6,truncate=0.2,seed=3"  # each is asked three times
    for concurrency in (1, 8):
        directory = tmp_path / str(concurrency)
        directory.mkdir()
        write(directory / "in.jsonl", corpus(30))
        config = endpoint_toml(directory / "c.toml", tiny.model, concurrency=concurrency)
        done = run_stage(directory, config, STANDIN_FAULTS=faults)
        assert done.returncode == 0, done.stderr
        _, rejects, _ = outputs(directory)
        assert "refused" in {reject["reason"] for reject in rejects}
        names = ("03_compress.jsonl", "03_compress.rejects.jsonl")
        files[concurrency] = [(directory / "trial/compression" / name).read_bytes() for name in names]
    assert files[1] == files[8]


def test_the_endpoint_is_where_the_settings_say(tmp_path: Path, tiny: SimpleNamespace, standin: Any) -> None:
    from shared.standin import start

    write(tmp_path / "in.jsonl", corpus(3))
    log = tmp_path / "requests.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STANDIN_LOG", str(log))
        with start() as url:
            done = run_stage(tmp_path, endpoint_toml(tmp_path / "c.toml", tiny.model, base_url=f"{url}/v1"))
    assert done.returncode == 0, done.stderr
    assert len(log.read_text("utf-8").splitlines()) == 3 and not standin.requests()


@pytest.mark.slow
def test_a_teacher_compresses_with_the_same_prompts(tmp_path: Path, tiny: SimpleNamespace, standin: Any) -> None:
    write(tmp_path / "in.jsonl", corpus(6))
    config = tmp_path / "c.toml"
    table = '[teacher]\nmodel = "anthropic/claude-haiku-5-5"\n'
    config.write_text(f'generator = "teacher"\ntokenizer = {json.dumps(str(tiny.model))}\n{table}', "utf-8")
    done = run_stage(tmp_path, config)
    assert done.returncode == 0, done.stderr
    pairs, _, report = outputs(tmp_path)
    assert pairs and {pair.generation.generator for pair in pairs} == {"teacher"}
    assert report["spending"]["models"] == {"anthropic/claude-haiku-5-5": 6}
    assert len(standin.requests()) == 6
    digest = main.Prompt(*((STAGE / f"prompts/{name}.txt").read_text("utf-8") for name in ("system", "user"))).digest
    assert {pair.generation.prompt for pair in pairs} == {digest}
