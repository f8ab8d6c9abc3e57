"""The contract between stages: every line of every ``.jsonl`` is one of these models.

Rules every record keeps:

- ``id`` is 32 hex digits of a hash of the content the record was first made from. It never changes afterwards,
  so ``grep <id> data/<run>/<track>/*.jsonl`` tells the record's whole life.
- A stage adds a nested field; it never rewrites a field an earlier stage wrote.
- ``parents`` are the ids of the records this one was made from (empty for what came straight from a source).
- Models are frozen and refuse unknown fields. ``schema_version`` is checked before anything else is read.

::

    Record
    ├── Sourced          + where the bytes came from and under which licence
    │   ├── RawText      01 acquire, 02 merge
    │   ├── QAPair       05 extract_qa, 06 validate_qa
    │   └── Item         + embedding, cluster, choice: what 10 to 13 need
    │       ├── Pair         03 compress, 04 validate, 10 to 12
    │       └── Conversation 07 converse, 08 pattern, 09 judge, 10 to 12
    └── Example          13 format
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal[1] = 1

Domain = Literal["code", "prose"]
Split = Literal["train", "valid", "test"]
RecordId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


def content_id(*parts: str) -> str:
    """32 hex digits (128 bits of SHA-256) of the parts; a part boundary is part of the hash."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


class Part(BaseModel):
    """A frozen model that refuses unknown fields: the base of records and of everything nested in them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Part):
    """One line of a ``.jsonl``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: RecordId
    parents: tuple[RecordId, ...] = ()

    def line(self) -> bytes:
        """The record as one JSON line, newline included; fields in the order of the model, so bytes are stable."""
        return orjson.dumps(self.model_dump(mode="json", exclude_none=True), option=orjson.OPT_APPEND_NEWLINE)

    def with_field(self, **nested: Any) -> Self:
        """A copy with nested fields added.

        Raises:
            ValueError: a field that an earlier stage has written already would change.
        """
        for name, value in nested.items():
            old = getattr(self, name)
            if old is not None and old != value:
                raise ValueError(
                    f"{type(self).__name__} {self.id}: {name} is written already; a stage only adds fields"
                )
        return self.model_copy(update=nested)


class Sourced(Record):
    """A record whose bytes can be found again.

    Attributes:
        source: name of the source in the settings of the first stage.
        origin: ``repo@commit:path#L10-L42``, ``package==1.2:path#L10-L42``, ``dataset@revision#row`` or ``file#id``.
        language: programming language in lower case, or the ISO 639-1 code of a natural language.
        category: what kind of text the source says it is (``function``, ``closed_qa``, ``readme``).
        licence: SPDX identifier or expression; ``unknown`` when nothing says.
    """

    domain: Domain
    source: str
    origin: str
    language: str
    category: str
    licence: str


class Merged(Part):
    """02 merge: the text as every later stage reads it.

    Attributes:
        text: NFC, ``\\n`` newlines, trimmed, scrubbed.
        edits: names of the rules that changed the text, in the order applied; empty when nothing changed.
    """

    text: str
    edits: tuple[str, ...] = ()


class RawText(Sourced):
    """01 acquire: one piece of code or prose, byte for byte as the source had it (decoded as UTF-8)."""

    kind: Literal["raw_text"] = "raw_text"
    text: str
    merged: Merged | None = None


class Embedding(Part):
    """10 embed: where the vector is. ``key`` is the row key in ``10_embed.parquet`` beside the records."""

    key: str
    model: str
    dimensions: int


class Cluster(Part):
    """11 deduplicate: ``id`` is the cluster's first record in input order, ``size`` counts all its members."""

    id: RecordId
    size: int


class Choice(Part):
    """12 choose: rank from 1 (best) and the score that ranked it."""

    rank: int
    score: float


class Message(Part):
    """One turn of a chat, in the shape every chat API and trainer reads."""

    role: Literal["system", "user", "assistant"]
    content: str


class Item(Sourced):
    """A record that can be embedded, deduplicated, chosen and formatted, whatever its track."""

    embedding: Embedding | None = None
    cluster: Cluster | None = None
    choice: Choice | None = None

    def content(self) -> str:
        """The text that is embedded and compared with other records."""
        raise NotImplementedError

    def quality(self) -> float:
        """Higher is better, 0 to 1; what 12 ranks by."""
        raise NotImplementedError

    def chat(self, system: str, user: str) -> tuple[Message, ...]:
        """The messages to train on. ``user``'s ``{text}`` is replaced."""
        raise NotImplementedError

    def ratio(self) -> float | None:
        """Compression ratio, for records that have one."""
        return None


class Generation(Part):
    """03 compress: what made the compressed text.

    Attributes:
        generator: ``mlx`` (local), ``endpoint`` (OpenAI-compatible server) or ``teacher`` (hosted model).
        model: model name or path, as in the settings.
        adapter: adapter path or repository, ``""`` for none.
        prompt: first 16 hex digits of the SHA-256 of the prompts.
        tokenizer: the tokenizer the counts were made with.
        compression_ratio: compressed tokens / verbose tokens, below 1.
    """

    generator: Literal["mlx", "endpoint", "teacher"]
    model: str
    adapter: str = ""
    prompt: str
    tokenizer: str
    verbose_tokens: int
    compressed_tokens: int
    compression_ratio: float


class TaskScore(Part):
    """One task asked of one model. ``verbose_reply`` and ``compressed_reply`` are keys in the reply store."""

    task: str
    similarity: float
    verbose_reply: str
    compressed_reply: str


