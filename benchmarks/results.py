"""Measured figures as tables: for the terminal, for benchmarks/results/*.md, and for the README.

python -m benchmarks.results        # client.md and the README anew from client.json, after a change here
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_OURS = ("heavy", "memory", "variants")
TITLES = {"synthmill": "synthmill", "bare": "bare aiohttp (the floor)"}
BEGIN, END = "<!-- make bench-client writes this -->", "<!-- end of what make bench-client writes -->"
CALLS = 2000
"""Of `fast`, when the bars hold."""
BARS = (
    ("fast", "seconds", 4.4, "{calls:,} calls, {concurrency} at a time, 100 ms each: seconds"),
    ("fast", "process_mib", 60.0, "the same: MiB of the process that does the work"),
    ("fast", "tree_mib", 60.0, "the same: MiB of all its processes"),
    ("capped_10", "seconds", 5.5, "{calls} calls at {rate} a second, {concurrency} at a time: seconds"),
    ("capped_10", "span_s", 5.5, "the same: first question to last answer at the server, s"),
    ("capped_10", "refused", 8, "the same: wasted calls"),
    ("capped_10", "lost", 0, "the same: rows lost"),
    ("capped_50", "seconds", 5.5, "{calls} calls at {rate} a second, {concurrency} at a time: seconds"),
    ("capped_50", "span_s", 5.5, "the same: first question to last answer at the server, s"),
    ("capped_50", "refused", 8, "the same: wasted calls"),
    ("capped_50", "lost", 0, "the same: rows lost"),
    ("killed", "paid_twice", 0, "killed at {killed_at} of {calls} and run again: calls paid twice"),
    ("killed", "lost", 0, "the same: rows missing"),
)
"""Scenario, figure, our bar (at most), what it is."""


def title(name: str, found: Row) -> str:
    """``synthmill``, or ``datatrove 0.10.1, defaults``."""
    peer, comma, variant = name.partition(", ")
    known = found["peers"].get(peer)
    return TITLES.get(peer) or f"{peer} {known['version']}{comma}{variant}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, first column left, the others right, padded so that it also reads in a terminal."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]

    def one(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([one(lines[0]), rule, *map(one, lines[1:])])


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


# ---------------------------------------------------------------- one table a scenario


def of_peers(scenario: Row, found: Row, head: Sequence[str], cells: Callable[[Row], Sequence[str]]) -> str:
    """One line for everybody, and below the reasons of those that failed and of those that are missing."""
    rows, notes = [], []
    for name, measured in scenario["found"].items():
        middle = measured["medians"]
        rows.append([title(name, found), *cells(middle)])
        if middle["failed"]:
            which = f"{middle['of'] - middle['good']} of {middle['of']} runs failed: {middle['failed']}"
            notes.append(f"- {title(name, found)}: {which}")
    for peer, known in found["peers"].items():
        if known["missing"]:
            rows.append([title(peer, found), *["–"] * (len(head) - 1)])
            notes.append(f"- {title(peer, found)}: not installed: {known['missing']}")
    return "\n\n".join([table(head, rows), *(["\n".join(notes)] if notes else [])])


def fast(found: Row) -> str:
    scenario = found["fast"]

    def cells(middle: Row) -> Sequence[str]:
        seconds = None if middle["failed"] and not middle["good"] else middle["seconds"]
        return [
            number(seconds, 2),
            number(seconds and seconds / scenario["ideal_s"], 2),
            number(middle["process_mib"]),
            number(middle["tree_mib"]),
            number(middle["processes"]),
            number(middle["cpu_s"], 1),
            number(middle["asked"]),
            number(middle["different"]),
        ]

    head = ("", "seconds", "x ideal", "MiB, process", "MiB, tree", "processes", "CPU s", "requests", "rows")
    return of_peers(scenario, found, head, cells)


def capped(found: Row, name: str) -> str:
    scenario = found[name]

    def cells(middle: Row) -> Sequence[str]:
        seconds, span = (middle["seconds"], middle["span_s"]) if middle["good"] else (None, None)
        return [
            number(seconds, 2),
            number(span, 2),
            number(middle["refused"]),
            number(middle["asked"]),
            number(middle["different"]),
        ]

    head = ("", "seconds", "at the server, s", "wasted (429)", "requests", f"rows of {scenario['calls']}")
    return of_peers(scenario, found, head, cells)


def killed(found: Row) -> str:
    scenario = found["killed"]

    def cells(middle: Row) -> Sequence[str]:
        names = ("answered_before", "asked_again", "paid_twice", "rows", "different")
        return [number(middle[name]) for name in names]

    head = ("", "answered before", "asked by the second run", "paid twice", "rows delivered", "different")
    return of_peers(scenario, found, head, cells)


def heavy(found: Row) -> str:
    measured, rows = found["heavy"], []
    for what in ("synthmill", "bare"):
        middle = measured["medians"][{"synthmill": "ours"}.get(what, what)]
        share = measured["ideal_s"] / middle["seconds"]
        runs = measured["runs"][{"synthmill": "ours"}.get(what, what)]
        each = " ".join(f"{row['latency_s'] / measured['concurrency'] / row['seconds']:.3f}" for row in runs)
        rows.append([TITLES[what], number(middle["seconds"], 2), number(share, 3), number(middle["mib"]), each])
    return table(("", "seconds", "share of Little's bound", "MiB", "share, each run"), rows)


def memory(found: Row) -> str:
    rows = [
        [f"{int(calls):,}", number(row["seconds"], 1), number(int(calls) / row["seconds"]), number(row["mib"], 1)]
        for calls, row in found["memory"]["flat"].items()
    ]
    return table(("calls", "seconds", "calls/s", "peak MiB"), rows)


def variants(found: Row) -> str:
    rows = []
    for name, measured in found["variants"]["providers"].items():
        middle = measured["medians"]["ours"]
        what = f"{measured['calls']:,} calls as in `fast`, {name}'s SDK"
        rows.append([what, number(middle["seconds"], 2), number(middle["mib"]), "–", "–"])
    middle = found["variants"]["two_processes"]["medians"]
    what = "100 calls at 20 a second, from two processes at once"
    rows.append([what, number(middle["seconds"], 2), "–", number(middle["wasted"]), number(middle["lost"])])
    return table(("ours", "seconds", "MiB", "wasted (429)", "rows lost"), rows)


# ---------------------------------------------------------------- who is ahead


def lead(found: Row) -> str:
    """Every bar: ours, the bar, the best peer, and whether ours is ahead of all of them."""
    rows = []
    for name, figure, bar, what in BARS:
        if name not in found:
            continue
        scenario, measured = found[name], found[name]["found"]
        ours = measured["synthmill"]["medians"][figure]
        # Not the floor, and nobody who failed: who delivers nothing wastes nothing.
        others = {
            peer: row["medians"][figure]
            for peer, row in measured.items()
            if peer not in TITLES and row["medians"]["good"] and (figure == "lost" or not row["medians"]["lost"])
        }
        best = min(others, key=lambda peer: float(others[peer])) if others else ""
        digits = 2 if figure in ("seconds", "span_s") else 0
        said = f"{number(others[best], digits)} ({title(best, found)})" if best else "–"
        ahead = "–" if not best else "yes" if ours < others[best] else "level" if ours == others[best] else "NO"
        met = "yes" if ours is not None and ours <= bar else "NO"
        rows.append([what.format(**scenario), number(ours, digits), number(bar, digits), met, said, ahead])
    return table(("", "ours", "bar", "met", "best peer that loses no row", "ahead"), rows)


# ---------------------------------------------------------------- the documents


def again(before: Row, found: Row) -> Row:
    """An earlier measurement in which what was measured anew takes the place of what it was."""
    anew = {name: row for name, row in found.items() if (isinstance(row, dict) and "found" in row) or name in _OURS}
    line = f"{', '.join(anew)}: {found['date']}, load average {found['machine']['load_before'][0]} before."
    return before | anew | {"again": [*before.get("again", []), line]}


def document(found: Row) -> str:
    """All of it, as benchmarks/results/client.md has it."""
    here, parts = found["machine"], ["# The client and its peers, measured"]
    kinds = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts.append(
        f"{found['date']}, `{found['command']}`: {found['repeats']} repeats, interleaved; medians. "
        f"{here['processor']}, {here['cores']} cores, {here['memory_gib']} GiB, {here['system']}, Python "
        f"{here['python']}; load average {here['load_before'][0]} before and {here['load_after'][0]} after. "
        f"Client and stub share the cores. Ours with {kinds}; the peers' dependencies as of {found['newest'][:10]}. "
        "What each column means: `python -m benchmarks.field --help`."
    )
    if found.get("again"):
        parts.append("Measured anew since: " + " ".join(found["again"]))
    if found["calls"] == CALLS and any(name in found for name, *_ in BARS):
        parts += ["## Against the bars and the best peer", lead(found)]
    if "fast" in found:
        s = found["fast"]
        head = f"## {s['calls']:,} calls, {s['concurrency']} at a time, 100 ms each: ideal {s['ideal_s']:.2f} s"
        parts += [head, fast(found)]
    for name in ("capped_10", "capped_50"):
        if name in found:
            s = found[name]
            head = f"## {s['calls']} calls, {s['concurrency']} at a time, where {s['rate']} a second are let through: "
            parts += [f"{head}ideal {s['ideal_s']:.2f} s", capped(found, name)]
    if "killed" in found:
        s = found["killed"]
        text = (
            f"{s['concurrency']} at a time, 50 to 150 ms each. A peer that can be told how often to save is told every "
            f"{s['save_every']} rows, and is measured at its defaults too. Paid twice counts answers that had been "
            "delivered 50 ms before the kill. What was under way then has to be asked again by everybody."
        )
        parts += [f"## SIGKILL at {s['killed_at']} of {s['calls']}, then run again", text, killed(found)]
    if "heavy" in found:
        s = found["heavy"]
        head = f"## Heavy-tailed latency: {s['calls']:,} calls, {s['concurrency']} at a time"
        parts += [f"{head}: ideal {s['ideal_s']:.2f} s", heavy(found)]
    if "memory" in found:
        parts += ["## Memory, as calls grow", memory(found)]
    if "variants" in found:
        parts += ["## Other SDKs, two processes", variants(found)]
    if found["peers"]:
        rows = [
            [peer, known["version"], *(number(known.get(name)) for name in ("packages", "mb")), known["missing"]]
            for peer, known in found["peers"].items()
        ]
        parts += ["## What was installed", table(("", "version", "packages", "MB", "not installed because"), rows)]
    return "\n\n".join(parts) + "\n"


def write(found: Row, base: Path, told: Callable[[Row], str] = document) -> None:
    """``base``.json and ``base``.md."""
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    base.with_suffix(".md").write_text(told(found), "utf-8")


def readme(found: Row) -> str:
    """The short table of the README."""
    quick, tight, again = found["fast"]["found"], found["capped_10"]["found"], found["killed"]["found"]
    rows = []
    for name, measured in quick.items():
        speed, limit, kill = measured["medians"], tight[name]["medians"], again[name]["medians"]
        seconds = number(speed["seconds"], 2) if speed["good"] else "failed"
        figures = [seconds, number(speed["process_mib"])]
        figures += [number(limit["seconds"], 2), number(limit["refused"])] if limit["good"] else ["failed", "–"]
        figures += [number(kill["paid_twice"]) if kill["good"] else "–", number(kill["rows"])]
        rows.append([title(name, found), *figures])
    missing = [f"{peer}: {known['missing']}" for peer, known in found["peers"].items() if known["missing"]]
    head = ("", "seconds", "MiB", "at 20/s: seconds", "wasted", "killed: paid twice", "rows of 100")
    share = found["heavy"]["ideal_s"] / found["heavy"]["medians"]["ours"]["seconds"]
    floor = found["heavy"]["ideal_s"] / found["heavy"]["medians"]["bare"]["seconds"]
    flat = found["memory"]["flat"]
    grown = ", ".join(f"{number(row['mib'])} MiB at {int(calls):,}" for calls, row in flat.items())
    two = found["variants"]["two_processes"]["medians"]
    sdks = "; ".join(
        f"{name}'s SDK: {row['medians']['ours']['seconds']:.2f} s, {number(row['medians']['ours']['mib'])} MiB"
        for name, row in found["variants"]["providers"].items()
    )
    text = [
        f"Measured by `make bench-client` on {found['date'][:10]}, {found['machine']['cores']} cores shared with the "
        f"server, medians of {found['repeats']}; whole tables, machine and versions in "
        "[benchmarks/results/client.md](benchmarks/results/client.md).",
        table(head, rows),
        "2,000 calls, 50 at a time, 100 ms each (ideal 4.00 s), and memory of the process that works; 100 calls at a "
        "server that lets 20 a second through (ideal 5.0 s); killed at 50 of 100 calls and run again.",
        f"- Heavy-tailed latency, 64 at a time: {share:.3f} of Little's bound (bare aiohttp {floor:.3f}).\n"
        f"- Memory: {grown} calls.\n"
        f"- Two processes at one limit of 20 a second: {two['seconds']:.2f} s, {number(two['wasted'])} wasted, "
        f"{number(two['lost'])} lost. {sdks[0].upper()}{sdks[1:]}.",
    ]
    if missing:
        text.append("Not installed: " + "; ".join(missing) + ".")
    return "\n\n".join(text)


def into_readme(path: Path, found: Row) -> None:
    """Put the short table where the README has the last one; a README without that place stays as it is."""
    text = path.read_text("utf-8")
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
    block = f"{BEGIN}\n{readme(found)}\n{END}"
    path.write_text(place.sub(lambda _: block, text, count=1), "utf-8")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    base = root / "benchmarks" / "results" / "client"
    found = json.loads(base.with_suffix(".json").read_text("utf-8"))
    write(found, base)
    into_readme(root / "README.md", found)


if __name__ == "__main__":
    main()
