"""What a licence asks of whoever publishes; what an allow-list covers is in tests/stages/test_02_merge.py."""

from __future__ import annotations

import pytest

from shared.spdx import obligation


@pytest.mark.parametrize("expression", ["MIT", "Apache-2.0", "CC0-1.0", "MIT OR GPL-3.0-only", "unknown", ""])
def test_a_permissive_licence_asks_nothing_beyond_its_notice(expression: str) -> None:
    assert obligation(expression) == ""


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("CC-BY-SA-4.0", "share alike"),
        ("cc-by-sa-3.0", "share alike"),
        ("CC-BY-4.0", "attribution"),
        ("CC-BY-NC-SA-4.0", "no commercial use"),
        ("GPL-2.0-or-later WITH Classpath-exception-2.0", "copyleft"),
        ("MIT AND LGPL-2.1-only", "changes to it"),
        ("CC-BY-4.0 OR GPL-3.0-only", "copyleft"),
        ("(MIT OR Apache-2.0) AND CC-BY-4.0", "attribution"),
    ],
)
def test_a_licence_that_asks_for_something_says_what(expression: str, said: str) -> None:
    assert said in obligation(expression)


def test_an_attribution_licence_is_not_taken_for_share_alike() -> None:
    assert "share alike" not in obligation("CC-BY-4.0")
