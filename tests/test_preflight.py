"""`make preflight`: every miss has a line and a mend, nothing hangs, nothing is a traceback."""

from __future__ import annotations

import asyncio
import datetime
import http.server
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from shared import estimate, preflight
from shared.errors import SettingsError
from shared.llm import Store
from shared.llm.catalogue import catalogue
from shared.llm.store import Entry
from shared.llm.types import Answer
from shared.local_models import ADAPTER_FILES
from shared.stage import ROOT
from shared.standin.hub import NOT_ACCEPTED
from shared.standin.wire import BAD_KEY
from tests.conftest import StandinLog

TRACK = "compression"
TODAY = datetime.date.fromisoformat(catalogue().checked)


def command(run: str, data: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as `make` runs it."""
    arguments = [sys.executable, "-m", "shared.preflight", "--run", run, "--data", str(data)]
    return subprocess.run(
        arguments, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    """A loopback server that answers everything with one status and body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def put_spending(data: Path, usd: float, stage: str = "04_validate") -> None:
    store = Store(data / "cache" / "mock.sqlite")
    entry = Entry(
        key=stage, model="openai/gpt-6-luna", run="trial", track=TRACK, stage=stage,
        input=1, output=1, cached=0, nano=round(usd * 1e9),
    )  # fmt: skip
    asyncio.run(store.put(entry, {}, Answer(text="x", stop="stop")))
    store.close()


# ---------------------------------------------------------------- providers


def pointed_at(provider: str, url: str) -> None:
    """What the provider's SDK reads: where it is, and a key."""
    base, key = {
        "anthropic": ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"),
        "openai": ("OPENAI_BASE_URL", "OPENAI_API_KEY"),
        "gemini": ("GOOGLE_GEMINI_BASE_URL", "GEMINI_API_KEY"),
    }[provider]
    os.environ |= {base: url, key: "a-key"}


@pytest.mark.parametrize("provider", ["anthropic", "openai", "gemini"])
def test_a_provider_that_cannot_be_reached_is_a_miss_with_a_line(provider: str) -> None:
    pointed_at(provider, "http://127.0.0.1:1")

    (check,) = preflight.at_once({provider: partial(preflight.provider, provider, "", ["m"])})

    assert (check.name, check.state) == (provider, "MISS")
    assert check.found.startswith("cannot be reached")
    assert "network" in check.mend


@pytest.mark.parametrize(
    ("provider", "status", "body"),
    [
        ("anthropic", 401, '{"type":"error","error":{"type":"authentication_error","message":"invalid key"}}'),
        ("openai", 401, '{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}'),
        ("gemini", 400, '{"error":{"code":400,"message":"API key not valid.","status":"INVALID_ARGUMENT"}}'),
    ],
)
def test_a_refused_key_names_the_variable_to_check(provider: str, status: int, body: str) -> None:
    with server(status, body) as url:
        pointed_at(provider, url)
        (check,) = preflight.at_once({provider: partial(preflight.provider, provider, "", ["m"])})

    assert check.state == "MISS"
    assert check.found.startswith("the key is refused")
    assert check.mend == f"check {provider.upper()}_API_KEY in .env"


def test_a_key_that_is_not_set_is_a_miss_and_nothing_is_asked() -> None:
    (check,) = preflight.at_once({"openai": partial(preflight.provider, "openai", "", ["m"])})

    assert check.state == "MISS"
    assert check.found == "OPENAI_API_KEY is not set"
    assert ".env" in check.mend


def test_a_model_that_is_no_longer_offered_is_a_miss_that_names_what_is_near() -> None:
    listing = (
        '{"object":"list","data":[{"id":"gpt-6.1-luna","object":"model"},{"id":"gpt-6-luna-mini","object":"model"}]}'
    )
    with server(200, listing) as url:
        pointed_at("openai", url)
        first, *rest = preflight.provider("openai", "", ["gpt-6-luna", "gpt-6.1-luna"])

    assert first.state == "ok" and "2 models offered" in first.found
    (missing,) = rest
    assert missing.name == "model openai/gpt-6-luna"
    assert missing.state == "MISS" and "gpt-6.1-luna" in missing.found


def test_a_dated_snapshot_is_the_undated_model() -> None:
    with server(200, '{"object":"list","data":[{"id":"gpt-6-luna-2026-10-16","object":"model"}]}') as url:
        pointed_at("openai", url)
        checks = preflight.provider("openai", "", ["gpt-6-luna"])

    assert [check.state for check in checks] == ["ok"]


def test_an_endpoint_is_asked_at_its_own_url_and_needs_no_key() -> None:
    with server(200, '{"object":"list","data":[{"id":"compress","object":"model"}]}') as url:
        assert [c.state for c in preflight.provider("endpoint", f"{url}/v1", ["compress"])] == ["ok"]
    (check,) = preflight.provider("endpoint", "http://127.0.0.1:1/v1", ["compress"])

    assert check.state == "MISS" and "http://127.0.0.1:1/v1" in check.found


def test_a_provider_that_never_answers_is_given_up_on_in_time_and_holds_up_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pointed_at("openai", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        checks = preflight.at_once(
            {
                "openai": partial(preflight.provider, "openai", "", ["m"]),
                "fine": lambda: [preflight.Check("fine", "ok", "here")],
            },
            limit_s=1.0,
        )
        seconds = time.monotonic() - started

    assert seconds < 20, "the SDK alone waits ten minutes"
    assert [(check.name, check.state) for check in checks] == [("openai", "MISS"), ("fine", "ok")]
    assert checks[0].found == "no answer in 1 s"


# ---------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    ("token", "state", "found"),
    [
        ("", "MISS", "gated, and HF_TOKEN is not set"),
        (BAD_KEY, "MISS", "the token is refused"),
        (NOT_ACCEPTED, "MISS", "terms are not accepted"),
        ("good", "ok", "is let in"),
    ],
)
def test_a_gated_data_set_needs_a_token_whose_owner_was_let_in(
    standin: StandinLog, token: str, state: str, found: str
) -> None:
    os.environ |= {"HF_ENDPOINT": os.environ["STANDIN_URL"], "HF_TOKEN": token}
    _, params = estimate.load_params("01_acquire", "trial", TRACK)
    (gated,) = (s for s in params.sources if getattr(s, "dataset", "") == "bigcode/the-stack-smol")  # type: ignore[attr-defined]

    (check,) = preflight.dataset(gated)

    assert (check.name, check.state) == ("dataset bigcode/the-stack-smol", state)
    assert found in check.found
    assert state == "ok" or "HF_TOKEN" in check.mend
    assert standin.requests()


def test_a_data_set_that_does_not_exist_is_a_miss(standin: StandinLog) -> None:
    os.environ |= {"HF_ENDPOINT": os.environ["STANDIN_URL"], "HF_TOKEN": "good"}
    _, params = estimate.load_params("01_acquire", "trial", TRACK)
    source = next(s for s in params.sources if s.kind == "huggingface")  # type: ignore[attr-defined]
    mistyped = source.model_copy(update={"dataset": "databricks/dolly-15k"})

    (check,) = preflight.dataset(mistyped)

    assert check.state == "MISS" and "not on the Hub" in check.found
    assert standin.requests()


# ---------------------------------------------------------------- this machine


def test_prices_older_than_ninety_days_are_a_warning_and_an_unknown_one_is_a_miss() -> None:
    models = ["openai/gpt-6-luna"]

    assert [c.state for c in preflight.prices(models, TODAY + datetime.timedelta(90))] == ["ok"]
    assert [c.state for c in preflight.prices(models, TODAY + datetime.timedelta(91))] == ["warn"]
    (missing,) = preflight.prices([*models, "openai/gpt-9-nova"], TODAY)
    assert missing.state == "MISS" and "models.toml" in missing.mend


def test_a_run_directory_of_the_other_kind_is_a_miss(tmp_path: Path) -> None:
    assert preflight.ownership(tmp_path / "trial", "live").state == "ok"
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / ".apis").write_text("mock\n")

    assert preflight.ownership(tmp_path / "trial", "mock").state == "ok"
    check = preflight.ownership(tmp_path / "trial", "live")
    assert check.state == "MISS" and "make clean RUN=trial" in check.mend


