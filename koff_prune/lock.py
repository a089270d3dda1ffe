"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from koff_export.errors import KoffError
from koff_prune import ranks


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds `folder`/.lock; of several processes of one run, the first does for all.

    Raises:
        KoffError: Another process holds it.
    """
    if ranks.rank():
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise KoffError(f"{folder}: another koff-prune is at work there; wait for it") from error
    try:
        yield
    finally:
        lock.release()
