"""A repository as huggingface_hub keeps it in its cache."""

from __future__ import annotations

import os
from pathlib import Path


def hub_snapshot(bundle: Path, cache: Path) -> Path:
    """Moves a bundle into the cache as the repository someone/slim: links into blobs beside them."""
    repository = cache / "models--someone--slim"
    snapshot = repository / "snapshots" / ("0123abcd" * 5)
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in bundle.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / str(number))
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot
