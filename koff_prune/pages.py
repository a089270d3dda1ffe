"""Pages for people: jinja templates of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def infinite(value: Any) -> Any:
    """What `finite` wrote of figures alone, read back: null is infinity."""
    if isinstance(value, Mapping):
        return {key: infinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [infinite(item) for item in value]
    return math.inf if value is None else value
