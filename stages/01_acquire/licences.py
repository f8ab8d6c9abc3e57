"""Licences as SPDX identifiers: from the text of a licence file, from package metadata, from a data set's column.

``unknown`` is an answer: nothing is guessed, and stage 02 decides by its allow-list what may go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

UNKNOWN = "unknown"

# Phrases as they read after _plain(): lower case, punctuation and runs of white space turned into one space.
# All phrases of a row must be there; a row with a word to exclude must not hold it.
_FINGERPRINTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "MIT",
        (
            "permission is hereby granted free of charge to any person obtaining a copy",
            "the above copyright notice and this permission notice shall be included in all",
            "the software is provided as is",
        ),
        (),
    ),
    (
        "MIT-0",
        (
            "permission is hereby granted free of charge to any person obtaining a copy",
            "the software is provided as is",
        ),
        ("the above copyright notice and this permission notice",),
    ),
    ("Apache-2.0", ("apache license version 2 0 january 2004",), ()),
    ("Apache-2.0", ("licensed under the apache license version 2 0",), ("apache license version 2 0 january 2004",)),
    (
        "BSD-4-Clause",
        ("redistribution and use in source and binary forms with or without", "all advertising materials mentioning"),
        (),
    ),
    (
        "BSD-3-Clause",
        ("redistribution and use in source and binary forms with or without", "to endorse or promote products derived"),
        ("all advertising materials mentioning",),
    ),
    (
        "BSD-2-Clause",
        (
            "redistribution and use in source and binary forms with or without",
            "redistributions in binary form must reproduce the above copyright notice",
        ),
        ("to endorse or promote products derived", "all advertising materials mentioning"),
    ),
    (
        "ISC",
        (
            "permission to use copy modify and or distribute this software for any purpose",
            "provided that the above copyright notice and this permission notice appear in all copies",
        ),
        (),
    ),
    (
        "0BSD",
        ("permission to use copy modify and or distribute this software for any purpose",),
        ("provided that the above copyright notice",),
    ),
    ("MPL-2.0", ("mozilla public license version 2 0",), ()),
    ("GPL-2.0-only", ("gnu general public license version 2 june 1991",), ()),
    ("GPL-3.0-only", ("gnu general public license version 3 29 june 2007",), ()),
    ("LGPL-2.1-only", ("gnu lesser general public license version 2 1 february 1999",), ()),
    ("LGPL-3.0-only", ("gnu lesser general public license version 3 29 june 2007",), ()),
    ("AGPL-3.0-only", ("gnu affero general public license version 3 19 november 2007",), ()),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",), ()),
    ("CC0-1.0", ("cc0 1 0 universal",), ()),
    ("PSF-2.0", ("python software foundation license version 2",), ()),
)
_ORDER = {spdx: number for number, (spdx, _, _) in enumerate(_FINGERPRINTS)}
_EITHER = re.compile(r"\bdual licen[sc]ed\b|\beither (of|license|licence|the)\b|\bat your option\b")
_LICENCE_FILE = re.compile(r"(un)?licen[cs]es?([-._].*)?|copying([-._].*)?", re.IGNORECASE)
_CODE_SUFFIX = re.compile(r"\.(py|pyi|js|ts|tsx|go|rs|sql|json|ya?ml|toml|html|xml|sh)$", re.IGNORECASE)


def is_licence_file(name: str) -> bool:
    """Whether a file's base name is one that licences are kept under; the text decides which licence it is."""
    return _LICENCE_FILE.fullmatch(name) is not None and _CODE_SUFFIX.search(name) is None


def identify(text: str) -> list[str]:
    """SPDX identifiers of the licences whose text is in here, in a fixed order; empty when none is recognised.

    A bare licence text says no "or later", so the GNU family is reported as ``-only``.
    """
    plain = _plain(text)
    found = {
        spdx
        for spdx, phrases, absent in _FINGERPRINTS
        if all(phrase in plain for phrase in phrases) and not any(phrase in plain for phrase in absent)
    }
    return sorted(found, key=_ORDER.__getitem__)


def of_files(files: Mapping[str, str]) -> str:
    """One SPDX expression for the licence files of one directory, base name to text.

    Several licences are joined with ``OR`` when a file says so (``either of``, ``dual-licensed``) or when each has a
    file of its own named after it (``LICENSE-MIT``, ``LICENSE-APACHE``); otherwise with ``AND``, the safe reading.
    ``COPYING`` beside ``COPYING.LESSER`` is the LGPL: that text adds permissions to the GPL's.
    """
    by_file = {name: identify(text) for name, text in sorted(files.items())}
    found = sorted({spdx for names in by_file.values() for spdx in names}, key=_ORDER.__getitem__)
    for version in ("3.0", "2.1"):
        if f"LGPL-{version}-only" in found:
            found = [spdx for spdx in found if not spdx.startswith("GPL-")]
    if len(found) < 2:
        return found[0] if found else UNKNOWN
    gnu = any("GPL" in spdx for spdx in found)  # the GNU texts themselves say "at your option"
    said = any(_EITHER.search(_plain(text)) for name, text in files.items() if not (gnu and by_file[name]))
    split = all(len(names) == 1 and re.search(r"[-._]", name) for name, names in by_file.items() if names)
    return (" OR " if said or split else " AND ").join(found)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


