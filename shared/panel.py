"""Is a compressed text as good as the text? Ask a panel of models to work from each, and compare their work.

For every member and task: one answer from the verbose text, one from the compressed text, and their similarity.
A member's equivalence is the mean over its tasks; the pair's ``min_equivalence`` is the lowest member's. The answer
from the verbose text is one request, shared (through the reply store) by every compression of that text ever judged.

Similarity of two answers = cosine of their embeddings x agreement on facts, each 0 to 1. The cosine alone hides a
dropped fact in a long answer (one of ten sentences less moves it by about 0.02); facts alone do not see a changed
relation. A product is low when either is. Facts are numbers, identifiers, names and negated words: what a text must not
lose, and what no paraphrase changes.
"""

from __future__ import annotations

import asyncio
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from shared.llm import Models, Reply, Request, chat, fill
from shared.llm.catalogue import catalogue
from shared.records import Domain, Part, TaskScore, Verdict, Verdicts


class KeyPoints(BaseModel):
    """Answer to ``key_points.txt``."""

    points: list[str]

    def text(self) -> str:
        return "\n".join(self.points)


class Implications(BaseModel):
    """Answer to ``implications.txt``."""

    implications: list[str]

    def text(self) -> str:
        return "\n".join(self.implications)


class Explanation(BaseModel):
    """Answer to ``explain.txt``."""

    steps: list[str]

    def text(self) -> str:
        return "\n".join(self.steps)


class Code(BaseModel):
    """Answer to ``write.txt``."""

    code: str

    def text(self) -> str:
        return self.code


class Judgement(BaseModel):
    """Answer to ``judge.txt``."""

    equivalent: bool
    reason: str


TASKS: dict[str, type[KeyPoints | Implications | Explanation | Code]] = {
    "key_points": KeyPoints,
    "implications": Implications,
    "explain": Explanation,
    "write": Code,
}
"""The tasks there are; each has a prompt of its name."""


class Unjudged(Part):
    """No verdict: a member's answer could not be used. ``reason`` is the reply's problem."""

    reason: str
    detail: str


class Scored(NamedTuple):
    """One task done by one member: the score, and the two answers it compares."""

    score: TaskScore
    verbose: str
    compressed: str


