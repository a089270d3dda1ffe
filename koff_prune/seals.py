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
    sums = _told(folder)
    if sums is None:
        return SEAL
    for name, digest in sums.items():
        try:
            if sha256_file(safe_join(folder, name)) != digest:
                return name
        except (KoffError, OSError):
            return name
    return None


def check_seal(folder: Path, mend: str) -> dict[str, str]:
    """Refuses a folder that is not as it was sealed; one without a seal was never given one.

    Args:
        folder: Of a stage.
        mend: What to remove, so that --resume makes it again.

    Returns:
        The sha256 of its files, by path, as they were found; none without a seal.

    Raises:
        KoffError: A file of it is missing, or has changed since.
    """
    if not (folder / SEAL).exists():
        return {}
    if (bad := changed(folder)) is not None:
        raise KoffError(
            f"{folder / bad}: is missing or damaged; remove {mend}, and --resume makes it again"
            f" (or, if it was changed on purpose, {folder / SEAL})"
        )
    return _told(folder) or {}


def sealed(folder: Path) -> bool:
    """Whether a folder has a seal, whatever it says."""
    found = folder / SEAL
    return found.is_file() and found.stat().st_size > 0


def _told(folder: Path) -> dict[str, str] | None:
    """The checksums that a folder's seal tells, or None of one that is damaged or another folder's."""
    try:
        told = read_json(folder / SEAL)
    except KoffError:
        return None
    files = told.get("files") if isinstance(told, dict) and told.get("name") == folder.name else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        return None
    return files
