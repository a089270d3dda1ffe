"""Checkpoints of a training: whole or absent, and known by the checksums of their files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.progress import say
from koff_prune.seals import changed, sealed

_LOGGED = {"phase", "step", "loss", "sparsity"}


def whole_checkpoints(folder: Path) -> list[Path]:
    """Sealed checkpoints, oldest first; what a kill left half-written is not among them."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if sealed(p)), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint to go on from; one whose files have changed since is told and removed."""
    for path in reversed(whole_checkpoints(folder)):
        if (bad := changed(path)) is None:
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
