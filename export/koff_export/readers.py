"""The tokenizers of an open bundle: the backbone's, and those of memories that have tokens of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.text import open_tokenizer


class Readers:
    """Tokenizers by memory, each opened once.

    Args:
        file: A file of the bundle by its path, checked; None where the bundle lists none such.
    """

    def __init__(self, file: Callable[[str], Path | None]) -> None:
        self._file = file
        self._backbone: Any = None
        self._own: dict[str, Any] = {}

    def of(self, memory: str | None) -> Any:
        """The tokenizer, a `tokenizers.Tokenizer`, of what is read with a loaded memory, or without one.

        Raises:
            KoffError: the bundle lists none, or it cannot be read.
        """
        if memory in self._own:
            return self._own[memory]
        if self._backbone is None:
            if (path := self._file("tokenizer.json")) is None:
                raise KoffError("the bundle lists no tokenizer.json: only token numbers can be used with it")
            self._backbone = open_tokenizer(path)
        return self._backbone

    def load(self, memory: str, path: Path | None, words: int) -> None:
        """Opens the tokenizer of a memory that has tokens of its own, `words` with the backbone's.

        Raises:
            KoffError: there is no path, or another's tokenizer.
        """
        if path is None:
            raise KoffError(
                f"the memory {memory!r} has tokens of its own, and no tokenizer is listed: fetch it again"
            )
        self._own[memory] = open_tokenizer(path, words)

    def forget(self, memory: str) -> None:
        """As if it had never been loaded."""
        self._own.pop(memory, None)
