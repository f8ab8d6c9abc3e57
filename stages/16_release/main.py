"""16 release: an adapter (14) that was measured (15), and its data (13) -> two repositories for the Hub, and a receipt.

Laid out beside the receipt, the whole directory replaced at once; the same inputs give the same bytes:

    models/<run>/<track>/release/model/     README.md, the adapter for PEFT, mlx/ for mlx-lm, example.json, loss.svg
    models/<run>/<track>/release/dataset/   README.md, ATTRIBUTION.md, data/<split>.parquet
    models/<run>/<track>/16_release.json    what is there, and all that stands against a push

With ``PUSH=1 HF_REPO=org/name`` (and ``HF_TOKEN``) both are uploaded, into private repositories where there are none
yet, downloaded again and compared; the data set to ``org/name-data``. The same bytes again make no commit. Refused,
with the list of all reasons: a changed input, a secret (nothing is laid out); a failed gate, a licence that is not
allowed, a lineage that does not fit together (nothing is pushed); anything made by a stand-in (not pushed to a real
Hub). Costs nothing; network only with ``PUSH=1``.

    python stages/16_release/main.py --in data/trial/compression/13_format.jsonl \\
        --out models/trial/compression/16_release.json --config stages/16_release/trial.toml --track compression
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from card_dataset import front_of
from card_parts import Facts
from hub_push import Wish, barred, push, refusal, target, wish
from lineage import Link, lineage, of_receipt
from pydantic import Field
from reasons import after, before
from staging import RELEASE, lay_out, repositories, told

from shared.errors import SettingsError
from shared.llm.catalogue import NANO
from shared.local_models import leave_out_without_mlx
from shared.receipts import (
    Counts,
    EvaluateReceipt,
    Reason,
    ReleaseReceipt,
    TrainReceipt,
    closing,
    read_evaluate_receipt,
    read_train_receipt,
)
from shared.records import Example
from shared.stage import Settings, Stage, run, sha256_of
from shared.stats import open_store
from shared.text import ScrubRules

TRAINED, EVALUATED = "14_train.json", "15_evaluate.json"
MEND = "mend them, then run the same command"


class Params(Settings):
    """See the comments in the TOML."""

    repo: str = ""
    dataset_repo: str = ""
    title: str
    description: str
    licence: str
    base_licence: str
    allow: tuple[str, ...]
    max_tokens: int = Field(default=256, ge=1)
    limitations: tuple[str, ...] = ()
    notes: dict[str, str] = Field(default={})
    scrub: ScrubRules = ScrubRules(email="reject", phone="reject")


# ---------------------------------------------------------------- what is released


def receipts(stage: Stage[Params]) -> tuple[TrainReceipt | None, EvaluateReceipt | None, list[Reason]]:
    """What 14 made and what 15 measured, and why there is none."""
    trained = evaluation = None
    missing: list[Reason] = []
    try:
        trained, _ = read_train_receipt(stage.output.with_name(TRAINED))
    except SettingsError as error:
        missing.append(Reason(code="not_trained", blocks="staging", text=f"{error.what}: {error.mend}"))
    try:
        evaluation = read_evaluate_receipt(stage.output.with_name(EVALUATED))
    except SettingsError as error:
        missing.append(Reason(code="not_evaluated", blocks="staging", text=f"{error.what}: {error.mend}"))
    return trained, evaluation, missing


def costs(stage: Stage[Params]) -> list[tuple[str, str, int, float]]:
    """(stage, model, calls, dollars) of all that was ever paid for this run and track."""
    store = open_store(stage.cache.parent, stage.apis)
    if store is None:
        return []
    query = (
        "SELECT stage, model, COUNT(*) AS calls, SUM(nano) AS nano FROM ledger WHERE run = ? AND track = ? "
        "GROUP BY stage, model ORDER BY stage, model"
    )
    try:
        rows = store.rows(query, stage.run, stage.track)
    finally:
        store.close()
    return [(row["stage"], row["model"], row["calls"], row["nano"] / NANO) for row in rows]


def facts_of(
    stage: Stage[Params],
    asked: Wish,
    examples: Sequence[Example],
    train: TrainReceipt,
    evaluation: EvaluateReceipt,
    links: Sequence[Link],
) -> Facts:
    """All that the cards say."""
    p = stage.params
    assert stage.input is not None  # it has been read
    repo = asked.repo or f"your-name/synthmill-{stage.run}-{stage.track}"
    return Facts(
        title=p.title,
        description=p.description,
        limitations=p.limitations,
        repo=repo,
        dataset_repo=asked.dataset_repo or f"{repo}-data",
        licence=p.licence,
        base_licence=p.base_licence,
        max_tokens=p.max_tokens,
        train=train,
        evaluation=evaluation,
        examples=examples,
        links=links,
        costs=costs(stage),
        notes=p.notes,
        languages=front_of(stage.input.with_name("dataset")).language or [],
        mock=any(link.apis == "mock" for link in links),
    )


def main(stage: Stage[Params]) -> None:
    # -- load
    started, p = time.monotonic(), stage.params
    if not all(stage.output.with_name(name).exists() for name in (TRAINED, EVALUATED)):
        leave_out_without_mlx("nothing is laid out for release")
    asked = wish(p.repo, p.dataset_repo, stage.apis)
    address, standin = target(stage.apis, stage.services) if asked.push else ("", False)
    train, evaluation, found = receipts(stage)
    examples: list[Example] = []
    for example in stage.read(Example):
        examples.append(example)
        stage.keep(example)
    if not examples:
        return  # the end says so
    assert stage.input is not None  # it has just been read
    links = lineage(stage.input.parent, stage.output.parent)
    links += [of_receipt(receipt) for receipt in (train, evaluation) if receipt]

    # -- process
    found += before(stage, examples, train, evaluation, links)
    if stage_bars := [reason for reason in found if reason.blocks == "staging"]:
        raise refusal([*stage_bars, *(r for r in found if r not in stage_bars)], f"{stage.name} lays nothing out", MEND)
    assert train and evaluation  # else that is a reason
    facts = facts_of(stage, asked, examples, train, evaluation, links)
    directory = stage.side_dir(RELEASE)
    lay_out(directory, stage.output.parent / train.run_id, stage.input.with_name("dataset"), facts)
    if late := list(after(stage, directory)):
        raise refusal([*late, *found], f"{stage.name} lays nothing out", MEND)
    if asked.push and (bars := barred(found, standin)):
        raise refusal(bars, f"{stage.name} does not push to {address}", "mend them, or stage only: make release")

    # -- save
    made = tuple(repositories(directory, facts))
    if asked.push:
        made = push(made, directory, asked.token, f"{train.run}/{train.track} {train.run_id}")
    receipt = ReleaseReceipt(
        run=stage.run,
        track=stage.track,
        run_id=train.run_id,
        train_sha256=sha256_of(stage.output.with_name(TRAINED)),
        evaluate_sha256=sha256_of(stage.output.with_name(EVALUATED)),
        data_sha256=train.data.sha256,
        apis=stage.apis,
        made_by_standin=facts.mock,
        reasons=tuple(found),
        licences=facts.licences,
        obligations=facts.obligations,
        repositories=made,
        pushed=asked.push,
        endpoint=address,
        settings=p.model_dump(mode="json"),
        counts=Counts.of(stage),
        **closing(facts.cost_usd, time.monotonic() - started),
    )
    stage.write_receipt(receipt.line())
    stage.summary |= {"pushed": asked.push, "reasons": [reason.model_dump() for reason in found]}
    stage.tables.append(told(receipt, stage.output.with_name(RELEASE)))


if __name__ == "__main__":
    run(main, Params, receipt=True)
