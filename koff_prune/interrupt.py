"""Interruptions that lose nothing: what is at work finishes its step first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from koff_prune.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the keyboard's, and what a scheduler sends
ECHO = 2.0  # seconds within which a signal is the same one: a launcher passes on what its group has received


class Interruption:
    """While it lasts, the first SIGINT or SIGTERM is noted; a second one interrupts at once.

    Attributes:
        asked: Whether one has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers there alone
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def ask(self) -> None:
        """As a first signal: one that has come to another process."""
        if not self.asked:
            self.asked, self._first = True, time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._first > ECHO:
                raise KeyboardInterrupt
            return
        self.ask()
        say("stopping once this step is finished and saved; a second signal stops at once")
