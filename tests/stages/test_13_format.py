"""13 format: splits that never straddle and never move, and directories that trainers read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest

from shared.records import Cluster, Example, Pair
from shared.stage import read_records
from tests.conftest import ROOT, run_stage
from tests.stages.test_04_validate import pair, texts

STAGE = ROOT / "stages" / "13_format"
PROMPTS = ROOT / "stages" / "03_compress" / "prompts"


def chosen(count: int, cluster_size: int = 1) -> list[Pair]:
    pairs = [pair(text) for text in texts(count)]
    groups = [pairs[n - n % cluster_size].id for n in range(count)]
    return [p.with_field(cluster=Cluster(id=group, size=cluster_size)) for p, group in zip(pairs, groups, strict=True)]


def format_(
    data: Path, pairs: list[Pair], extra: str = "", name: str = "trial"
) -> tuple[subprocess.CompletedProcess[str], list[Example]]:
    (data / "12_choose.jsonl").write_bytes(b"".join(p.line() for p in pairs))
    keys = {line.partition("=")[0].strip() for line in extra.splitlines()}
    lines = [
        line
        for line in (STAGE / f"{name}.toml").read_text("utf-8").splitlines()
        if line.partition("=")[0].strip() not in keys
    ]
    (data / "settings.toml").write_text("\n".join([*extra.splitlines(), *lines]), "utf-8")
    files = ("--in", data / "12_choose.jsonl", "--out", data / "13_format.jsonl", "--config", data / "settings.toml")
    done = run_stage(STAGE / "main.py", *files, "--track", "compression")
    output = data / "13_format.jsonl"
    return done, list(read_records(output, Example)) if output.exists() else []


def test_an_example_is_the_chat_the_model_will_see(data: Path) -> None:
    pairs = chosen(3)
    done, examples = format_(data, pairs)
    assert done.returncode == 0, done.stderr
    assert "3 training examples: train" in done.stderr
    for p, example in zip(pairs, examples, strict=True):
        assert [m.role for m in example.messages] == ["system", "user", "assistant"]
        assert example.messages[0].content == (PROMPTS / "system.txt").read_text("utf-8")
        assert p.verbose in example.messages[1].content and "{text}" not in example.messages[1].content
        assert example.messages[2].content == p.compressed
        assert (example.id, example.origin, example.licence, example.group) == (p.id, p.origin, p.licence, p.id)
        assert example.compression_ratio == 0.5


def test_a_text_with_braces_is_not_taken_for_a_placeholder(data: Path) -> None:
    odd = pair("print(f'{text} and {other} {0}') is what the manual says.")
    _, (example,) = format_(data, [odd])
    assert odd.verbose in example.messages[1].content


@pytest.mark.parametrize(("name", "held_out"), [("trial", (0.10, 0.15)), ("full", (0.05, 0.05))])
def test_the_splits_have_their_shares(data: Path, name: str, held_out: tuple[float, float]) -> None:
    _, examples = format_(data, chosen(2000), name=name)
    shares = Counter(example.split for example in examples)
    assert abs(shares["valid"] / 2000 - held_out[0]) < 0.02
    assert abs(shares["test"] / 2000 - held_out[1]) < 0.02
    assert sum(shares.values()) == 2000


def test_near_duplicates_never_straddle_splits(data: Path) -> None:
    _, examples = format_(data, chosen(600, cluster_size=3))
    splits: dict[str, set[str]] = {}
    for example in examples:
        splits.setdefault(example.group, set()).add(example.split)
    assert len(splits) == 200 and all(len(found) == 1 for found in splits.values())


def test_more_data_moves_nothing(data: Path) -> None:
    everything = chosen(400)
    _, few = format_(data, everything[::4])
    _, all_of_them = format_(data, everything)
    later = {example.id: example.split for example in all_of_them}
    assert {example.id: example.split for example in few} == {example.id: later[example.id] for example in few}
    _, other = format_(data, everything, "seed = 43")
    assert {e.id: e.split for e in other} != later, "only another seed does"


def test_the_directories_hold_the_splits(data: Path) -> None:
    _, examples = format_(data, chosen(80))
    for split in ("train", "valid", "test"):
        lines = [orjson.loads(line) for line in (data / "training" / f"{split}.jsonl").read_bytes().splitlines()]
        expected = [[m.model_dump() for m in e.messages] for e in examples if e.split == split]
        assert [line["messages"] for line in lines] == expected and expected
    held_out = data / "openai" / "test.jsonl"
    assert not held_out.exists(), "what is uploaded to a vendor is not held out any more"
    card = (data / "dataset" / "README.md").read_text("utf-8")
    assert card.startswith("---\n") and "license: mit" in card and "80 examples" in card
    assert "stand-in" in card and "near-duplicates share `group`" in card


def test_old_directories_are_replaced_whole(data: Path) -> None:
    format_(data, chosen(80))
    (data / "training" / "left-over.jsonl").write_text("old")
    format_(data, chosen(40))
    assert sorted(p.name for p in (data / "training").iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    assert sum(p.read_bytes().count(b"\n") for p in (data / "training").iterdir()) == 40


def test_datasets_loads_it_even_with_an_empty_split(data: Path, tmp_path: Path) -> None:
    _, examples = format_(data, chosen(2), "valid = 0.0\ntest = 0.0")
    assert {example.split for example in examples} == {"train"}
    loaded = load_dataset(data / "dataset", tmp_path)
    assert set(loaded) == {"train"} and sorted(loaded["train"]) == sorted(example.id for example in examples)


def test_datasets_never_gives_the_rows_of_an_earlier_run(data: Path, tmp_path: Path) -> None:
    for count in (80, 40):  # in one cache, from one directory
        _, examples = format_(data, chosen(count))
        for split, ids in load_dataset(data / "dataset", tmp_path).items():
            assert sorted(ids) == sorted(example.id for example in examples if example.split == split), split


def load_dataset(directory: Path, home: Path) -> dict[str, list[str]]:
    """The ids of each split, as a stranger's program reads them."""
    code = (
        "import sys, json, datasets\n"
        "found = datasets.load_dataset(sys.argv[1])\n"
        "print(json.dumps({split: list(rows['id']) for split, rows in found.items()}))\n"
    )
    environment = os.environ | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_a_turn_without_text_is_set_aside(data: Path) -> None:
    empty = pair("Something that was compressed to nothing.", " ")
    done, examples = format_(data, [empty, *chosen(2)])
    assert done.returncode == 0, done.stderr
    assert len(examples) == 2
    assert b'"reason":"empty_message"' in (data / "13_format.rejects.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("valid = 0.5\ntest = 0.5", "valid + test must leave room for train"),
        ("valid = 0.9", "valid"),
        ('exports = ["openia"]', "exports"),
        ('system_prompt = "stages/nowhere.txt"\nuser_prompt = "x"', "the prompt stages/nowhere.txt cannot be read"),
    ],
)
def test_wrong_settings_stop_it(data: Path, extra: str, says: str) -> None:
    done, examples = format_(data, chosen(3), extra)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert examples == []
