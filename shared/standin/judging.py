"""Judges a conversation by a rubric: every criterion by its name, each decided by what its words ask for.

Facts are compared by content words and numbers; a pattern is applied when what shows it occurs in the assistant's
turns. A small seeded share of judgements misquotes or leaves a criterion out, as judges do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.standin.dialogues import Dice
from shared.standin.grammar import alike, sentences, states, stems, unsupported
from shared.standin.rewriting import draw

MISQUOTED_SHARE = 0.02
"""Share of judgements with a quote that does not occur in the conversation."""
INCOMPLETE_SHARE = 0.01
"""Share of judgements that leave a criterion out."""
REPEATED = 0.97
"""Dice overlap of words from which two turns of one speaker say the same."""

CUES = {
    "Gap Analysis": r"\bwhat is missing\b|\bgaps?\b|\byou still need\b|\bis not covered\b",
    "Tradeoff Analysis": r"\btrade-?offs?\b|\bat the cost of\b|\bin exchange for\b|\bcosts you\b",
    "Production Readiness": r"\bin production\b|\bbefore it ships\b|\bat three in the morning\b",
    "Brutal Accuracy": r"\bthis is wrong\b|\bwill not work\b|\bplainly wrong\b|\bthat claim is incorrect\b",
    "Multi-Dimensional Evaluation": r"(?:\b(?:correctness|speed|performance|readability|maintainability|operations|"
    r"security|cost)\s*:.*){3}",
    "Hint-Based Learning": r"\bhints?\b|\bbefore I show\b|\bthink about\b",
    "Diminishing Returns": r"\bdiminishing\b|\bnot worth\b|\bmost of the gain\b|\bstop here\b|\bstops paying\b",
    "Mechanistic Understanding": r"\bunder the hood\b|\binternally\b|\bunderneath\b|\bmechanism\b",
    "Context-Dependent Recommendations": r"\bdepends on\b|\bin your case\b|\bthe fact that decides\b",
    "Precision Policing": r"\bstrictly speaking\b|\bnot the same as\b|\bneeds a figure\b|\bexact term\b",
}
"""What shows a pattern in an answer. A pattern that is not among them is looked for by the words of its definition."""
CUE_PATTERNS = {name.lower(): re.compile(pattern, re.I) for name, pattern in CUES.items()}
_PLACEHOLDER = re.compile(
    r"\b(?:TODO|FIXME|XXX)\b|\bplaceholder\b|\bNotImplementedError\b|\bexcept\s*:|\byour code here\b", re.I
)
_FILLER = re.compile(
    r"\bgreat question\b|\bexcellent question\b|\bI hope (?:this|that) helps\b|\bfeel free to\b|\bhappy to help\b|"
    r"\babsolutely!|\bcertainly!|\bas an AI\b",
    re.I,
)
_FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)
_TURN = re.compile(r"(?:\A|\n\n)(system|user|assistant): ", re.I)
_CURT = re.compile(r"\s*(?:yes|no|it does|it does not|right|correct|sure|ok)\b[\s\w,]{0,12}[.!]?\s*", re.I)


@dataclass
class Verdict:
    """One criterion: whether it holds, the words that show it, and what is wrong when it does not."""

    passed: bool
    quote: str
    issue: str = ""


@dataclass
class Case:
    """A conversation and what it is judged against."""

    users: list[str]
    assistants: list[str]
    facts: str = ""
    code: list[tuple[str, str]] = field(default_factory=list)

    @property
    def said(self) -> str:
        """All that the assistant said."""
        return "\n\n".join(self.assistants)

    def best(self) -> str:
        """The assistant's words that show most: its longest sentence of prose."""
        prose = [s for turn in self.assistants for s in sentences(_FENCE.sub("\n", turn))]
        return max(prose, key=len, default=self.said.strip()[:80])


def judge(user: str, tags: Mapping[str, str], model: str, attempt: str = "") -> dict[str, Any]:
    """The judgement that a prompt asks for."""
    case = _case(tags["conversation"], tags.get("facts", ""))
    dice = Dice(user, model, attempt)
    criteria: list[dict[str, Any]] = []
    issues: list[str] = []
    for name, meaning in _rubric(tags["rubric"]):
        verdict = _decide(name, meaning, case)
        criteria.append({"name": name, "passed": verdict.passed, "quote": verdict.quote})
        if not verdict.passed:
            issues.append(f"{name}: {verdict.issue}")
    if criteria and draw(user, model, attempt, "misquote") < MISQUOTED_SHARE:
        row = criteria[-1]  # the patterns come last, and theirs are the quotes that count
        row["quote"] = _from_memory(row["quote"], dice)
    if len(criteria) > 1 and draw(user, model, attempt, "incomplete") < INCOMPLETE_SHARE:
        criteria.pop(int(dice.share() * len(criteria)))
    failed = [row["name"] for row in criteria if not row["passed"]]
    feedback = f"Fails on {', '.join(failed)}." if failed else "Holds up on every point of the rubric."
    return {"criteria": criteria, "feedback": feedback, "issues": issues}


