"""Progress on the terminal: a bar where there is one, a line now and then where there is not."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)
_EVERY = 30.0  # seconds between lines without a terminal


class Bar:
    """One stage's progress in tokens (or any unit of work)."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self.label, self.total, self.progress = label, total, progress
        self.done, self.begun, self.printed = 0, time.monotonic(), time.monotonic()
        self.first = 0
        self.task = progress.add_task(label, total=total, note="") if progress else None

    def start_at(self, done: int) -> None:
        """Work that an earlier run has done already; it counts, but not as speed."""
        self.first = self.done = done
        self._show("")

    @property
    def rate(self) -> float:
        """Units of work per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.begun, 1e-9)

    def __call__(self, amount: int, note: str = "") -> None:
        """Counts `amount` more units; `note` is shown beside the bar."""
        self.done += amount
        self._show(note)

    def _show(self, note: str) -> None:
        note = f"{self.rate:,.0f} tokens/s {note}".rstrip() if self.done > self.first else note
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=self.done, note=note)
        elif time.monotonic() - self.printed > _EVERY:
            self.printed = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            say(f"{self.label}: {self.done / max(self.total, 1):.0%}, {note}, {left / 60:.1f} min left")


@contextmanager
def bar(label: str, total: int) -> Iterator[Bar]:
    """A progress bar for work of `total` tokens; on stderr, so that results can be piped."""
    seen = sys.stderr is not None and sys.stderr.isatty()  # rich takes FORCE_COLOR for a terminal
    if not seen or console.is_dumb_terminal:
        say(f"{label} …")
        yield Bar(label, total, None)
        return
    columns = (TextColumn("{task.description:<24}", markup=False), BarColumn(),
               TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Bar(label, total, progress)


def say(text: str) -> None:
    """One line for the user, on stderr; brackets in it are brackets, and no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """The libraries' own notices are for their developers; ours are one sentence each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that it can do without
    logging.getLogger("gguf").setLevel(logging.WARNING)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # of every attempt that it makes again

    transformers_logging.disable_progress_bar()
