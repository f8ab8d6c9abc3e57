"""What a run kept, rejected and spent, from the files every stage leaves.

Two sources, which say different things: a report says what the *last* run of a stage did (a stage run again from
stored answers paid nothing), the ledger says what was *ever* paid.

    python -m shared.stats --run trial
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from pydantic import BaseModel, ValidationError

from shared import apis
from shared.errors import SettingsError, SynthmillError, complain
from shared.llm.catalogue import NANO
from shared.llm.journal import set_aside
from shared.llm.models import budget_from_env
from shared.llm.store import Store
from shared.llm.types import Spending
from shared.stage import ROOT, shown

DATA = ROOT / "data"
REASONS = 3
"""Reasons shown of a stage's rejects, the most frequent first."""


class Counts(BaseModel):
    """The account of a stage; ``reasons`` sums to ``rejected``."""

    planned: int
    kept: int
    rejected: int
    reasons: dict[str, int] = {}

    @property
    def keep_rate(self) -> float:
        """Kept / planned, 0 to 1; 1 when nothing was planned."""
        return self.kept / self.planned if self.planned else 1.0


class Report(BaseModel):
    """The fields of ``NN_stage.report.json`` that are read back; see :class:`shared.stage.Stage` for the rest."""

    stage: str
    track: str
    apis: str
    counts: Counts
    spending: Spending | None = None
    seconds: float


