"""What a run will ask and cost, stage by stage, before anything is asked: low / expected / high.

Each track is walked along its spine. A stage's volume is measured from its input where that file exists; else it
follows from the nearest file upstream and the share of records each stage in between keeps (as this run's earlier
reports say, else the constants below); else from the limits of the sources. What a stage asks for a volume is its own
function ``calls`` (:mod:`shared.llm.volume`); what that costs is in ``shared/llm/models.toml``.

    python -m shared.estimate --run full
"""

from __future__ import annotations

import importlib.util
import operator
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from shared import apis
from shared.errors import SettingsError, SynthmillError, complain
from shared.llm.batch import batch_from_env, has_batches
from shared.llm.catalogue import NANO, catalogue
from shared.llm.models import budget_from_env
from shared.llm.types import Usage
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Domain, Example, Item, RawText, Record
from shared.stage import ROOT, Settings, load_settings, parse_line, shown
from shared.stats import DATA, budget_line, flags_for, grid, open_store, reports

Span = tuple[float, float, float]
"""Low, expected, high."""
Volumes = dict[Domain, Volume]
Flow = tuple[Volumes, Volumes, Volumes]
"""What reaches a stage: low, expected, high; three times the same where it was measured."""

# What is assumed where nothing can be measured.
FILLED: Span = (0.5, 0.9, 1.0)
"""Share of a source's limit it turns out to hold."""
TEXT_TOKENS: dict[Domain, Span] = {"code": (130, 190, 280), "prose": (80, 130, 220)}
"""Tokens of one text: functions of 5 to 60 lines and 150 to 2,000 characters; passages of 100 to 2,000."""
EVENNESS = 0.65
"""Of such texts: lengths are about log-normal with sigma 0.65, whose harmonic mean / mean is exp(-sigma^2)."""
KEPT: dict[str, Span] = {
    "02_merge": (0.6, 0.85, 1.0),
    "03_compress": (0.75, 0.93, 1.0),
    "04_validate": (0.4, 0.65, 0.9),
    "06_validate_qa": (0.6, 0.85, 1.0),
    "09_judge": (0.5, 0.8, 1.0),
    "11_deduplicate": (0.8, 0.95, 1.0),
}
"""Share of its input a stage keeps; 1 for a stage that is not here."""
KEPT_MARGIN = 0.1
"""A keep rate that this run has measured once is taken to lie within a tenth of that."""
COMPRESSED: Span = (0.40, 0.55, 0.75)
"""Compressed tokens / verbose tokens."""


@dataclass(frozen=True)
class Row:
    """What one stage asks one model. ``basis`` says where the volume comes from."""

    track: str
    stage: str
    model: str
    calls: Span
    input_tokens: Span
    output_tokens: Span
    usd: Span
    basis: str
    base_url: str = ""


# ---------------------------------------------------------------- the spine


def spine(run: str, makefile: Path = ROOT / "Makefile") -> dict[str, list[str]]:
    """The stages of every track of a run in order, ``{"compression": ["01_acquire", ...]}``: what Make has rules for.

    A run has the tracks whose first stage has settings for it: ``bootstrap`` is compression alone. The stages after 13
    are those that ``make <run>`` goes on to.

    Raises:
        SettingsError: no track has.
    """
    text = makefile.read_text("utf-8")
    every = re.search(r"^TRACKS *:= *(.*)$", text, re.MULTILINE)
    tracks: dict[str, list[str]] = {track: [] for track in (every[1].split() if every else [])}
    for name, on in re.findall(r"^\$\(call out,(\d\d_\w+),(.+)\): ", text, re.MULTILINE):
        for track in tracks if on == "$(TRACKS)" else on.split():
            tracks[track].append(name)
    goal = re.search(rf"^{run}: .*models/{run}/(\w+)/(\d\d_\w+)\.json", text, re.MULTILINE)
    if goal:
        trained = re.findall(r"^\$\(call trained,(\d\d_\w+)\): ", text, re.MULTILINE)
        tracks[goal[1]] += [name for name in trained if name <= goal[2]]
    spines = {track: sorted(stages) for track, stages in tracks.items()}
    found = {track: spine for track, spine in spines.items() if (ROOT / "stages" / spine[0] / f"{run}.toml").exists()}
    if not found:
        runs = sorted(path.stem for path in (ROOT / "stages" / "01_acquire").glob("*.toml"))
        raise SettingsError(f"no stage has settings for RUN={run}", f"one of: {', '.join(runs)}")
    return found


