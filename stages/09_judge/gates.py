"""Go or no go: is this set of conversations fit to train on? A table, and an exit code where the settings say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from pydantic import Field
from rubric import Tally

from shared.errors import SettingsError
from shared.stage import Settings, shown

if TYPE_CHECKING:
    from shared.stage import Stage


class Gates(Settings):
    """The gates; see full.toml for the unit of each. ``enforce`` false: the table is printed, the exit code is 0."""

    enforce: bool
    per_provider: int = Field(100, ge=0)
    per_pattern: float = Field(20, ge=0)
    most_over_least: float = Field(2.0, ge=1)
    least_exchanges: int = 3
    most_exchanges: int = 5
    parsed: float = Field(1.0, ge=0, le=1)
    shown: float = Field(0.90, ge=0, le=1)
    usable: int = Field(80, ge=0)


def go_no_go(stage: Stage[Any], gates: Gates, tally: Tally) -> None:
    """Put the table into the report and on the screen; stop the stage when a gate fails and is enforced."""
    rows = measured(stage, gates, tally)
    failed = [row for row in rows if not row["go"]]
    stage.summary["gates"] = rows
    lines = [
        f"  {'go' if r['go'] else 'NO GO':6} {r['gate']:44} wanted {r['wanted']:>12}  got {r['got']}" for r in rows
    ]
    stage.tables.append("\n".join(lines))
    if failed and gates.enforce:
        stage.no_go = "; ".join(f"{r['gate']}: wanted {r['wanted']}, got {r['got']}" for r in failed)


def measured(stage: Stage[Any], gates: Gates, tally: Tally) -> list[dict[str, Any]]:
    """One row a gate: what was wanted, what was got, whether it is a go."""
    generated = generation_counts(stage)
    least = min(tally.patterns.values(), default=0)
    most = max(tally.patterns.values(), default=0)
    share = 100 * least / max(1, tally.judged)
    fewest = min(tally.by_provider.values(), default=0)
    parsed = 1 - generated["unparsed"] / max(1, generated["planned"])
    shown_share = tally.shown / max(1, tally.judged)
    off = sum(
        n for exchanges, n in tally.exchanges.items() if not gates.least_exchanges <= exchanges <= gates.most_exchanges
    )
    return [
        _row("examples per provider, the fewest", f">= {gates.per_provider}", fewest, fewest >= gates.per_provider),
        _row(
            "rarest pattern per 100 examples", f">= {gates.per_pattern:g}", round(share, 1), share >= gates.per_pattern
        ),
        _row(
            "most frequent pattern / least frequent",
            f"<= {gates.most_over_least:g}",
            round(most / max(1, least), 2),
            0 < most <= gates.most_over_least * least,
        ),
        _row(f"outside {gates.least_exchanges} to {gates.most_exchanges} exchanges", "0", off, off == 0),
        _row("answers that parse", f">= {gates.parsed:.0%}", f"{parsed:.1%}", parsed >= gates.parsed),
        _row(
            "conversations that show their patterns",
            f">= {gates.shown:.0%}",
            f"{shown_share:.1%}",
            shown_share >= gates.shown,
        ),
        _row("usable examples", f">= {gates.usable}", tally.passed, tally.passed >= gates.usable),
    ]


def _row(gate: str, wanted: str, got: Any, go: bool) -> dict[str, Any]:
    return {"gate": gate, "wanted": wanted, "got": got, "go": go}


def generation_counts(stage: Stage[Any]) -> dict[str, int]:
    """How many examples the stage before planned, and how many never parsed, from its report."""
    assert stage.input is not None
    report = stage.input.with_suffix(".report.json")
    if not report.exists():
        raise SettingsError(f"no report at {shown(report)}; the gates need it", f"make {shown(stage.input)}")
    counts = orjson.loads(report.read_bytes())["counts"]
    unparsed = sum(counts["reasons"].get(reason, 0) for reason in ("invalid_json", "truncated", "empty"))
    return {"planned": counts["planned"], "unparsed": unparsed}
