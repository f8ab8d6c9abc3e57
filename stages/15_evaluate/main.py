"""15 evaluate: Example -> how good the adapter of 14 is on the held-out ``test`` split, against others, with intervals.

Every contestant answers the same prompts: the candidate (the adapter of 14), the baseline (an older adapter), the model
without one and, for compression, two rules that need no model, at the candidate's length. Answers are generated
greedily and judged by the panel of 04 (compression) or the judge of 09 (conversations), with their settings. Figures
are means with 95 % bootstrap intervals, and differences to the candidate paired by example. A failed gate is no error
here: the table and the receipt say so, and 16 refuses to release. Written, the receipt last:

    models/<run>/<track>/15_evaluate.answers.jsonl   every answer, with its figures or why it has none
    models/<run>/<track>/15_evaluate.json            the receipt

Source: ``--in`` and, for what the examples were made from, ``12_choose.jsonl`` beside it. Cost: generation is free and
stored; the panel answers 2 members x 2 tasks x 5 contestants a text, about $0.003 a test example.

    python stages/15_evaluate/main.py --in data/trial/compression/13_format.jsonl \\
        --out models/trial/compression/15_evaluate.json --config stages/15_evaluate/trial.toml --track compression
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from compression import CompressionSettings
from contestants import ModelAdapted, ModelAlone, writers, written
from conversation import ConversationSettings
from evaluation import answer_line, contestant_of, receipt_of
from figures import Bounds, differences, gates_of, known
from pydantic import Field
from scoring import Case, Score, Task, Unmeasured
from tables import outcome_tables

from shared.errors import MixedApisError, SettingsError
from shared.generate import Ask, Outcome
from shared.llm.volume import Calls, Volume
from shared.local_models import leave_out_without_mlx
from shared.receipts import TrainReceipt, read_train_receipt
from shared.records import AnyItem, Domain, Example, Item
from shared.stage import Settings, Stage, read_records, run, sha256_of, shown

TRAINED, CHOSEN = "14_train.json", "12_choose.jsonl"


class Params(Settings):
    """See the comments in the TOML."""

    written_by: Literal["mlx", "endpoint"]
    max_tokens: int = Field(default=512, ge=1)
    batch_size: int = Field(default=0, ge=0)
    max_prompt_tokens: int = Field(default=4096, ge=64)
    base_url: str = ""
    concurrency: int = Field(default=8, ge=1)
    resamples: int = Field(default=2000, ge=2000)
    seed: int = 0
    candidate: ModelAlone = ModelAlone()
    baseline: ModelAdapted | None = None
    base: ModelAlone | None = ModelAlone()
    task: CompressionSettings | ConversationSettings = Field(discriminator="kind")
    gates: dict[str, Bounds] = Field(default={})
    targets: dict[str, Bounds] = Field(default={})

    @property
    def models(self) -> int:
        """How many contestants are models."""
        return 1 + (self.baseline is not None) + (self.base is not None)


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 15 asks for these examples *of the test split*, from a store that has the answers of 04; generation on this
    machine asks nobody, a server of one's own is free."""
    return params.task.calls(params.models, volumes)


# ---------------------------------------------------------------- what is measured


def fits(stage: Stage[Params], trained: TrainReceipt) -> None:
    """Stop where data and adapter do not belong together.

    Raises:
        MixedApisError: the stand-in made the adapter and this is live, or the other way round.
        SettingsError: the data changed since training: what is held out now may have been trained on.
    """
    if trained.apis != stage.apis:
        raise MixedApisError(
            f"the adapter {trained.run_id} was made with APIS={trained.apis}; this command has APIS={stage.apis}. "
            "They never mix.",
            f"run with APIS={trained.apis}",
        )
    if stage.input is None or not stage.input.exists():
        return  # reading it will say so
    if (now := sha256_of(stage.input)) != trained.data.sha256:
        raise SettingsError(
            f"{shown(stage.input)} changed since {trained.run_id} was trained: its SHA-256 was "
            f"{trained.data.sha256[:12]}..., it is {now[:12]}...; what is held out now may have been trained on",
            "make stage14   (trains on the data as it is now), then run the same command",
        )


