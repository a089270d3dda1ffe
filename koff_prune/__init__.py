"""koff-prune: knowledge offloading for language models (KOFF, arXiv 2605.29075).

Everything is imported on first use, so that `import koff_prune` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "apply": "koff_prune.api",
    "learn": "koff_prune.api",
    "plan": "koff_prune.api",
    "cut": "koff_prune.api",
    "export": "koff_prune.api",
    "compare": "koff_prune.api",
    "verify": "koff_prune.bundling",
    "load_bundle": "koff_prune.bundling",
    "attach_memory": "koff_prune.bundling",
    "load_backbone": "koff_prune.cut",
    "load_recipe": "koff_prune.reading",
    "Recipe": "koff_prune.recipe",
    "KoffError": "koff_export.errors",
}
__all__ = [*_WHERE, "__version__"]

if TYPE_CHECKING:
    from koff_export.errors import KoffError
    from koff_prune.api import apply, compare, cut, export, learn, plan
    from koff_prune.bundling import attach_memory, load_bundle, verify
    from koff_prune.cut import load_backbone
    from koff_prune.reading import load_recipe
    from koff_prune.recipe import Recipe


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module koff_prune has no attribute {name}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value  # a submodule of the same name (cut, plan, learn) must not shadow it later
    return value
