"""Everything a run needs, checked before anything is spent: settings, inputs, keys, models, machine, budget.

One line a check: ``ok``, ``warn`` (the run would start, but look) or ``MISS`` (it would fail later), with the mend.
Nothing is asked that costs money: providers are asked for their list of models, the Hub who we are.

    python -m shared.preflight --run full        # exit 0: nothing is missing; 2: something is
"""

from __future__ import annotations

import asyncio
import datetime
import difflib
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from shared import apis
from shared.errors import SettingsError, SynthmillError, complain
from shared.estimate import Row, estimate, load_params, measured, offered, spine, still_to_pay, total_usd, unforeseen
from shared.llm.catalogue import NANO, catalogue
from shared.llm.models import budget_from_env
from shared.llm.providers import KEY_NAMES, PROVIDERS, OpenAI, check_key
from shared.llm.types import Usage
from shared.llm.volume import Volume, tokens_of
from shared.local_models import local_adapter, on_hub, pinned, pinned_model
from shared.records import Domain, Example
from shared.stage import ROOT, read_records, shown
from shared.stats import DATA, flags_for, open_store

NETWORK_S = 10.0
"""For all network checks together, because they run at the same time."""
SDKS = {"anthropic": "anthropic", "openai": "openai", "endpoint": "openai", "gemini": "google.genai"}
"""What is imported to ask a provider."""
PRICES_DAYS = 90
"""Older prices get a warning: vendors changed theirs four times in the half year the table covers."""
TRAIN, EVALUATE = "14_train", "15_evaluate"
GIB = 2**30
MLX = ("mlx.core", "mlx_lm")
BYTES_PER_RECORD = 100_000
"""Eight stage files and their rejects (40 kB), a vector (4 kB), 8 answers and their embeddings, stored (50 kB)."""
DOWNLOADS_BYTES = 3 * GIB
"""Shallow clones of the production sources (about 0.5 GiB) and the Hub's cache of the files rows are read from."""
RANK_KNOWN = 32
"""The lowest limit on an adapter's rank known of any model at Tinker; a model's own is told only when it is made."""
TURN_TOKENS = 5
"""The chat template's own, for each message."""
MODEL_BYTES = 5 * GIB
"""A 4B model at 8 bits, as it is downloaded and as it lies in memory; its cache and the system want as much again."""

State = Literal["ok", "warn", "MISS"]
Stages = dict[tuple[str, str], tuple[ModuleType, Any]]
"""Module and settings by track and stage."""


@dataclass(frozen=True)
class Check:
    """One line of the table; ``spec`` is what it found pinned on the Hub, ``org/name@<commit>``."""

    name: str
    state: State
    found: str
    mend: str = ""
    spec: str = ""


def missed(name: str, error: SynthmillError) -> Check:
    """A check that failed with an error that already says what to do."""
    return Check(name, "MISS", " ".join(error.what.split()), error.mend)


# ---------------------------------------------------------------- on this machine


def settings(run: str) -> tuple[Stages, list[Check]]:
    """The settings of every stage of every track; a miss for each that does not load."""
    loaded: Stages = {}
    checks: list[Check] = []
    for track, stages in spine(run).items():
        for name in stages:
            try:
                loaded[track, name] = load_params(name, run, track)
            except SynthmillError as error:
                if (check := missed(f"settings {name}", error)) not in checks:  # once, not once a track
                    checks.append(check)
    return loaded, checks or [Check("settings", "ok", f"{len({name for _, name in loaded})} stages, {run}.toml each")]


def keys(run: str, mode: str) -> list[Check]:
    """Whether the keys are used at all; a run that is to be real must not be made by the stand-in unawares."""
    if mode == "live":
        return []
    asked = os.environ.get("APIS", "").strip()
    why = "APIS=mock" if asked else "APIS is not set and there is no .env"
    state: State = "ok" if run == "trial" else "warn" if asked else "MISS"
    mend = "cp env.example .env, and fill it in; to rehearse with the stand-in: APIS=mock"
    return [Check("keys", state, f"none is used: {why}, and every service below is the stand-in", mend)]


def ownership(directory: Path, mode: str) -> Check:
    """Whether the run directory is free, or of the same kind."""
    mark = directory / ".apis"
    owner = mark.read_text("utf-8").strip() if mark.exists() else ""
    if owner and owner != mode:
        found = f"{shown(directory)} holds outputs of APIS={owner}; this is APIS={mode}; they never mix"
        return Check("run directory", "MISS", found, f"make clean RUN={directory.name}, or run with APIS={owner}")
    return Check("run directory", "ok", f"{shown(directory)}, {f'of APIS={mode}' if owner else 'not there yet'}")


