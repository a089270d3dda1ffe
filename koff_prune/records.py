"""Records of one file: json and csv as they are written, parquet through `datasets`, SQLite by a query."""

from __future__ import annotations

import csv
import glob
import json
import lzma
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fsspec.core import OpenFile, get_compression
from fsspec.implementations.local import LocalFileSystem

from koff_export.errors import KoffError

Record = dict[str, Any]
PACKED = (".gz", ".bz2", ".xz", ".zst")
_SQLITE = (".db", ".sqlite", ".sqlite3")
_KINDS = {".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json", ".csv": "csv",
          ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}  # fmt: skip
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar"}  # of several files
_FIELD = 1 << 30  # longest field of a csv file, characters
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)


def kind_of(path: Path) -> str:
    """`text`, `sqlite`, or which of `records`' kinds a file is, by its name."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    last = suffixes[-1] if suffixes else ""
    return "sqlite" if last in _SQLITE else _KINDS.get(last, "text")


def records(path: Path, kind: str) -> Iterator[Record]:
    """The records of a jsonl, json, csv, tsv, parquet or arrow file, one at a time.

    Raises:
        KoffError: It is empty, or no such file.
    """
    if path.stat().st_size == 0:
        raise KoffError(f"{path} is empty")
    read = {"json": _json, "csv": _csv, "tsv": _csv}.get(kind, _table)
    yield from read(path, kind)


def first_line(error: Exception) -> str:
    """What an error of a library says, or what it is caused by, in short."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def _json(path: Path, kind: str) -> Iterator[Record]:
    """An object a line, or one list of objects; `datasets` would make dates of texts that look so."""
    number = 0
    try:
        with _opened(path) as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            if start == "[":
                yield from (_object(path, one, n) for n, one in enumerate(json.loads(start + file.read()), 1))
                return
            for number, line in enumerate(_after(start, file), 1):
                if line.strip():
                    yield _object(path, json.loads(line), number)
    except UnicodeDecodeError as error:
        raise KoffError(f"{path} is not UTF-8 text; convert it") from error
    except json.JSONDecodeError as error:
        at = f"record {number}" if number else "it"
        raise KoffError(
            f"{path} cannot be read as json: {at} is no JSON ({error.msg}); write an object a line"
        ) from error
    except RecursionError as error:
        raise KoffError(f"{path} cannot be read as json: record {number} nests too deeply") from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # a damaged archive
        raise KoffError(f"{path} cannot be read as json: {first_line(error)}") from error


def text_of(path: Path) -> str:
    """The whole of a text file, unpacked where its name says that it is packed.

    Raises:
        KoffError: It is no UTF-8 text, damaged, or cannot be read.
    """
    try:
        with _opened(path) as file:
            text = str(file.read())
        if "\0" in text:
            raise KoffError(f"{path}: holds NUL characters, so it is no text; leave it out with `files`")
        return text
    except UnicodeDecodeError as error:
        raise KoffError(f"{path} is not UTF-8 text; convert it, or leave it out with `files`") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = (getattr(error, "strerror", None) or first_line(error)).lower()
        raise KoffError(f"cannot read {path}: {why}") from error


def _opened(path: Path, newline: str | None = None) -> OpenFile:
    """Text, unpacked on the way; the name means this file and no pattern.

    Raises:
        KoffError: What would unpack it is not installed, or it is an archive of several files.
    """
    if _ARCHIVES.intersection(s.lower() for s in path.suffixes[-2:]):
        raise KoffError(f"{path}: is an archive; unpack it, or leave it out with `files`")
    is_packed = path.suffix.lower() in PACKED
    packed = get_compression(path.name.lower(), "infer") if is_packed else None
    if packed is None and is_packed:
        raise KoffError(f"{path}: what is packed so takes `pip install zstandard`; do so, or unpack it")
    return OpenFile(
        LocalFileSystem(), str(path), mode="rt", compression=packed, encoding="utf-8-sig", newline=newline
    )


def _after(start: str, file: IO[str]) -> Iterator[str]:
    yield start + file.readline()
    yield from file


def _object(path: Path, one: Any, number: int) -> Record:
    if not isinstance(one, dict):
        raise KoffError(f"{path} cannot be read as json: record {number} is no object with fields")
    return one


def _csv(path: Path, kind: str) -> Iterator[Record]:
    """All fields as text, as they are written: 007 is no 7, and NA no gap."""
    before = csv.field_size_limit(_FIELD)
    number = 0
    try:
        with _opened(path, newline="") as file:
            table = csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",", strict=True)
            for number, row in enumerate(table, 1):
                if None in row:
                    raise KoffError(
                        f"{path} cannot be read as {kind}: record {number} has more fields than names"
                    )
                yield row
    except UnicodeDecodeError as error:
        raise KoffError(f"{path} is not UTF-8 text; convert it") from error
    except (csv.Error, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise KoffError(
            f"{path} cannot be read as {kind}: after record {number}, {first_line(error)}"
        ) from error
    finally:
        csv.field_size_limit(before)


def _table(path: Path, kind: str) -> Iterator[Record]:
    from datasets import load_dataset
    from pyarrow.parquet import read_metadata

    if "::" in str(path):
        raise KoffError(f"{path}: `::` in a path means something else to what reads it; rename it")
    try:
        if kind == "parquet" and not read_metadata(path).num_rows:
            return
        yield from load_dataset(kind, data_files=[glob.escape(str(path))], split="train", streaming=True)
    except Exception as error:  # datasets raises what its readers do: pyarrow's errors
        raise KoffError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


def rows(path: Path, query: str | None) -> Iterator[Record]:
    """Rows (key, text) of a query, which may read this SQLite file and do nothing else.

    Raises:
        KoffError: There is no query, it fails, or changes lie beside the file that are not in it yet.
    """
    if query is None:
        raise KoffError(f"{path} is a SQLite file: set `query` to SQL that yields (key, text) rows")
    for ending, mend in (("wal", "run `PRAGMA wal_checkpoint`"), ("journal", "open it once with sqlite3")):
        log = path.with_name(f"{path.name}-{ending}")
        if log.exists() and log.stat().st_size:
            raise KoffError(
                f"{path}: {log.name} beside it holds changes that are not settled yet; close what writes"
                f" it, or {mend}"
            )
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            connection.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
            )
            cursor = connection.execute(query)
            if len(cursor.description or ()) != 2:
                raise KoffError(f"query of {path.name}: must select two columns, the key and the text")
            for row in cursor:
                key, text = (_text(path, value) for value in row)
                yield {"key": key, "text": text}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise KoffError(f"query of {path.name}: {error}") from error


def _text(path: Path, value: Any) -> str:
    if not isinstance(value, bytes):
        return "" if value is None else str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise KoffError(f"query of {path.name}: a value is bytes that are no UTF-8 text") from error
