"""09 judge: Conversation -> Conversation + judgement: a boolean rubric, passed only when every criterion holds.

The criteria are the settings' and, for a conversation that was to show patterns, one for each of them. A criterion
that asks for a quote holds only when the quote occurs in the assistant's turns: checked, not trusted. The judge is
never the model that wrote the conversation. With gates in the settings, the stage ends in go or no go.

Cost: one call a conversation; about $0.0004 at claude-haiku-5-5.

    python stages/09_judge/main.py --in data/trial/grounded/07_converse.jsonl \\
        --out data/trial/grounded/09_judge.jsonl --config stages/09_judge/trial.toml --track grounded
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gates import Gates, go_no_go
from pydantic import Field
from rubric import Tally

from shared.errors import SettingsError
from shared.judge import Judge, Judged, Unjudged
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Conversation, Domain
from shared.stage import Settings, Stage, run

PROMPTS = ("system", "judge")
CRITERION_TOKENS, FEEDBACK_TOKENS, CONTEXT_TOKENS = 32, 40, 120
"""Of one criterion judged with its quote, of feedback and issues, and of the facts or profile; for the estimate. The
trial's answers have 160 for 4 criteria and 233 for 6."""


class Params(Settings):
    """Settings of 09; see trial.toml for the unit of each."""

    judge: str
    criteria: dict[str, str] = Field(min_length=1)
    patterns: Path | None = None
    profile: Path | None = None
    gates: Gates | None = None
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(1500, ge=256)


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 09 asks for these conversations, from an empty store; with patterns, two or three criteria more each."""
    here = Path(__file__).parent / "prompts"
    prompt = sum(tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in PROMPTS)
    criteria = len(params.criteria) + (2.5 if params.patterns else 0)
    rubric = criteria * sum(tokens_of(meaning) + 8 for meaning in params.criteria.values()) / len(params.criteria)
    count = sum(volume.records for volume in volumes.values())
    tokens = sum(volume.records * volume.tokens for volume in volumes.values())
    asked = count * (prompt + tokens_of(str(strict_schema(Judged))) + rubric + CONTEXT_TOKENS) + tokens
    return [Calls(params.judge, count, asked, count * (criteria * CRITERION_TOKENS + FEEDBACK_TOKENS))]


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    prompts = {name: stage.prompt(f"{name}.txt") for name in PROMPTS}
    judge = Judge(
        stage.models,
        p.judge,
        p.criteria,
        prompts,
        patterns=p.patterns,
        profile=p.profile,
        max_tokens=p.max_tokens,
    )
    for record in stage.peek(Conversation):
        if record.generated_by == p.judge:
            raise SettingsError(
                f"{p.judge} wrote these conversations and cannot judge them",
                "set another judge in stages/09_judge/<run>.toml",
            )
        if undefined := judge.undefined(record):
            raise SettingsError(
                f"no definition of {undefined}, which a conversation was to show",
                "set `patterns` for this track in stages/09_judge/<run>.toml",
            )

    # -- process
    tally = Tally()
    for record, judgement in stage.models.map(judge.judge, stage.read(Conversation), p.concurrency):
        if isinstance(judgement, Unjudged):
            stage.reject(record, judgement.reason, judgement.detail)
            continue
        judged = record.with_field(judgement=judgement)
        tally.add(judged)
        if judgement.passed:
            stage.keep(judged)
        else:
            failed = [c.name for c in judgement.criteria if not c.passed]
            stage.reject(judged, "judged_" + failed[0].lower().replace(" ", "_").replace("-", "_"), ", ".join(failed))

    # -- save
    stage.summary["criteria"] = tally.summary()
    stage.tables.append(tally.table())
    if p.gates is not None:
        go_no_go(stage, p.gates, tally)


if __name__ == "__main__":
    run(main, Params)
