"""The Hub, against the stand-in through the real libraries: pinned rows, pinned files, errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared import hub
from shared.errors import SettingsError
from tests.conftest import ROOT, StandinLog

# The libraries read their endpoint when they are imported, so what uses them runs in a process of its own; one for all
# the tests here, because the import takes seconds.
SCRIPT = r"""
import json, os, sys
from itertools import islice
from shared import hub

def told(action):
    try:
        return {"value": action()}
    except Exception as error:
        what = getattr(error, "what", str(error))
        return {"error": type(error).__name__, "what": what, "mend": getattr(error, "mend", "")}

def rows(dataset, seed, buffer, count=1000, **where):
    data = hub.open_dataset(dataset, where.pop("revision", "main"), **where)
    return [[place, sorted(row)] for place, row in islice(data.rows(seed, buffer), count)]

DOLLY, OASST, SMOL = "databricks/databricks-dolly-15k", "OpenAssistant/oasst1", "bigcode/the-stack-smol"
CLEAN, PARQUET = "codeparrot/github-code-clean", "refs/convert/parquet"
answers = {
    "opened": told(lambda: vars(hub.open_dataset(DOLLY, "main"))),
    "conversion": told(lambda: vars(hub.open_dataset(CLEAN, PARQUET, data_dir="Python-all/partial-train"))),
    "validation": told(lambda: hub.open_dataset(OASST, "main", split="validation").files),
    "in order": told(lambda: rows(DOLLY, None, 0)),
    "seed 1": told(lambda: rows(DOLLY, 1, 8)),
    "seed 1 again": told(lambda: rows(DOLLY, 1, 8)),
    "seed 2": told(lambda: rows(DOLLY, 2, 8)),
    "files 1": told(lambda: rows(CLEAN, 1, 0, revision=PARQUET, data_files="*/partial-train/*.parquet")),
    "files 2": told(lambda: rows(CLEAN, 2, 0, revision=PARQUET, data_files="*/partial-train/*.parquet")),
    "by commit": told(lambda: rows(DOLLY, 1, 8, revision=hub.open_dataset(DOLLY, "main").commit)),
    "gated": told(lambda: len(rows(SMOL, None, 0, data_dir="data/python"))),
    "missing": told(lambda: hub.open_dataset("nobody/nothing", "main")),
    "script": told(lambda: hub.open_dataset(CLEAN, "main")),
    "revision": told(lambda: hub.open_dataset(SMOL, "v9")),
    "folder": told(lambda: hub.open_dataset(SMOL, "main", data_dir="data/cobol")),
    "config": told(lambda: hub.open_dataset(SMOL, "main", config="cobol")),
    "split": told(lambda: hub.open_dataset(OASST, "main", split="test")),
}
from huggingface_hub import HfApi
ADAPTER = "standin/tiny-adapter"
commit = HfApi().model_info(ADAPTER).sha
answers |= {
    "download": told(lambda: sorted(file.name for file in hub.download(ADAPTER, commit, ["*.json", "*.md"]).iterdir())),
    "no file": told(lambda: str(hub.download(ADAPTER, commit, ["*.bin"]))),
    "no commit": told(lambda: str(hub.download(ADAPTER, "0" * 40, ["*.json"]))),
    "no model": told(lambda: str(hub.download("nobody/nothing", commit, ["*.json"]))),
    "home": os.environ["HF_HOME"],
}
os.environ["HF_TOKEN"] = "unaccepted-key"
answers["terms"] = told(lambda: hub.open_dataset(SMOL, "main"))
os.environ["HF_TOKEN"] = "bad-key"
answers["bad token"] = told(lambda: hub.open_dataset(DOLLY, "main"))
del os.environ["HF_TOKEN"]
answers["no token"] = told(lambda: hub.open_dataset(SMOL, "main"))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(_standin_server: tuple[str, Path]) -> dict[str, Any]:
    url, _ = _standin_server
    connected = {"HF_ENDPOINT": url, "HF_TOKEN": "standin", "SYNTHMILL_CONNECTED": url, "HF_HUB_DISABLE_XET": "1"}
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | connected
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_branch_becomes_a_commit_and_files_are_paths_in_the_repository(answers: dict[str, Any]) -> None:
    opened = answers["opened"]["value"]
    assert len(opened["commit"]) == 40 and opened["format"] == "json"
    assert opened["files"] == ["databricks-dolly-15k.jsonl"]
    conversion = answers["conversion"]["value"]
    assert conversion["files"] == ["Python-all/partial-train/0000.parquet"] and conversion["format"] == "parquet"
    assert answers["validation"]["value"][0].startswith("data/validation-")


