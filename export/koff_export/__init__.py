"""What leaves the workshop: the bundle, its ONNX graph and the runtime that needs no torch.

Importing this package is cheap: `Runtime` and `KoffError` are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koff_export.errors import KoffError
    from koff_export.runtime import Runtime

__version__ = "0.1.0"
__all__ = ["KoffError", "Runtime", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads an exported name on first use, so that `import koff_export` costs next to nothing."""
    if name == "KoffError":
        from koff_export.errors import KoffError

        return KoffError
    if name == "Runtime":
        from koff_export.runtime import Runtime

        return Runtime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
