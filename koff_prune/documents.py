"""From a source in a recipe to documents: (key, text) pairs, in the order of the files.

Everything is streamed, so that nothing is copied; `records.py` reads the files.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NoReturn

from koff_export.errors import KoffError
from koff_prune.chat import chat_of
from koff_prune.packages import fetch_files
from koff_prune.progress import say
from koff_prune.recipe import TextSource
from koff_prune.records import Record, first_line, kind_of, records, rows, text_of
from koff_prune.spool import pieces
from koff_prune.templates import lookup, named_by, unknown_fields

_PIECE, _LONG_PIECE = 2_000, 8_000  # characters; see `_pieces`
_STDLIB_BYTES = (500, 400_000)
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(source: TextSource, *, cache: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields the documents of one source.

    Args:
        source: Its local path absolute, or relative to the working folder.
        cache: Replaces the cache folder of packages.

    Yields:
        Key and text, neither empty. Without `source.key`, a text file's key is its name, a query's its first
        column and a record's its text. Records of one file that share a key are one document: their texts
        joined by line breaks in the order of the file, or the text alone when all say the same, as rows that
        repeat a question for each answer do.

    Raises:
        KoffError: A missing or unreadable file, a template that does not fit the records, a query that fails.
    """
    remove = re.compile(source.remove) if source.remove else None
    all_rows = (
        (i, named, f"{place}: record {n}", record)
        for i, (named, place, table) in enumerate(_tables(source, cache))
        for n, record in enumerate(table, 1)
    )
    fields: list[str] = []
    unknown: set[str] | None = None  # of the template's fields, what no record has had so far
    read = empty = nameless = 0
    for (_, named), table in groupby(islice(all_rows, source.limit), key=lambda row: row[:2]):
        template = source.key or ("{key}" if named else None)
        grouped: dict[str, list[str]] = {}
        for _, _, place, record in table:
            fields = fields or list(record)
            if not _wanted(record, source):
                continue
            try:
                if source.messages:
                    text: str = chat_of(lookup(record, source.messages)) or ""
                else:
                    text = named_by(source.text, record)
                    if unknown is None or unknown:
                        lacks = unknown_fields(source.text, record)
                        unknown = lacks if unknown is None else unknown & lacks
                    text = (remove.sub("", text) if remove else text).strip()
                key = named_by(template, record) if template else ""
            except ValueError as error:
                under = f" under `messages: {source.messages}`" if source.messages else ""
                raise KoffError(f"{place}{under}: {error}; the fields are {', '.join(record)}") from error
            read += 1
            empty += not text
            nameless += bool(text and not key)
            if not text:
                continue
            if template is None or source.messages:
                yield key or text, text
            else:
                grouped.setdefault(key or text, []).append(text)
        for key, texts in grouped.items():
            yield key, texts[0] if len(set(texts)) == 1 else "\n".join(texts)
    _tell(source, fields, read, empty, nameless)
    if read > empty and unknown:
        raise KoffError(
            f'{describe(source)}: no record has `{sorted(unknown)[0]}`, which `text: "{source.text}"` names;'
            f" the fields are {', '.join(fields)}"
        )


def _tell(source: TextSource, fields: list[str], read: int, empty: int, nameless: int) -> None:
    """Says how many records gave nothing, or no key; refuses keys of a recipe that give nothing at all."""
    known = f"; the fields are {', '.join(fields)}"
    found = read - empty
    if source.messages:
        what = f"an assistant's turn that answers something in `{source.messages}`"
        if fields and not found:
            raise KoffError(f"{describe(source)}: no record has {what}{known}")
        if empty:
            say(f"{describe(source)}: {empty} of {read} records have no {what[3:]}, and are left out")
    elif fields and not found:
        where = f" and `where: {source.where}`" if source.where else ""
        raise KoffError(
            f'{describe(source)}: no record gives any text under `text: "{source.text}"`{where}{known}'
        )
    elif empty:
        lost = f"{empty} of {read} records give no text"
        say(f'{describe(source)}: {lost} under `text: "{source.text}"`, and are left out')
    if source.key and nameless:
        if nameless == found:
            raise KoffError(f'{describe(source)}: no record gives any key under `key: "{source.key}"`{known}')
        lost = f"{nameless} of {found} records give no key"
        say(f'{describe(source)}: {lost} under `key: "{source.key}"`, and stand for themselves')


def describe(source: TextSource) -> str:
    """A source in a few words, for messages."""
    if source.python_stdlib:
        return "python_stdlib"
    kind = "package" if source.package else "hub" if source.hub else "path"
    return f"{kind} {getattr(source, kind)}"


def _wanted(record: Record, source: TextSource) -> bool:
    return all(_says(lookup(record, path), value) for path, value in (source.where or {}).items())


def _says(found: Any, value: Any) -> bool:
    """Whether a field has a value; where a table is text alone, also as text."""
    if isinstance(found, str) and isinstance(value, bool):
        return found.strip().lower() == str(value).lower()
    if isinstance(found, str) and isinstance(value, int | float):
        return found.strip() in (str(value), f"{value:g}")
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


