"""A run's own tables of tensors: written aside, synced, renamed; known by a checksum when they are read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from koff_export.errors import KoffError
from koff_export.files import check_safetensors, disk_errors, fsync_path

_SUM = "sha256"


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, *, checksum: bool = True) -> None:
    """Writes a safetensors file aside and renames it.

    Args:
        tensors: By name.
        path: Of the file.
        checksum: Of all tensors, kept in the header; not for gigabytes that are read in parts.

    Raises:
        KoffError: The disk is full, or refuses.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        try:
            save_file(whole, aside, metadata={_SUM: _digest(whole)} if checksum else None)
            fsync_path(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        KoffError: It is missing, cut short, or not as it was written.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    damaged = KoffError(f"{path}: is missing or damaged; remove it, and --resume makes it again")
    try:
        check_safetensors(path)
    except KoffError as error:
        raise damaged from error
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get(_SUM)
    if told is not None and told != _digest(tensors):
        raise damaged
    return tensors


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