class Verdict(Part):
    """One panel model's view of one pair; ``equivalence`` is the mean similarity over its tasks.

    ``stopped``: not all tasks were asked, because ``equivalence``, now the highest that could still come of it, is
    below the threshold already. ``judged`` is the optional LLM judge's boolean; ``None`` when no judge was asked.
    """

    model: str
    equivalence: float
    tasks: tuple[TaskScore, ...]
    judged: bool | None = None
    stopped: Literal[True] | None = None


class Verdicts(Part):
    """04 validate: the panel. ``min_equivalence`` is the lowest model's; ``passed`` compares it to the threshold.

    A pair that did not pass may lack models: once one has found it not equivalent the others need not be asked.
    """

    panel: tuple[Verdict, ...]
    min_equivalence: float
    mean_equivalence: float
    threshold: float
    passed: bool


class Pair(Item):
    """03 compress: a text and its compression. The id is the RawText's."""

    kind: Literal["pair"] = "pair"
    verbose: str
    compressed: str
    generation: Generation
    verdicts: Verdicts | None = None

    def content(self) -> str:
        return self.verbose

    def quality(self) -> float:
        return self.verdicts.min_equivalence if self.verdicts else 0.0

    def chat(self, system: str, user: str) -> tuple[Message, ...]:
        return (
            Message(role="system", content=system),
            Message(role="user", content=user.replace("{text}", self.verbose)),
            Message(role="assistant", content=self.compressed),
        )

    def ratio(self) -> float | None:
        return self.generation.compression_ratio


class Validation(Part):
    """06 validate_qa: another model's view of a pair against the chunk it was made from."""

    model: str
    supported: bool
    complete: bool
    self_contained: bool
    no_invention: bool
    reason: str
    passed: bool


class QAPair(Sourced):
    """05 extract_qa: a question and its answer from one chunk of a facts file.

    Attributes:
        chunk: the text the pair was made from, context lines included; ``parents`` holds its content id.
        quote: the words of the chunk that support the answer; they occur in it, letter by letter but for white space.
    """

    kind: Literal["qa_pair"] = "qa_pair"
    section: str
    chunk: str
    question: str
    answer: str
    quote: str
    difficulty: Literal["basic", "intermediate", "advanced"]
    categories: tuple[str, ...]
    generated_by: str
    validation: Validation | None = None


class Plan(Part):
    """What a conversation is to be, drawn before anything is asked; see 07 for the values and shares."""

    persona: str
    style: str
    system_prompt: str
    emotion: str
    modality: str
    variation: str
    turns: int
    difficulty: str


class Criterion(Part):
    """One boolean of a rubric; ``quote`` is where the conversation shows it, ``""`` when none was asked for."""

    name: str
    passed: bool
    quote: str = ""


class Judgement(Part):
    """09 judge: passes only when every criterion does."""

    model: str
    criteria: tuple[Criterion, ...]
    feedback: str
    issues: tuple[str, ...]
    passed: bool


class Grounding(Part):
    """What a conversation may state as fact: the pair it was seeded by and the chunk behind it."""

    question: str
    answer: str
    chunk: str


class Conversation(Item):
    """07 converse, 08 pattern: a dialogue, with the plan it was made from.

    Attributes:
        messages: system (grounded only), then user and assistant in turn, ending with assistant.
        plan: grounded: what was drawn for it.
        grounding: grounded: what it may state.
        topic, patterns, learning_notes: patterns: what it is about, which patterns it must show, what they teach.
        generated_by: model, ``provider/name``.
    """

    kind: Literal["conversation"] = "conversation"
    messages: tuple[Message, ...]
    generated_by: str
    plan: Plan | None = None
    grounding: tuple[Grounding, ...] = ()
    topic: str = ""
    patterns: tuple[str, ...] = ()
    learning_notes: tuple[str, ...] = ()
    judgement: Judgement | None = None

    def content(self) -> str:
        return "\n\n".join(message.content for message in self.messages if message.role != "system")

    def quality(self) -> float:
        if self.judgement is None:
            return 0.0
        return sum(c.passed for c in self.judgement.criteria) / len(self.judgement.criteria)

    def chat(self, system: str, user: str) -> tuple[Message, ...]:
        return self.messages


class Example(Record):
    """13 format: one training example.

    Attributes:
        messages: system, user and assistant turns; the last is the assistant's.
        split: from a hash of ``group``, so adding data moves an example only when it joins it to another cluster.
        group: cluster id; near-duplicates share it and so never straddle splits.
    """

    kind: Literal["example"] = "example"
    domain: Domain
    source: str
    origin: str
    language: str
    category: str
    licence: str
    messages: tuple[Message, ...]
    split: Split
    group: RecordId
    quality: float
    compression_ratio: float | None = None


AnyItem = Annotated[Pair | Conversation, Field(discriminator="kind")]
"""Any record that 10 to 13 take."""


class Reject(Part):
    """A record that does not go on, never lost.

    Attributes:
        stage: ``NN_name``.
        reason: short, stable, counted in the report (``not_shorter``, ``near_duplicate``).
        detail: for a person: the figures, the match, the rule.
        match: id of the record this one duplicates, when that is the reason.
        record: the record as it was, when it could be read.
        raw: the line as it was, when it could not.
        raw_base64: the same, when the line is not UTF-8.
    """

    stage: str
    reason: str
    detail: str = ""
    match: str | None = None
    record: dict[str, Any] | None = None
    raw: str | None = None
    raw_base64: str | None = None

    def line(self) -> bytes:
        """The reject as one JSON line, newline included."""
        return orjson.dumps(self.model_dump(mode="json", exclude_none=True), option=orjson.OPT_APPEND_NEWLINE)
