"""Dialogues as models write them, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel


class Turn(BaseModel):
    """One turn of a dialogue in a model's structured answer."""

    role: Literal["user", "assistant"]
    content: str


def fault_of(turns: Sequence[Turn], least: int, most: int) -> str:
    """Why the turns are not ``least`` to ``most`` exchanges of user and assistant; ``""`` when they are."""
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return f"roles must alternate user, assistant; got {', '.join(roles) or 'nothing'}"
    if not least <= len(roles) // 2 <= most:
        planned = str(least) if least == most else f"{least} to {most}"
        return f"planned {planned} exchanges, got {len(roles) // 2}"
    if any(not turn.content.strip() for turn in turns):
        return "a turn is empty"
    return ""