class Panel:
    """The panel of one stage.

    Accepted is a pair that every member accepts: the same pairs whether ``exhaustive`` or not. Without it the panel
    asks the cheapest member first, one task after the other, and stops where the pair can no longer be accepted.

    Args:
        models: where to ask.
        members: models, ``provider/name``.
        tasks: task names by domain, from :data:`TASKS`.
        prompts: prompt text by name: ``system``, every task, and ``judge``; ``{text}`` (``{a}``, ``{b}``) is replaced.
        embedder: the model whose embeddings measure similarity.
        dimensions: of these embeddings.
        max_tokens: of an answer.
        threshold: the lowest ``min_equivalence`` that passes.
        judge: a model that must also call every two answers equivalent; ``""`` = none.
        exhaustive: ask every member every task whatever the others say: for the scores of pairs that fail.
    """

    def __init__(
        self,
        models: Models,
        members: Sequence[str],
        tasks: Mapping[Domain, Sequence[str]],
        prompts: Mapping[str, str],
        *,
        embedder: str,
        dimensions: int = 512,
        max_tokens: int = 1024,
        threshold: float = 0.80,
        judge: str = "",
        exhaustive: bool = True,
    ) -> None:
        self.models, self.members, self.tasks, self.prompts = models, members, tasks, prompts
        self.embedder, self.dimensions, self.max_tokens = embedder, dimensions, max_tokens
        self.threshold, self.judge, self.exhaustive = threshold, judge, exhaustive
        models.require(*members, *([judge] if judge else []))
        models.require_embedder(embedder)

    async def compare(self, domain: Domain, verbose: str, compressed: str) -> Verdicts | Unjudged:
        """The panel's verdicts on one pair, or why there is none."""
        views: list[Verdict | Unjudged] = []
        if self.exhaustive:
            views += await asyncio.gather(*(self._member(m, domain, verbose, compressed) for m in self.members))
        else:
            for model in self._order():  # until one does not accept the pair: then the others cannot save it
                views.append(view := await self._member(model, domain, verbose, compressed))
                if isinstance(view, Unjudged) or not self._accepts(view):
                    break
        if unjudged := [view for view in views if isinstance(view, Unjudged)]:
            return unjudged[0]
        verdicts = [view for view in views if isinstance(view, Verdict)]
        panel = tuple(sorted(verdicts, key=lambda verdict: self.members.index(verdict.model)))
        lowest = min(verdict.equivalence for verdict in panel)
        return Verdicts(
            panel=panel,
            min_equivalence=lowest,
            mean_equivalence=round(sum(verdict.equivalence for verdict in panel) / len(panel), 4),
            threshold=self.threshold,
            passed=all(map(self._accepts, panel)),
        )

    def _order(self) -> Sequence[str]:
        """Whom to ask first: the cheapest, by the price of its answers; of two alike the first of the settings."""
        return sorted(self.members, key=lambda model: catalogue().card(model).price().output)

    def _accepts(self, verdict: Verdict) -> bool:
        return verdict.equivalence >= self.threshold and verdict.judged is not False

    async def _member(self, model: str, domain: Domain, verbose: str, compressed: str) -> Verdict | Unjudged:
        tasks = self.tasks[domain]
        if self.exhaustive:
            done = list(await asyncio.gather(*(self._task(model, task, verbose, compressed) for task in tasks)))
        else:
            done = []
            for task in tasks:
                done.append(await self._task(model, task, verbose, compressed))
                if isinstance(done[-1], Unjudged) or self._equivalence(done, len(tasks)) < self.threshold:
                    break
        if unjudged := [each for each in done if isinstance(each, Unjudged)]:
            return unjudged[0]
        scored = [each for each in done if isinstance(each, Scored)]
        equivalence, judged = self._equivalence(scored, len(tasks)), None
        if self.judge and (self.exhaustive or equivalence >= self.threshold):
            views = await asyncio.gather(*(self._judged(each) for each in scored))
            if unjudged := [view for view in views if isinstance(view, Unjudged)]:
                return unjudged[0]
            judged = all(views)
        return Verdict(
            model=model,
            equivalence=equivalence,
            tasks=tuple(each.score for each in scored),
            judged=judged,
            stopped=True if len(scored) < len(tasks) else None,
        )

    @staticmethod
    def _equivalence(done: Sequence[Scored | Unjudged], tasks: int) -> float:
        """The mean over all tasks, counting 1 for those not asked: the highest it can still become."""
        scores = [each.score.similarity for each in done if isinstance(each, Scored)]
        return round((sum(scores) + tasks - len(scores)) / tasks, 4)

    async def _task(self, model: str, task: str, verbose: str, compressed: str) -> Scored | Unjudged:
        full, short = await asyncio.gather(self._answer(model, task, verbose), self._answer(model, task, compressed))
        for reply, side in ((full, "verbose"), (short, "compressed")):
            if reply.problem:
                return Unjudged(reason=reply.problem, detail=f"{model} on {task} from the {side} text: {reply.detail}")
        a, b = full.parsed.text(), short.parsed.text()
        similarity = await self.similarity(a, b, code=TASKS[task] is Code)
        if similarity is None:
            return Unjudged(reason="bad_request", detail=f"{self.embedder} refuses {model}'s answer on {task}")
        score = TaskScore(task=task, similarity=similarity, verbose_reply=full.key, compressed_reply=short.key)
        return Scored(score, a, b)

    async def _judged(self, scored: Scored) -> bool | Unjudged:
        prompt = fill(self.prompts["judge"], a=scored.verbose, b=scored.compressed)
        verdict = await self.models.ask(Request(model=self.judge, messages=chat("", prompt), response=Judgement))
        if verdict.problem:
            return Unjudged(
                reason=verdict.problem, detail=f"judge {self.judge} on {scored.score.task}: {verdict.detail}"
            )
        return bool(verdict.parsed.equivalent)

    async def _answer(self, model: str, task: str, text: str) -> Reply:
        messages = chat(self.prompts["system"], fill(self.prompts[task], text=text))
        return await self.models.ask(
            Request(model=model, messages=messages, max_tokens=self.max_tokens, response=TASKS[task])
        )

    async def similarity(self, a: str, b: str, *, code: bool = False) -> float | None:
        """0 to 1, four decimals; 1 for equal texts, 0 when one says nothing; None when the embedder refuses one."""
        if a == b:
            return 1.0
        if not a.strip() or not b.strip():
            return 0.0
        one, two = await self.models.embed(self.embedder, [a, b], self.dimensions)
        if one is None or two is None:
            return None
        return round(max(0.0, cosine(one, two)) * agreement(a, b, code=code), 4)


