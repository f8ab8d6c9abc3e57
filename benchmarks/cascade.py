"""What stage 04 saves by stopping early: calls and dollars of the cascade against the exhaustive panel.

    python -m benchmarks.cascade                    # at pass rates of 50, 70 and 90 %; about a minute, no key

The texts are the trial's own (stages 01 and 02 make them). The stand-in compresses them, a share of them badly; that
share is chosen for each pass rate from what the panel says of every text's good and bad compression. What stage 03
rejects (empty, not shorter) is left out. Then the panel of stages/04_validate/trial.toml runs twice, from an empty
store, ``exhaustive`` and not; the two must keep the same pairs with the same scores. Dollars
are at the real providers' prices.

A second table tells what ``min_facts``, the free check before any model, would refuse and save at the middle pass rate.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.client import ROOT
from benchmarks.field import machine
from shared.llm import Models
from shared.panel import Panel, Unjudged, carried
from shared.records import Domain, RawText, Verdicts
from shared.stage import read_records
from shared.standin import start
from shared.standin.rewriting import draw, rewrite

STAGE = ROOT / "stages" / "04_validate"
RATES = (0.5, 0.7, 0.9)
MIN_FACTS = (0.5, 0.7, 0.8, 0.9, 1.0)
CONCURRENCY = 8


class Pair(NamedTuple):
    domain: Domain
    verbose: str
    compressed: str


class Judged(NamedTuple):
    """One run of the panel over some pairs, from an empty store."""

    verdicts: list[Verdicts | Unjudged]
    calls: int
    dollars: float

    def passed(self) -> list[bool]:
        return [isinstance(each, Verdicts) and each.passed for each in self.verdicts]


def texts(place: Path, limit: int) -> list[RawText]:
    """What stages 01 and 02 of the trial make, or the first ``limit``."""
    path = place / "none"
    for stage in ("01_acquire", "02_merge"):
        out = place / "trial" / "compression" / f"{stage}.jsonl"
        flags = ["--out", str(out), "--config", f"stages/{stage}/trial.toml", "--track", "compression"]
        given = ["--in", str(path)] if stage != "01_acquire" else []
        command = [sys.executable, f"stages/{stage}/main.py", *given, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "APIS": "mock", "RUNNER": "native"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        path = out
    found = list(read_records(path, RawText))
    return found[:: max(1, len(found) // limit)][:limit] if limit else found


def pairs_of(found: Sequence[RawText], bad_share: float) -> list[Pair]:
    """The stand-in's compressions that stage 03 would keep."""
    pairs = (Pair(text.domain, text.text, rewrite(text.text, bad_share)) for text in found)
    return [pair for pair in pairs if pair.compressed.strip() and len(pair.compressed) < len(pair.verbose)]


def judge(pairs: Sequence[Pair], exhaustive: bool) -> Judged:
    """The panel of stage 04 on these pairs."""
    settings = tomllib.loads((STAGE / "trial.toml").read_text("utf-8"))
    prompts = {path.stem: path.read_text("utf-8") for path in (STAGE / "prompts").glob("*.txt")}
    names = ("embedder", "dimensions", "max_tokens", "threshold", "judge")
    with (
        tempfile.TemporaryDirectory() as cache,
        Models(Path(cache), "mock", "trial", "04_validate", "compression") as models,
    ):
        chosen = {name: settings[name] for name in names}
        panel = Panel(models, settings["panel"], settings["tasks"], prompts, exhaustive=exhaustive, **chosen)

        async def one(pair: Pair) -> Verdicts | Unjudged:
            return await panel.compare(*pair)

        verdicts = [each for _, each in models.map(one, pairs, CONCURRENCY)]
        spent = models.spending()
    return Judged(verdicts, spent.calls, spent.cost_usd)


def shares(found: Sequence[RawText], rates: Sequence[float]) -> list[float]:
    """The bad share for each pass rate. A text's compression is bad when its draw is below the share."""
    passes: list[dict[str, bool]] = []
    for bad_share in (0.0, 1.0):
        pairs = pairs_of(found, bad_share)
        verdicts = judge(pairs, exhaustive=False).passed()
        passes.append({pair.verbose: passed for pair, passed in zip(pairs, verdicts, strict=True)})
    good, bad = passes

    def rate(share: float) -> float:
        kept = [(bad if draw(text.text, "fate") < share else good).get(text.text) for text in found]
        asked = [passed for passed in kept if passed is not None]
        return sum(asked) / max(1, len(asked))

    steps = [n / 200 for n in range(201)]
    return [min(steps, key=lambda share: (abs(rate(share) - wanted), share)) for wanted in rates]


