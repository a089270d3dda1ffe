"""Pages for people: jinja templates of this package, and text files that are whole or absent."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koff_export.files import disk_errors, fsync_path


def render(template: str, **values: Any) -> str:
    """One HTML file, nothing fetched, no script: `template` of this package filled with `values`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(signed=signed, **values)


def signed(form: str, value: float) -> str:
    """`value` in the format `form`, with a true minus sign."""
    return form.format(value).replace("-", "−")


def finite(value: Any) -> Any:
    """JSON has no infinity: a perplexity that overflowed is written as null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Writes aside, syncs, renames.

    Raises:
        KoffError: The disk is full or may not be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