def test_local_sources_that_are_missing_are_named_and_optional_ones_are_not() -> None:
    module, params = estimate.load_params("01_acquire", "trial", TRACK)
    trial = {source.name: source for source in params.sources}  # type: ignore[attr-defined]
    absent = trial["documents"].model_copy(update={"files": ("data/inputs/absent/*.md",)})
    optional = absent.model_copy(update={"name": "mine", "optional": True})
    package = trial["pydantic"].model_copy(update={"version": "0.0.1"})

    checks = preflight.sources(TRACK, module, params.model_copy(update={"sources": [absent, optional, package]}))

    assert [(check.name, check.state) for check in checks] == [
        ("source documents", "MISS"),
        ("source pydantic", "MISS"),
    ]
    assert all(check.mend for check in checks)


def test_a_generator_without_its_adapter_is_a_miss_and_an_endpoint_needs_none(tmp_path: Path) -> None:
    module, params = estimate.load_params("03_compress", "full", TRACK)
    adapter = params.mlx.model_copy(update={"revision": "a" * 40, "adapter": str(tmp_path)})  # type: ignore[attr-defined]
    local = params.model_copy(update={"generator": "mlx", "tokenizer_revision": "b" * 40, "mlx": adapter})
    endpoint = params.model_copy(update={"generator": "endpoint", "tokenizer_revision": "b" * 40})

    states = {check.name: check.state for check in preflight.generator(module, local)}
    assert states == {"tokenizer": "ok", "mlx.model": "ok", "mlx.adapter": "MISS", "mlx": "ok"}
    for name in ADAPTER_FILES:
        (tmp_path / name).touch()
    assert {check.state for check in preflight.generator(module, local)} == {"ok"}
    assert {check.state for check in preflight.generator(module, endpoint)} == {"ok"}