# ---------------------------------------------------------------- names

_NAMES = {
    "MIT": ("mit", "mit license", "the mit license", "expat"),
    "MIT-0": ("mit-0",),
    "Apache-2.0": (
        *("apache-2.0", "apache 2.0", "apache 2", "apache license 2.0", "apache license, version 2.0"),
        *("apache license version 2.0", "apache software license", "apache software license 2.0", "asl 2.0"),
        *("apache-2.0 license", "apache2.0", "apache 2.0 license"),
    ),
    "BSD-2-Clause": ("bsd-2-clause", "bsd 2-clause", "bsd-2", "simplified bsd", "bsd 2-clause license"),
    "BSD-3-Clause": (
        *("bsd-3-clause", "bsd 3-clause", "bsd-3", "new bsd", "new bsd license", "modified bsd"),
        *("3-clause bsd", "3-clause bsd license", "bsd 3-clause license"),
    ),
    "BSD-4-Clause": ("bsd-4-clause",),
    "ISC": ("isc", "isc license", "isc license (iscl)"),
    "0BSD": ("0bsd",),
    "MPL-2.0": ("mpl-2.0", "mpl 2.0", "mozilla public license 2.0 (mpl 2.0)", "mozilla public license 2.0"),
    "GPL-2.0-only": ("gpl-2.0", "gpl-2.0-only", "gplv2", "gnu general public license v2 (gplv2)"),
    "GPL-2.0-or-later": (
        *("gpl-2.0-or-later", "gpl-2.0+", "gplv2+"),
        "gnu general public license v2 or later (gplv2+)",
    ),
    "GPL-3.0-only": ("gpl-3.0", "gpl-3.0-only", "gplv3", "gnu general public license v3 (gplv3)"),
    "GPL-3.0-or-later": (
        *("gpl-3.0-or-later", "gpl-3.0+", "gplv3+"),
        "gnu general public license v3 or later (gplv3+)",
    ),
    "LGPL-2.1-only": ("lgpl-2.1", "lgpl-2.1-only"),
    "LGPL-2.1-or-later": ("lgpl-2.1-or-later", "lgpl-2.1+"),
    "LGPL-3.0-only": ("lgpl-3.0", "lgpl-3.0-only", "lgplv3", "gnu lesser general public license v3 (lgplv3)"),
    "LGPL-3.0-or-later": (
        *("lgpl-3.0-or-later", "lgpl-3.0+", "lgplv3+"),
        "gnu lesser general public license v3 or later (lgplv3+)",
    ),
    "AGPL-3.0-only": ("agpl-3.0", "agpl-3.0-only", "agplv3", "gnu affero general public license v3"),
    "AGPL-3.0-or-later": ("agpl-3.0-or-later", "gnu affero general public license v3 or later (agplv3+)"),
    "Unlicense": ("unlicense", "the unlicense", "the unlicense (unlicense)"),
    "CC0-1.0": ("cc0-1.0", "cc0", "cc0 1.0 universal (cc0 1.0) public domain dedication"),
    "CC-BY-4.0": ("cc-by-4.0",),
    "CC-BY-SA-3.0": ("cc-by-sa-3.0",),
    "CC-BY-SA-4.0": ("cc-by-sa-4.0",),
    "PSF-2.0": ("psf-2.0", "psf", "python software foundation license"),
    "EPL-1.0": ("epl-1.0",),
    "EPL-2.0": ("epl-2.0",),
    "Artistic-2.0": ("artistic-2.0",),
    "Zlib": ("zlib", "zlib/libpng license"),
    "BSL-1.0": ("bsl-1.0", "boost software license 1.0 (bsl-1.0)"),
}
_BY_NAME = {name: spdx for spdx, names in _NAMES.items() for name in (*names, spdx.lower())}
_OPERATOR = re.compile(r"(\(|\)|\s+(?:AND|OR|WITH)\s+)", re.IGNORECASE)


def of_name(name: str) -> str:
    """The SPDX expression a person or a platform meant: ``Apache 2.0`` -> ``Apache-2.0``; ``unknown`` when unclear.

    An expression is read part by part; one part that is not known makes the whole unknown. ``BSD`` alone is unclear.
    """
    name = " ".join(name.split())
    if known := _BY_NAME.get(name.lower().removesuffix(".")):
        return known
    parts = [part for part in _OPERATOR.split(name) if part.strip()]
    words = []
    for part in parts:
        word = part.strip()
        if word in "()" or word.upper() in ("AND", "OR", "WITH"):
            words.append(word.upper())
        elif (spdx := _BY_NAME.get(word.lower())) is not None:
            words.append(spdx)
        else:
            return UNKNOWN
    return " ".join(words).replace("( ", "(").replace(" )", ")") if len(words) > 1 else UNKNOWN


def of_names(names: Iterable[str]) -> str:
    """Several names that all hold at once, joined with ``AND``; one that is not known makes the whole unknown."""
    found = sorted({of_name(name) for name in names})
    if not found or UNKNOWN in found:
        return UNKNOWN
    return " AND ".join(f"({spdx})" if " OR " in spdx and len(found) > 1 else spdx for spdx in found)
