"""What a model puts around its answer, taken off; pure functions.

Every rule looks at the source text as well: what the source text holds is content, and stays. A function that parses
``<think>`` blocks, a changelog that begins with "Rewritten:", a README that is one fence all keep what they had.
"""

from __future__ import annotations

import re
from collections.abc import Callable

THINK_TAGS = ("think", "thinking", "reasoning")
TOOL_TAGS = ("tool_call", "tool_response", "tool_code", "function_call")
WRAPPER_TAGS = ("compressed", "compression", "rewrite", "output", "answer", "result", "response", "text")
MAX_DEPTH = 10

_MARKER = re.compile(
    r"(?P<marker><\|[a-z_]+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\])"
    r"\s*(?:(?:system|user|assistant|model)[ \t]*:?[ \t]*(?=\n|<\|))?"
)
"""A chat marker of ChatML, Llama, Gemma or Mistral, with the role that may follow it."""

_META = r"(?:compress|rewrit|condens|shorten|abbreviat)\w*"
_NOUN = r"(?:text|version|code|prose|output|form|result|passage|rewrite|content)"
_LABEL = re.compile(
    rf"""
    (?:\#{{1,6}}[ \t]*)? [*_]{{0,2}}
    (?P<label>
        (?:(?:sure|certainly|okay|ok|of\ course|got\ it)[,!.]*\s+)?
        (?:here(?:['’]s|\ is|\ are)\ [^\n:]{{0,60}}? (?:{_META}|{_NOUN}) [^\n:]{{0,40}}
          |(?:the\ )?{_META}(?:\ {_NOUN})?
          |(?:sure|certainly|of\ course)(?=[!.]))
    )
    (?: [*_]{{0,2}}[ \t]*[:!.][*_]{{0,2}}\s* | [*_]{{0,2}}[ \t]*\n\s* )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LABEL_LINE = re.compile(r"(?P<label>assistant|output|answer|final answer|result|response)[ \t]*:?[ \t]*\n\s*", re.I)
"""These may be content when text follows on the same line (``Output: list``), so they count only on their own line."""

_FENCED = re.compile(r"(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<body>.*?)\n?(?P=fence)", re.DOTALL)
_FENCED_LINE = re.compile(r"```(?P<body>[^\n`]+)```")

_CANNOT = r"(?:can['’]?t|can\s?not|unable|not\sable|won['’]t|must\sdecline)"
_REFUSAL = re.compile(
    rf"""
    (?:unfortunately,?\ |apologies,?\ |sorry,?\ (?:but\ )?)?
    (?:(?:i['’]?m|i\ am)\ (?:\w+\ )?sorry\b .{{0,80}}? \b{_CANNOT}\b
      |i\ apologi[sz]e\b .{{0,80}}? \b{_CANNOT}\b
      |i(?:['’]m|\ am)?\ {_CANNOT}\ (?:to\ )?(?:help|assist|comply|compress|rewrite|provide|process|fulfil|do|with)
      |i\ must\ decline
      |as\ an\ ai\b
      |(?:please|could\ you)\ (?:provide|share|paste)\ (?:the|me|your|some)\ (?:\w+\ )?(?:text|code|passage|content)
      |(?:it\ (?:seems|looks\ like|appears)\ )?(?:that\ )?(?:you\ have\ not|you\ haven['’]t|you\ didn['’]t)\ provide
      |no\ text\ (?:was\ )?provided)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


def clean(output: str, source: str) -> str:
    """The rewrite alone: reasoning, tool calls, chat markers, labels and fences around the whole taken off, trimmed.

    Artefacts nest in any order (a label before a fence, a think block inside a wrapper), so the rules run until nothing
    changes, or to a depth that no answer has. ``""`` when nothing is left.
    """
    text = output.replace("\r\n", "\n").strip()
    for _ in range(MAX_DEPTH):
        before = text
        for rule in _RULES:
            text = rule(text, source).strip()
        if text == before:
            break
    return text


def answer(output: str, source: str) -> str:
    """A free answer without its reasoning, tool calls and chat markers, trimmed; labels and fences are its own."""
    return _without_markers(_without_blocks(output.replace("\r\n", "\n").strip(), source), source).strip()


def refusal(text: str, source: str) -> str:
    """The phrase with which a text begins that refuses the task, ``""`` when it does not refuse.

    Only the start counts, and only when the source text has no such phrase: people do write "I'm sorry, I cannot
    log in", and its compression says so too.
    """
    found = _REFUSAL.match(text.lstrip("\"'*_ "))
    return found.group() if found and not _REFUSAL.search(source) else ""


def _without_blocks(text: str, source: str) -> str:
    """Reasoning and tool blocks gone, with what they hold; one that is never closed goes to the end of the text."""
    for tag in (*THINK_TAGS, *TOOL_TAGS):
        if not re.search(rf"</?{tag}\b", source, re.I):
            text = _outside(text, tag)
    return text


def _outside(text: str, tag: str) -> str:
    """What stands outside the blocks of one tag. Blocks do not nest: reasoning about ``<think>`` is one block."""
    kept: list[str] = []
    inside = False
    for piece in re.split(rf"(</?{tag}\b[^<>]*>)", text, flags=re.I):
        if re.fullmatch(rf"</{tag}\b[^<>]*>", piece, re.I):
            if not inside and tag in THINK_TAGS:
                kept.clear()  # the chat template opened the block, so all before its end is reasoning
            inside = False
        elif re.fullmatch(rf"<{tag}\b[^<>]*>", piece, re.I):
            inside = True
        elif not inside:
            kept.append(piece)
    return "".join(kept)


def _without_markers(text: str, source: str) -> str:
    """Chat markers at the start gone; the text ends at the next, because there the model went on as someone else."""
    while (found := _MARKER.match(text)) and found["marker"] not in source:
        text = text[found.end() :].lstrip()
    cut = (found.start() for found in _MARKER.finditer(text) if found["marker"] not in source)
    return text[: next(cut, len(text))]


def _without_label(text: str, source: str) -> str:
    """``Compressed:``, ``Here is the rewritten text:`` and their like gone from the start."""
    found = _LABEL.match(text) or _LABEL_LINE.match(text)
    if found is None or found["label"].lower() in source.lower():
        return text
    return text[found.end() :]


def _without_fence(text: str, source: str) -> str:
    """One Markdown fence around the whole gone; also half of one, when its other half never came."""
    if source.lstrip().startswith(("```", "~~~")):
        return text
    if (found := _FENCED.fullmatch(text)) and found["fence"] not in found["body"]:
        return found["body"]
    if found := _FENCED_LINE.fullmatch(text):
        return found["body"]
    if text.count("```") == 1 and text.startswith("```"):
        return text.partition("\n")[2]
    if text.count("```") == 1 and text.endswith("\n```"):
        return text[: -len("\n```")]
    return text


def _without_wrapper(text: str, source: str) -> str:
    """One ``<output>…</output>`` or the like around the whole gone."""
    for tag in WRAPPER_TAGS:
        found = re.fullmatch(rf"<{tag}>(?P<body>.*)</{tag}>", text, re.S | re.I)
        if found and f"<{tag}>" not in source.lower():
            return found["body"]
    return text


_RULES: tuple[Callable[[str, str], str], ...] = (
    _without_blocks,
    _without_markers,
    _without_label,
    _without_fence,
    _without_wrapper,
)