def test_rows_come_in_order_with_their_place(answers: dict[str, Any]) -> None:
    rows = answers["in order"]["value"]
    assert [place for place, _ in rows] == [f"databricks-dolly-15k.jsonl:{number}" for number in range(len(rows))]
    assert rows[0][1] == ["category", "context", "instruction", "response"]


def test_a_shuffle_is_a_permutation_that_the_seed_decides(answers: dict[str, Any]) -> None:
    everything = sorted(answers["in order"]["value"])
    first, second = answers["seed 1"]["value"], answers["seed 2"]["value"]
    assert sorted(first) == sorted(second) == everything
    assert first == answers["seed 1 again"]["value"] == answers["by commit"]["value"]
    assert len({json.dumps(order) for order in (first, second, answers["in order"]["value"])}) == 3
    numbers = [int(place.split(":")[1]) for place, _ in first[:20]]
    assert numbers != sorted(numbers)  # drawn from the buffer, not passed through it


def test_files_come_in_an_order_that_the_seed_decides(answers: dict[str, Any]) -> None:
    orders = []
    for case in ("files 1", "files 2"):
        places = [place.split(":") for place, _ in answers[case]["value"]]
        files = list(dict.fromkeys(file for file, _ in places))
        assert places == sorted(places, key=lambda place: (files.index(place[0]), int(place[1])))
        orders.append(files)
    assert sorted(orders[0]) == sorted(orders[1]) and len(orders[0]) == 4
    assert orders[0] != orders[1]


def test_a_token_opens_what_is_gated(answers: dict[str, Any]) -> None:
    assert answers["gated"]["value"] > 0


@pytest.mark.parametrize(
    ("case", "kind", "what", "mend"),
    [
        ("no token", "KeyMissingError", "is gated", "HF_TOKEN"),
        ("terms", "KeyMissingError", "is gated", "accept the terms at"),
        ("bad token", "KeyMissingError", "refuses the token", "valid read token"),
        ("missing", "SettingsError", "no dataset nobody/nothing", "correct the id"),
        ("script", "SettingsError", "is a data set script", "refs/convert/parquet"),
        ("revision", "SettingsError", "no revision 'v9'", "history"),
        ("folder", "SettingsError", "no readable data", "data_dir"),
        ("config", "SettingsError", "Available: ['default']", "set config"),
        ("split", "SettingsError", "it has train, validation", "split"),
        ("no file", "SettingsError", "no file that matches *.bin", "patterns"),
        ("no commit", "SettingsError", "no revision '000", "history"),
        ("no model", "SettingsError", "no model nobody/nothing", "correct the id"),
    ],
)
def test_an_error_says_what_to_do(answers: dict[str, Any], case: str, kind: str, what: str, mend: str) -> None:
    answer = answers[case]
    assert answer.get("error") == kind, answer
    assert what in answer["what"] and mend in answer["mend"]


def test_files_are_downloaded_by_pattern(answers: dict[str, Any]) -> None:
    assert answers["download"]["value"] == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "abc123", ""])
def test_only_a_commit_hash_pins_a_download(revision: str) -> None:
    with pytest.raises(SettingsError, match="must be a commit hash"):
        hub.download("org/model", revision, ["*"])


def test_what_the_stand_in_says_is_not_kept_for_a_live_run(answers: dict[str, Any]) -> None:
    home = Path(answers["home"])
    assert home.name.startswith("synthmill-hub-") and not home.exists()


def test_a_hub_that_is_not_reached_is_said(standin: StandinLog, tmp_path: Path) -> None:
    script = "from shared import hub\nhub.download('org/model', '0' * 40, ['*'])"
    # Offline mode fails at once where a dead host would be tried for half a minute; both end in the same error.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert "ProviderError: the Hub does not give org/model" in done.stderr
    assert standin.requests() == []
