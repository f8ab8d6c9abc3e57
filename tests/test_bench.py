"""`make bench-client` measures what it says: what reached the server, what was delivered, and who failed, and why."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cascade, field, results, venvs
from benchmarks.client import ROOT, stub
from tests.conftest import StandinLog
from tests.test_panel import PAIRS

PEERS = ROOT / "benchmarks" / "peers"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.slow
def test_ours_is_measured_beside_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {"fast": field.fast(field.OURS, repeats=1, calls=50, limit_s=60.0)}
    for name in field.OURS:
        middle = found["fast"]["found"][name]["medians"]
        assert (middle["asked"], middle["different"], middle["lost"], middle["failed"]) == (50, 50, 0, "")
        assert middle["seconds"] >= found["fast"]["ideal_s"] == pytest.approx(0.1)
        assert 10 < middle["process_mib"] <= middle["tree_mib"]
    found |= {"date": "2026-01-01", "command": "x", "repeats": 1, "calls": 50, "newest": venvs.NEWEST}
    found |= {"machine": field.machine() | {"load_after": [0.0]}, "versions": field.versions()}
    found["peers"] = {"distilabel": {"version": "1.5.3", "missing": "no version of torch"}}
    results.write(found, tmp_path / "client")
    told = (tmp_path / "client.md").read_text("utf-8")
    assert json.loads((tmp_path / "client.json").read_text("utf-8")) == found
    assert "| synthmill " in told and "- distilabel 1.5.3: not installed: no version of torch" in told


@pytest.mark.slow
def test_killed_at_half_ours_pays_nothing_twice_and_the_floor_pays_half(_own_environment: None) -> None:
    with stub("--latency", "spread") as url:
        ours, floor = (field.killed(name, url, 50, 10, 60.0, 0) for name in field.OURS)
    assert (ours["paid_twice"], ours["different"], ours["rows"], ours["failed"]) == (0, 50, 50, "")
    assert ours["asked_again"] < 50
    assert (floor["asked_again"], floor["different"]) == (50, 50)
    assert 25 <= floor["paid_twice"] < 50, "more than half, when the kill came late"


@pytest.mark.slow
def test_who_fails_or_hangs_is_told_of_with_the_reason(tmp_path: Path, _own_environment: None) -> None:
    refused = field.once("bare", "http://127.0.0.1:1", 5, 2, tmp_path, 60.0)
    assert "127.0.0.1:1" in refused["failed"] and refused["rows"] == 0
    with stub("--latency", "60") as url:
        started = time.monotonic()
        hung = field.once("bare", url, 5, 2, tmp_path, 1.5)
    assert hung["failed"] == "hung, killed after 2 s" and time.monotonic() - started < 15
    good = {**refused, "failed": "", "seconds": 2.0, "rows": 5}
    middle = field.medians([refused, good, good])
    assert (middle["good"], middle["of"], middle["seconds"], middle["rows"]) == (2, 3, 2.0, 5)
    assert middle["failed"] == refused["failed"]


@pytest.mark.parametrize("peer", venvs.PEERS)
def test_every_peer_has_a_script_that_compiles_and_exact_pins(peer: str) -> None:
    source = (PEERS / f"{peer}.py").read_text("utf-8")
    compile(source, peer, "exec")
    assert "given.clock()" in source and "given.done(" in source
    pins = venvs.requirements(peer)
    assert pins and all(line.count("==") == 1 for line in pins), pins
    assert venvs.version(peer)


def test_a_peer_for_which_no_time_is_left_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venvs, "HERE", tmp_path)
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "datatrove.txt").write_text("datatrove==0.10.1\n")
    with pytest.raises(venvs.NotInstalledError, match="no time was left"):
        venvs.install("datatrove", 0.0)


def test_a_reason_names_nothing_of_this_machine() -> None:
    text = f"Traceback\n  File {ROOT}/x.py\nOSError: cannot read {Path.home()}/.cache/models/a from http://127.0.0.1:8/v1\n"
    assert venvs.reason(text) == "OSError: cannot read a from <address>"
    assert venvs.reason("") == ""


def test_the_cascade_report_compares_the_same_pairs(standin: StandinLog) -> None:
    pairs = [cascade.Pair(domain, verbose, good) for domain, verbose, good, _ in PAIRS[:3]]
    pairs += [cascade.Pair(domain, verbose, bad) for domain, verbose, _, bad in PAIRS[:3]]
    row = cascade.compare(pairs, 0.5, 0.5)
    assert row["same_kept"] and 0 < row["kept"] < row["pairs"] == 6
    assert 0 < row["calls"]["saved"] < 1 and 0 < row["dollars"]["saved"] < 1
    facts = cascade.with_facts(pairs, cascade.judge(pairs, exhaustive=False), 1.01)
    assert (facts["refused"], facts["calls_saved"]) == (6, 1.0), "nobody has more than all facts"


def test_what_the_readme_says_was_measured() -> None:
    found = json.loads((RESULTS / "client.json").read_text("utf-8"))
    assert results.document(found) == (RESULTS / "client.md").read_text("utf-8")
    block = f"{results.BEGIN}\n{results.readme(found)}\n{results.END}"
    assert block in (ROOT / "README.md").read_text("utf-8"), "make bench-client writes it; don't edit it by hand"
