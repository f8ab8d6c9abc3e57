"""Reads English sentences well enough to ask about them, and tells whether one text states what another does not.

Shallow on purpose: a sentence is a subject, a verb, what follows, and at most one clause ("so that ...", "when ...").
What cannot be read that way is still asked about, by its first words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shared.standin.reading import SKIPPED

# ---------------------------------------------------------------- words

BE = frozenset("is are was were".split())
MODALS = frozenset("can cannot must may will should could would".split())
NEGATIONS = frozenset("not no never none nothing nobody cannot without neither nor don't doesn't isn't aren't".split())
DETERMINERS = frozenset("a an the every each all no any some this that these those its their his her our your".split())
PREPOSITIONS = frozenset(
    "in at on by with from for to into under over after before during through between within without beside as of "
    "upon onto against among across towards".split()
)
ADVERBS = frozenset("never also always only then still usually often already".split())
FUNCTION_WORDS = (
    SKIPPED
    | BE
    | MODALS
    | NEGATIONS
    | DETERMINERS
    | PREPOSITIONS
    | ADVERBS
    | frozenset(
        "or if when while so because until unless since although though than what how why where who which whether "
        "there here now yes one ones other another same own per about up down out off again too more most less least "
        "very much many such both either even yet once else way let s t ll re ve d m don doesn isn aren".split()
    )
)
EVERYDAY = frozenset(
    "answer ask asked question mean means meant say says said state states stated tell told know knows known note "
    "point points part parts thing things word words term terms detail details case cases fact facts rule short long "
    "brief exact exactly precise precisely plain plainly simply simple clear clearly right correct sure certain "
    "certainly course indeed fine good better best glad happy sorry welcome thanks thank help helps helpful please "
    "look looks see sees read reads take takes taken give gives given get gets put make makes made come comes go goes "
    "keep keeps hold holds true work works working use uses used need needs want wants like follow follows following "
    "first second third next last then finally step steps together taken matter matters important benefit useful "
    "practice practical team user users customer customers colleague everyone anything something everything else "
    "open remain remains leave leaves add adds above below further beyond more less rely count easy mind time day "
    "material source information rest think believe guess doubt promise cannot sum sentence line lines side whole "
    "short version apply applies write kind sort reason result way base based behind described documented covered "
    "concern concerns understand understood explain explained happen happens back try bye later soon ready moment "
    "check checked confirm confirmed spell out full picture start end stop bottom top".split()
)
"""What conversations are held together with. A statement made of such words alone says nothing about its subject."""

_IRREGULAR = {
    "written": "write", "wrote": "write", "made": "make", "kept": "keep", "sent": "send", "ran": "run", "cut": "cut",
    "given": "give", "gave": "give", "taken": "take", "took": "take", "held": "hold", "left": "leave", "lay": "lie",
    "lies": "lie", "lain": "lie", "lost": "lose", "found": "find", "chosen": "choose", "chose": "choose",
    "drawn": "draw", "drew": "draw", "built": "build", "paid": "pay", "spent": "spend", "begun": "begin",
    "began": "begin", "dealt": "deal", "shown": "show", "put": "put", "read": "read", "met": "meet", "hung": "hang",
}  # fmt: skip
_NUMBER_WORDS = {
    word: str(n) for n, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2)
} | {"twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000"}


@lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """One form for the inflections of a lower-case word; crude, but the same for both sides of a comparison."""
    word = _IRREGULAR.get(word, word)
    if word[0].isdigit() or len(word) < 4:
        return word
    if word.endswith(("ies", "ied")):
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if word.endswith("ing") and len(word) > 5:
        word = _undoubled(word[:-3])
    elif word.endswith("ed") and len(word) > 4 and word[-3] != "e":
        word = _undoubled(word[:-2])
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def _undoubled(word: str) -> str:
    """``stopp`` is ``stop``; ``call`` and ``miss`` stay."""
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsfz" else word


# ---------------------------------------------------------------- what a text states

_TOKEN = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]\w*(?:['’]\w+)?|_\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”'’)]*\s+|\n+")
_STARTS = frozenset(".!?:;\n\"“'‘(-*`–—")
_DISCLAIMS = re.compile(
    r"\b(?:do(?:es)? not (?:know|say|state|tell|cover)|don't know|says? nothing|nothing (?:on|about) (?:that|it)|"
    r"no information|cannot (?:say|confirm|tell)|not (?:stated|covered|mentioned|known)|have nothing)\b",
    re.I,
)


@dataclass(frozen=True)
class Term:
    """A content word, stemmed; ``hard`` when it is a number or a name, which no other word can stand for."""

    stem: str
    hard: bool


def sentences(text: str) -> list[str]:
    """A text cut after its sentences and at line ends; the pieces occur in it letter by letter."""
    return [piece for piece in (part.strip() for part in _SENTENCE_END.split(text)) if piece]


def terms(text: str) -> list[Term]:
    """The content words of a text, in order."""
    found = []
    for match in _TOKEN.finditer(text):
        word = match[0].replace("’", "'")
        low = word.lower()
        if low.endswith("'s"):
            word, low = word[:-2], low[:-2]
        if low in FUNCTION_WORDS:
            continue
        if low in _NUMBER_WORDS:
            low = _NUMBER_WORDS[low]
        hard = low[0].isdigit() or "_" in low or word[1:] != word[1:].lower()
        if not hard and word[0].isupper():
            before = text[: match.start()].rstrip(" ")
            hard = bool(before) and before[-1] not in _STARTS
        found.append(Term(stem(low), hard))
    return found


@lru_cache(maxsize=1024)  # a dialogue is judged against the same facts turn by turn
def stems(text: str) -> frozenset[str]:
    """The content words of a text, stemmed."""
    return frozenset(term.stem for term in terms(text))


_EVERYDAY_STEMS = frozenset(stem(word) for word in EVERYDAY)


def states(text: str) -> frozenset[str]:
    """The content words of a text that say something about a subject."""
    return stems(text) - _EVERYDAY_STEMS


def unsupported(text: str, source: str) -> list[tuple[str, list[str]]]:
    """The sentences of ``text`` that state what ``source`` does not, each with the words that are new.

    A sentence is unsupported when it has a number or a name that the source lacks, when most of what it says is new,
    or when it says a sentence of the source without its negation. Questions and disclaimers state nothing.
    """
    known = stems(source)
    found = []
    for sentence in sentences(text):
        if sentence.endswith("?") or _DISCLAIMS.search(sentence):
            continue
        said = [term for term in terms(sentence) if term.stem not in _EVERYDAY_STEMS]
        new = list(dict.fromkeys(term.stem for term in said if term.stem not in known))
        hard = [term.stem for term in said if term.hard and term.stem not in known]
        if hard or (len(new) >= 3 and 2 * len(new) > len({term.stem for term in said})):
            found.append((sentence, hard or new))
        elif turned := _turned(sentence, source):
            found.append((sentence, [turned]))
    return found


def _turned(sentence: str, source: str) -> str:
    """``not`` when a sentence repeats one of the source, but one of them has a negation the other lacks."""
    tail = sentence.rpartition(": ")[2]  # what stands before a colon leads in, and may deny something else
    body = tail if len(stems(tail)) >= 3 else sentence
    said = stems(body)
    if len(said) < 3:
        return ""
    denied, best, matched = _negations(body), 0.0, 0
    for other in sentences(source):
        theirs = stems(other)
        shared = len(said & theirs) / len(said | theirs) if theirs else 0.0
        if shared > best:
            best, matched = shared, _negations(other)
    return "not" if best >= 0.8 and bool(denied) != bool(matched) else ""


def _negations(text: str) -> int:
    words = [word.lower().replace("’", "'") for word in _TOKEN.findall(text)]
    if words and words[0] == "no":  # as an answer to a question it denies what was asked, not what follows
        words = words[1:]
    return sum(word in NEGATIONS for word in words)


def alike(a: str, b: str) -> float:
    """Dice overlap of all the words of two texts, 0 to 1."""
    one, two = ({word.lower() for word in _TOKEN.findall(text)} for text in (a, b))
    return 2 * len(one & two) / (len(one) + len(two)) if one or two else 1.0


# ---------------------------------------------------------------- reading one sentence

_VERBS = frozenset(
    "accept acquire act add aim allow answer appear append apply approve arrive ask assign attach avoid await balance "
    "become begin belong block break bring build buy calculate call cancel cap carry cause change charge check choose "
    "clean close collect come compare compress compute connect consist contain continue convert copy cost count cover "
    "create cross deal decide declare define delete deliver deny depend derive describe detect determine die differ "
    "divide do download drop draw earn embed emit enable encode end enforce enter exceed exclude execute exist expect "
    "expire explain export express extend extract fail fall feed fetch fill filter find finish fit follow forbid "
    "force form format free gain generate get give go grow guarantee hang handle happen have help hide hold identify "
    "ignore import improve include increase indicate inherit insert inspect install invoke join judge keep kill know "
    "label lack last lead learn leave let lie limit link list listen live load lock log look lose lower maintain make "
    "manage map mark match mean measure meet merge mix move name need note notify obey occur offer omit open operate "
    "order own pack parse pass pause pay perform pick place play point prefer prepare present preserve prevent print "
    "process produce promise protect prove provide publish pull push put raise reach read receive record reduce refer "
    "refuse reject release rely remain remove rename repeat replace report represent request require rerun reserve "
    "reset resolve respond rest restart restore result retain retry return reuse reveal rewrite rise round run save "
    "say scale scan score search seed select send separate serve set share ship shorten show shrink sign sit skip "
    "solve sort speak specify spend split stand start state stay stop store strip submit suit support survive switch "
    "take tell test throw tie track train transfer translate treat trim trust turn understand update upload use "
    "validate vary verify wait want warn weigh win work wrap write yield".split()
)
_PARTICIPLES = frozenset(
    "kept sent cut given taken held left lost found chosen drawn built paid spent dealt shown put read met made "
    "written run set known done seen told said hung frozen".split()
)
_JOINTS = re.compile(
    r",?\s+\b(so that|because|although|while|when|whenever|unless|until|before|after|if|since|so)\b\s+(?=\S)", re.I
)
_WORD = re.compile(r"`[^`]*`\S*|\S+")
_MARKER = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+")


@dataclass(frozen=True)
class Fact:
    """One sentence taken apart; ``subject`` is ``""`` when it could not be.

    Attributes:
        text: the sentence as it stands, with its full stop.
        lead: what comes before the subject (``After an interrupt``).
        subject, adverb, verb, rest: ``A killed stage`` ``never`` ``leaves`` ``half a file``.
        joint, clause: ``so that`` ``the next run can go on``; both ``""`` for a sentence without one.
    """

    text: str
    lead: str = ""
    subject: str = ""
    adverb: str = ""
    verb: str = ""
    rest: str = ""
    joint: str = ""
    clause: str = ""

    @property
    def plural(self) -> bool:
        """Whether the verb takes ``do`` and ``are``."""
        return self.verb in ("are", "were") or (self.verb not in BE | MODALS and base(self.verb) == self.verb)

    @property
    def denies(self) -> bool:
        """Whether the main part says what is not so."""
        words = f"{self.adverb} {self.verb} {self.rest}".lower().split()
        return any(word in NEGATIONS for word in words[:4]) or self.subject.lower().startswith("no ")

    @property
    def main(self) -> str:
        """The sentence without its clause, without a full stop."""
        if not self.clause:
            return self.text.rstrip(".")
        return self.text[: self.text.rindex(self.joint)].rstrip(" ,")


def fact_of(entry: str) -> Fact:
    """The first sentence of a Markdown entry, taken apart."""
    whole = " ".join(_MARKER.sub("", entry).split())
    first = (sentences(whole) or [""])[0]
    text = first if first.endswith((".", "!", "?")) else f"{first}."
    body = text.rstrip(".!?")
    lead, body = _lead(body)
    joint, clause = "", ""
    if (match := _JOINTS.search(body)) and _is_clause(body, match):
        joint, clause, body = match[1], body[match.end() :], body[: match.start()]
    words = _WORD.findall(body)
    place = _verb_place(words)
    if not 0 < place <= 14:
        return Fact(text, joint=joint, clause=clause)
    adverb = words[place - 1].lower() if words[place - 1].lower() in ADVERBS and place > 1 else ""
    subject = " ".join(words[: place - bool(adverb)])
    rest = " ".join(words[place + 1 :])
    return Fact(text, lead, subject, adverb, words[place].strip(",:").lower(), rest, joint, clause)


def _is_clause(body: str, joint: re.Match[str]) -> bool:
    """Whether a clause follows a joining word: not inside code, not at the front, and not a verb at once."""
    follows = body[joint.end() :].split()
    verb = base(follows[0].lower())
    if len(follows) < 2 or (verb in _VERBS and verb != follows[0].lower()):
        return False
    return joint.start() > 8 and body[: joint.start()].count("`") % 2 == 0


def _lead(body: str) -> tuple[str, str]:
    """A phrase before the subject, and the rest: ``After an interrupt, ...``, ``In mock mode the ...``."""
    words = body.split()
    if not words or words[0].lower() not in PREPOSITIONS | {"when", "if", "while", "unless", "until"}:
        return "", body
    head, comma, rest = body.partition(", ")
    if comma and len(head.split()) <= 10 and (words[0].lower() not in PREPOSITIONS or not _verb_place(head.split())):
        return head, rest
    for place in range(2, min(len(words) - 2, 7)):
        if words[place].lower() in DETERMINERS:
            return " ".join(words[:place]), " ".join(words[place:])
    return "", body


def _verb_place(words: Sequence[str]) -> int:
    """Where the main verb is, 0 when none is found."""
    relative = False
    for place, word in enumerate(words):
        low = word.lower().strip(",:;")
        before = words[place - 1].lower() if place else ""
        if low in ("that", "which", "who") and place:
            relative = True
            continue
        if not place or "`" in word or not _is_verb(low, before, words[:place]):
            continue
        after = words[place + 1].lower() if place + 1 < len(words) else ""
        if low not in BE | MODALS and after in BE | MODALS:
            continue  # "SDK retries are": a noun
        if relative and before not in ADVERBS:
            relative = False
            continue
        return place
    return 0


def _is_verb(low: str, before: str, subject: Sequence[str]) -> bool:
    if low in BE or low in MODALS:
        return True
    if before in PREPOSITIONS - {"before", "after"} or before in ("not", "does", "do", "and", "or"):
        return False
    if before in DETERMINERS and before != "that":
        return False
    root = base(low.removeprefix("re-"))
    if root not in _VERBS:
        return False
    if root != low.removeprefix("re-") or before in ADVERBS:
        return True
    last = next((w.lower() for w in reversed(subject) if w.lower() not in ADVERBS), "")
    return " and " in f" {' '.join(subject).lower()} " or (last.endswith("s") and not last.endswith("ss"))


@lru_cache(maxsize=4096)
def base(verb: str) -> str:
    """``writes`` -> ``write``; a verb that is not in the third person comes back as it is."""
    if verb in ("has", "does", "goes"):
        return {"has": "have", "does": "do", "goes": "go"}[verb]
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    if verb.endswith(("sses", "shes", "ches", "xes", "zes")):
        return verb[:-2]
    if verb.endswith("s") and not verb.endswith(("ss", "us", "is")) and len(verb) > 3:
        return verb[:-1]
    return verb


def lowered(text: str, known: Iterable[str] = ()) -> str:
    """The text with a small first letter, unless its first word is a name, an acronym or code."""
    first, _, rest = text.partition(" ")
    plain = first.rstrip(",")
    if plain == "I" or (len(plain) > 1 and not plain[1:].islower()):
        return text
    small = first[:1].lower() + first[1:]
    # A capital at the start of a sentence says nothing; in doubt it is no name.
    name = plain in _NAMES or (plain.lower() not in DETERMINERS and plain in set(known))
    return text if name else f"{small} {rest}" if rest else small


_NAMES = frozenset("Claude Anthropic Bedrock Gemini Python Rust Docker Make Daft Ray Linux Monday January".split())


def capital(text: str) -> str:
    """The text with a capital first letter, code left alone."""
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Asked:
    """A question about a fact; ``kind`` says what it wants to know, ``yes`` what a yes-or-no question is answered."""

    kind: str
    text: str
    yes: str = ""


def questions(fact: Fact, section: str = "") -> list[Asked]:
    """What a reader may ask about a fact, the plainest first; never empty. ``section``: the title it stands under."""
    found = _about_verb(fact) if fact.subject else []
    about = lowered(fact.subject) if fact.subject else _first_words(fact)
    if re.search(r"\d", re.sub(r"`[^`]*`", "", f"{fact.rest} {fact.clause}")):
        found.append(Asked("figure", f"Which figure applies to {about}?"))
    found.append(Asked("explain", f"How would you explain {about} to a new colleague?"))
    area = f" when it comes to {section[:1].lower() + section[1:]}" if section and section[1:].islower() else ""
    found.append(Asked("know", f"What should one know about {about}{area}?"))
    found.append(Asked("rule", f"Which rule holds for {about}?"))
    return found


def _about_verb(fact: Fact) -> list[Asked]:
    about, rest, verb = lowered(fact.subject), fact.rest, fact.verb
    before = f" {fact.lead[:1].lower()}{fact.lead[1:]}" if fact.lead else ""
    first, second, *_ = [*(word.lower() for word in rest.split()), "", ""]
    if verb in BE:
        helper, action = verb, rest
        done = first.strip(",;") in _PARTICIPLES or (first.rstrip(",;").endswith("ed") and len(first) > 3)
        passive = done and (not second or first[-1] in ",;" or second.rstrip(",;") in PREPOSITIONS | _AFTER_PARTICIPLE)
        noun = first in DETERMINERS or (not passive and first not in PREPOSITIONS | NEGATIONS | ADVERBS)
        what = f"What happens to {about}{before}?" if passive else f"What {verb} {about}?" if noun else ""
    elif verb in MODALS:
        helper, action = "can" if verb == "cannot" else verb, rest
        what = f"What {helper} {about} {'not ' if verb == 'cannot' else ''}do{before}?"
    else:
        helper, action = "do" if fact.plural else "does", f"{base(verb)} {rest}".strip()
        what = f"What {helper} {about} {_wanted(fact, first)}{before}?"
        if fact.adverb != "never" and first in ("at", "in", "under", "beside"):
            what = f"Where {helper} {about} {base(verb)}?"
        elif fact.adverb != "never" and first in ("with", "from", "by", "through", "within", "without", "between"):
            what = f"How {helper} {about} {base(verb)}?"
    found = [Asked("what", what)] if what else []
    # Only the first of two things said is asked about, and never with its negation in the question.
    asked = re.sub(r"^(?:never|not|no)\s+", "", _first_of_two(action))
    asked = re.sub(r"^(\w+) (?:no|nothing)\b", _any, asked).rstrip(",")
    if asked and len(asked.split()) <= 14:
        ever = "ever " if fact.adverb == "never" or action.startswith("never") else ""
        yes = "No" if fact.denies else "Yes"
        aside = before if len(asked.split()) < 10 else ""
        found.append(Asked("whether", f"{helper.capitalize()} {about} {ever}{asked}{aside}?", yes))
        never = "never " if ever else "not " if action.startswith("not ") else ""
        if fact.joint in ("so that", "because", "since"):
            found.insert(0, Asked("why", f"Why {helper} {about} {never}{action}?"))
        elif fact.joint and fact.joint not in ("although", "so"):
            found.insert(0, Asked("when", f"When {helper} {about} {never}{asked}?"))
    return found


_AFTER_PARTICIPLE = frozenset("and or off up out down again last first only as when too".split())


def _first_of_two(action: str) -> str:
    """What is said before a second verb: ``add fields to a record`` of ``... and never rewrites a field``."""
    action = re.split(r"[;:](?:\s|$)", action)[0]
    for match in re.finditer(r",? (?:and|but) (?:never |not )?([\w-]+)", action):
        verb = match[1].lower()
        if verb in BE or (base(verb) in _VERBS and base(verb) != verb):
            return action[: match.start()]
    return action


def _wanted(fact: Fact, first: str) -> str:
    """The end of a question for the object: ``write``, ``ask for``, ``do``."""
    if fact.adverb == "never" or not fact.rest or first in ADVERBS or fact.verb in ("does", "do", "has", "have"):
        return "never do" if fact.adverb == "never" else "do"
    return f"{base(fact.verb)} {first}" if first in ("for", "to", "on", "against", "into") else base(fact.verb)


def _any(match: re.Match[str]) -> str:
    """``create no file`` is asked for as ``create any file``."""
    return f"{match[1]} {'anything' if match[0].endswith('nothing') else 'any'}"


def _first_words(fact: Fact) -> str:
    """What a sentence that could not be read is about."""
    words = _WORD.findall(fact.text.rstrip("."))
    return lowered(" ".join(words[: min(5, len(words))])).rstrip(",:;")


def rearranged(fact: Fact) -> list[str]:
    """Other orders of the same words, each a text of whole sentences; the sentence itself comes first."""
    found = [fact.text]
    if not fact.clause:
        return found
    main, clause = fact.main, fact.clause.rstrip(".")
    if fact.joint.lower() in ("when", "while", "if", "unless", "until", "before", "after", "although", "because"):
        found.append(f"{capital(fact.joint)} {clause}, {lowered(main)}.")
    if fact.joint.lower() == "so that":
        found.append(f"{main}. The reason: {clause}.")
    if fact.joint.lower() == "so":
        found.append(f"{main}. What follows: {clause}.")
    return found
