"""Where a bundle keeps its memories, and what may be done to them there."""

from __future__ import annotations

from pathlib import Path

from koff_export.bundle import Manifest
from koff_export.errors import KoffError
from koff_export.files import safe_join
from koff_prune.packing import check_spelling

ADDING = ".adding-"  # and a name: where `memory add` trains, inside the bundle


def beside(bundle: Path, name: str) -> tuple[Path, Path]:
    """Where a memory stands in the formats of others: ONNX, GGUF."""
    return bundle / f"onnx/memories/{name}.onnx_adapter", bundle / f"gguf/memories/{name}.gguf"


def check_places(bundle: Path, manifest: Manifest, name: str) -> None:
    """Before anything is read, written or deleted: is it a memory of this bundle alone, and in it?

    Raises:
        KoffError: It is part of the weights, its name is none, or its place leads out of the bundle.
    """
    if manifest.merged is not None:
        raise KoffError(
            f"{bundle}: holds the memory of {manifest.merged} merged, and no slots for others; use the bundle"
            " that was exported without --merge"
        )
    check_spelling(name)
    for path in (bundle / "memories" / name, *beside(bundle, name)):
        for place in (path.parent, path):
            safe_join(bundle, place.relative_to(bundle).as_posix())


def unlisted(bundle: Path, manifest: Manifest) -> list[str]:
    """Memories that the manifest does not tell of: their files were dropped in, or left by a kill."""
    found = {place.name for place in (bundle / "memories").glob("[!.]*")}
    for pattern in ("onnx/memories/[!.]*.onnx_adapter", "gguf/memories/[!.]*.gguf"):
        found |= {file.stem for file in bundle.glob(pattern)}
    return sorted(found - manifest.domains.keys())


def shipped(bundle: Path, lacks: str) -> KoffError:
    """What to say of a bundle that holds no more than a device needs."""
    return KoffError(f"{bundle}: was shipped for devices, without {lacks}; use its original")