def test_a_model_that_is_not_pinned_is_a_miss_that_says_how_to_pin_it() -> None:
    module, params = estimate.load_params("03_compress", "full", TRACK)
    mlx = params.mlx.model_copy(update={"model": "org/model", "revision": ""})  # type: ignore[attr-defined]

    checks = preflight.generator(module, params.model_copy(update={"generator": "mlx", "mlx": mlx}))

    (check,) = (check for check in checks if check.name == "mlx.model")
    assert check.state == "MISS" and "set mlx.revision" in check.mend


def test_the_contestants_of_the_evaluation_must_be_here_or_pinned(tmp_path: Path) -> None:
    _, params = estimate.load_params("15_evaluate", "full", TRACK)
    baseline = params.baseline.model_copy(update={"adapter": str(tmp_path)})  # type: ignore[attr-defined]
    own = params.model_copy(update={"baseline": baseline})

    def found(changed: object) -> dict[str, preflight.Check]:
        return {check.name: check for check in preflight.contestants(changed)}

    checks = found(own)
    assert {name: check.state for name, check in checks.items()} == {
        "candidate.model": "ok", "baseline.model": "ok", "baseline.adapter": "MISS",
    }  # fmt: skip
    assert "make bootstrap; or take the table out" in checks["baseline.adapter"].mend
    assert checks["candidate.model"].spec == f"{own.candidate.model}@{own.candidate.revision}"  # type: ignore[attr-defined]
    for name in ADAPTER_FILES:
        (tmp_path / name).touch()
    assert {check.state for check in found(own).values()} == {"ok"}

    pinned = baseline.model_copy(update={"adapter": "org/v1", "adapter_revision": "c" * 40})
    assert found(own.model_copy(update={"baseline": pinned}))["baseline.adapter"].spec == f"org/v1@{'c' * 40}"
    loose = own.candidate.model_copy(update={"revision": ""})  # type: ignore[attr-defined]
    check = found(own.model_copy(update={"candidate": loose}))["candidate.model"]
    assert check.state == "MISS" and "set candidate.revision" in check.mend
    served = found(own.model_copy(update={"written_by": "endpoint"}))
    assert set(served) == {"candidate.served_as", "baseline.served_as", "base.served_as"}
    assert {check.state for check in served.values()} == {"MISS"}
    assert found(own.model_copy(update={"baseline": None})).keys() == {"candidate.model"}


def test_a_model_that_is_not_on_the_hub_is_a_miss_that_says_which_setting_names_it(standin: StandinLog) -> None:
    os.environ |= {"HF_ENDPOINT": os.environ["STANDIN_URL"], "HF_TOKEN": "good"}
    check = partial(preflight.repository, "model", name="model x", where="what mlx.model names in the settings")

    (there,) = check(repo="Qwen/Qwen3-8B", revision="b968826d9c46dd6066d109eabc6255188de91218")
    (missing,) = check(repo="Qwen/Qwen3-8BB", revision="a" * 40)

    assert (there.name, there.state, missing.state) == ("model x", "ok", "MISS")
    assert missing.mend == "correct what mlx.model names in the settings"


def test_where_mlx_cannot_be_installed_the_trial_is_warned_and_a_full_run_misses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("mlx", "mlx.core", "mlx_lm"):
        monkeypatch.setitem(sys.modules, name, None)  # as Python does: importing it fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    writes, how = estimate.load_params("03_compress", "trial", TRACK)
    assert {check.state for check in preflight.generator(writes, how)} == {"ok"}, "the endpoint writes instead"

    trains, params = estimate.load_params("14_train", "trial", TRACK)
    _, measured = estimate.load_params("15_evaluate", "trial", TRACK)
    for state in ("warn", "MISS"):
        checks = preflight.trainer(trains, params, state) + preflight.contestants(measured, state)
        assert [check.name for check in checks if check.state == state] == [
            "training mlx.core", "training mlx_lm", "evaluation mlx.core", "evaluation mlx_lm",
        ]  # fmt: skip


def test_too_little_disk_or_memory_is_a_miss_with_the_figures(tmp_path: Path) -> None:
    assert preflight.disk(tmp_path / "not" / "yet", 1).state == "ok"
    assert preflight.disk(tmp_path, 2**60).state == "MISS"
    assert preflight.memory(1).state == "ok"
    assert "needed" in preflight.memory(2**60).found and preflight.memory(2**60).state == "MISS"


