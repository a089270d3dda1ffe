"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class KoffError(Exception):
    """A user's mistake, told in one sentence that names the key, the value and the mend.

    Command lines print it as ``error: …`` and exit with code 2, without a traceback.
    """
