"""koff-prune: knowledge offloading for language models (KOFF, arXiv 2605.29075).

Everything is imported on first use, so that `import koff_prune` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
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
    "load_tokenizer": "koff_prune.attach",
    "Router": "koff_prune.router",
    "load_backbone": "koff_prune.cut",
    "load_recipe": "koff_prune.reading",
    "Recipe": "koff_prune.recipe",
    "KoffError": "koff_export.errors",
}
__all__ = [
    "KoffError",
    "Recipe",
    "Router",
    "__version__",
    "apply",
    "attach_memory",
    "compare",
    "cut",
    "export",
    "learn",
    "load_backbone",
    "load_bundle",
    "load_recipe",
    "load_tokenizer",
    "plan",
    "verify",
]

if TYPE_CHECKING:
    from koff_export.errors import KoffError as KoffError
    from koff_prune.api import apply as apply
    from koff_prune.api import compare as compare
    from koff_prune.api import cut as cut
    from koff_prune.api import export as export
    from koff_prune.api import learn as learn
    from koff_prune.api import plan as plan
    from koff_prune.attach import attach_memory as attach_memory
    from koff_prune.attach import load_tokenizer as load_tokenizer
    from koff_prune.bundling import load_bundle as load_bundle
    from koff_prune.bundling import verify as verify
    from koff_prune.cut import load_backbone as load_backbone
    from koff_prune.reading import load_recipe as load_recipe
    from koff_prune.recipe import Recipe as Recipe
    from koff_prune.router import Router as Router


class _Package(ModuleType):
    """This package: `koff_prune.learn` is the function, also after the module of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module koff_prune has no attribute {name}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