def _rubric(text: str) -> list[tuple[str, str]]:
    """The criteria: names, and what they mean."""
    return [(m[1].strip(), m[2].strip()) for m in re.finditer(r"^[-*]\s+([^:\n]+):\s*(.*)$", text, re.M)]


def _case(conversation: str, facts: str) -> Case:
    pieces = _TURN.split(conversation.strip())
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True))
    case = Case(
        [text.strip() for role, text in turns if role.lower() == "user"],
        [text.strip() for role, text in turns if role.lower() == "assistant"],
        facts,
    )
    case.code = [(m[1].lower(), m[2]) for turn in case.assistants for m in _FENCE.finditer(turn)]
    return case


def _from_memory(quote: str, dice: Dice) -> str:
    """A quote with a word too many."""
    words = quote.split() or ["it"]
    place = int(dice.share() * len(words))
    return " ".join([*words[:place], "practically", *words[place:]])


# ---------------------------------------------------------------- criteria


def _decide(name: str, meaning: str, case: Case) -> Verdict:
    if "pattern" in meaning.lower() and "appl" in meaning.lower():
        return _shows(name, meaning, case)
    low = f"{name} {meaning}".lower()
    for words, decide in (
        (("accura", "facts"), _accurate),
        (("production", "code"), _production),
        (("profile",), _in_profile),
        (("natural", "repeat"), _natural),
        (("topic",), _on_topic),
        (("value", "learn"), _adds_value),
    ):
        if any(word in low for word in words):
            return decide(case)
    return Verdict(bool(case.assistants), case.best(), "the assistant says nothing")


def _accurate(case: Case) -> Verdict:
    """What the assistant states is in the facts; without facts there is nothing to hold it against."""
    if not case.facts:
        return Verdict(True, case.best())
    for turn in case.assistants:
        if new := unsupported(turn, case.facts):
            sentence, words = new[0]
            return Verdict(False, sentence, f"the facts do not say {', '.join(words[:4])!r}")
    return Verdict(True, case.best())


def _natural(case: Case) -> Verdict:
    for turns in (case.users, case.assistants):
        for place, turn in enumerate(turns):
            if not turn:
                return Verdict(False, "", "a turn is empty")
            for other in turns[:place] if len(turn.split()) > 3 else ():
                if alike(turn, other) >= REPEATED:
                    return Verdict(False, turn[:200], "a turn repeats another")
    return Verdict(bool(case.users and case.assistants), case.best(), "a speaker says nothing")


def _on_topic(case: Case) -> Verdict:
    """An exchange is off the topic when the user talks about something else and the assistant not about the facts."""
    about = stems(case.facts or case.said)
    for turn, reply in zip(case.users, case.assistants, strict=False):
        if len(states(turn)) >= 4 and not stems(turn) & about and not states(reply) & about:
            return Verdict(False, reply[:200], f"{turn[:60]!r} is about something else")
    return Verdict(True, case.best())


def _adds_value(case: Case) -> Verdict:
    if all(_CURT.fullmatch(turn) for turn in case.assistants):
        return Verdict(False, case.said[:200], "the user learns no more than yes or no")
    return Verdict(True, case.best())


def _production(case: Case) -> Verdict:
    """Code is there, has no placeholder, and, in Python, is valid and annotated."""
    if not case.code:
        return Verdict(False, case.best(), "there is no code")
    for language, code in case.code:
        if match := _PLACEHOLDER.search(code):
            line = next(line for line in code.splitlines() if match[0].split("\n")[0] in line)
            return Verdict(False, line.strip(), f"the code has {match[0]!r}")
        if language in ("python", "py") and (problem := _python_problem(code)):
            return Verdict(False, code.strip().splitlines()[0], problem)
    return Verdict(True, case.code[0][1].strip().splitlines()[0])


def _python_problem(code: str) -> str:
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return f"the code is not valid Python: {error.msg}"
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    bare = [n.name for n in functions if n.returns is None]
    return f"{bare[0]} has no annotated return type" if bare else ""


def _in_profile(case: Case) -> Verdict:
    for turn in case.assistants:
        if match := _FILLER.search(turn):
            return Verdict(False, match[0], f"filler: {match[0]!r}")
    return Verdict(True, case.best())


def _shows(name: str, meaning: str, case: Case) -> Verdict:
    """Whether the assistant applies a pattern, and the sentence that shows it."""
    prose = [_FENCE.sub("\n", turn) for turn in case.assistants]
    missing = Verdict(False, "", "nothing in the answers shows it")
    if cue := CUE_PATTERNS.get(name.lower()):
        for turn in prose:
            lines = [*sentences(turn), *(" ".join(p.split()) for p in turn.split("\n\n"))]
            if found := next((line for line in lines if cue.search(line)), None):
                return Verdict(True, found)
        return missing
    wanted = states(meaning.partition("pattern:")[2] or meaning)
    best = max((s for turn in prose for s in sentences(turn)), key=lambda s: len(states(s) & wanted), default="")
    return Verdict(True, best) if len(states(best) & wanted) >= min(3, max(1, len(wanted) // 2)) else missing