def held_out(stage: Stage[Params]) -> tuple[list[Case], dict[str, int]]:
    """The test examples with the records behind them, and how many examples every split has."""
    examples: list[Example] = []
    splits = {"train": 0, "valid": 0, "test": 0}
    for example in stage.read(Example, seeds=True):
        splits[example.split] += 1
        if example.split == "test":
            stage.plan()
            examples.append(example)
    assert stage.input is not None  # it has just been read
    if not examples:
        read = sum(splits.values())
        raise SettingsError(
            f"there is nothing to measure on: none of {read} examples of {shown(stage.input)} is in the test split",
            "raise LIMIT, make more data, or raise test in stages/13_format/<run>.toml; then train again: make stage14",
        )
    chosen = stage.input.with_name(CHOSEN)
    if not chosen.exists():
        raise SettingsError(f"no {shown(chosen)}: it holds what the examples were made from", f"make {shown(chosen)}")
    wanted = {example.id for example in examples}
    items: dict[str, Item] = {item.id: item for item in read_records(chosen, AnyItem) if item.id in wanted}
    cases = []
    for example in examples:
        if example.id not in items:
            stage.reject(example, "no_origin", f"{shown(chosen)} has no record with its id")
        elif [message.role for message in example.messages[-2:]] != ["user", "assistant"]:
            stage.reject(example, "no_question", "it does not end with the user's turn and the assistant's")
        else:
            cases.append(Case(example, items[example.id]))
    return cases, splits


# ---------------------------------------------------------------- what came of it


def answers(task: Task, cases: Sequence[Case], wrote: Mapping[str, Sequence[Outcome]]) -> dict[str, list[Outcome]]:
    """What each contestant makes of each case, cleaned, or why it is nothing; then the rules, at the candidate's."""
    by_name = {
        name: [task.usable(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)]
        for name, outcomes in wrote.items()
    }
    return by_name | task.rules(cases, by_name["candidate"])


def main(stage: Stage[Params]) -> None:
    # -- load
    started, p = time.monotonic(), stage.params
    if p.written_by == "mlx":
        leave_out_without_mlx("nothing is measured")
    path = stage.output.with_name(TRAINED)
    trained, directory = read_train_receipt(path)
    fits(stage, trained)
    entered = {writer.name: writer for writer in writers(stage, trained, directory)}
    cases, splits = held_out(stage)
    task = p.task.task(stage, cases)
    known([*p.gates, *p.targets], task.metrics, [*list(entered)[1:], *getattr(p.task, "rules", ())])
    faults = [task.fault(case) for case in cases]
    for case, fault in zip(cases, faults, strict=True):
        if fault:
            stage.reject(case.example, fault.reason, fault.detail)
    cases = [case for case, fault in zip(cases, faults, strict=True) if fault is None]

    # -- process
    asks = [Ask(case.example.id, case.example.messages[:-1]) for case in cases]
    made = answers(task, cases, {name: written(stage, writer, asks) for name, writer in entered.items()})

    async def judge(place: int) -> list[Score] | Unmeasured:
        return await task.scores(cases[place], [outcomes[place] for outcomes in made.values()])

    rows: dict[str, list[Score]] = {name: [] for name in made}
    with open(stage.side_file(".answers.jsonl"), "wb") as file:
        for place, scores in stage.models.map(judge, range(len(cases)), task.concurrency):
            if isinstance(scores, Unmeasured):
                stage.reject(cases[place].example, scores.reason, scores.detail)
                continue
            stage.keep(cases[place].example)
            for (name, outcomes), score in zip(made.items(), scores, strict=True):
                rows[name].append(score)
                file.write(answer_line(cases[place], name, outcomes[place], score))
    if not stage.kept:
        return

    # -- save
    contestants = tuple(contestant_of(name, entered.get(name), scores, p) for name, scores in rows.items())
    changes = differences(rows, p.resamples, p.seed)
    gates = gates_of(p.gates, contestants[0].metrics, changes)
    counts = {name: Counter(score.problem for score in scores if score.problem) for name, scores in rows.items()}
    problems = {name: dict(sorted(count.items())) for name, count in counts.items()}
    stage.summary |= {"run_id": trained.run_id, "problems": problems}
    receipt = receipt_of(stage, trained, path, splits, contestants, changes, gates, started)
    stage.write_receipt(receipt.line())
    targets = {name: (bounds.low, bounds.high) for name, bounds in p.targets.items()}
    stage.tables += outcome_tables(contestants, changes, gates, targets, task.metrics, problems)


if __name__ == "__main__":
    run(main, Params, receipt=True)