def test_docker_is_needed_only_when_it_was_asked_for(tmp_path: Path) -> None:
    os.environ["PATH"] = str(tmp_path)  # no docker in here

    states = {}
    for runner in ("", "auto", "native", "docker"):
        os.environ["RUNNER"] = runner
        (check,) = preflight.docker()
        states[runner] = check.state
    assert states == {"": "warn", "auto": "warn", "native": "ok", "docker": "MISS"}


def test_the_budget_must_hold_what_is_still_to_be_paid(tmp_path: Path) -> None:
    row = estimate.Row(TRACK, "04_validate", "openai/gpt-6-luna", (1, 2, 3), (1, 2, 3), (1, 2, 3), (0.5, 1.0, 2.0), "x")
    check = partial(preflight.budget, [row], "trial", tmp_path)

    assert check("mock", 1.0).state == "ok"
    small = check("mock", 0.4)
    assert small.state == "MISS" and "BUDGET_USD=2.00 make trial" in small.mend
    assert check("mock", None).state == "ok"
    assert check("live", None).state == "warn"

    put_spending(tmp_path, 0.9)
    assert check("mock", 1.05).state == "ok", "0.15 are left, and about 0.10 are still to be paid"
    assert check("mock", 0.95).state == "MISS"


# ---------------------------------------------------------------- all of it


@pytest.mark.usefixtures("standin")
def test_the_trial_is_ready_without_a_key_or_a_step_by_hand(tmp_path: Path) -> None:
    said = command("trial", tmp_path / "data")

    assert said.returncode == 0, said.stdout + said.stderr
    lines = said.stdout.splitlines()
    assert lines[-1] == "ready"
    for name in (
        "settings",
        "run directory",
        "tokenizer",
        "mlx.model",
        "mlx.adapter",
        "training",
        "baseline.adapter",
        "prices",
        "anthropic",
        "openai",
        "disk",
    ):
        assert any(re.match(rf"  ok +{name}", line) for line in lines), name
    assert any("gated; the token of standin is let in" in line for line in lines)
    assert not (tmp_path / "data").exists(), "a check makes nothing"


@pytest.mark.usefixtures("standin")
def test_a_full_run_that_lacks_things_says_all_of_them_at_once_and_stops_make(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "full").mkdir(parents=True)
    (data / "full" / ".apis").write_text("live\n")

    said = command("full", data, BUDGET_USD="0.0001")

    assert said.returncode == SettingsError.exit_code
    missed = re.findall(r"^  MISS  (\S+(?: \S+)*?)  ", said.stdout, re.MULTILINE)
    assert {"run directory", "mlx.adapter", "baseline.adapter", "budget"} <= set(missed)
    assert re.search(r"^  ok +model mlx-community/Qwen3-8B-4bit +open$", said.stdout, re.MULTILINE)
    assert said.stdout.count("next: ") >= len(missed), "every miss has its mend"
    assert re.search(rf"^{len(missed)} missing; nothing was spent$", said.stdout, re.MULTILINE)


@pytest.mark.usefixtures("standin")
def test_wrong_settings_are_a_miss_and_the_other_checks_still_run(tmp_path: Path) -> None:
    checkout = tmp_path / "copy"
    for name in ("shared", "stages", "models"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".ruff_cache"))
    shutil.copy2(ROOT / "Makefile", checkout / "Makefile")
    settings = checkout / "stages" / "12_choose" / "trial.toml"
    settings.write_text("tpo_k = 5\n" + settings.read_text())
    arguments = [sys.executable, "-m", "shared.preflight", "--run", "trial"]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    said = subprocess.run(arguments, cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert said.returncode == SettingsError.exit_code
    assert re.search(r"MISS +settings 12_choose +.*unknown key 'tpo_k'", said.stdout)
    assert re.search(r"ok +openai +", said.stdout)


def test_without_a_stand_in_that_answers_there_is_no_traceback(tmp_path: Path) -> None:
    said = command("trial", tmp_path / "data", STANDIN_URL="http://127.0.0.1:1")

    assert said.returncode == SettingsError.exit_code
    assert "Traceback" not in said.stdout + said.stderr
    assert re.search(r"MISS +anthropic +cannot be reached", said.stdout)


def test_a_run_that_costs_money_is_not_made_by_the_standin_unawares(
    _own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APIS", "")
    assert preflight.keys("full", "live") == []
    assert [preflight.keys(run, "mock")[0].state for run in ("trial", "full", "bootstrap")] == ["ok", "MISS", "MISS"]
    monkeypatch.setenv("APIS", "mock")
    (check,) = preflight.keys("full", "mock")
    assert check.state == "warn" and "stand-in" in check.found and "env.example" in check.mend