def load_stage(name: str) -> ModuleType:
    """A stage's ``main.py`` as a module. Not run: its flags and files do not exist here.

    Raises:
        SettingsError: there is no such stage.
    """
    directory = ROOT / "stages" / name
    spec = importlib.util.spec_from_file_location(f"stage_{name}", directory / "main.py")
    if spec is None or spec.loader is None or not (directory / "main.py").is_file():
        raise SettingsError(f"the Makefile names {name}, but there is no {shown(directory / 'main.py')}", "git status")
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    before = set(sys.modules)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks a model's annotations up there
    sys.path.insert(0, str(directory))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        sys.path.remove(str(directory))
        # Modules beside a main.py have plain names, which another stage may have too.
        for new in set(sys.modules) - before - {spec.name}:
            if str(getattr(sys.modules[new], "__file__", None) or "").startswith(f"{directory}/"):
                del sys.modules[new]
    return module


def load_params(name: str, run: str, track: str) -> tuple[ModuleType, Settings]:
    """A stage's module and its settings for a run.

    Raises:
        SettingsError: the settings are missing or wrong.
    """
    module = load_stage(name)
    config = ROOT / "stages" / name / f"{run}.toml"
    if not config.exists():
        runs = sorted(path.stem for path in config.parent.glob("*.toml"))
        raise SettingsError(
            f"{name} has no settings for RUN={run}, only for {', '.join(runs)}", f"write {shown(config)}"
        )
    return module, load_settings(config, module.Params, track)


# ---------------------------------------------------------------- volumes


def measured(path: Path, limit: int = 0) -> Volumes:
    """The volume of a finished ``.jsonl``. Lines that are no records are left to the stage that will reject them.

    Args:
        limit: lines to read at most; 0 = all.

    Raises:
        SettingsError: the file was written by another schema version.
    """
    kinds = [kind for kind in _subclasses(Record) if "kind" in kind.model_fields]
    union: Any = Annotated[reduce(operator.or_, kinds), Field(discriminator="kind")]
    adapter: TypeAdapter[Any] = TypeAdapter(union)
    sizes: dict[Domain, list[tuple[float, float]]] = defaultdict(list)
    with open(path, "rb") as lines:
        for line in islice(lines, limit or None):
            record = parse_line(line, adapter)[2]
            if record is not None:
                sizes[record.domain].append((tokens_of(_text(record)), tokens_of(_compressed(record))))
    return {domain: _volume(rows) for domain, rows in sorted(sizes.items())}


def _volume(sizes: list[tuple[float, float]]) -> Volume:
    count = len(sizes)
    mean = sum(size for size, _ in sizes) / count
    harmonic = count / sum(1 / max(size, 0.25) for size, _ in sizes)
    return Volume(count, mean, sum(short for _, short in sizes) / count, min(1.0, harmonic / mean) if mean else 1.0)


def _subclasses(kind: type[Record]) -> list[type[Record]]:
    return [deep for direct in kind.__subclasses__() for deep in (direct, *_subclasses(direct))]


def _text(record: Any) -> str:
    """The text of a record that its stage asks about."""
    if isinstance(record, RawText):
        return record.merged.text if record.merged else record.text
    if isinstance(record, Item):
        return record.content()
    if isinstance(record, Example):
        return "\n".join(message.content for message in record.messages if message.role == "user")
    return "\n".join(value for name, value in record if name in ("chunk", "question", "answer"))


def _compressed(record: Any) -> str:
    if isinstance(record, Example):
        return "\n".join(message.content for message in record.messages if message.role == "assistant")
    return getattr(record, "compressed", "")


def held_out(flow: Flow, share: float) -> Flow:
    """The part of the examples that is measured on."""
    return _flow(
        {domain: replace(volume, records=volume.records * share) for domain, volume in each.items()} for each in flow
    )


def offered(params: Settings) -> Flow:
    """What the ``[[sources]]`` of a first stage may bring: their limits, and texts of the usual length."""
    limits: dict[Domain, int] = defaultdict(int)
    for source in getattr(params, "sources", ()):
        limits[source.domain] += source.limit
    return _flow(
        {
            domain: Volume(limit * FILLED[k], TEXT_TOKENS[domain][k], evenness=EVENNESS)
            for domain, limit in sorted(limits.items())
        }
        for k in range(3)
    )


