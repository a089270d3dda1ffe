"""A packed memory, one file that is shipped alone: what it must be before a byte of it is believed."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.router import AUTO, BARE
from koff_prune.memory import FILES

PACKED = "koff-memory.json"  # the table of contents inside a packed memory
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FILES = (*FILES.values(), "adapter_config.json", "README.md", *_TOKENIZER)
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that an archive can tell
_LARGEST = 1 << 34  # bytes; no memory is larger


def pack(target: Path, contents: dict[str, Any], files: list[Path]) -> None:
    """Writes a packed memory: the same bytes from the same memory, whatever its files' times."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(PACKED, _TIME), json.dumps(contents, indent=1))
        for file in files:
            entry = zipfile.ZipInfo(file.name, _TIME)
            entry.file_size = file.stat().st_size
            with file.open("rb") as source, archive.open(entry, "w") as into:
                shutil.copyfileobj(source, into, 1 << 20)


def extract(packed: Path, into: Path) -> dict[str, Any]:
    """Checks everything that a packed memory says before a byte of it is believed."""
    try:
        with zipfile.ZipFile(packed) as archive:
            entries = {e.filename: e for e in archive.infolist()}
            table = entries.pop(PACKED, None)
            if table is None or table.file_size > 1 << 20 or len(entries) != len(archive.infolist()) - 1:
                raise KoffError(f"{packed}: is no packed memory; make one with `koff-prune memory pack`")
            if table.compress_type != zipfile.ZIP_STORED:
                raise KoffError(f"{packed}: is no packed memory; make one with `koff-prune memory pack`")
            contents = json.loads(archive.read(table))
            _check_contents(packed, contents, entries)
            for file, entry in entries.items():
                seen = hashlib.sha256()
                place = into / file
                with archive.open(entry) as source, disk_errors(place), place.open("xb") as target:
                    while piece := source.read(1 << 20):
                        seen.update(piece)
                        target.write(piece)
                if seen.hexdigest() != contents["files"][file]["sha256"]:
                    raise KoffError(f"{packed}: {file} has another sha256 than it says; fetch it again")
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, RuntimeError) as error:
        raise KoffError(f"{packed}: cannot be read as a packed memory ({error})") from error
    return dict(contents)


def _check_contents(packed: Path, contents: Any, entries: dict[str, zipfile.ZipInfo]) -> None:
    wrong = KoffError(f"{packed}: its table of contents is damaged or hostile; fetch it again")
    if not isinstance(contents, dict) or contents.get("format") != 1:
        raise wrong
    name, files, told = (contents.get(key) for key in ("name", "files", "told"))
    if not isinstance(contents.get("plan"), str) or not isinstance(told, dict) or not isinstance(files, dict):
        raise wrong
    check_spelling(name)
    if set(files) != set(entries) or not set(files) <= set(_FILES):
        raise wrong
    for file, entry in entries.items():
        said = files[file]
        if not isinstance(said, dict) or said.get("size") != entry.file_size or entry.file_size > _LARGEST:
            raise wrong
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise wrong  # so that nothing grows while it is read


def check_spelling(name: Any) -> None:
    """Raises KoffError where `name` cannot be a memory's."""
    from pydantic import TypeAdapter, ValidationError

    from koff_prune.fields import Name

    try:
        TypeAdapter(Name).validate_python(name, strict=True)
    except ValidationError as error:
        raise KoffError(
            f"memory {name!r}: a name has up to 64 letters, digits, dots, dashes and underscores"
        ) from error
    if name in (BARE, AUTO):
        raise KoffError(f"memory '{name}': is a word of koff-run's own; choose another name")
