"""A data set on the Hugging Face Hub, streamed at a pinned revision and shuffled by the seed.

A row of code is a file: it goes through the same extraction as a repository's. A row of prose is taken as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import licences
from extract import LANGUAGES, language_of
from prose import Sizes
from pydantic import Field, model_validator

from shared import hub
from shared.errors import SettingsError
from shared.records import Domain
from shared.stage import Settings
from sources import Acquire, Candidate, Candidates, CodeSource, from_file

Value = str | bool | int | None


class Mapping(Settings):
    """Which columns hold what. Where several are named, ``text`` takes each, the others the first that is there.

    Attributes:
        text: columns that hold text; each that is not empty is a candidate of its own.
        language: column with the language; "" = the fixed one.
        category: column with the category; "" = the fixed one. Code is categorised by the extraction.
        licence: columns with the licence, a name or a list of names; empty = the fixed one.
        path: columns with the path of a file of code, which tells tests and vendored files.
        fixed_language: ISO 639-1 code, for prose without a column.
        fixed_category: for prose without a column.
        fixed_licence: SPDX expression, for rows without one of their own.
        only: column to the values a row must have to be looked at; rows without one of them are no candidates.
    """

    text: tuple[str, ...] = Field(min_length=1)
    language: str = ""
    category: str = ""
    licence: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    fixed_language: str = "en"
    fixed_category: str = "text"
    fixed_licence: str = licences.UNKNOWN
    only: dict[str, tuple[Value, ...]] = Field(default_factory=dict)


MAPPINGS: dict[str, tuple[Domain, Mapping]] = {
    # bigcode/the-stack and the-stack-smol: the two column layouts it has had.
    "the-stack": (
        "code",
        Mapping(
            text=("content",),
            language="lang",
            licence=("max_stars_repo_licenses", "licenses"),
            path=("max_stars_repo_path", "path"),
        ),
    ),
    # codeparrot/github-code-clean is a script; its rows are read from the Hub's parquet conversion.
    "github-code-clean": (
        "code",
        Mapping(text=("code",), language="language", licence=("license",), path=("path",)),
    ),
    # databricks/databricks-dolly-15k: the passage and the answer are prose; the instruction is a question.
    "dolly": (
        "prose",
        Mapping(text=("context", "response"), category="category", fixed_licence="CC-BY-SA-3.0"),
    ),
    # OpenAssistant/oasst1: what people wrote, not what was deleted or failed its review (null = not reviewed).
    "oasst1": (
        "prose",
        Mapping(
            text=("text",),
            language="lang",
            category="role",
            fixed_licence="Apache-2.0",
            only={"lang": ("en",), "role": ("prompter",), "deleted": (False, None), "review_result": (True, None)},
        ),
    ),
}


class HuggingFace(CodeSource):
    """``kind = "huggingface"``.

    Attributes:
        dataset: ``org/name``.
        revision: commit hash, tag, branch or ``refs/convert/parquet``; the commit it is goes into the origin.
        config: configuration; "" = the only one.
        data_dir: folder inside the repository; "" = all.
        data_files: paths or patterns inside the repository, instead of ``data_dir``.
        split: the split to read.
        mapping: a ready one (``the-stack``, ``github-code-clean``, ``dolly``, ``oasst1``) or a table of its own.
        only: column to values, on top of the mapping's.
        shuffle_rows: rows held in memory to draw the next one from; 0 = rows in the Hub's order.
        max_rows: rows read at most, so that a filter nothing passes does not read a whole Hub.
        sizes: for prose, how long a text is.
    """

    kind: Literal["huggingface"]
    domain: Domain
    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(min_length=1)
    config: str = ""
    data_dir: str = ""
    data_files: tuple[str, ...] = ()
    split: str = "train"
    mapping: Literal["the-stack", "github-code-clean", "dolly", "oasst1"] | Mapping
    only: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    shuffle_rows: int = Field(default=1_000, ge=0)
    max_rows: int = Field(default=100_000, ge=1)
    sizes: Sizes = Sizes(min_chars=100, max_chars=2_000)

    @model_validator(mode="after")
    def _of_one_domain(self) -> HuggingFace:
        if isinstance(self.mapping, str) and MAPPINGS[self.mapping][0] != self.domain:
            raise ValueError(f"mapping {self.mapping!r} is for domain {MAPPINGS[self.mapping][0]!r}")
        if self.data_dir and self.data_files:
            raise ValueError("give data_dir or data_files, not both")
        if self.domain == "code" and len(self.columns().text) != 1:
            raise ValueError("a data set of code has one text column")
        return self

    def columns(self) -> Mapping:
        """The mapping with this source's own ``only`` on top."""
        mapping = MAPPINGS[self.mapping][1] if isinstance(self.mapping, str) else self.mapping
        return mapping.model_copy(update={"only": mapping.only | self.only})


