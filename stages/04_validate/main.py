"""04 validate: Pair -> Pair + verdicts of a model panel; only pairs every panel model finds task-equivalent go on.

Every panel model does the domain's tasks twice, from the verbose and from the compressed text (see shared/panel.py).
The cheapest model is asked first, and a pair that cannot pass any more is asked nothing more, unless ``exhaustive``.
Failed pairs go to the rejects with the scores they have. With ``limit`` set, a subset is validated
first and the rest is rejected as ``pending``; raising the limit later pays only for the rest.

Cost: per pair that passes, panel x tasks x 2 answers (the verbose half only once per text) and as many small
embeddings; about half per pair that fails. At claude-haiku-5-5 and gpt-6-luna $0.001 a pair; `make estimate` says it
for your data.

    python stages/04_validate/main.py --in data/trial/compression/03_compress.jsonl \\
        --out data/trial/compression/04_validate.jsonl --config stages/04_validate/trial.toml --track compression
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, TypeAdapter, model_validator

from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.panel import TASKS, Panel, Unjudged, carried
from shared.records import Domain, Pair, Verdicts, content_id
from shared.stage import Settings, Stage, parse_line, run

PROMPTS = ("system", "judge", *TASKS)
ANSWER_SHARE = {"key_points": 0.85, "implications": 0.85, "explain": 1.1, "write": 0.8}
"""Tokens of an answer, JSON included, / tokens of the verbose text: measured on the stand-in, see `make estimate`."""
JUDGEMENT_TOKENS = 40
PASSING = 0.65
"""Share of pairs that pass, for the estimate (as :data:`shared.estimate.KEPT` has it); who fails is asked less."""
FAILED_REACH = (0.7, 0.35)
"""Of the pairs that fail, the share that a later task of the first panel model sees, and the others see."""


class Params(Settings):
    """Settings of 04; see trial.toml for the unit of each."""

    panel: tuple[str, ...] = Field(min_length=1)
    tasks: dict[Domain, tuple[str, ...]]
    embedder: str
    dimensions: int = Field(512, ge=1)
    threshold: float = Field(0.80, ge=0, le=1)
    judge: str = ""
    exhaustive: bool = False
    min_facts: float = Field(0.0, ge=0, le=1)
    limit: int = Field(0, ge=0)
    seed: int = 0
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(1024, ge=64)

    @model_validator(mode="after")
    def _tasks_there_are(self) -> Params:
        for domain in get_args(Domain):
            if not self.tasks.get(domain):
                raise ValueError(f"tasks.{domain}: at least one of {', '.join(TASKS)} is needed")
        if unknown := {task for tasks in self.tasks.values() for task in tasks} - set(TASKS):
            raise ValueError(f"tasks: there is no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
        return self


def subset(path: Path, limit: int, seed: int) -> set[str] | None:
    """Ids of the pairs to validate now: ``limit`` a domain, None for all.

    Stratified by source: each source's pairs are spread evenly over the order, so any first ``limit`` of it has the
    sources' shares. Cost-aware: within a source, pairs come in the order of a sample without replacement with
    weights 1/cost (Efraimidis and Spirakis 2006), so money is spent on many short pairs before few long ones. The
    order depends on the seed and the ids alone: a larger limit only adds.
    """
    if not limit:
        return None
    strata: dict[tuple[Domain, str], list[tuple[float, str]]] = defaultdict(list)
    adapter = TypeAdapter(Pair)
    with open(path, "rb") as lines:
        for line in lines:
            pair: Pair | None = parse_line(line, adapter)[2]
            if pair is not None:
                cost = pair.generation.verbose_tokens + pair.generation.compressed_tokens
                u = (int(content_id(str(seed), pair.id), 16) + 1) / 2**128
                strata[pair.domain, pair.source].append((-math.log(u) * cost, pair.id))
    orders: dict[Domain, list[tuple[float, str]]] = defaultdict(list)
    for (domain, _), rows in strata.items():
        orders[domain] += [((place + 0.5) / len(rows), id_) for place, (_, id_) in enumerate(sorted(rows))]
    return {id_ for order in orders.values() for _, id_ in sorted(order)[:limit]}


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 04 asks for these pairs, from an empty store. Answers from the compressed text are as long as the other's.

    High is that every pair is asked everything; expected is less what failing pairs are spared. With ``limit``, short
    pairs come first: the mean of a small subset is near the harmonic mean of all, see subset().
    """
    here = Path(__file__).parent / "prompts"
    prompt = {name: tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in PROMPTS}
    asked: list[Calls] = []
    for domain, volume in volumes.items():
        pairs = min(volume.records, params.limit or volume.records)
        shorter = volume.evenness + (1 - volume.evenness) * pairs / volume.records
        verbose, compressed = volume.tokens * shorter, volume.compressed * shorter
        for place, task in enumerate(params.tasks[domain]):
            answers = 2 * verbose * ANSWER_SHARE[task]
            schema = tokens_of(str(strict_schema(TASKS[task])))  # providers bill it as input
            questions = 2 * (prompt["system"] + prompt[task] + schema) + verbose + compressed
            for seat, model in enumerate(params.panel):
                reach = 1.0 if params.exhaustive or not (place or seat) else FAILED_REACH[min(seat, 1)]
                share = PASSING + (1 - PASSING) * reach
                n = pairs * share
                high = Calls.high / share
                asked.append(Calls(model, 2 * n, n * questions, n * answers, high=high))
                asked.append(Calls(params.embedder, n, n * answers, high=high))
                if params.judge:
                    judged = n * (prompt["judge"] + answers)
                    asked.append(Calls(params.judge, n, judged, n * JUDGEMENT_TOKENS, high=high))
    return asked