def _tables(source: TextSource, cache: Path | None) -> Iterator[tuple[bool, str, Iterable[Record]]]:
    """Per file: whether its records name themselves (fields `key` and `text`), its name, its records."""
    if source.hub:
        yield False, describe(source), _hub(source)
        return
    files = sorted(_files(source, cache))
    texts = [(name, path) for name, path in files if kind_of(path) == "text"]
    tables = [path for _, path in files if kind_of(path) != "text"]
    if source.query and not any(kind_of(path) == "sqlite" for path in tables):
        raise KoffError(f"{describe(source)}: holds no SQLite file for `query` to read; leave `query` out")
    for path in tables:
        if (kind := kind_of(path)) == "sqlite":
            yield True, str(path), rows(path, source.query)
        else:
            yield False, str(path), records(path, kind)
    if len(files) == 1 and texts and not source.python_stdlib:
        yield True, describe(source), _pieces(*texts[0])
    elif texts:
        yield True, describe(source), ({"key": name, "text": text_of(path)} for name, path in texts)


def _files(source: TextSource, cache: Path | None) -> list[tuple[str, Path]]:
    """Name and path of every file meant."""
    patterns = [source.files] if isinstance(source.files, str) else source.files
    if source.package and source.sha256 and patterns:
        paths = fetch_files(source.package, patterns, source.sha256, cache=cache)
        return [(path.as_posix().split(f"/{source.sha256}/files/", 1)[1], path) for path in paths]
    if source.python_stdlib:
        root = Path(sysconfig.get_path("stdlib"))
        smallest, largest = _STDLIB_BYTES
        return [
            (name, path)
            for name, path in _walk(root, patterns or ["*.py"], whole=False)
            if path.suffix == ".py"
            and not _STDLIB_SKIPPED.intersection(Path(name).parts)
            and smallest <= path.stat().st_size <= largest
        ]
    root = Path(source.path or "").expanduser()
    if root.is_file():
        if patterns and not any(fnmatch.fnmatchcase(root.name, p) for p in patterns):
            raise KoffError(f"path {source.path}: is one file, which {patterns} does not match; mend `files`")
        return [(root.name, root)]
    if not root.is_dir():
        raise KoffError(f"path {source.path}: there is no such file or folder")
    files = _walk(root, patterns or ["*"])
    if not files:
        what = (
            f"no file in this folder matches {patterns}; mend `files`" if patterns else "the folder is empty"
        )
        raise KoffError(f"path {source.path}: {what}")
    return files


def _walk(root: Path, patterns: list[str], *, whole: bool = True) -> list[tuple[str, Path]]:
    """Name and path of the files below a folder; links are followed, each folder is entered once.

    Raises:
        KoffError: Of what must be `whole`, a folder may not be read, or a link leads nowhere.
    """
    found: list[tuple[str, Path]] = []
    entered: set[str] = set()
    for folder, inside, files in os.walk(root, onerror=_unreadable if whole else None, followlinks=True):
        place = os.path.realpath(folder)
        inside[:] = [] if place in entered else sorted(d for d in inside if not d.startswith("."))
        for file in [] if place in entered else files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            wanted = not file.startswith(".") and any(fnmatch.fnmatchcase(name, p) for p in patterns)
            if wanted and path.is_file():
                found.append((name, path))
            elif whole and wanted and path.is_symlink() and not path.exists():
                raise KoffError(f"{path}: is a link to nothing; fetch it, or leave it out with `files`")
        entered.add(place)
    return found


def _unreadable(error: OSError) -> NoReturn:
    what = (error.strerror or str(error)).lower()
    raise KoffError(f"cannot read the folder {error.filename}: {what}; mend it, or leave it out") from error


def _pieces(name: str, path: Path) -> Iterator[Record]:
    """A lone text file as several documents, so that it can be split.

    A piece ends at the first blank line after `_PIECE` characters, or at any line end after `_LONG_PIECE`; a
    line that is longer still is divided at spaces.
    """
    piece: list[str] = []
    size = number = 0
    lines = text_of(path).splitlines(keepends=True)
    for part in (part for line in lines for part in pieces(line, _LONG_PIECE)):
        piece.append(part)
        size += len(part)
        if size >= _LONG_PIECE or (size >= _PIECE and not part.strip()):
            yield {"key": f"{name}#{number}", "text": "".join(piece)}
            piece, size, number = [], 0, number + 1
    if piece:
        yield {"key": f"{name}#{number}", "text": "".join(piece)}


def _hub(source: TextSource) -> Iterator[Record]:
    from datasets import load_dataset

    try:
        yield from load_dataset(
            source.hub, name=source.config, revision=source.revision, split=source.dataset_split,
            data_files=source.files, streaming=True,
        )  # fmt: skip
    except Exception as error:  # as above, and the hub's and the network's
        raise KoffError(
            f"hub {source.hub}: the dataset cannot be read ({first_line(error)}); "
            "check its id, `config`, `dataset_split`, `files` and the network"
        ) from error
