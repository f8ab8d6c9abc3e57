"""Writes dialogues between a user and an assistant about one text, after a plan given in words.

The user's turns take their colour from who asks, how they feel, their style and how they type or speak. The assistant
states only what the text says: the first exchange answers the question, later ones go to other lines of the text, and
what the text does not say the assistant does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from shared.standin.grammar import Fact, capital, fact_of, lowered, questions, rearranged
from shared.standin.rewriting import draw

T = TypeVar("T")

Turns = list[dict[str, str]]


class Dice:
    """Choices that hang on a seed and on how many were made before."""

    def __init__(self, *seed: str) -> None:
        self._seed, self._made = "\0".join(seed), 0

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.share() * len(options))]

    def order(self, options: Sequence[T]) -> list[T]:
        """All the options, shuffled."""
        return [options[place] for _, place in sorted((self.share(), place) for place in range(len(options)))]

    def share(self) -> float:
        """A number from 0 to 1 (excluded)."""
        self._made += 1
        return draw(self._seed, str(self._made))


@dataclass(frozen=True)
class Order:
    """What a dialogue is to be, as read from the prompt; an empty word for what the prompt does not say."""

    exchanges: int
    persona: str
    emotion: str
    style: str
    modality: str
    difficulty: str
    system_prompt: str
    chunk: str
    question: str
    answer: str


# ---------------------------------------------------------------- what users say

_CONTEXTS = {
    "developer": (
        "I am wiring this into our build.", "I am reading the code base for the first time.",
        "I have a pull request open that touches this.", "I am writing a small script around it.",
        "Some of our tests hang on this.", "I am pairing with a new hire on it today.",
        "I maintain the integration on our side.", "I want to get this right before I commit.",
        "My branch is almost ready and this is the last open point.", "I am debugging something nearby.",
    ),
    "product manager": (
        "I am writing the release notes.", "I have to put this on a roadmap slide.",
        "I am preparing a demo for next week.", "Two customers brought this up in interviews.",
        "I am comparing this with what others offer.", "I am drafting the one-pager for sales.",
        "We are deciding what goes into the next version.", "I own the backlog for this area.",
        "I am collecting open questions before planning.", "I need wording that people outside the team follow.",
    ),
    "support agent": (
        "I have a ticket open about this.", "A customer is waiting in the chat.",
        "This comes up on the help desk every other day.", "I am writing an article for the help centre.",
        "My queue is full of this one.", "I am new on the support desk.",
        "The customer has asked me the same thing again.", "I want to close this ticket properly.",
        "I need something I can paste into a reply.", "A colleague escalated this to me.",
    ),
    "executive": (
        "I have a board meeting this afternoon.", "I need this for a decision.",
        "I am signing off the plan today.", "My team and I disagree on this.",
        "I only need what matters for the business.", "We are reviewing suppliers this month.",
        "I was asked about this by an investor.", "I am about to approve the roll-out.",
        "I would like to understand what we are buying.", "This is on my agenda for tomorrow.",
    ),
    "operations": (
        "I am on call this week.", "I am writing the runbook.",
        "I am setting up the machines for this.", "Our night job depends on it.",
        "I look after the servers it runs on.", "I had an alert about this at three.",
        "I am planning the maintenance window.", "I want to automate it before the weekend.",
        "I am handing the shift over in a minute.", "The dashboard does not tell me.",
    ),
    "finance": (
        "I am putting the budget together.", "I need this for the quarterly forecast.",
        "I am checking last month's invoice.", "The auditors want to know.",
        "I have to book this somewhere.", "I am comparing what was planned with what was spent.",
        "I approve purchases for this team.", "I am preparing the cost report.",
        "Somebody has to sign for this, and that is me.", "I am reconciling two spreadsheets.",
    ),
}  # fmt: skip
_SOMEBODY = ("I work as a {persona}.", "I am asking as a {persona}.", "In my job as a {persona} this came up.")
_MOODS = {
    "professional": (
        "", "", "", "Good morning.", "Good afternoon.", "Hello.", "A question, if I may.", "I have a question.",
    ),
    "happy": (
        "This is going really well so far!", "I am enjoying this more than I expected.",
        "Great work on this, by the way!",
        "Finally something that just runs, lovely!", "What a nice surprise this is!", "Good news first: it runs here!",
        "I am in a very good mood about this.", "Love it so far!",
    ),
    "frustrated": (
        "I have been stuck on this for an hour.", "This is driving me up the wall.",
        "I have now read everything I could find, without luck.", "Honestly, I am fed up with guessing.",
        "Third attempt at getting an answer.", "Nobody here could tell me, which is annoying.",
        "I keep going round in circles.", "This should not be so hard to find out.",
    ),
    "impatient": (
        "Quick one, I have two minutes.", "No long story please.", "I need this now.", "Just the answer, please.",
        "Short on time.", "Let us be quick.", "I am between meetings.", "Keep it short.",
    ),
    "confused": (
        "I am a bit lost here.", "I may have this the wrong way round.", "Sorry, I do not quite follow.",
        "I am not sure I even ask the right thing.", "There is something I do not get.",
        "I thought I understood this, but no.", "Maybe a silly question.", "I mix these things up all the time.",
    ),
}  # fmt: skip
_ASKING = {
    "formal": (
        "Could you please tell me the following. {q}", "May I ask: {q}", "I would be grateful for an answer. {q}",
        "Would you kindly clarify this for me? {q}", "I should like to know: {q}", "Please advise. {q}",
        "Allow me to ask: {q}", "My question is as follows. {q}",
    ),
    "casual": (
        "so, {l}", "hey, {l}", "just wondering, {l}", "ok so {l}", "{q} Any idea?", "any chance you know: {q}",
        "tell me: {q}", "well, {l}", "{q} I keep forgetting.", "dumb question, but {l}",
    ),
    "technical": (
        "For the specification: {q}", "Regarding the exact behaviour: {q}", "To be precise: {q}",
        "I need the definition, not the idea. {q}", "From an implementation point of view: {q}",
        "In terms of the contract: {q}", "Semantics question: {q}", "{q} Please use the exact terms.",
    ),
}  # fmt: skip
_PLAIN_ASKING = ("{q}", "One question: {q}", "Tell me: {q}")
_REACTIONS = {
    "professional": (
        "Understood.", "Thank you, that is clear.", "Noted.", "That answers it.", "Good to know.", "All right.",
        "Thanks, that helps.", "I see.",
    ),
    "happy": (
        "Wonderful, thank you!", "Oh nice!", "That is even better than I hoped!", "Lovely, thanks!", "Perfect!",
        "Great, that makes my day!", "Super!", "Brilliant!",
    ),
    "frustrated": (
        "Right, at least that is settled.", "Why does nobody write that down anywhere.", "Fine.",
        "OK, one headache less.", "That would have saved me a morning.", "Finally.", "Hm, if you say so.",
        "So that was it.",
    ),
    "impatient": ("OK, next.", "Good, go on.", "Fine, moving on.", "Yes yes.", "Got it.", "Next.", "Right.",
    "Quickly then."),
    "confused": (
        "I think I follow.", "Hm, let me repeat that in my head.", "Slowly it makes sense.", "Ah, so that is it.",
        "I had that mixed up.", "Still a little foggy, but better.", "Wait, really?", "Oh, now I see.",
    ),
}  # fmt: skip
_NEXT = (
    "And {l}", "One more thing: {q}", "Related: {q}", "While we are at it: {q}", "Next point. {q}", "Then {l}",
    "Another one: {q}", "And what about this: {q}", "That leads me to the next question. {q}", "Also: {q}",
    "Last thing on my list: {q}", "And to go a little deeper: {q}", "Something close to it: {q}", "What else: {q}",
)  # fmt: skip
_UNKNOWN = (
    "Who decided that about {s}?", "Since which release has it been like that with {s}?",
    "Is that going to change for {s}?", "Are there people who handle {s} differently?",
    "How long does that usually take with {s}?", "Has anybody complained about {s}?",
    "Is there a video that shows {s}?", "Does a competitor do the same with {s}?",
    "Which team looks after {s}?", "What did you try before you settled on that for {s}?",
    "Is there a shortcut for {s} that nobody talks about?", "How often does that go wrong with {s}?",
)  # fmt: skip
_CONFIRM = (
    "So {m}, did I get that right?", "To be sure: {m}?", "In my own words: {m}. Correct?",
    "Then I can write down that {m}?", "Let me repeat it: {m}. Yes?", "If somebody asks me, I say that {m}. Fine?",
    "Hence {m}, do I read you correctly?",
)  # fmt: skip
_WHO = {
    "developer": "the person who writes the code", "product manager": "the road map", "support agent": "my customer",
    "executive": "the decision", "operations": "whoever is on call", "finance": "the budget",
}  # fmt: skip
_CONSEQUENCE = (
    "What does that come down to for {w}?", "And what is the upshot for {w}?", "What should {w} take from that?",
    "If you had one line for {w}, what would it be?", "Why would {w} care?", "What is the part that matters to {w}?",
)  # fmt: skip

# ---------------------------------------------------------------- what assistants say

_LEADS = {
    "helpful": (
        "Here is how it works.", "Of course.", "Sure, here it is.", "Good to check that.", "In short:", "The answer:",
        "That is easy to answer.", "Let me help with that.", "Happily.", "Here is what I know.",
        "Yes, that is covered.",
        "Gladly.", "This is the part you need:", "That one is clear.",
    ),
    "concise": ("", "", "", "Short:", "In brief:", "Here:", "Simply:"),
    "technical": (
        "Precisely:", "In exact terms:", "The rule is this:", "Stated exactly:", "The definition:", "By the rule:",
        "Exactly this holds:", "In the terms of the source:", "To state it exactly:", "The terms first.",
        "What is specified:", "Literally:",
    ),
    "detailed": (
        "Let me go through it step by step.", "Let me take it from the start.", "I will take this apart for you.",
        "Here is the full picture.", "Let us take it slowly.", "The long version, then.", "Let me lay it out in order.",
        "I will go from the whole to the details.", "To explain it thoroughly:",
        "There is more than a line to say here.",
    ),
    "sales": (
        "What you get:", "For you this means:", "Here is what it does for you:", "The benefit in plain words:",
        "This is what your team can count on:", "What it gives you:", "Here is the good part:",
        "What matters for you:", "In terms of what you gain:", "This works in your favour:",
    ),
}  # fmt: skip
_LEADS_LATER = (
    "", "On that:", "That one is clear as well.", "Then this:", "Also simple:", "For that part:",
    "There, it goes like this:",
    "That is stated too.", "Next to it stands this:", "Here the source says:", "That follows the same lines:",
    "For this one:", "The answer to that:", "Also covered:", "Good follow-up.",
)  # fmt: skip
_DETAILS = (
    ("First:", "Then, close to it:"), ("To begin with:", "What stands beside it:"), ("The main point:",
    "And next to it:"),
    ("The core of it:", "What belongs with it:"), ("Step by step: first this.", "Then this."),
    ("At the top:", "Just before it in the source:"),
)  # fmt: skip
_CLOSERS = {
    "helpful": (
        "", "", "Is there anything else about it?", "Does that answer your question?",
        "Tell me if something remains open.",
        "Shall I say more about any part of it?", "Ask on if you like.",
    ),
    "concise": ("",),
    "technical": ("", "", "Nothing beyond that is stated.", "That is the whole of the rule.",
    "No more than that follows."),
    "detailed": (
        "Taken together, that is the whole of it.", "That is all of it, from start to end.",
        "Does the order make sense?",
        "Those are all the parts that matter here.", "", "Which of these parts should I go into?",
    ),
    "sales": (
        "", "That is what it does, and I promise nothing beyond it.", "Would that help your team?",
        "No more is promised than that.", "Would you like to see how that fits in with the rest?",
    ),
}  # fmt: skip
_DO_NOT_KNOW = (
    "That I do not know.", "The material I have does not say.", "I have nothing on that, so I would rather not guess.",
    "I cannot say: it is not stated.", "There is no information on that in what I have.",
    "I do not know, and I prefer to say so.", "What I have says nothing about that.",
    "I cannot confirm anything there: it is not covered.", "Not something I know, I am afraid: it is not mentioned.",
)  # fmt: skip
_RIGHT = (
    "Yes, that is right.", "Correct.", "Yes, exactly so.", "That is it.", "Yes.", "You read it correctly.",
    "Right, word for word.", "Yes, you can say it like that.",
)  # fmt: skip
_COMES_DOWN = (
    "It comes down to this:", "The line to take away:", "In one line:", "What matters there:", "Keep this in mind:",
    "The upshot:", "Reduced to the essential part:",
)  # fmt: skip
INVENTED = (
    "It also keeps a copy for {n} days before anything is deleted.",
    "The default was raised from {n} to {m} last spring.",
    "Version {n}.{m} added a graphical dashboard for it.", "About {n} percent of all customers switch that off.",
    "The vendor guarantees a response within {n} minutes.", "It was certified by Lloyd's in Rotterdam.",
    "Each further seat costs {n} euros a month.", "A nightly backup copies it to a data centre in Oslo.",
    "An administrator must approve that by telephone beforehand.",
    "It sends a weekly summary to the billing department.",
    "Older laptops need {n} gigabytes of memory for that.", "The Kubernetes operator restarts it after {n} seconds.",
)  # fmt: skip
"""Statements that no facts file of ours makes."""
_DIGRESSIONS = (
    "By the way, which bakery near the harbour has the best cinnamon rolls?",
    "Completely unrelated, did your football club win yesterday evening?",
    "Before I forget, what should I cook for my guests on Saturday evening?",
    "Different topic, is the train to Vienna late because of all that snow?",
    "Random thought, do penguins sleep standing up during winter storms?",
)
_DEFLECTED = ("I cannot say.", "That I do not know.", "I have nothing on that.")


def mood_of(emotion: str) -> str:
    """The key of an emotion that is put in words of its own (``professional and neutral``)."""
    low = emotion.lower()
    keys = ("happy", "frustrat", "impatient", "confus")
    found = next((key for key in keys if key in low), "professional")
    return {"frustrat": "frustrated", "confus": "confused"}.get(found, found)


def manner_of(system_prompt: str) -> str:
    """How an assistant with this system prompt answers."""
    low = system_prompt.lower()
    for manner, words in (
        ("concise", ("few words", "concise", "brief", "short")),
        ("detailed", ("thorough", "step by step", "detail")),
        ("technical", ("technical", "exact terms", "precise")),
        ("sales", ("product assistant", "sales", "promise")),
    ):
        if any(word in low for word in words):
            return manner
    return "helpful"


# ---------------------------------------------------------------- writing one


class Dialogue:
    """One dialogue after one plan; ``turns`` is what was written so far."""

    def __init__(self, plan: Order, dice: Dice) -> None:
        self.plan, self.dice, self.turns = plan, dice, Turns()
        self.mood, self.manner = mood_of(plan.emotion), manner_of(plan.system_prompt)
        section, self.context, entry = parts_of(plan.chunk)
        self.section, self.fact = section, fact_of(entry)
        self.others = dice.order([fact_of(line) for line in self.context])
        self.kinds = dice.order(("unknown", "confirm", "consequence", "unknown"))
        self.unknowns = list(zip(dice.order(_UNKNOWN), dice.order(_DO_NOT_KNOW), strict=False))

    def write(self) -> Turns:
        """All the exchanges of the plan."""
        self._open()
        while len(self.turns) < 2 * self.plan.exchanges:
            # Other lines of the text come first; a dialogue about a lone line asks around it.
            if self.others and self.dice.share() < 0.75:
                self._other(self.others.pop())
            elif self.kinds:
                getattr(self, f"_{self.kinds.pop()}")()
            elif self.others:
                self._other(self.others.pop())
            elif self.unknowns:
                self._unknown()
            else:
                self._exchange(*self.dice.pick(_COURTESIES))
        return self.turns

    def _exchange(self, user: str, assistant: str) -> None:
        self.turns.append({"role": "user", "content": self._typed(user)})
        self.turns.append({"role": "assistant", "content": " ".join(assistant.split())})

    # ------------------------------------------------------------ exchanges

    def _open(self) -> None:
        question = self.dice.pick(_ASKING.get(self.plan.style, _PLAIN_ASKING)).format(
            q=self.plan.question, l=lowered(self.plan.question)
        )
        contexts = _CONTEXTS.get(self.plan.persona) or [line.format(persona=self.plan.persona) for line in _SOMEBODY]
        context = self.dice.pick(contexts) if self.dice.share() < 0.85 else ""
        mood = self.dice.pick(_MOODS[self.mood])
        lead = [mood, context] if self.dice.share() < 0.7 else [context, mood]
        if self.dice.share() < 0.2:
            user = " ".join(filter(None, (question, *lead)))
        else:
            user = " ".join(filter(None, (*lead, question)))
        self._exchange(user, self._answered())

    def _answered(self) -> str:
        answer = self.plan.answer
        same = " ".join(answer.split()) == self.fact.text
        if same or answer.rstrip(".") in self.fact.text:
            answer = self.dice.pick(rearranged(self.fact))
        parts = [self.dice.pick(_LEADS[self.manner]), answer]
        if self.manner == "detailed":
            first, then = self.dice.pick(_DETAILS)
            parts = [parts[0], first, answer]
            if self.others:
                parts += [then, self.others.pop().text]
        elif self.manner in ("technical", "helpful") and self.others and self.dice.share() < 0.25:
            parts += ["Next to it:", self.others.pop().text]
        return " ".join(filter(None, (*parts, self.dice.pick(_CLOSERS[self.manner]))))

    def _later(self, statement: str) -> str:
        lead = "" if self.manner == "concise" else self.dice.pick(_LEADS_LATER)
        closer = self.dice.pick(_CLOSERS[self.manner]) if self.dice.share() < 0.3 else ""
        return " ".join(filter(None, (lead, statement, closer)))

    def _follow_up(self, question: str) -> str:
        asked = self.dice.pick(_NEXT).format(q=question, l=lowered(question))
        reaction = self.dice.pick(_REACTIONS[self.mood]) if self.dice.share() < 0.8 else ""
        return " ".join(filter(None, (reaction, asked)))

    def _other(self, fact: Fact) -> None:
        asked = self.dice.pick(questions(fact, self.section)[:4])
        yes = f"{asked.yes}. " if asked.yes else ""
        self._exchange(self._follow_up(asked.text), self._later(f"{yes}{self.dice.pick(rearranged(fact))}"))

    def _unknown(self) -> None:
        asked, unknown = self.unknowns.pop()
        self._exchange(self._follow_up(asked.format(s=self._subject())), unknown)

    def _confirm(self) -> None:
        main = lowered(self.fact.main)
        user = self.dice.pick(_CONFIRM).format(m=main)
        clause = capital(self.fact.clause) + "." if self.fact.clause and self.fact.joint != "so that" else ""
        self._exchange(capital(user), f"{self.dice.pick(_RIGHT)} {clause}")

    def _consequence(self) -> None:
        user = self._follow_up(self.dice.pick(_CONSEQUENCE).format(w=_WHO.get(self.plan.persona, "me")))
        self._exchange(user, f"{self.dice.pick(_COMES_DOWN)} {lowered(self.fact.main)}.")

    def _subject(self) -> str:
        """What the dialogue is about, in a few words."""
        return lowered(self.fact.subject or " ".join(self.fact.text.rstrip(".").split()[:5]))

    # ------------------------------------------------------------ how it is typed

    def _typed(self, text: str) -> str:
        low = self.plan.modality.lower()
        if "phone" in low:
            return self._on_a_phone(text)
        return self._spoken(text) if "dictat" in low else " ".join(text.split())

    def _on_a_phone(self, text: str) -> str:
        for word, short in _PHONE:
            text = re.sub(rf"\b{word}\b", short, text, flags=re.I)
        words = text.split()
        known = set(self.plan.chunk.lower().split())  # what it is about stays readable
        long = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{5,}", word) and word not in known]
        if long:  # one slip: two neighbouring letters change places
            i = self.dice.pick(long)
            at = 1 + int(self.dice.share() * (len(words[i]) - 3))
            word = words[i]
            words[i] = f"{word[:at]}{word[at + 1]}{word[at]}{word[at + 2 :]}"
        return " ".join(words)

    def _spoken(self, text: str) -> str:
        sentences = re.split(r"(?<=[.!?])\s+", text.replace("`", "").replace(":", ","))
        said = [f"{self.dice.pick(_FILLERS)} {lowered(s)}" if self.dice.share() < 0.6 else s for s in sentences]
        return " ".join(said)


_PHONE = (
    ("please", "pls"), ("you", "u"), ("because", "bc"), ("thanks", "thx"), ("thank u", "thx"), ("about", "abt"),
    ("what is", "whats"), ("I am", "im"), ("that is", "thats"), ("with", "w"), ("before", "b4"), ("and", "n"),
    ("without", "w/o"), ("something", "smth"), ("right now", "rn"), ("quickly", "quick"), ("do not", "dont"),
)  # fmt: skip
_FILLERS = ("Um,", "So, uh,", "Okay so,", "You know,", "Let me think,", "Well, um,", "Right, so,", "I mean,", "Uh,")


def parts_of(chunk: str) -> tuple[str, list[str], str]:
    """The section, the lines of context and the last entry of a chunk; markers of bullets are left out."""
    section, entries = "", list[str]()
    for line in chunk.splitlines():
        if match := re.match(r"#{1,6}\s+(.*)", line):
            section = match[1].strip()
        elif line[:1].isspace() and entries and line.strip():
            entries[-1] += f" {line.strip()}"
        elif line.strip():
            entries.append(re.sub(r"^\s*(?:[-*+•]|\d+[.)])\s+", "", line).strip())
    return section, entries[:-1], entries[-1] if entries else chunk.strip()


# ---------------------------------------------------------------- dialogues as they should not be


def with_statement(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with a statement of the assistant that the text does not make."""
    place = dice.pick(range(1, len(turns), 2))
    number, more = 14 + int(dice.share() * 75), 131 + int(dice.share() * 700)
    extra = dice.pick(INVENTED).format(n=number, m=more)
    return _with(turns, place, f"{turns[place]['content']} {extra}")


