"""Errors written for a person: what happened, and the next command to type.

::

    SynthmillError               exit 1
    ├── SettingsError            exit 2   a setting, a flag or an input is wrong; nothing was spent
    ├── KeyMissingError          exit 2   a key is not set, or the provider refused it
    ├── MixedApisError           exit 2   live and stand-in outputs would mix
    ├── AccountingError          exit 3   planned is not kept + rejected: a bug of ours, never hidden
    ├── NothingKeptError         exit 4   every record was rejected, or a gate failed
    ├── BudgetError              exit 5   the next call would exceed BUDGET_USD, or its price is unknown
    ├── ProviderError            exit 6   a provider stays unreachable or refuses us; what is done is saved
    └── LeftOutError             exit 0   this machine cannot do it, and the command goes on without it
"""

from __future__ import annotations

import sys


class SynthmillError(Exception):
    """Base of all errors a person can mend. ``mend`` is the next command or step."""

    exit_code = 1
    heading = "error"

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.what}\n  next: {self.mend}" if self.mend else self.what


class SettingsError(SynthmillError):
    """A setting, a flag or an input is wrong; raised before anything is spent."""

    exit_code = 2


class KeyMissingError(SettingsError):
    """A provider's key is not set, or the provider refused it."""


class MixedApisError(SettingsError):
    """A run directory belongs to live services or to the stand-in, never to both."""


class AccountingError(SynthmillError):
    """planned = kept + rejected does not hold."""

    exit_code = 3


class NothingKeptError(SynthmillError):
    """No record goes on, or a gate failed; the rejects and the report are written."""

    exit_code = 4


class BudgetError(SynthmillError):
    """The next call would exceed ``BUDGET_USD``, or its price is unknown. What was paid for is saved."""

    exit_code = 5


class ProviderError(SynthmillError):
    """A provider refuses us for good, or stays unreachable. What was answered is saved."""

    exit_code = 6


class LeftOutError(SynthmillError):
    """This machine cannot do it, and whoever started us wants to go on without it; nothing was written."""

    exit_code = 0
    heading = "left out"


def complain(error: SynthmillError) -> int:
    """Print an error for a person on stderr; the exit code to leave with."""
    print(f"{error.heading}: {error}", file=sys.stderr)
    return error.exit_code
