"""Files of lines that a user names: their JSON, and mistakes told with their place."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from koff_export.errors import KoffError


@contextmanager
def at_line(path: str, number: int) -> Iterator[None]:
    """What is wrong with a line of a file is told with its place."""
    try:
        yield
    except KoffError as error:
        raise KoffError(f"{path}, line {number}: {error}") from error


def read_text(path: str) -> str:
    """A file that a user names, as text; `-` is standard input.

    Raises:
        KoffError: It cannot be read.
    """
    try:
        if path == "-":
            if sys.stdin is None:
                raise KoffError("there is no standard input: name a file")
            # as a file is read, whatever the locale's encoding
            return io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), encoding="utf-8-sig").read()
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise KoffError(f"cannot read {path}: {error}") from error


def json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of every line of a file that is not blank.

    Raises:
        KoffError: The file cannot be read, or a line is no JSON; names it.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise KoffError(f"{path}, line {number}: not valid JSON ({error})") from error
        yield number, row
