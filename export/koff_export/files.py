"""Files that are whole or absent: written aside, synced, renamed; read with suspicion.

Shared by koff_prune and koff_export. Everything here turns what can go wrong on a disk into a `KoffError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from koff_export.errors import KoffError

# what ONNX Runtime and torch say of a full disk, without the system's words
_FULL = ("Failed to write", "unexpected pos")
_WINDOWS = os.name == "nt"
_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or write to another folder",
    errno.EDQUOT: "the disk quota is used up: free some space, or write to another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}
# Bytes per element; the two 4-bit floats are absent because no koff file holds them.
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full disk, a missing permission and their like, while writing `path`, into a `KoffError`.

    safetensors and ONNX Runtime wrap the system's message in exceptions of their own, so the text is read
    too. Every other exception passes through untouched.
    """
    try:
        yield
    except KoffError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None:
            code = next((c for c in (errno.ENOSPC, errno.EDQUOT) if os.strerror(c) in str(error)), None)
        if code is None and any(words in str(error) for words in _FULL):
            code = errno.ENOSPC
        if code in _MENDS:
            raise KoffError(f"cannot write {os.fspath(path)}: {_MENDS[code]}") from error
        raise


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Flushes one file, or one folder's list of names, to the disk."""
    if _WINDOWS and os.path.isdir(path):
        return  # it opens no folders; a rename is as safe as it makes it
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename is then as safe as that system makes it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8: aside, synced, then renamed over `path`.

    Raises:
        KoffError: the disk is full or may not be written.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync_path(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON; see `write_text`.

    Raises:
        KoffError: the disk is full or may not be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], max_bytes: int = 64 << 20) -> Any:
    """Reads a JSON file of at most `max_bytes` bytes.

    Raises:
        KoffError: the file is missing, unreadable, too large, or not JSON.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise KoffError(f"cannot read {name}: {(error.strerror or str(error)).lower()}") from error
    if len(data) > max_bytes:
        raise KoffError(
            f"{name} is larger than {max_bytes} bytes, which no file of its kind is: it is damaged or foreign"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KoffError(
            f"{name} is not valid JSON ({error}): it is damaged, so write or fetch it again"
        ) from error


def inside(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether `path`, after symlinks, is below `root` or is a blob of the hub's repository that `root` is in.

    The hub's cache keeps a repository as `snapshots/<revision>/`, all links, and `blobs/` beside it.
    """
    base, target = Path(root).resolve(), Path(path).resolve()
    homes = [
        folder.parents[1] / "blobs" for folder in (base, *base.parents) if folder.parent.name == "snapshots"
    ]
    return any(target.is_relative_to(home) for home in (base, *homes))


def safe_join(root: str | os.PathLike[str], relative: str) -> Path:
    """`root`/`relative`, where `relative` is a POSIX path that must stay `inside` `root`.

    Raises:
        KoffError: `relative` is absolute, climbs with "..", or leads out of `root` through a symlink.
    """
    parts = PurePosixPath(relative).parts
    hostile = not parts or relative.startswith("/") or ".." in parts or "\\" in relative or "\0" in relative
    try:
        hostile = hostile or ":" in parts[0] or not inside(root, Path(root) / relative)
    except (OSError, RuntimeError, ValueError):  # a loop of links, half a character, a name without end
        hostile = True
    if hostile:
        raise KoffError(
            f"the path {relative!r} leads out of {os.fspath(root)}: this folder is damaged or hostile"
        )
    return Path(root) / relative


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def recover(destination: str | os.PathLike[str]) -> None:
    """Clears up after runs that died while writing `destination`, a file or a folder.

    A folder that was moved aside and never replaced comes back; what is half-written goes. Those of live
    processes stay.
    """
    target = Path(destination)
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(tmp|old)")
    for path in sorted(target.parent.iterdir()):  # ".old" sorts before ".tmp" of the same process
        match = pattern.fullmatch(path.name)
        if match is None or (_alive(int(match[1])) and int(match[1]) != os.getpid()):
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def recover_below(folder: str | os.PathLike[str]) -> None:
    """`recover` for everything below `folder`: what a kill left half-written may be large."""
    for path in sorted(Path(folder).rglob(".*")):
        if match := re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", path.name):
            recover(path.with_name(match[1]))


@contextmanager
def staged_dir(destination: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `destination`; when the block ends well, renames it into place.

    An existing folder is moved aside first and removed last, so that at every instant the old or the new one
    exists whole (`recover` brings the old one back after a crash between the two renames). When the block
    raises, the destination is as it was.

    Args:
        destination: Where the folder belongs.
        new: Nothing may be there, even if it came while the block ran.

    Raises:
        KoffError: the disk is full, may not be written, or `destination` is a file, or is there.
    """
    target = Path(destination).resolve()
    stage = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    with disk_errors(target):
        recover(target)
        if target.exists() and not target.is_dir():
            raise KoffError(f"{target} is a file: choose another folder, or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        try:
            yield stage
            for folder, _, names in os.walk(stage):
                for name in names:
                    fsync_path(os.path.join(folder, name))
                fsync_path(folder)
            if target.exists():
                if new:
                    raise KoffError(f"{target}: came to be there meanwhile; remove it, or name another")
                target.rename(aside)
            stage.rename(target)
            fsync_path(target.parent)
        except BaseException:
            if aside.exists() and not target.exists():
                aside.rename(target)
            shutil.rmtree(stage, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _tensor_span(entry: Any) -> tuple[int, int]:
    """Checks one header entry; returns its (begin, end) in bytes from the end of the header."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a whole number")
    size = _DTYPE_BYTES[entry["dtype"]]
    for n in shape:
        size *= n
    if end - begin != size:
        raise ValueError("a shape does not match its bytes")
    return begin, end


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checks a safetensors file's header against the file's size, without reading a tensor.

    Returns:
        Of every tensor, by name: its dtype as the format spells it ("F32", "BF16", …) and its shape.

    Raises:
        KoffError: the file is missing, truncated, or its header does not describe it.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        expected = 0
        for begin, end in sorted(_tensor_span(entry) for entry in header.values()):
            if begin != expected:
                raise ValueError("tensors overlap or leave a hole")
            expected = end
        if expected != size - 8 - length:
            raise ValueError(f"the tensors need {expected} bytes and {size - 8 - length} are there")
        return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    except OSError as error:
        raise KoffError(f"cannot read {name}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KoffError(
            f"{name} is not a whole safetensors file ({error}): fetch or write it again"
        ) from error
