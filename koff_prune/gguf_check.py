"""Looks at a GGUF file before anything is read out of it."""

from __future__ import annotations

from pathlib import Path

from koff_export.errors import KoffError

TYPES = ("llama", "qwen2", "qwen3", "gemma3")  # as GGUF names architectures


def check_gguf(path: Path) -> None:
    """Refuses a file that is no GGUF, is truncated, or holds an architecture that is not supported.

    Raises:
        KoffError: One of these, with the mend.
    """
    from gguf import GGUFReader  # slow to import, and needed only before the conversion

    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise KoffError(f"{path} is not a GGUF file (it does not start with 'GGUF'): fetch it again")
    try:
        reader = GGUFReader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field else ""
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        UnicodeDecodeError,
        MemoryError,
        TypeError,
        RecursionError,
    ) as error:
        raise KoffError(f"{path} is a truncated or damaged GGUF file: fetch it again") from error
    if end == 0 or end > path.stat().st_size:
        raise KoffError(
            f"{path} is a truncated GGUF file: {end} bytes are described, {path.stat().st_size} are there"
        )
    if architecture not in TYPES:
        raise KoffError(
            f"{path} holds a model of architecture '{architecture}'; supported in GGUF are {', '.join(TYPES)}"
        )