def read(source: HuggingFace, acquire: Acquire) -> Candidates:
    """The data set's candidates, in an order drawn by the seed.

    Raises:
        SettingsError: it is gated, missing or a script, or the settings name something it does not have (a column:
            when the first row is read).
        ProviderError: the Hub does not answer.
    """
    acquire.services()
    data = hub.open_dataset(
        source.dataset,
        source.revision,
        config=source.config or None,
        data_dir=source.data_dir or None,
        data_files=source.data_files or None,
        split=source.split,
    )
    acquire.note(source, commit=data.commit, files=len(data.files))
    return _candidates(source, acquire, data)


def _candidates(source: HuggingFace, acquire: Acquire, data: hub.HubDataset) -> Candidates:
    mapping = source.columns()
    passed_over = 0
    for number, (place, row) in enumerate(data.rows(acquire.seed, source.shuffle_rows)):
        if number == source.max_rows:
            acquire.note(source, stopped_at_rows=number)
            return
        if not number and not set(mapping.text) & set(row):
            raise SettingsError(
                f"source {source.name!r}: {source.dataset} has no column {' or '.join(mapping.text)}; "
                f"it has {', '.join(row)}",
                "correct mapping",
            )
        if not all(row.get(column) in values for column, values in mapping.only.items()):
            passed_over += 1
            acquire.note(source, passed_over=passed_over)
            continue
        origin = f"{source.dataset}@{data.commit}#{place}"
        if source.domain == "code":
            yield from _from_code(source, mapping, row, origin, acquire)
        else:
            yield from _from_prose(source, mapping, row, origin)


def _from_code(source: HuggingFace, mapping: Mapping, row: dict[str, Any], origin: str, acquire: Acquire) -> Candidates:
    path = str(_first(row, mapping.path) or "")
    stated = str(row.get(mapping.language) or "").lower()
    language = stated if stated in LANGUAGES.values() else language_of(path)
    (column,) = mapping.text
    content = row.get(column)
    if language is None:
        yield Candidate(origin, reason="other_language", detail=f"{stated or path}")
    elif not isinstance(content, str):
        yield Candidate(origin, reason="empty", detail=f"column {column!r} holds no text")
    else:
        data, licence = content.encode("utf-8", "surrogatepass"), _licence(row, mapping)
        yield from from_file(path, data, language, origin, licence, source, acquire)


def _from_prose(source: HuggingFace, mapping: Mapping, row: dict[str, Any], origin: str) -> Candidates:
    category = str(row.get(mapping.category) or mapping.fixed_category)
    language = str(row.get(mapping.language) or mapping.fixed_language)
    for column in mapping.text:
        value = row.get(column)
        text = value.strip() if isinstance(value, str) else ""
        if not text and len(mapping.text) > 1:
            continue
        place = f"{origin}:{column}" if len(mapping.text) > 1 else origin
        reason, detail = _problem(text, source.sizes)
        text = "" if reason == "too_long" else text
        yield Candidate(place, text, language, category, _licence(row, mapping), reason, detail)


def _problem(text: str, sizes: Sizes) -> tuple[str, str]:
    if not text:
        return "empty", "no text in this row"
    if "\0" in text:
        return "binary", f"NUL character at {text.index(chr(0)):,}"
    if len(text) < sizes.min_chars:
        return "too_short", f"{len(text):,} characters; at least {sizes.min_chars:,}"
    if len(text) > sizes.max_chars:
        return "too_long", f"{len(text):,} characters; at most {sizes.max_chars:,}"
    return "", ""


def _licence(row: dict[str, Any], mapping: Mapping) -> str:
    stated = _first(row, mapping.licence)
    if isinstance(stated, (list, tuple)):
        return licences.of_names(map(str, stated))
    return licences.of_name(stated) if isinstance(stated, str) and stated else mapping.fixed_licence


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[column] for column in columns if row.get(column)), None)
