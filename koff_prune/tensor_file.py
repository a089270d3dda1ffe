"""A run's own tables of tensors: written aside, synced, renamed; known by checksums when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from koff_export.errors import KoffError
from koff_export.files import check_safetensors, disk_errors, fsync_path

_SUMS = "checksums"  # in the header's metadata: sha256 of every tensor, and of the notes under _NOTES
_NOTES = ""  # no tensor's name


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, notes: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file aside and renames it.

    Args:
        tensors: By name.
        path: Of the file.
        notes: Text beside them, in the header.

    Raises:
        KoffError: The disk is full, or refuses.
    """
    notes = notes or {}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sums = {name: sum_of(tensor) for name, tensor in whole.items()} | {_NOTES: _sum_of_notes(notes)}
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(whole, aside, metadata={**notes, _SUMS: json.dumps(sums)})
            fsync_path(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


class TensorFile(Mapping[str, torch.Tensor]):
    """What `save_tensors` wrote; a tensor is read when it is asked for, the first time against its checksum.

    Attributes:
        notes: The text beside the tensors.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            KoffError: The file is missing, cut short, or not as it was written.
        """
        self._path, self._checked = path, set[str]()
        try:
            check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                self._names = list(file.keys())
                self.notes = dict(file.metadata() or {})
            self._sums: dict[str, str] = json.loads(self.notes.pop(_SUMS, "{}"))
        except (KoffError, SafetensorError, ValueError) as error:
            raise self._damaged() from error
        if self._sums and self._sums.get(_NOTES) != _sum_of_notes(self.notes):
            raise self._damaged()

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of a tensor, or the whole file would stay mapped.

        Raises:
            KeyError: There is none of that name.
            KoffError: It is not as it was written.
        """
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name).clone()
        if self._sums and name not in self._checked:  # a mask asks for its moments over and over
            if self._sums.get(name) != sum_of(found):
                raise self._damaged()
            self._checked.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _damaged(self) -> KoffError:
        return KoffError(f"{self._path}: is missing or damaged; remove it, and --resume makes it again")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads all of what `save_tensors` wrote.

    Raises:
        KoffError: It is missing, cut short, or not as it was written.
    """
    return dict(TensorFile(path))


def is_whole(path: Path) -> bool:
    """Whether a file is as `save_tensors` wrote it; all of it is read."""
    try:
        return all(tensor is not None for tensor in TensorFile(path).values())
    except KoffError:
        return False


def sum_of(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _sum_of_notes(notes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