def cosine(a: array[float], b: array[float]) -> float:
    """Cosine of two vectors; 0 when one is zero."""
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))  # fsum: the same to the last bit on every Python
    norm = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return dot / norm if norm else 0.0


# ---------------------------------------------------------------- facts

_WORD = re.compile(r"[A-Za-z_$][\w$]*(?:\.[A-Za-z_]\w*)*|\d+(?:[.,:/]\d+)*")
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NEGATION = re.compile(
    r"\b(?:\w+n't|no|not|never|none|cannot|without|neither|nor|nothing|nobody)\b|(?<!\w)(?:!|¬)(?=\w)", re.I
)
_SMALL = frozenset(
    "a an the is are was were be been being to of in on for with that which this these it its as by from or and "
    "has have had will would can could may might must should do does did if when than then there any all also at up "
    "out so".split()
)  # fmt: skip
_KEYWORDS = frozenset(
    "def class return if else elif for while in is not and or try except finally raise with as import from lambda "
    "yield async await pass break continue none true false self this function const let var new type func fn pub impl "
    "struct enum match mut use mod end begin select where case then null void int str string bool float".split()
)  # fmt: skip


def carried(verbose: str, compressed: str, *, code: bool = False) -> float:
    """The share of the verbose text's facts (see :func:`agreement`) that the compressed one still has; 1 without."""
    facts = (_code_facts if code else _facts)(verbose)
    return len(facts & (_tokens(compressed) | _negated(compressed))) / len(facts) if facts else 1.0


def agreement(a: str, b: str, *, code: bool = False) -> float:
    """The share of both texts' facts that the other text also has; 1 when neither states any.

    ``code``: every identifier and number is a fact; otherwise numbers, identifiers, names and negated words are.
    """
    found_a, found_b = (_code_facts if code else _facts)(a), (_code_facts if code else _facts)(b)
    has_a, has_b = _tokens(a) | _negated(a), _tokens(b) | _negated(b)
    total = len(found_a) + len(found_b)
    return (len(found_a & has_b) + len(found_b & has_a)) / total if total else 1.0


def _tokens(text: str) -> set[str]:
    """All words and numbers, lower case; parts of dotted names too; number words as digits."""
    found = set()
    for match in _WORD.finditer(text):
        word = match[0]
        found.add(_norm(word))
        if "." in word and not word[0].isdigit():
            found.update(_norm(part) for part in word.split("."))
    return found


def _norm(word: str) -> str:
    word = word.lower()
    if word[0].isdigit():
        return word.replace(",", "")
    return str(_NUMBERS.index(word)) if word in _NUMBERS else word


def _facts(text: str) -> set[str]:
    facts = _negated(text)
    for sentence in re.split(r"[\n.;:!?|]\s+|\n", text):
        for position, match in enumerate(_WORD.finditer(sentence)):
            word = match[0]
            if word[0].isdigit() or word.lower() in _NUMBERS[2:]:
                facts.add(_norm(word))
            elif "_" in word or "." in word or (word[1:] != word[1:].lower()):
                facts.add(_norm(word))  # snake_case, dotted, camelCase, ALLCAPS
            elif position and word[0].isupper() and len(word) > 1:
                facts.add(_norm(word))  # a name; a sentence's first word says nothing by its capital
    return facts


def _code_facts(text: str) -> set[str]:
    tokens = _tokens(text)
    numbers = {token for token in tokens if token[0].isdigit()}
    names = {token for token in tokens if len(token) > 1 and token not in _KEYWORDS and "." not in token}
    return _negated(text) | numbers | names


def _negated(text: str) -> set[str]:
    """``¬word`` for the first content word after each negation."""
    found = set()
    for match in _NEGATION.finditer(text):
        for word in _WORD.findall(text[match.end() : match.end() + 80]):
            if word.lower() not in _SMALL:
                found.add("¬" + _norm(word))
                break
    return found
