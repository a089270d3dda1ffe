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
from koff_prune.chat import Chat, chat_of
from koff_prune.packages import fetch_files
from koff_prune.progress import say
from koff_prune.recipe import TextSource
from koff_prune.records import Record, first_line, kind_of, records, rows, text_of
from koff_prune.templates import lookup, named_by, render

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
        (i, named, record) for i, (named, table) in enumerate(_tables(source, cache)) for record in table
    )
    fields: list[str] = []
    found, read, empty = False, 0, 0
    for (_, named), table in groupby(islice(all_rows, source.limit), key=lambda row: row[:2]):
        key_template = source.key or ("{key}" if named else None)
        if source.messages:
            for _, _, record in table:
                if _wanted(record, source) and (chat := _chat(source, record, key_template)) is not None:
                    found = True
                    yield chat
            continue
        grouped: dict[str, list[str]] = {}
        for _, _, record in table:
            fields = fields or list(record)
            if not _wanted(record, source):
                continue
            try:
                text = render(source.text, record)
                key = named_by(key_template, record) if key_template else ""
            except ValueError as error:
                raise KoffError(f"{describe(source)}: {error}") from error
            text = (remove.sub("", text) if remove else text).strip()
            read += 1
            if not text:
                empty += 1
                continue
            found = True
            if key_template is None:
                yield text, text
            else:
                grouped.setdefault(key or text, []).append(text)
        for key, texts in grouped.items():
            yield key, texts[0] if len(set(texts)) == 1 else "\n".join(texts)
    if empty and found:
        lost = f"{empty} of {read} records give no text"
        say(f'{describe(source)}: {lost} under `text: "{source.text}"`, and are left out')
    if source.messages and not found:
        raise KoffError(
            f"{describe(source)}: no record has an assistant's turn that answers something in"
            f" `{source.messages}`"
        )
    if fields and not found:
        where = f" and `where: {source.where}`" if source.where else ""
        raise KoffError(
            f'{describe(source)}: no record gives any text under `text: "{source.text}"`{where}; '
            f"the fields are {', '.join(fields)}"
        )


def _chat(source: TextSource, record: Record, key: str | None) -> tuple[str, Chat] | None:
    """A record's key and conversation; None where the assistant says nothing."""
    assert source.messages is not None
    try:
        chat = chat_of(lookup(record, source.messages))
        return None if chat is None else ((named_by(key, record) if key else "") or str(chat), chat)
    except ValueError as error:
        raise KoffError(
            f"{describe(source)}: under `messages: {source.messages}`: {error};"
            f" the fields are {', '.join(record)}"
        ) from error


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


def _tables(source: TextSource, cache: Path | None) -> Iterator[tuple[bool, Iterable[Record]]]:
    """Per file, whether its records name themselves (fields `key` and `text`), and the records."""
    if source.hub:
        yield False, _hub(source)
        return
    files = sorted(_files(source, cache))
    texts = [(name, path) for name, path in files if kind_of(path) == "text"]
    for _, path in files:
        if (kind := kind_of(path)) == "sqlite":
            yield True, rows(path, source.query)
        elif kind != "text":
            yield False, records(path, kind)
    if len(files) == 1 and texts and not source.python_stdlib:
        yield True, _pieces(*texts[0])
    elif texts:
        yield True, ({"key": name, "text": text_of(path)} for name, path in texts)


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

    A piece ends at the first blank line after `_PIECE` characters, or at any line end after `_LONG_PIECE`.
    """
    piece: list[str] = []
    size = number = 0
    for line in text_of(path).splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _LONG_PIECE or (size >= _PIECE and not line.strip()):
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
