"""16 release: what is laid out, what the cards say and that their usage runs, what is refused, what is pushed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml  # type: ignore[import-untyped]

from shared.receipts import (
    Contestant,
    Counts,
    EvaluateReceipt,
    Gate,
    Interval,
    Metrics,
    ReleaseReceipt,
    TrainReceipt,
    read_train_receipt,
)
from shared.records import Cluster, Example, Pair
from shared.stage import TRACKS, load_settings, read_records, sha256_of
from tests.conftest import NOWHERE, ROOT, StandinLog, StandinWith, closed_environment, environment_of, run_stage
from tests.stages.test_04_validate import pair, texts

STAGE = ROOT / "stages" / "16_release"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
lineage: Any = importlib.import_module("lineage")
reasons: Any = importlib.import_module("reasons")
_spec = importlib.util.spec_from_file_location("release_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["release_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

HAS_MLX = importlib.util.find_spec("mlx_lm") is not None
if not HAS_MLX:
    warnings.warn("mlx-lm is not installed: releases are NOT TESTED; `make setup` installs it", stacklevel=1)
pytestmark = pytest.mark.skipif(not HAS_MLX, reason="mlx-lm is not installed: nothing can be trained to release")
HAS_PEFT = all(importlib.util.find_spec(name) is not None for name in ("torch", "peft", "transformers"))
if not HAS_PEFT:
    warnings.warn(
        "torch and peft are not installed: the card's usage of them is NOT RUN; they are in the group `parity`",
        stacklevel=1,
    )

HERE = "trial/compression"
EARLIER = ("01_acquire", "02_merge", "03_compress", "04_validate", "10_embed", "11_deduplicate", "12_choose")
SECRET = "ghp_" + "a1B2" * 9  # the format of a GitHub token, of nobody


# ---------------------------------------------------------------- a chain to release from


class Chain:
    """``data/`` and ``models/`` of a run whose data 13 formatted and whose adapter 14 trained."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.models = root, root / "data" / HERE, root / "models" / HERE
        self.output, self.release = self.models / "16_release.json", self.models / "release"

    def run(self, changes: dict[str, Any] | None = None, /, **environment: str) -> subprocess.CompletedProcess[str]:
        """16 with the trial's settings, ``changes`` in place of theirs."""
        settings = tomllib.loads((STAGE / "trial.toml").read_text("utf-8")) | (changes or {})
        tables = {name: settings.pop(name) for name in ("scrub", "notes")}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key != "tracks"]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        config = self.root / "16.toml"
        config.write_text("\n".join(lines), "utf-8")
        files = ("--in", self.data / "13_format.jsonl", "--out", self.output, "--config", config)
        return run_stage(STAGE / "main.py", *files, "--track", "compression", **({"PUSH": ""} | environment))

    @property
    def receipt(self) -> ReleaseReceipt:
        return ReleaseReceipt.model_validate(orjson.loads(self.output.read_bytes()))

    @property
    def train(self) -> TrainReceipt:
        return read_train_receipt(self.models / "14_train.json")[0]

    @property
    def evaluation(self) -> EvaluateReceipt:
        return EvaluateReceipt.model_validate(orjson.loads((self.models / "15_evaluate.json").read_bytes()))

    def change(self, name: str, **values: Any) -> None:
        """Put values into a receipt or report; an evaluation keeps belonging to the training."""
        path = (self.models if name[:2] > "13" else self.data) / name
        path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | values, option=orjson.OPT_INDENT_2))
        if name == "14_train.json" and (self.models / "15_evaluate.json").exists():
            self.change("15_evaluate.json", train_sha256=sha256_of(path))

    def made_live(self) -> None:
        """As if live services had made all of it, on a base model that the Hub has."""
        for path in [*self.data.glob("*.report.json"), *self.models.glob("*.report.json")]:
            self.change(path.name, apis="live")
        base = self.train.base_model.model_dump() | {"name": "Qwen/Qwen3-8B"}
        self.change("14_train.json", apis="live", base_model=base)
        self.change("15_evaluate.json", apis="live")
        for mark in self.root.glob("*/trial/.apis"):
            mark.write_text("live\n")

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what is laid out, by path."""
        files = sorted(path for path in self.release.rglob("*") if path.is_file())
        return {path.relative_to(self.release).as_posix(): sha256_of(path) for path in files}


def report(directory: Path, stage: str, **values: Any) -> None:
    """What a stage leaves beside its output, as far as others read it."""
    directory.mkdir(parents=True, exist_ok=True)
    counts = {"planned": 1, "kept": 1, "rejected": 0, "reasons": {}}
    content = {"stage": stage, "track": directory.name, "apis": "live", "seconds": 1.0, "counts": counts} | values
    (directory / f"{stage}.report.json").write_bytes(orjson.dumps(content))


def figures(value: float) -> Metrics:
    return {"pass_rate": Interval(value=value, low=value - 0.1, high=value + 0.05, n=9)}


def evaluation_of(chain: Chain) -> EvaluateReceipt:
    """What 15 would say of the adapter."""
    train = chain.train
    model, adapter = train.base_model.model, f"models/{HERE}/{train.run_id}/adapter_mlx"
    return EvaluateReceipt(
        run=train.run,
        track=train.track,
        run_id=train.run_id,
        train_sha256=sha256_of(chain.models / "14_train.json"),
        apis="mock",
        data=train.data,
        settings={},
        counts=Counts(planned=9, kept=9, rejected=0, reasons={}),
        contestants=(
            Contestant(
                name="candidate",
                kind="adapter",
                model=model,
                adapter=adapter,
                metrics=figures(0.81),
                by_group={"prose": figures(0.82)},
            ),
            Contestant(name="base", kind="model", model=model, adapter="", metrics=figures(0.43), by_group={}),
        ),
        differences={"base": {"pass_rate": Interval(value=0.38, low=0.21, high=0.52, n=9)}},
        gates=(Gate(metric="pass_rate", low=0.5, high=None, value=0.81, passed=True),),
        passed=True,
        cost_usd=0.0,
        seconds=1.0,
        finished_at="2026-11-21T00:00:00Z",
        git="unknown",
        python="3.11",
        platform="here",
        packages={},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain in which 13 and 14 ran for real, on the tiny model; the stages before them left reports alone."""
    chain = Chain(tmp_path_factory.mktemp("made"))
    chain.data.mkdir(parents=True)
    for number, stage in enumerate(EARLIER):
        counts = {"planned": 50 - number, "kept": 49 - number, "rejected": 1, "reasons": {}}
        report(chain.data, stage, apis="mock", counts=counts)
    licences = ("MIT", "Apache-2.0", "CC-BY-SA-3.0")
    pairs: list[Pair] = []
    for number, text in enumerate(texts(30)):
        one = pair(text)
        about = {"source": f"source-{number % 3}", "licence": licences[number % 3], "origin": f"work@{number % 3}:a#L1"}
        pairs.append(one.model_copy(update=about | {"cluster": Cluster(id=one.id, size=1)}))
    (chain.data / "12_choose.jsonl").write_bytes(b"".join(p.line() for p in pairs))
    train = (ROOT / "stages" / "14_train" / "trial.toml").read_text("utf-8")
    for key, value in {"iterations": 2, "eval_every": 2, "save_every": 2}.items():
        train = re.sub(rf"^{key} = \d+", f"{key} = {value}", train, flags=re.MULTILINE)
    (chain.root / "14.toml").write_text(train, "utf-8")
    steps: tuple[tuple[str, Path, Path, Path], ...] = (
        (
            "13_format",
            chain.data / "12_choose.jsonl",
            chain.data / "13_format.jsonl",
            ROOT / "stages/13_format/trial.toml",
        ),
        ("14_train", chain.data / "13_format.jsonl", chain.models / "14_train.json", chain.root / "14.toml"),
    )
    with environment_of(closed_environment()):
        for stage, source, target, config in steps:
            flags = ("--in", source, "--out", target, "--config", config, "--track", "compression")
            done = run_stage(ROOT / "stages" / stage / "main.py", *flags)
            assert done.returncode == 0, done.stderr
    (chain.models / "15_evaluate.json").write_bytes(evaluation_of(chain).line())
    report(chain.models, "15_evaluate", apis="mock")
    return chain