def passed_on(name: str, module: ModuleType, params: Settings, flow: Flow, kept: Span) -> Flow:
    """What a stage that has not run yet will hand to the next: what it makes of its input, less what it rejects."""
    if hasattr(module, "yields"):
        flow = _flow(module.yields(params, _present(volumes)) for volumes in flow)
    most = getattr(params, "limit", 0) or float("inf")  # 04 lets so many records of a domain through
    return _flow(
        {
            domain: Volume(
                min(volume.records, most) * kept[k],
                volume.tokens,
                volume.compressed or (volume.tokens * COMPRESSED[k] if name == "03_compress" else 0.0),
                volume.evenness,
            )
            for domain, volume in volumes.items()
        }
        for k, volumes in enumerate(flow)
    )


def _present(volumes: Volumes) -> Volumes:
    return {domain: volume for domain, volume in volumes.items() if volume.records > 0}


def _flow(volumes: Iterable[Volumes]) -> Flow:
    low, expected, high = volumes
    return low, expected, high


def keep_rates(directory: Path) -> dict[str, Span]:
    """The share of records every stage keeps: as this run's reports say, else as assumed."""
    rates = dict(KEPT)
    for report in reports(directory):
        decided = report.counts.planned - report.counts.reasons.get("pending", 0)
        if report.counts.kept and decided > 0:  # a stage that kept nothing is going to be mended first
            rate = report.counts.kept / decided
            rates[report.stage] = (rate * (1 - KEPT_MARGIN), rate, min(1.0, rate * (1 + KEPT_MARGIN)))
    return rates


# ---------------------------------------------------------------- the estimate


def estimate(run: str, data: Path = DATA) -> list[Row]:
    """What every stage of a run asks every model, in the order of the spine. Reads files only.

    Raises:
        SettingsError: settings are missing or wrong, or a file was written by another schema version.
        BudgetError: a model's price is unknown.
    """
    return [row for track, stages in spine(run).items() for row in _track(run, track, stages, data / run / track)]


def _track(run: str, track: str, stages: list[str], directory: Path) -> list[Row]:
    rows: list[Row] = []
    rates = keep_rates(directory)
    flow: Flow = ({}, {}, {})
    basis, before = "", ""
    for name in stages:
        module, params = load_params(name, run, track)
        source = directory / f"{before}.jsonl"
        if before and source.exists():
            volumes = measured(source)
            flow, basis = (volumes, volumes, volumes), shown(source)
        elif not before:
            flow, basis = offered(params), f"stages/{name}/{run}.toml"
        if name == "15_evaluate":
            flow = held_out(flow, getattr(load_params("13_format", run, track)[1], "test", 1.0))
        if hasattr(module, "calls"):
            rows += _rows(track, name, module, params, flow, basis)
        if name >= "14":  # these write no records: what they read is 13's
            continue
        # What the sources offer is what 01 hands on already; for the others the shares kept come in between.
        kept = (1.0, 1.0, 1.0) if hasattr(params, "sources") else rates.get(name, (1.0, 1.0, 1.0))
        flow = passed_on(name, module, params, flow, kept)
        basis, before = f"from {basis.removeprefix('from ')}", name
    return rows


def _rows(track: str, name: str, module: ModuleType, params: Settings, flow: Flow, basis: str) -> list[Row]:
    sums: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[0.0] * 3 for _ in range(3)])
    for k, volumes in enumerate(flow):
        asked: list[Calls] = module.calls(params, _present(volumes))
        for call in asked:
            factor = (call.low, 1.0, call.high)[k]
            total = sums[call.model, call.base_url]
            total[0][k] += call.calls
            total[1][k] += call.input_tokens * factor
            total[2][k] += call.output_tokens * factor
    return [
        Row(track, name, model, _span(calls), _span(inputs), _span(outputs), _usd(model, inputs, outputs), basis, url)
        for (model, url), (calls, inputs, outputs) in sums.items()
        if any(calls)
    ]


def announcement(module: Any, name: str, params: Settings, source: Path | None, limit: int = 0) -> str:
    """One line on what a stage that is about to ask will ask and cost; ``""`` when its module has no ``calls``."""
    if not hasattr(module, "calls"):
        return ""
    volumes = measured(source, limit) if source and source.exists() else {}
    rows = _rows("", name, module, params, (volumes, volumes, volumes), "")
    low, expected, high = total_usd(rows)
    calls = sum(row.calls[1] for row in rows)
    return f"{name}  about {_count(calls)} calls, ${expected:,.4f} (${low:,.4f} to ${high:,.4f}), less what is stored"