class Scores:
    """Running totals for the report: by domain, by source, by panel model."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[tuple[bool, float, float]]] = defaultdict(list)

    def add(self, pair: Pair, verdicts: Verdicts) -> None:
        ratio = pair.generation.compression_ratio
        for group in (("all", ""), ("domain", pair.domain), ("source", pair.source)):
            self.rows[group].append((verdicts.passed, ratio, verdicts.min_equivalence))
        for verdict in verdicts.panel:
            passed = verdict.equivalence >= verdicts.threshold and verdict.judged is not False
            self.rows["model", verdict.model].append((passed, ratio, verdict.equivalence))

    def summary(self) -> dict[str, Any]:
        """``{"domain code": {"pairs", "pass_rate", "compression_ratio", "mean_equivalence"}}``.

        The last is of the pairs that passed: others may not have been asked everything.
        """
        return {
            f"{kind} {name}".strip(): {
                "pairs": len(rows),
                "pass_rate": round(sum(passed for passed, _, _ in rows) / len(rows), 4),
                "compression_ratio": round(sum(ratio for _, ratio, _ in rows) / len(rows), 4),
                "mean_equivalence": mean([score for passed, _, score in rows if passed]),
            }
            for (kind, name), rows in sorted(self.rows.items())
        }


def mean(scores: list[float]) -> float:
    """Four decimals; 0 for none."""
    return round(sum(scores) / len(scores), 4) if scores else 0.0


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    head = f"  {'':40} {'pairs':>6} {'passed':>7} {'ratio':>6} {'equivalence':>11}"
    lines = [
        f"  {name:40} {row['pairs']:6} {row['pass_rate']:7.1%} {row['compression_ratio']:6.1%}"
        f" {row['mean_equivalence']:11.3f}"
        for name, row in summary.items()
    ]
    return "\n".join([head, *lines])


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    panel = Panel(
        stage.models,
        p.panel,
        p.tasks,
        {name: stage.prompt(f"{name}.txt") for name in PROMPTS},
        embedder=p.embedder,
        dimensions=p.dimensions,
        max_tokens=p.max_tokens,
        threshold=p.threshold,
        judge=p.judge,
        exhaustive=p.exhaustive,
    )
    there = stage.input is not None and stage.input.exists()  # else reading says what is missing
    chosen = subset(stage.input, p.limit, p.seed) if stage.input and there else None

    # -- process
    async def verdicts_on(pair: Pair) -> Verdicts | Unjudged | None:
        if chosen is not None and pair.id not in chosen:
            return None
        share = carried(pair.verbose, pair.compressed, code=pair.domain == "code") if p.min_facts else 1.0
        if share < p.min_facts:
            return Unjudged(reason="facts_lost", detail=f"{share:.0%} of the facts are left, min_facts = {p.min_facts}")
        return await panel.compare(pair.domain, pair.verbose, pair.compressed)

    scores = Scores()
    for pair, verdicts in stage.models.map(verdicts_on, stage.read(Pair), p.concurrency):
        if verdicts is None:
            stage.reject(pair, "pending", f"not among the first {p.limit} a domain; raise limit to validate it")
        elif isinstance(verdicts, Unjudged):
            stage.reject(pair, verdicts.reason, verdicts.detail)
        else:
            scores.add(pair, verdicts)
            judged = pair.with_field(verdicts=verdicts)
            if verdicts.passed:
                stage.keep(judged)
            elif verdicts.min_equivalence >= p.threshold:
                stage.reject(judged, "judge_disagrees", f"{p.judge} calls answers different that score {p.threshold}")
            else:
                lowest = min(verdicts.panel, key=lambda v: v.equivalence)
                most = "at most " if lowest.stopped else ""
                stage.reject(
                    judged, "not_equivalent", f"{lowest.model}: {most}{lowest.equivalence:.3f} of {p.threshold}"
                )

    # -- save
    stage.summary |= scores.summary()
    stage.tables.append(table(stage.summary))


if __name__ == "__main__":
    run(main, Params)