@pytest.fixture
def chain(made: Chain, tmp_path: Path) -> Chain:
    shutil.copytree(made.root, tmp_path / "chain", symlinks=True)
    return Chain(tmp_path / "chain")


@pytest.fixture(scope="module")
def staged(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain that was laid out; for tests that only look."""
    root = tmp_path_factory.mktemp("staged") / "chain"
    shutil.copytree(made.root, root, symlinks=True)
    with environment_of(closed_environment()):
        done = Chain(root).run()
    assert done.returncode == 0, done.stderr
    return Chain(root)


def front(card: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.read_text("utf-8").split("---\n")[1])
    return found


# ---------------------------------------------------------------- laid out


def test_both_repositories_are_laid_out_and_every_file_is_in_the_receipt(staged: Chain) -> None:
    model, dataset = staged.receipt.repositories
    assert set(model.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mlx/adapter_config.json",
        "mlx/adapters.safetensors", "example.json", "loss.svg",
    }  # fmt: skip
    assert {"README.md", "ATTRIBUTION.md", "data/train.parquet", "data/test.parquet"} <= set(dataset.files)
    listed = {f"{r.kind}/{name}": sha for r in (model, dataset) for name, sha in r.files.items()}
    assert listed == staged.hashes()
    trained = staged.train.files
    assert model.files["adapter_model.safetensors"] == trained["adapter/adapter_model.safetensors"]
    assert model.files["mlx/adapters.safetensors"] == trained["adapter_mlx/adapters.safetensors"]
    assert not staged.receipt.pushed and model.commit is None


def test_what_a_stand_in_made_is_marked_in_cards_and_receipt(staged: Chain) -> None:
    assert staged.receipt.made_by_standin
    (standin,) = [reason for reason in staged.receipt.reasons if reason.code == "standin"]
    assert standin.blocks == "real_hub" and f"{HERE}/01_acquire" in standin.text
    for kind in ("model", "dataset"):
        card = staged.release / kind / "README.md"
        assert "Made with a stand-in" in card.read_text("utf-8") and "stand-in" in front(card)["tags"]


def test_the_same_inputs_give_the_same_bytes(chain: Chain) -> None:
    assert chain.run().returncode == 0
    first = chain.hashes()
    assert chain.run().returncode == 0
    assert chain.hashes() == first


def test_the_model_card_has_the_front_matter_of_the_hub_and_the_figures_of_15(staged: Chain) -> None:
    card = staged.release / "model" / "README.md"
    data, text, repo = front(card), card.read_text("utf-8"), staged.receipt.repositories[0].repo
    assert (data["base_model"], data["library_name"], data["license"]) == ("models/tiny", "peft", "mit")
    assert data["datasets"] == [f"{repo}-data"] and data["language"] == ["en"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "pass_rate", "value": 0.81, "name": "pass rate"}]
    assert result["dataset"]["split"] == "test"
    assert "| pass rate | 0.810 [0.710, 0.860] | 0.430 [0.330, 0.480] |" in text
    assert "| pass rate | +0.380 [+0.210, +0.520] |" in text
    assert "| pass rate | 0.5 |  | 0.81 | yes |" in text
    assert f"{staged.train.steps} over" in text.replace(", over", " over")
    assert "## Limitations" in text and "## Cost" in text


def test_the_cards_name_sources_licences_and_what_they_ask_for(staged: Chain) -> None:
    examples = list(read_records(staged.data / "13_format.jsonl", Example))
    shared_alike = sum(example.licence == "CC-BY-SA-3.0" for example in examples)
    for kind in ("model", "dataset"):
        text = (staged.release / kind / "README.md").read_text("utf-8")
        assert f"| source-2 | CC-BY-SA-3.0 | 1 | {shared_alike} |" in text
        assert f"{shared_alike} examples are under CC-BY-SA-3.0, which asks for share alike" in text
    assert front(staged.release / "dataset" / "README.md")["license"] == "other"
    attribution = (staged.release / "dataset" / "ATTRIBUTION.md").read_text("utf-8")
    assert f"## source-2 (CC-BY-SA-3.0)\n\n{shared_alike} examples. It asks for share alike" in attribution
    assert f"- work@2 ({shared_alike})" in attribution
    assert list(staged.receipt.obligations) == ["CC-BY-SA-3.0"]
    assert sum(staged.receipt.licences.values()) == len(examples)


@pytest.mark.parametrize("scale", ["trial", "full"])
@pytest.mark.parametrize("track", TRACKS)
def test_the_settings_are_valid_for_every_track(scale: str, track: str) -> None:
    params = load_settings(STAGE / f"{scale}.toml", main.Params, track)
    assert params.title and params.description and "CC-BY-SA-3.0" in params.allow
    assert not params.repo, "nobody's repository is written into the settings of everybody"


# ---------------------------------------------------------------- refused


def refused(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The codes that a refusal lists."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return re.findall(r"^  (?!next)(\w+): ", done.stderr, flags=re.MULTILINE)


def changed_data(chain: Chain) -> None:
    path = chain.data / "13_format.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def changed_adapter(chain: Chain) -> None:
    with open(chain.models / chain.train.run_id / "adapter" / "adapter_model.safetensors", "ab") as file:
        file.write(b"\0")


def lost_adapter(chain: Chain) -> None:
    (chain.models / chain.train.run_id / "adapter_mlx" / "adapters.safetensors").unlink()


def other_evaluation(chain: Chain) -> None:
    chain.change("15_evaluate.json", train_sha256="0" * 64)


def other_parquet(chain: Chain) -> None:
    shutil.copy(chain.data / "dataset/data/test.parquet", chain.data / "dataset/data/valid.parquet")


def lost_parquet(chain: Chain) -> None:
    shutil.rmtree(chain.data / "dataset")


def leaked(chain: Chain) -> None:
    """A token and an address, in records that were trained on."""
    path = chain.data / "13_format.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    lines[0]["messages"][1]["content"] += f"\ntoken = '{SECRET}'"
    lines[1]["messages"][1]["content"] += "\nAsk jane.roe@northwind-traders.com about it."
    path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    data = chain.train.data.model_dump() | {"sha256": sha256_of(path)}
    chain.change("14_train.json", data=data)
    chain.change("15_evaluate.json", data=data)


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (changed_data, "data_changed"),
        (changed_adapter, "adapter_changed"),
        (lost_adapter, "adapter_changed"),
        (other_evaluation, "evaluation_of_another"),
        (other_parquet, "dataset_differs"),
        (lost_parquet, "dataset_differs"),
        (leaked, "secret"),
        (lambda chain: (chain.models / "15_evaluate.json").unlink(), "not_evaluated"),
        (lambda chain: (chain.models / "14_train.json").unlink(), "not_trained"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_must_not_be_laid_out_is_not_and_the_last_release_stays(
    chain: Chain, break_it: Callable[[Chain], None], code: str
) -> None:
    chain.release.mkdir()
    (chain.release / "old").write_text("as it was")
    break_it(chain)
    done = chain.run()
    assert code in refused(done)
    assert SECRET not in done.stderr
    assert chain.hashes() == {"old": sha256_of(chain.release / "old")}
    assert not chain.output.exists() and not (chain.models / ".release.part").exists()


def test_a_refusal_lists_every_reason_not_the_first(chain: Chain) -> None:
    leaked(chain)
    other_parquet(chain)
    lost_adapter(chain)
    (chain.models / "15_evaluate.json").unlink()
    codes = refused(chain.run({"allow": ["MIT"]}))
    assert set(codes) == {
        "not_evaluated", "adapter_changed", "base_model_is_local", "standin", "licence", "dataset_differs", "secret",
    }  # fmt: skip
    assert codes.count("licence") == 2  # Apache-2.0 and CC-BY-SA-3.0
    assert codes.count("secret") == 2  # the token, and the address


def test_a_failed_gate_and_a_licence_let_it_be_laid_out_and_bar_every_push(chain: Chain, standin: StandinLog) -> None:
    gate = {"metric": "pass_rate", "low": 0.9, "high": None, "value": 0.81, "passed": False}
    chain.change("15_evaluate.json", gates=[gate], passed=False)
    settings = {"allow": ["MIT", "Apache-2.0"]}
    done = chain.run(settings)
    assert done.returncode == 0, done.stderr
    found = {reason.code: reason for reason in chain.receipt.reasons}
    assert found["gate_failed"].blocks == found["licence"].blocks == "push"
    assert found["gate_failed"].text == "pass_rate is 0.81, and must be at least 0.9"
    assert "CC-BY-SA-3.0" in found["licence"].text and "asks for share alike" in found["licence"].text
    assert "**no**" in (chain.release / "model" / "README.md").read_text("utf-8")
    before = chain.output.read_bytes()
    pushed = chain.run(settings, PUSH="1", HF_REPO="acme/barred")
    assert refused(pushed) == ["gate_failed", "licence"]  # the stand-in's Hub takes what a stand-in made
    assert standin.requests() == []
    assert chain.output.read_bytes() == before


@pytest.fixture
def somewhere() -> Iterator[tuple[str, list[Any]]]:
    """A server that is nobody's stand-in, and who connected to it."""
    callers: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    callers.append(server.accept()[1])
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", callers


@pytest.mark.parametrize("hidden", [False, True], ids=["said by every report", "said by one report"])
def test_what_a_stand_in_made_is_not_pushed_anywhere_else_and_nobody_is_even_asked(
    chain: Chain, somewhere: tuple[str, list[Any]], hidden: bool
) -> None:
    address, callers = somewhere
    if hidden:
        chain.made_live()
        chain.change("02_merge.report.json", apis="mock")
    else:
        for mark in chain.root.glob("*/trial/.apis"):
            mark.unlink()
    live = {"APIS": "live", "HF_TOKEN": "hf_somebody", "HF_ENDPOINT": address}
    done = chain.run(PUSH="1", HF_REPO="acme/adapter", **live)
    assert "standin" in refused(done) and address in done.stderr
    assert callers == []


def test_an_address_that_is_only_said_to_be_the_stand_ins_is_not(
    chain: Chain, somewhere: tuple[str, list[Any]]
) -> None:
    port = somewhere[0].rpartition(":")[2]
    done = chain.run(PUSH="1", HF_REPO="acme/adapter", STANDIN_URL=f"http://hub.test:{port}")
    assert "standin" in refused(done)
    assert somewhere[1] == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PUSH": "1", "APIS": "live", "HF_REPO": "acme/x"}, "HF_TOKEN is not set"),
        ({"PUSH": "1"}, "nobody says where to"),
        ({"PUSH": "1", "HF_REPO": "no-organization"}, "must be org/name"),
        ({"PUSH": "yes", "HF_REPO": "acme/x"}, "PUSH must be 1"),
    ],
)
def test_a_push_without_token_or_name_stops_before_anything(
    tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    chain = Chain(tmp_path)  # nothing is there, and nothing of it is looked at
    done = chain.run(**environment)
    assert done.returncode == 2 and said in done.stderr


# ---------------------------------------------------------------- who made it


def test_the_adapter_that_wrote_the_data_is_part_of_the_lineage(made: Chain, tmp_path: Path) -> None:
    data = tmp_path / "data" / "full" / "compression"
    adapter = made.models / "latest" / "adapter_mlx"
    used = {"generator": "mlx", "mlx": {"adapter": str(adapter), "adapter_revision": ""}}
    report(data, "03_compress", settings=used)
    links = {link.name: link.apis for link in lineage.lineage(data, tmp_path / "models")}
    assert links["full/compression/03_compress"] == "live"
    assert links[f"{HERE}/14_train"] == links[f"{HERE}/01_acquire"] == "mock"
    # With another generator the adapter in the settings wrote nothing.
    report(data, "03_compress", settings=used | {"generator": "endpoint", "endpoint": {"model": "x"}})
    assert list({link.apis for link in lineage.lineage(data, tmp_path / "models")}) == ["live"]


def test_a_stage_that_read_an_older_file_breaks_the_lineage(tmp_path: Path) -> None:
    data, models = tmp_path / "data" / "full" / "grounded", tmp_path / "models" / "full" / "grounded"
    report(data, "05_extract_qa", output={"a.jsonl": "1" * 64})
    report(data, "13_format", inputs={"a.jsonl": "1" * 64}, output={"b.jsonl": "2" * 64})
    report(models, "14_train", inputs={"b.jsonl": "2" * 64})
    assert list(reasons.of_lineage(lineage.lineage(data, models), data)) == []
    report(data, "05_extract_qa", output={"a.jsonl": "3" * 64})
    (broken,) = reasons.of_lineage(lineage.lineage(data, models), data)
    assert (broken.code, broken.blocks) == ("lineage_broken", "push") and "a.jsonl" in broken.text
    (data / "13_format.report.json").unlink()
    (unknown,) = reasons.of_lineage(lineage.lineage(data, models), data)
    assert (unknown.code, unknown.blocks) == ("lineage_unknown", "real_hub")


def test_a_place_on_this_machine_is_found_in_what_is_told_about_a_release() -> None:
    texts = [("README.md", f"trained on {ROOT}/models/tiny"), ("b", "models/tiny, see /rooted/x")]
    (found,) = reasons.of_places(texts)
    assert found.code == "local_path" and "README.md" in found.text


# ---------------------------------------------------------------- pushed

DOWNLOAD = r"""
import hashlib, json, os, sys
from huggingface_hub import HfApi, snapshot_download
found = {}
for kind, repo, commit in json.loads(sys.argv[1]):
    at = snapshot_download(repo, repo_type=kind, revision=commit, token="standin")
    paths = [os.path.join(d, name) for d, _, names in os.walk(at) for name in names]
    files = {os.path.relpath(p, at): hashlib.sha256(open(p, "rb").read()).hexdigest() for p in paths}
    files.pop(".gitattributes")
    found[kind] = {"files": files, "private": HfApi(token="standin").repo_info(repo, repo_type=kind).private,
                   "commits": len(HfApi(token="standin").list_repo_files(repo, repo_type=kind))}
print(json.dumps(found))
"""


def in_process(code: str, home: Path, *arguments: str, url: str = "") -> Any:
    """The last line that a process prints, as JSON; the library reads its endpoint when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": url or os.environ["STANDIN_URL"],
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_push_downloads_with_the_same_hashes_and_the_same_bytes_make_no_commit(
    chain: Chain, standin_with: StandinWith, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    standin_with(state=state)
    done = chain.run(PUSH="1", HF_REPO="acme/adapter")
    assert done.returncode == 0, done.stderr
    first = chain.receipt
    assert first.pushed and [r.repo for r in first.repositories] == ["acme/adapter", "acme/adapter-data"]
    assert all(re.fullmatch("[0-9a-f]{40}", r.commit or "") and r.private for r in first.repositories)

    standin_with(state=state)  # another process, which has what the first was given
    asked = json.dumps([(r.kind, r.repo, r.commit) for r in first.repositories])
    found = in_process(DOWNLOAD, tmp_path / "hf", asked)
    assert {r.kind: r.files for r in first.repositories} == {kind: value["files"] for kind, value in found.items()}
    assert all(value["private"] for value in found.values())

    again = chain.run(PUSH="1", HF_REPO="acme/adapter")
    assert again.returncode == 0, again.stderr
    assert [r.commit for r in chain.receipt.repositories] == [r.commit for r in first.repositories]

    changed = chain.run({"title": "another"}, PUSH="1", HF_REPO="acme/adapter")
    assert changed.returncode == 0, changed.stderr
    assert all(a.commit != b.commit for a, b in zip(chain.receipt.repositories, first.repositories, strict=True))


def test_a_file_that_came_to_harm_at_the_hub_is_noticed(
    chain: Chain, standin_with: StandinWith, tmp_path: Path
) -> None:
    standin_with(state=tmp_path / "state")
    assert chain.run(PUSH="1", HF_REPO="acme/harmed").returncode == 0
    before = chain.output.read_bytes()
    blob = tmp_path / "state" / "hub" / "blobs" / chain.receipt.repositories[0].files["README.md"]
    blob.write_bytes(blob.read_bytes().replace(b"LoRA", b"LoRa"))
    standin_with(state=tmp_path / "state")
    done = chain.run(PUSH="1", HF_REPO="acme/harmed")
    assert done.returncode == 6
    assert "model acme/harmed at" in done.stderr and "is not what was uploaded: README.md" in done.stderr
    assert chain.output.read_bytes() == before


def test_a_repository_of_somebody_else_is_left_alone(chain: Chain, standin: StandinLog, tmp_path: Path) -> None:
    code = (
        "from huggingface_hub import HfApi; api = HfApi(token='standin'); api.create_repo('acme/theirs-data', "
        "repo_type='dataset'); print('\"' + api.upload_file(path_or_fileobj=b'# Years of work', "
        "path_in_repo='README.md', repo_id='acme/theirs-data', repo_type='dataset').oid + '\"')"
    )
    before = in_process(code, tmp_path / "hf")
    done = chain.run(PUSH="1", HF_REPO="acme/theirs")
    assert done.returncode == 2 and "was not made by this pipeline" in done.stderr
    head = "from huggingface_hub import HfApi; print('\"' + HfApi().dataset_info('acme/theirs-data').sha + '\"')"
    assert in_process(head, tmp_path / "hf") == before
    assert not chain.output.exists()


def test_what_live_services_made_may_go_to_a_real_hub(chain: Chain, standin: StandinLog) -> None:
    chain.made_live()
    hub = {"APIS": "live", "HF_ENDPOINT": os.environ["STANDIN_URL"], "HF_HUB_DISABLE_XET": "1"}
    done = chain.run(PUSH="1", HF_REPO="acme/live", HF_TOKEN="hf_somebody", **hub)
    assert done.returncode == 0, done.stderr
    assert chain.receipt.pushed and not chain.receipt.made_by_standin and chain.receipt.reasons == ()
    card = (chain.release / "model" / "README.md").read_text("utf-8")
    assert "stand-in" not in card and "base_model: Qwen/Qwen3-8B" in card
    refused_token = chain.run(PUSH="1", HF_REPO="acme/live", HF_TOKEN="read-only-key", **hub)
    assert refused_token.returncode == 2 and "may not do this" in refused_token.stderr
    bad = chain.run(PUSH="1", HF_REPO="acme/live", HF_TOKEN="bad-key", **hub)
    assert bad.returncode == 2 and "refuses the token" in bad.stderr
    away = chain.run(PUSH="1", HF_REPO="acme/live", HF_TOKEN="hf_somebody", APIS="live", HF_ENDPOINT=NOWHERE)
    assert away.returncode == 6 and "check the network" in away.stderr


# ---------------------------------------------------------------- the usage that the card shows


def usage(card: Path, library: str) -> str:
    """The Python of the card that uses a library."""
    found: str
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", card.read_text("utf-8"), re.S) if library in code]
    return found


def run_usage(chain: Chain, library: str, repo: str, home: Path) -> str:
    """What the card's own code prints, after the card was pushed."""
    done = chain.run(PUSH="1", HF_REPO=repo)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"HF_ENDPOINT": os.environ["STANDIN_URL"], "HF_TOKEN": "standin", "HF_HOME": str(home)}
    command = [sys.executable, "-c", usage(chain.release / "model" / "README.md", library)]
    answer = subprocess.run(
        command, cwd=ROOT, env=environment | {"HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


@pytest.mark.parametrize("base", ["models/tiny", f"mlx-community/Qwen3-8B-4bit@{'5' * 40}"])
def test_the_usage_with_mlx_runs_as_the_card_has_it(
    chain: Chain, standin: StandinLog, tmp_path: Path, base: str
) -> None:
    candidate, *others = chain.evaluation.model_dump()["contestants"]
    chain.change("15_evaluate.json", contestants=[candidate | {"model": base}, *others])
    said = run_usage(chain, "mlx_lm", "acme/usage-mlx", tmp_path / "hf")
    assert ("revision=" in usage(chain.release / "model" / "README.md", "mlx_lm")) == ("@" in base)
    example = orjson.loads((chain.release / "model" / "example.json").read_bytes())
    assert [message["role"] for message in example["messages"]] == ["system", "user"]
    text = example["messages"][1]["content"]
    words = set(re.findall(r"\w{4,}", text))
    assert words & set(re.findall(r"\w{4,}", said)), (text, said)  # it is about the text it was given


@pytest.mark.skipif(not HAS_PEFT, reason="group `parity` is not installed: the usage with peft is NOT RUN")
def test_the_usage_with_peft_runs_as_the_card_has_it(chain: Chain, standin: StandinLog, tmp_path: Path) -> None:
    peft = run_usage(chain, "peft", "acme/usage-peft", tmp_path / "hf")
    mlx = run_usage(chain, "mlx_lm", "acme/usage-peft", tmp_path / "hf")
    assert peft.split() == mlx.split()
