"""Bundles on the hub: `hf://org/name`, or `hf://org/name@revision`, fetched once into the hub's own cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from koff_export.bundle import LICENCES
from koff_export.errors import KoffError

SCHEME = "hf://"
TEXTS = ("*.json", "*.jinja", "*.md", *LICENCES)
FOR_TORCH = (*TEXTS, "*.safetensors")
FOR_DEVICES = (*TEXTS, "onnx/*")
_PLACE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?")


def local(bundle: str | os.PathLike[str], patterns: Sequence[str] | None = None) -> Path:
    """The folder of a bundle: as it is, or for `hf://…` what the hub's cache holds of it, fetched if need be.

    Args:
        bundle: A folder, or the bundle's place on the hub.
        patterns: Of the files that are wanted; None: all.

    Raises:
        KoffError: The place is none, huggingface_hub is not installed, or the hub does not give it.
    """
    name = os.fspath(bundle)
    if not name.startswith(SCHEME):
        return Path(name)
    place = _PLACE.fullmatch(name.removeprefix(SCHEME))
    if place is None:
        raise KoffError(f"{name}: is no place on the hub; write hf://org/name, or hf://org/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise KoffError(
            f"{name}: fetching from the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        wanted = None if patterns is None else list(patterns)
        return Path(snapshot_download(place[1], revision=place[2], allow_patterns=wanted))
    except Exception as error:  # the hub's, the network's and the disk's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise KoffError(f"{name}: cannot be fetched from the hub ({reason})") from error
