"""Leave a training that is paid by the step, with what is paid saved: Ctrl-C is a wish here, not a blow."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

LEAVE_S = 120.0
"""How long leaving may take: two steps under way are answered and a state is kept in a minute when all is well; below
the 200 s after which docker/runner.py has a container killed."""


class Leaving:
    """Hears Ctrl-C while its block lasts, and SIGTERM and SIGHUP, which :func:`shared.stage.run` turns into it.

    Whoever waits looks at ``deadline`` and leaves by itself; whoever presses Ctrl-C once more leaves at once.

    Attributes:
        deadline: when to be gone, by the monotonic clock; infinite while nobody wants to leave.
        interrupted: whether somebody pressed Ctrl-C; else it was an error that asked.
    """

    def __init__(self) -> None:
        self.deadline, self.interrupted = float("inf"), False
        self._before: Any = None

    @property
    def asked(self) -> bool:
        return self.deadline < float("inf")

    def ask(self) -> None:
        """Be gone in :data:`LEAVE_S` seconds."""
        self.deadline = min(self.deadline, time.monotonic() + LEAVE_S)

    def __enter__(self) -> Leaving:
        if threading.current_thread() is threading.main_thread():  # only there can signals be heard
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.interrupted = True
        self.ask()