def reports(directory: Path) -> list[Report]:
    """The reports of one track directory (``data/<run>/<track>``) in stage order; ``[]`` when there is none.

    Raises:
        SettingsError: a report is not readable as one.
    """
    found = []
    for path in sorted(directory.glob("[0-9][0-9]_*.report.json")):
        try:
            found.append(Report.model_validate(orjson.loads(path.read_bytes())))
        except (orjson.JSONDecodeError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise SettingsError(
                f"{shown(path)} is no report: {first}", f"make stage{int(path.name[:2])}   (writes it again)"
            ) from None
    return found


# ---------------------------------------------------------------- tables


def grid(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows of cells as indented lines; ``align`` has ``<`` or ``>`` for each column."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        (
            "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def dollars(usd: float) -> str:
    """Money for a table: four decimals, because a trial costs cents."""
    return f"{usd:,.4f}"


def models_of(directory: Path) -> Path:
    """``models/<run>/<track>`` of ``data/<run>/<track>``: where 14 and the stages after it report."""
    return directory.parents[2] / "models" / directory.parent.name / directory.name


def track_table(directory: Path, running: str = "") -> str:
    """What the stages of one track directory (``data/<run>/<track>``) did, as lines for a terminal.

    One line a stage: records in, kept, rejected, model calls, answers from the store, dollars, seconds, and the most
    frequent reasons. Then a total, and whether live services or the stand-in answered. Without reports, one line that
    says what to type.

    Args:
        running: the stage that asks, which has not written its report yet; what an earlier run of it left is no news.

    Raises:
        SettingsError: a report is not readable as one.
    """
    data = [report for report in reports(directory) if report.stage != running]
    done = data + reports(models_of(directory))
    run, track = directory.parent.name, directory.name
    if not data:
        return f"{run}/{track}: nothing yet; next: make {track} RUN={run}"
    rows = [("stage", "in", "kept", "rejected", "calls", "cached", "dollars", "seconds", "reasons")]
    for report in done:
        counts, spent = report.counts, report.spending or Spending()
        asked = (f"{spent.calls:,}", f"{spent.cached:,}", dollars(spent.cost_usd)) if report.spending else ("", "", "")
        account = (f"{counts.planned:,}", f"{counts.kept:,}", f"{counts.rejected:,}")
        rows.append((report.stage, *account, *asked, f"{report.seconds:,.1f}", _reasons(counts)))
    spendings = [report.spending for report in done if report.spending]
    rows.append(
        (
            "total",
            f"{done[0].counts.planned:,}",
            f"{data[-1].counts.kept:,}",  # what 14 and the others count are no records
            f"{sum(report.counts.rejected for report in data):,}",
            f"{sum(s.calls for s in spendings):,}",
            f"{sum(s.cached for s in spendings):,}",
            dollars(sum(s.cost_usd for s in spendings)),
            f"{sum(report.seconds for report in done):,.1f}",
            "",
        )
    )
    made = " and ".join(sorted({report.apis for report in done}))
    by = {
        "mock": "made with the stand-in (APIS=mock): the dollars are what real models would have cost",
        "live": "made with live services (APIS=live): the dollars are real",
    }.get(made, f"made with {made}, which should never mix; make clean RUN={run}")
    return "\n".join([f"{run}/{track}", *grid(rows, "<>>>>>>><"), f"  {by}"])


def _reasons(counts: Counts) -> str:
    """``not_equivalent 12, refused 1, 2 more kinds 5``"""
    ranked = sorted(counts.reasons.items(), key=lambda item: (-item[1], item[0]))
    shown_, rest = ranked[:REASONS], ranked[REASONS:]
    parts = [f"{reason} {count:,}" for reason, count in shown_]
    if rest:
        parts.append(f"{len(rest)} more kinds {sum(count for _, count in rest):,}")
    return ", ".join(parts)


# ---------------------------------------------------------------- the ledger

_BY = {
    "stage": "track || ' ' || stage",
    "provider": "substr(model, 1, instr(model, '/') - 1)",
    "model": "model",
    "day (UTC)": "day",
}


def spending_table(store: Store, run: str) -> list[str]:
    """Everything ever paid for a run, by stage, provider, model and day; ``[]`` when nothing was."""
    rows = [("by", "", "calls", "tokens in", "tokens out", "dollars")]
    for name, column in _BY.items():
        totals = store.rows(
            f"SELECT {column} AS name, COUNT(*) AS calls, SUM(input) AS input, SUM(output) AS output, "
            f"SUM(nano) AS nano FROM ledger WHERE run = ? GROUP BY {column} ORDER BY {column}",
            run,
        )
        for place, total in enumerate(totals):
            figures = (f"{total['calls']:,}", f"{total['input']:,}", f"{total['output']:,}")
            rows.append(("" if place else name, total["name"], *figures, dollars(total["nano"] / NANO)))
    return grid(rows, "<<>>>>") if len(rows) > 1 else []


def budget_line(store: Store | None, run: str, budget_usd: float) -> str:
    """What is left of ``BUDGET_USD`` for a run."""
    spent = store.spent_usd(run) if store else 0.0
    left = budget_usd - spent
    return f"BUDGET_USD={budget_usd:g} for RUN={run}: {dollars(spent)} spent, {dollars(max(0.0, left))} left"


def open_store(data: Path, mode: str) -> Store | None:
    """The reply store of ``mock`` or ``live``; None, and nothing made, when there is none yet."""
    path = data / "cache" / f"{mode}.sqlite"
    return Store(path) if path.exists() else None


# ---------------------------------------------------------------- the command


def flags_for(command: str, doc: str, run: str = "trial") -> argparse.ArgumentParser:
    """The flags of ``python -m shared.<command>``, as all commands about a run have them; ``run`` is the default."""
    parser = argparse.ArgumentParser(prog=f"python -m shared.{command}", description=doc.partition("\n")[0])
    parser.add_argument("--run", default=run, help="trial, full or bootstrap")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="where runs and cache lie")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of every track of a run, then its spending. Returns the exit code."""
    flags = flags_for("stats", __doc__).parse_args(arguments)
    try:
        return _print(flags.data, flags.run)
    except SynthmillError as error:
        return complain(error)


def _print(data: Path, run: str) -> int:
    mode, budget = apis.decide(), budget_from_env()
    directory = data / run
    tracks = sorted({path.parent for path in directory.glob("*/[0-9][0-9]_*.report.json")})
    for track in tracks:
        print(f"{track_table(track)}\n")
    if not tracks:
        print(f"{run}: no stage has run yet; next: make {run}\n")
    for kind, title in (("live", "paid"), ("mock", "counted by the stand-in, not paid")):
        store = open_store(data, kind)
        try:
            if store and (lines := spending_table(store, run)):
                print("\n".join([f"{run}: ever {title} (one line a call in {shown(store.path)})", *lines, ""]))
            if store and (nano := set_aside(store, run)):
                print(f"batches of {run} are under way, for up to ${dollars(nano / NANO)}; BATCH=1 picks them up\n")
            if budget is not None and kind == mode:
                print(f"{budget_line(store, run, budget)}\n")
        finally:
            if store:
                store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
