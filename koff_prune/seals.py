"""Folders that are known by the checksums of their files: a bit that changes later is seen."""

from __future__ import annotations

from pathlib import Path

from koff_export.errors import KoffError
from koff_export.files import fsync_path, read_json, safe_join, sha256_file, write_json

SEAL = "complete"  # the file inside a whole folder


def seal(folder: Path, name: str | None = None) -> None:
    """Marks a written folder as whole: its files are on the disk, and their checksums beside them.

    Args:
        folder: Written aside, maybe.
        name: That it will have; default: its own.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    for path in files:
        fsync_path(path)
    sums = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    write_json(folder / SEAL, {"name": name or folder.name, "files": sums})


def changed(folder: Path) -> str | None:
    """The first file that is not as it was sealed; all of them are read."""
    try:
        told = read_json(folder / SEAL)
    except KoffError:
        return SEAL
    if (
        not isinstance(told, dict)
        or told.get("name") != folder.name
        or not isinstance(told.get("files"), dict)
    ):
        return SEAL
    for name, digest in told["files"].items():
        try:
            if sha256_file(safe_join(folder, name)) != digest:
                return str(name)
        except (KoffError, OSError):
            return str(name)
    return None


def check_seal(folder: Path, mend: str) -> None:
    """Refuses a folder that is not as it was sealed; one without a seal was never given one.

    Args:
        folder: Of a stage.
        mend: What to remove, so that --resume makes it again.

    Raises:
        KoffError: A file of it is missing, or has changed since.
    """
    if (folder / SEAL).exists() and (bad := changed(folder)) is not None:
        raise KoffError(f"{folder / bad}: is missing or damaged; remove {mend}, and --resume makes it again")


def sealed(folder: Path) -> bool:
    """Whether a folder has a seal, whatever it says."""
    found = folder / SEAL
    return found.is_file() and found.stat().st_size > 0