def unforeseen(run: str) -> list[str]:
    """Stages that ask models and do not say how much: what they will cost is not in the estimate."""
    found = []
    for track, stages in spine(run).items():
        for name in stages:
            module, _ = load_params(name, run, track)
            if not hasattr(module, "calls") and "stage.models" in Path(str(module.__file__)).read_text("utf-8"):
                found.append(name)
    return sorted(set(found))


def _span(values: list[float]) -> Span:
    low, expected, high = values
    return low, expected, high


def _usd(model: str, inputs: list[float], outputs: list[float]) -> Span:
    price, batch = catalogue().card(model).price(), batch_from_env() and has_batches(model)
    nano = [price.nano(Usage(input=round(i), output=round(o)), batch) for i, o in zip(inputs, outputs, strict=True)]
    return _span([n / NANO for n in nano])


def total_usd(rows: list[Row]) -> Span:
    """Dollars of all rows together."""
    return _span([sum(row.usd[k] for row in rows) for k in range(3)])


def still_to_pay(rows: list[Row], run: str, data: Path, mode: str) -> float:
    """Expected dollars less what this run has paid at each stage already: those answers are stored, and free."""
    store = open_store(data, mode)
    paid: dict[tuple[str, str], float] = {}
    if store:
        query = "SELECT track, stage, SUM(nano) AS nano FROM ledger WHERE run = ? GROUP BY track, stage"
        paid = {(row["track"], row["stage"]): row["nano"] / NANO for row in store.rows(query, run)}
        store.close()
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        expected[row.track, row.stage] += row.usd[1]
    return sum(max(0.0, usd - paid.get(stage, 0.0)) for stage, usd in expected.items())


# ---------------------------------------------------------------- the command


def table(rows: list[Row]) -> list[str]:
    """The estimate for a terminal; a figure that is not low / expected / high was counted, not guessed."""
    cells: list[tuple[str, ...]] = [
        ("track", "stage", "model", "calls", "tokens in", "tokens out", "dollars", "volume")
    ]
    for row in rows:
        numbers = [_three(span, _count) for span in (row.calls, row.input_tokens, row.output_tokens)]
        cells.append((row.track, row.stage, row.model, *numbers, _three(row.usd, _money), row.basis))
    spans = [_span([sum(getattr(row, name)[k] for row in rows) for k in range(3)]) for name in _COUNTS]
    cells.append(("total", "", "", *(_three(span, _count) for span in spans), _three(total_usd(rows), _money), ""))
    return grid(cells, "<<<>>>><")


_COUNTS = ("calls", "input_tokens", "output_tokens")


def _three(span: Span, form: Any) -> str:
    parts = [form(value) for value in span]
    return parts[0] if len(set(parts)) == 1 else " / ".join(parts)


def _count(value: float) -> str:
    """``734``, ``12.3k``, ``1.20M``"""
    if value < 9_999.5:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.1f}k" if value < 999_950 else f"{value / 1e6:,.2f}M"


def _money(usd: float) -> str:
    return f"{usd:,.4f}" if usd < 1 else f"{usd:,.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate of a run. Returns the exit code."""
    flags = flags_for("estimate", __doc__).parse_args(arguments)
    try:
        return _print(flags.data, flags.run)
    except SynthmillError as error:
        return complain(error)


def _print(data: Path, run: str) -> int:
    mode, budget = apis.decide(), budget_from_env()
    rows = estimate(run, data)
    print(f"RUN={run}, low / expected / high, at the prices of {catalogue().checked}; nothing was asked or spent\n")
    print("\n".join(table(rows)))
    if batch_from_env():
        print("\nBATCH=1: hosted models at half price, but for what a batch leaves unanswered; each round within a day")
    if silent := unforeseen(run):
        print(f"\nnot estimated, because these stages do not say what they ask (no calls()): {', '.join(silent)}")
    store = open_store(data, mode)
    try:
        spent = store.spent_usd(run) if store else 0.0
        if spent:
            print(
                f"\n${spent:,.4f} are spent already; those answers are stored and free, and not subtracted above: "
                f"about ${still_to_pay(rows, run, data, mode):,.4f} would be new"
            )
        if budget is not None:
            print(f"\n{budget_line(store, run, budget)}")
    finally:
        if store:
            store.close()
    if mode == "mock":
        print("\nAPIS=mock: the stand-in counts tokens and costs nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