def sources(track: str, module: ModuleType, params: Any) -> list[Check]:
    """Whether the sources that need no network can be read; the readers of 01 check all they can before they read."""
    checks = []
    for source in getattr(params, "sources", ()):
        local = source.kind in ("package", "documents", "claude_export") or getattr(source, "url", "") == "."
        if not local:
            continue
        acquire = module.Acquire(limits=params.code, seed=params.seed, cache=DATA / "cache", services=lambda: None)
        try:
            module.READERS[source.kind](source, acquire).close()
        except SynthmillError as error:
            checks.append(missed(f"source {source.name}", error))
    count = len(getattr(params, "sources", ()))
    return checks or ([Check(f"sources {track}", "ok", f"{count} listed, all local ones readable")] if count else [])


def generator(module: ModuleType, params: Any) -> list[Check]:
    """Whether 03 can write: tokenizer, and for ``mlx`` the model, the adapter and MLX itself."""
    params = module.where_there_is_no_mlx(params)
    table = module.table_of(params)
    checks = [there(pinned, "tokenizer", params.tokenizer, params.tokenizer_revision, "tokenizer_revision")]
    if params.generator != "mlx":
        return [*checks, Check("generator", "ok", f"{params.generator}: {table.model}; no adapter is needed")]
    checks.append(there(pinned_model, "mlx.model", table.model, table.revision, "mlx.revision"))
    checks.append(adapter("mlx", table, "make bootstrap"))
    return [*checks, *importable("mlx", MLX, 'make setup; or generator = "endpoint" in 03\'s settings')]


def there(find: Callable[[str, str, str, str], str], key: str, place: str, revision: str, revision_key: str) -> Check:
    """Whether a model or tokenizer is on this machine or pinned to a commit, as the stage demands that uses it."""
    try:
        spec = find(key, place, revision, revision_key)
    except SynthmillError as error:
        return missed(key, error)
    return Check(key, "ok", spec, spec=spec if on_hub(spec) else "")


def adapter(key: str, table: Any, without: str) -> Check:
    """The same for the adapter of a table of the settings; ``without`` is what to do where there is none yet."""
    name = f"{key}.adapter"
    if table.adapter_revision or not table.adapter:
        spec = f"{table.adapter}@{table.adapter_revision}" if table.adapter else ""
        return Check(name, "ok", spec or "none", spec=spec)
    mend = f"{without}; or train one and put it there; or set {key}.adapter_revision when it is on the Hub"
    try:
        return Check(name, "ok", local_adapter(table.adapter, mend))
    except SynthmillError as error:
        return missed(name, error)


def importable(name: str, modules: Sequence[str], mend: str, otherwise: State = "MISS") -> list[Check]:
    """Whether modules can be imported: a line for each that cannot, one line where all can."""
    checks = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            checks.append(Check(f"{name} {module}", otherwise, str(error), mend))
    return checks or [Check(name, "ok", "importable")]


