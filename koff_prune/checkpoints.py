"""Checkpoints of a training: whole or absent, and known by the checksums of their files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.files import fsync_path, read_json, sha256_file, write_json
from koff_prune.progress import say

_LOGGED = {"phase", "step", "loss", "sparsity"}
SEAL = "complete"  # the file inside a whole checkpoint


def seal(folder: Path) -> None:
    """Marks a written checkpoint as whole: its files are on the disk, and their checksums beside them."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        fsync_path(path)
    write_json(folder / SEAL, {"checkpoint": folder.name, "files": {p.name: sha256_file(p) for p in files}})


def whole_checkpoints(folder: Path) -> list[Path]:
    """Sealed checkpoints, oldest first; what a kill left half-written is not among them."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if _is_sealed(p)), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint to go on from; one whose files have changed since is told and removed."""
    for path in reversed(whole_checkpoints(folder)):
        if (bad := _changed(path)) is None:
            return path
        say(f"{path}: {bad} is damaged, so that the checkpoint before it is gone on from")
        shutil.rmtree(path)
    return None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps that a training told of (log.json), for curves alone; of a damaged file, none."""
    try:
        log = read_json(folder / "log.json")
    except KoffError:
        return []
    whole = isinstance(log, list) and all(
        isinstance(entry, dict) and entry.keys() >= _LOGGED for entry in log
    )
    return log if whole else []


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_sealed(checkpoint: Path) -> bool:
    return (checkpoint / SEAL).is_file() and (checkpoint / SEAL).stat().st_size > 0


def _changed(checkpoint: Path) -> str | None:
    """The first file that is not as it was sealed."""
    try:
        told = read_json(checkpoint / SEAL)
    except KoffError:
        return SEAL
    if not isinstance(told, dict) or told.get("checkpoint") != checkpoint.name:
        return SEAL
    for name, digest in told["files"].items():
        path = checkpoint / Path(name).name
        if not path.is_file() or sha256_file(path) != digest:
            return str(name)
    return None