def compare(pairs: Sequence[Pair], wanted: float, bad_share: float) -> dict[str, Any]:
    """Both panels on the same pairs.

    Raises:
        AssertionError: they do not keep the same pairs with the same scores.
    """
    whole, fewer = judge(pairs, exhaustive=True), judge(pairs, exhaustive=False)
    for one, other in zip(whole.verdicts, fewer.verdicts, strict=True):
        assert isinstance(one, Verdicts) and isinstance(other, Verdicts), (one, other)
        assert one.passed is other.passed, (one, other)
        assert not one.passed or one == other, (one, other)
    kept = sum(whole.passed())
    return {
        "wanted": wanted,
        "bad_share": bad_share,
        "pairs": len(pairs),
        "kept": kept,
        "pass_rate": kept / len(pairs),
        "same_kept": whole.passed() == fewer.passed(),
        "calls": {"exhaustive": whole.calls, "cascade": fewer.calls, "saved": 1 - fewer.calls / whole.calls},
        "dollars": {"exhaustive": whole.dollars, "cascade": fewer.dollars, "saved": 1 - fewer.dollars / whole.dollars},
    }


def with_facts(pairs: Sequence[Pair], base: Judged, least: float) -> dict[str, Any]:
    """What is asked, and which pairs the panel keeps are lost, when pairs with fewer facts left are not asked about."""
    left = [carried(pair.verbose, pair.compressed, code=pair.domain == "code") >= least for pair in pairs]
    fewer = judge([pair for pair, stays in zip(pairs, left, strict=True) if stays], exhaustive=False)
    lost = sum(passed and not stays for passed, stays in zip(base.passed(), left, strict=True))
    return {
        "min_facts": least,
        "refused": left.count(False),
        "kept_lost": lost,
        "calls_saved": 1 - fewer.calls / base.calls,
        "dollars_saved": 1 - fewer.dollars / base.dollars,
    }


# ---------------------------------------------------------------- telling


def document(found: dict[str, Any]) -> str:
    """As benchmarks/results/cascade.md has it."""
    here = found["machine"]
    rows = []
    for row in found["rates"]:
        calls, dollars = row["calls"], row["dollars"]
        rows.append(
            [
                f"{row['pass_rate']:.1%}",
                f"{row['pairs']}",
                f"{row['kept']}",
                "yes" if row["same_kept"] else "NO",
                f"{calls['exhaustive']:,}",
                f"{calls['cascade']:,}",
                f"{calls['saved']:.1%}",
                f"{dollars['exhaustive']:.4f}",
                f"{dollars['cascade']:.4f}",
                f"{dollars['saved']:.1%}",
            ]
        )
    head = ("pass rate", "pairs", "kept", "the same", "calls", "cascade", "saved", "dollars", "cascade", "saved")
    facts = [
        [
            f"{row['min_facts']:.1f}",
            str(row["refused"]),
            str(row["kept_lost"]),
            f"{row['calls_saved']:.1%}",
            f"{row['dollars_saved']:.1%}",
        ]
        for row in found["min_facts"]
    ]
    parts = [
        "# The cascade of stage 04 against the exhaustive panel",
        f"{found['date']}, `{found['command']}`, {here['cores']} cores, Python {here['python']}: {found['texts']} "
        f"texts of the trial, compressed by the stand-in; panel {', '.join(found['panel'])}. Calls include embeddings; "
        "dollars are at the providers' prices. `the same`: both keep the same pairs, with the same scores.",
        results.table(head, rows),
        f"What `min_facts` would add at a pass rate of {found['rates'][len(found['rates']) // 2]['pass_rate']:.0%}, "
        "against the cascade alone:",
        results.table(
            ("min_facts", "refused unasked", "of these the panel keeps", "calls saved", "dollars saved"), facts
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=0, help="how many of the trial's; 0 = all")
    parser.add_argument("--out", default="benchmarks/results/cascade", help="there .json and .md; '' = print only")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, start() as url:
        os.environ |= {"STANDIN_URL": url, "APIS": "mock"}
        given = texts(Path(place), flags.texts)
        chosen = shares(given, RATES)
        rates = [compare(pairs_of(given, share), wanted, share) for wanted, share in zip(RATES, chosen, strict=True)]
        middle = pairs_of(given, chosen[len(RATES) // 2])
        base = judge(middle, exhaustive=False)
        facts = [with_facts(middle, base, least) for least in MIN_FACTS]
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks.cascade" + (f" --texts {flags.texts}" if flags.texts else ""),
        "machine": machine(),
        "texts": len(given),
        "panel": tomllib.loads((STAGE / "trial.toml").read_text("utf-8"))["panel"],
        "rates": rates,
        "min_facts": facts,
    }
    print(document(found))
    if flags.out:
        results.write(found, ROOT / flags.out, document)


if __name__ == "__main__":
    main()