def disk(data: Path, need: int) -> Check:
    """Whether the disk that holds ``data`` has room for the run."""
    place = next(path for path in (data.absolute(), *data.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free, about {need / GIB:.1f} GiB needed"
    return Check("disk", "ok", found) if free >= need else Check("disk", "MISS", found, f"free some space at {place}")


def memory(need: int) -> Check:
    """Whether the machine has the memory of the run's largest stage."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{there / GIB:.1f} GiB, about {need / GIB:.1f} GiB needed"
    mend = "a larger machine; or generator = \"endpoint\" in 03's settings, and lower limits in 01's"
    return Check("memory", "ok", found) if there >= need else Check("memory", "MISS", found, mend)


def needs(run: str, data: Path, loaded: Stages) -> tuple[int, int]:
    """Bytes of disk and of memory that a run may need, from its first stages' volumes and settings."""
    records, downloads, weights = 0.0, 0, 0
    for (track, name), (_, params) in loaded.items():
        first = data / run / track / f"{name}.jsonl"
        if hasattr(params, "sources"):
            there = measured(first) if first.exists() else offered(params)[2]
            records += sum(volume.records for volume in there.values())
            remote = any(s.kind == "huggingface" or "://" in getattr(s, "url", "") for s in params.sources)
            downloads = max(downloads, 0 if first.exists() or not remote else DOWNLOADS_BYTES)
        if getattr(params, "generator", "") == "mlx" and getattr(params.mlx, "revision", ""):
            weights = MODEL_BYTES
    return round(GIB / 4 + records * BYTES_PER_RECORD + downloads + weights), (2 * MODEL_BYTES if weights else 2 * GIB)


def prices(models: Sequence[str], today: datetime.date) -> list[Check]:
    """Whether every model has a price, and how old the table is."""
    checks = []
    for model in models:
        try:
            catalogue().card(model)
        except SynthmillError as error:
            checks.append(missed(f"price {model}", error))
    age = (today - datetime.date.fromisoformat(catalogue().checked)).days
    found = f"{len(models)} models; the table was checked on {catalogue().checked}, {age} days ago"
    if age > PRICES_DAYS:
        mend = "compare shared/llm/models.toml with the vendors' pages, correct it, and set its `checked` date"
        return [*checks, Check("prices", "warn", found, mend)]
    return checks or [Check("prices", "ok", found)]


def budget(rows: list[Row], run: str, data: Path, mode: str, cap: float | None) -> Check:
    """Whether what is expected fits into what is left of ``BUDGET_USD``."""
    low, expected, high = total_usd(rows)
    new = still_to_pay(rows, run, data, mode)
    said = f"expected ${expected:,.4f} ({low:,.4f} to {high:,.4f}), about ${new:,.4f} of it not yet paid"
    if cap is None:
        unbounded = f"no cap (BUDGET_USD is not set); {said}"
        mend = f"BUDGET_USD={max(1, round(high + 0.5))} make {run}"
        return Check("budget", "warn", unbounded, mend) if mode == "live" and high else Check("budget", "ok", unbounded)
    store = open_store(data, mode)
    spent = store.spent_usd(run) if store else 0.0
    if store:
        store.close()
    found = f"BUDGET_USD={cap:g}, ${max(0.0, cap - spent):,.4f} left; {said}"
    if new > cap - spent:
        return Check(
            "budget", "MISS", found, f"BUDGET_USD={spent + high:.2f} make {run}, or lower limits in the settings"
        )
    return Check("budget", "ok", found)


# ---------------------------------------------------------------- training and evaluation


def beyond(run: str, loaded: Stages, stage: str) -> tuple[Stages, list[Check]]:
    """The settings of 14 or 15 for every track, also where the run's spine ends before; a miss where they do not load.

    Of a run that has none for the stage, as bootstrap has none for 15, nothing is found.
    """
    found: Stages = {}
    checks: list[Check] = []
    for track in dict.fromkeys(track for track, _ in loaded):
        if (track, stage) not in loaded and not (ROOT / "stages" / stage / f"{run}.toml").exists():
            continue
        try:
            found[track, stage] = loaded.get((track, stage)) or load_params(stage, run, track)
        except SynthmillError as error:
            if (check := missed(f"settings {stage}", error)) not in checks:
                checks.append(check)
    return found, checks


def trainer(module: ModuleType, params: Any, without_mlx: State = "MISS") -> list[Check]:
    """Whether 14 can train: what its backend checks of its settings, and what it needs on this machine.

    ``without_mlx``: what it is that MLX is not installed.
    """
    try:
        backend = module.backend_of(params, lambda: None)
    except SynthmillError as error:
        return [missed("training", error)]
    model = backend.model
    checks = [Check("training", "ok", f"{params.backend}: {model}", spec=model if on_hub(model) else "")]
    needed: tuple[str, ...] = MLX
    if params.backend == "tinker":
        rank = params.tinker.rank
        if rank > RANK_KNOWN:
            found = f"{rank}; above {RANK_KNOWN} a model may refuse, which is known only when training begins"
            checks.append(
                Check("tinker.rank", "warn", found, f"rank = {RANK_KNOWN} in [tinker]; nothing is paid before")
            )
        needed, without_mlx = ("tinker", "transformers", "jinja2"), "MISS"
    lines = importable("training", needed, "make setup", without_mlx)
    return [*checks, *(check for check in lines if check.state != "ok")]


def contestants(params: Any, without_mlx: State = "MISS") -> list[Check]:
    """Whether 15 can have its contestants answer, but for the adapter that 14 is still to train."""
    tables = {name: getattr(params, name) for name in ("candidate", "baseline", "base") if getattr(params, name)}
    if params.written_by == "endpoint":
        mend = "set it to the name the server will know that model and adapter by"
        empty = [name for name, table in tables.items() if not table.served_as]
        return [Check(f"{name}.served_as", "MISS", "empty, and written_by = 'endpoint'", mend) for name in empty]
    checks = []
    for name, table in tables.items():
        if table.model:  # else it is the candidate's, and that is the one 14 trains
            checks.append(there(pinned_model, f"{name}.model", table.model, table.revision, f"{name}.revision"))
    if "baseline" in tables:
        checks.append(adapter("baseline", params.baseline, "make bootstrap; or take the table out of the settings"))
    mend = 'make setup; or written_by = "endpoint" in 15\'s settings'
    lines = importable("evaluation", MLX, mend, without_mlx)
    return [*checks, *(check for check in lines if check.state != "ok")]


def service(module: ModuleType, params: Any) -> list[Check]:
    """Whether Tinker takes our key and still trains the model, on sequences as long as ours."""
    return [Check("tinker", "ok", f"key accepted, {module.backend_of(params, lambda: None).check()}")]


def training_cost(track: str, params: Any, examples: Path, run: str, data: Path, mode: str) -> list[Check]:
    """What training on the examples that are there will cost, against what is left of ``BUDGET_USD``.

    14 counts again with the model's own tokenizer before its first step; this is bytes / 4.
    """
    name = f"training {track}"
    if not examples.exists():
        return [Check(name, "ok", f"{shown(examples)} is not made yet; 14 shows the cost before its first step")]
    records = list(read_records(examples, Example))
    tokens = sum(tokens_of(m.content) + TURN_TOKENS for one in records for m in one.messages)
    calls = params.tinker.calls(len(records), tokens)
    usd = sum(catalogue().card(c.model).price().nano(Usage(input=round(c.input_tokens))) for c in calls) / NANO
    found, cap = f"about ${usd:,.4f} for {len(records):,} examples", budget_from_env()
    if cap is None:
        return [Check(name, "ok", found)]
    store = open_store(data, mode)
    left = max(0.0, cap - (store.spent_usd(run) if store else 0.0))
    if store:
        store.close()
    found = f"{found}; ${left:,.4f} of BUDGET_USD={cap:g} are left"
    mend = f"BUDGET_USD={cap - left + usd * 1.2:.2f} make {run}, or fewer epochs"
    return [Check(name, "ok" if usd <= left else "MISS", found, mend if usd > left else "")]


# ---------------------------------------------------------------- over the network


def at_once(checks: dict[str, Callable[[], list[Check]]], limit_s: float = NETWORK_S) -> list[Check]:
    """Run checks at the same time, each in a thread; one that has not answered after ``limit_s`` seconds is a miss."""
    answers: dict[str, list[Check]] = {}

    def answer(name: str, check: Callable[[], list[Check]]) -> None:
        try:
            answers[name] = check()
        except SynthmillError as error:
            answers[name] = [missed(name, error)]
        except Exception as error:  # an SDK's own: whatever it is, it is this check's miss, not a traceback
            answers[name] = [Check(name, "MISS", _first_line(error), "check the network, then run the same command")]

    # Daemons: a hanging connection must not keep the process.
    threads = [threading.Thread(target=answer, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    until = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    silent = f"no answer in {limit_s:g} s"
    mend = "check the network and the provider's status page, then run the same command"
    done = dict(answers)
    return [line for name in checks for line in done.get(name, [Check(name, "MISS", silent, mend)])]


def provider(name: str, base_url: str, models: Sequence[str]) -> list[Check]:
    """Whether a provider accepts our key and still offers the models (``provider/name`` without the provider)."""
    client = PROVIDERS[name]()
    check_key(client)
    key = KEY_NAMES.get(name, "ENDPOINT_API_KEY")
    try:
        offered_ = asyncio.run(_listed(client, base_url))
    except Exception as error:
        status = next((s for s in (getattr(error, a, None) for a in ("status_code", "code")) if isinstance(s, int)), 0)
        if status in (401, 403) or "API key" in str(error):
            return [Check(name, "MISS", f"the key is refused: {_first_line(error)}", f"check {key} in .env")]
        found = f"answered {status}" if status else f"cannot be reached{f' at {base_url}' if base_url else ''}"
        return [Check(name, "MISS", f"{found}: {_first_line(error)}", "check the network, then run the same command")]
    checks = [
        Check(name, "ok", f"{'reached' if name == 'endpoint' else 'key accepted'}, {len(offered_)} models offered")
    ]
    for model in models:
        # A vendor lists dated snapshots; an undated name is the newest of them.
        if not any(re.fullmatch(rf"{re.escape(model)}(-\d[\d-]*)?", one) for one in offered_):
            near = difflib.get_close_matches(model, sorted(offered_), n=3, cutoff=0.3)
            found = "not offered" + (f"; near: {', '.join(near)}" if near else "")
            checks.append(Check(f"model {name}/{model}", "MISS", found, "choose another model in the settings"))
    return checks


async def _listed(client: Any, base_url: str) -> set[str]:
    try:
        if isinstance(client, OpenAI):
            return {model.id async for model in client.client(base_url).models.list()}
        listed: set[str] = await client.models()
        return listed
    finally:
        await client.close()


def dataset(source: Any) -> list[Check]:
    """Whether a data set of 01 is on the Hub and open to us."""
    where = "dataset and revision in the settings of 01"
    return repository("dataset", source.dataset, source.revision, f"dataset {source.dataset}", where)


def repository(kind: Literal["model", "dataset"], repo: str, revision: str, name: str, where: str) -> list[Check]:
    """Whether a repository of the Hub is there and, when it is gated, whether our token opens one of its files.

    Args:
        name: of the check; ``where`` are the settings that name the repository, for the mend.
    """
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    token, endpoint = get_token(), os.environ.get("HF_ENDPOINT") or None
    hub = HfApi(endpoint=endpoint, token=token)
    accept = f"log in to the Hub, accept the terms on the page of {repo}, put HF_TOKEN=... into .env"
    try:
        info = hub.repo_info(repo, repo_type=kind, revision=revision, timeout=NETWORK_S)
        if not info.gated:
            return [Check(name, "ok", "open")]
        if not token:
            return [Check(name, "MISS", "gated, and HF_TOKEN is not set", accept)]
        user, files = hub.whoami()["name"], getattr(info, "siblings", None) or ()
        # Everybody may see a gated repository's list of files, and its card; a data file tells whether we are let in.
        file = next(f.rfilename for f in files if not f.rfilename.startswith((".", "README")))
        url = hf_hub_url(repo, file, repo_type=kind, revision=revision, endpoint=endpoint)
        hub.get_hf_file_metadata(url=url, timeout=NETWORK_S)
        return [Check(name, "ok", f"gated; the token of {user} is let in")]
    except GatedRepoError:
        return [Check(name, "MISS", "gated, and its terms are not accepted by the owner of HF_TOKEN", accept)]
    except RepositoryNotFoundError:
        return [Check(name, "MISS", "not on the Hub, or private", f"correct {where}")]
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            return [Check(name, "MISS", f"the token is refused: {_first_line(error)}", "check HF_TOKEN in .env")]
        return [Check(name, "MISS", f"the Hub answered {status}: {_first_line(error)}", f"check {where}")]


def docker() -> list[Check]:
    """Whether a Docker engine answers; without one, ``RUNNER=auto`` runs natively."""
    runner = os.environ.get("RUNNER", "").strip() or "auto"
    if runner == "native":
        return [Check("docker", "ok", "not needed: RUNNER=native")]
    try:
        command = ["docker", "version", "--format", "{{.Server.Version}}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NETWORK_S - 1, check=False)
        found = answer.stdout.strip() or _line(answer.stderr)
        if answer.returncode == 0:
            return [Check("docker", "ok", f"engine {found}")]
    except (OSError, subprocess.TimeoutExpired) as error:
        found = "not installed" if isinstance(error, FileNotFoundError) else _first_line(error)
    if runner == "docker":
        return [Check("docker", "MISS", f"RUNNER=docker, but no engine answers: {found}", "start it, or RUNNER=native")]
    return [
        Check("docker", "warn", f"no engine answers ({found}); stages run natively", "start Docker to isolate them")
    ]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(str(error))}"


def _line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:200]


# ---------------------------------------------------------------- all of it


def preflight(run: str, data: Path, mode: str, today: datetime.date) -> list[Check]:
    """Every check of a run; with the stand-in running already when ``mode`` is mock (:func:`shared.apis.connect`)."""
    loaded, checks = settings(run)
    whole = all(check.state == "ok" for check in checks)
    checks += [*keys(run, mode), ownership(data / run, mode)]
    network: dict[str, Callable[[], list[Check]]] = {}
    asked: dict[tuple[str, str], set[str]] = {}
    one: dict[Domain, Volume] = {"code": Volume(1, 100, 50), "prose": Volume(1, 100, 50)}
    for (track, name), (module, params) in loaded.items():
        if hasattr(params, "sources") and not (data / run / track / f"{name}.jsonl").exists():
            checks += sources(track, module, params)
            for source in params.sources:
                if source.kind == "huggingface":
                    network[f"dataset {source.dataset}"] = partial(dataset, source)
        if hasattr(params, "generator"):
            checks += generator(module, params)
        try:
            calls = module.calls(params, one) if hasattr(module, "calls") else ()
        except SynthmillError as error:  # an input that is missing is a line of the table, not its end
            checks.append(missed(f"input {name}", error))
            continue
        for call in calls:
            asked.setdefault((call.model.partition("/")[0], call.base_url), set()).add(call.model)
    trained, more = beyond(run, loaded, TRAIN)
    evaluated, still = beyond(run, loaded, EVALUATE)
    checks += [check for check in (*more, *still) if check not in checks]
    without_mlx: State = "warn" if run == "trial" else "MISS"  # `make trial` goes on without it
    for (track, _), (module, params) in trained.items():
        checks += [
            check for check in trainer(module, params, without_mlx) if check not in checks
        ]  # once, not once a track
        if params.backend == "tinker" and params.tinker:
            network["tinker"] = partial(service, module, params)
            for call in module.calls(params, one):
                asked.setdefault(("tinker", ""), set()).add(call.model)
            try:
                checks += training_cost(track, params, data / run / track / "13_format.jsonl", run, data, mode)
            except SynthmillError as error:
                checks.append(missed(f"training {track}", error))
    for _, params in evaluated.values():
        checks += [check for check in contestants(params, without_mlx) if check not in checks]
    for check in checks:
        if check.spec:
            repo, _, revision = check.spec.partition("@")
            where = f"what {check.name} names in the settings"
            network[check.spec] = partial(repository, "model", repo, revision, f"model {repo}", where)
    if whole and (silent := unforeseen(run)):
        found = f"{', '.join(silent)} ask models that are not checked here and not in the estimate"
        checks.append(Check("models", "warn", found, "give each a calls() function in its main.py"))
    checks += prices(sorted(set().union(*asked.values())), today)
    for (name, url), models in asked.items():
        names = sorted(model.partition("/")[2] for model in models)
        if name in PROVIDERS:
            network[f"{name} {url}".strip()] = partial(provider, name, url, names)
    for sdk in sorted({SDKS[name] for name, _ in asked if name in SDKS}):
        with suppress(ImportError):  # its own check says so
            importlib.import_module(sdk)  # seconds on a busy machine, which the network is not to answer for
    checks += at_once(network | {"docker": docker})
    need_disk, need_memory = needs(run, data, loaded)
    checks += [disk(data, need_disk), memory(need_memory)]
    if whole:
        try:
            checks.append(budget(estimate(run, data), run, data, mode, budget_from_env()))
        except SynthmillError as error:
            checks.append(missed("budget", error))
    else:
        checks.append(Check("budget", "warn", "not estimated", "mend the settings first"))
    return checks


def table(checks: list[Check]) -> list[str]:
    """The checks for a terminal, the mend below each that needs one."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"  {check.state:4}  {check.name:{width}}  {check.found}")
        if check.mend and check.state != "ok":
            lines += [f"  {'':4}  {'':{width}}  next: {line}" for line in check.mend.splitlines()]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Returns 0 when nothing is missing, else the exit code of settings that are wrong."""
    flags = flags_for("preflight", __doc__, run="full").parse_args(arguments)
    try:
        with ExitStack() as stack:
            mode = apis.decide()
            apis.connect(mode, stack)
            checks = preflight(flags.run, flags.data, mode, datetime.datetime.now(datetime.UTC).date())
    except SynthmillError as error:
        return complain(error)
    misses = sum(check.state == "MISS" for check in checks)
    print(f"preflight of RUN={flags.run}, APIS={mode}")
    print("\n".join(table(checks)))
    print(f"{misses} missing; nothing was spent" if misses else "ready")
    return SettingsError.exit_code if misses else 0


if __name__ == "__main__":
    sys.exit(main())
