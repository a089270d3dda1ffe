"""The one exception that means "the user can mend this", and what torch says when memory has run out."""

from __future__ import annotations


class KoffError(Exception):
    """A user's mistake, told in one sentence that names the key, the value and the mend.

    Command lines print it as ``error: …`` and exit with code 2, without a traceback.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether a RuntimeError means it: torch has an exception of its own for GPUs, on the CPU only words."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    )