def with_digression(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with an exchange about something else."""
    place = dice.pick(range(0, len(turns), 2))
    return _with(_with(turns, place, dice.pick(_DIGRESSIONS)), place + 1, dice.pick(_DEFLECTED))


def with_echo(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with the assistant saying the same thing again; one exchange becomes a curt one instead."""
    return curt(turns, dice) if len(turns) < 4 else _with(turns, len(turns) - 1, turns[1]["content"])


def curt(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with an assistant that says no more than yes or no."""
    return [t if t["role"] == "user" else {**t, "content": dice.pick(("Yes.", "No.", "Yes, it does."))} for t in turns]


def off_length(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with an exchange too many or too few."""
    if len(turns) > 2 and dice.share() < 0.5:
        return turns[:-2]
    thanks = dice.pick(("Thanks, that was all.", "Good, I have what I need.", "That is everything for today."))
    farewell = dice.pick(("You are welcome.", "Good. Come back any time.", "Glad that helped."))
    return [*turns, {"role": "user", "content": thanks}, {"role": "assistant", "content": farewell}]


def out_of_turn(turns: Turns, dice: Dice) -> Turns:
    """The dialogue with one speaker twice in a row, or the assistant first."""
    if dice.share() < 0.5:
        return [turns[1], turns[0], *turns[2:]]
    place = dice.pick(range(len(turns)))
    other = "assistant" if turns[place]["role"] == "user" else "user"
    return [*turns[:place], {**turns[place], "role": other}, *turns[place + 1 :]]


def _with(turns: Turns, place: int, content: str) -> Turns:
    return [*turns[:place], {**turns[place], "content": content}, *turns[place + 1 :]]


_COURTESIES = (
    ("So that is it?", "That is it."), ("Really?", "It is so."), ("And it is just that, then?", "Just that."),
    ("Very well.", "So it is."),
)  # fmt: skip
_SMALL_WORDS = ("really", "quite", "rather", "simply", "basically", "actually", "just", "then", "however", "therefore")


def stock(plan: Order, dice: Dice) -> Turns:
    """The same dialogue for every plan about one chunk, but for a word or two: a writer that stopped looking.

    What follows the first exchange is mere courtesy, so that even dialogues of different lengths are near-duplicates.
    """
    section, context, entry = parts_of(plan.chunk)
    fact, fixed = fact_of(entry), Dice(plan.chunk, "stock")
    asked = fixed.pick(questions(fact, section)[:3])
    lead = fixed.pick([*_CONTEXTS["developer"], *_CONTEXTS["operations"]])
    user = f"{lead} {dice.pick(_SMALL_WORDS).capitalize()}: {asked.text} Answer {dice.pick(_SMALL_WORDS)}."
    answer = " ".join([fixed.pick(_LEADS["helpful"]), fact.text, *(fact_of(line).text for line in context)])
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    for thanks, welcome in _COURTESIES[: plan.exchanges - 1]:
        turns += [{"role": "user", "content": thanks}, {"role": "assistant", "content": welcome}]
    return turns
