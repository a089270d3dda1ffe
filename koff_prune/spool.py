"""Texts in a temporary file, so that a corpus may be larger than the memory, and their pieces."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from koff_export.files import disk_errors
from koff_prune.chat import Chat

IN_MEMORY = 2**24  # bytes of text up to which there is no file


class Place(NamedTuple):
    """Where a text, or a piece of one, stands: its first byte, its bytes, whether it is a conversation."""

    at: int
    length: int
    chat: bool


class Spool:
    """Texts one after the other, in the folder of temporary files (TMPDIR) once they are many."""

    def __init__(self) -> None:
        """No text yet."""
        # closed with the last of those who read from it
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._end = 0

    def add(self, text: str) -> Place:
        """Keeps a text.

        Raises:
            KoffError: The disk is full.
        """
        data = text.encode()
        with disk_errors(tempfile.gettempdir()):
            self._file.seek(self._end)
            self._file.write(data)
        place = Place(self._end, len(data), isinstance(text, Chat))
        self._end += len(data)
        return place

    def read(self, place: Place) -> str:
        """What stands there."""
        self._file.seek(place.at)
        text = self._file.read(place.length).decode()
        return Chat(text) if place.chat else text


class Texts(Sequence[str]):
    """Some texts of a spool, in an order of their own; each is read when it is asked for.

    Attributes:
        spool: That they stand in.
        places: Where.
    """

    def __init__(self, spool: Spool, places: Sequence[Place]) -> None:
        """Of one spool."""
        self.spool, self.places = spool, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if isinstance(index, slice):
            return Texts(self.spool, self.places[index])
        return self.spool.read(self.places[index])

    def as_they_lie(self) -> Iterator[tuple[int, Place, str]]:
        """Index, place and text of each, in the order of the file."""
        for index in sorted(range(len(self)), key=self.places.__getitem__):
            yield index, self.places[index], self[index]


def shuffled_pieces(texts: Texts, size: int, seed: int) -> Iterator[tuple[str, int, Place]]:
    """Of every piece of every text: a digest to sort by, the index of its text, where it is."""
    for owner, (at, _, chat), text in texts.as_they_lie():
        digest = hashlib.sha256(text.encode()).hexdigest()
        for number, piece in enumerate([text] if chat else pieces(text, size)):
            order = hashlib.sha256(f"{seed}\n{digest}\n{number}".encode()).hexdigest()
            length = len(piece.encode())
            yield order, owner, Place(at, length, chat)
            at += length


def pieces(text: str, size: int) -> Iterator[str]:
    """Divides a text into pieces of about `size` characters, at line ends or else at spaces."""
    start = 0
    while len(text) - start > size * 3 // 2:
        cut = text.rfind("\n", start + size // 2, start + size)
        if cut < 0:
            cut = text.rfind(" ", start + size // 2, start + size)
        end = cut + 1 if cut >= 0 else start + size
        yield text[start:end]
        start = end
    yield text[start:]
