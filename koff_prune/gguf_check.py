"""Looks at a GGUF file before anything is read out of it."""

from __future__ import annotations

from pathlib import Path

from koff_export.errors import KoffError

CHECKED = 2  # counts what `check_gguf` refuses: copies of files that were read before are checked anew
TYPES = ("llama", "qwen2", "qwen3", "gemma3")  # as GGUF names architectures


def check_gguf(path: Path) -> None:
    """Refuses a file that is no GGUF, is truncated, or holds a model that would not be read as it is.

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
        scaling = reader.get_field(f"{architecture}.rope.scaling.type")
        scaled = scaling is not None and str(scaling.contents()) not in ("none", "")
        names = sorted(t.name for t in reader.tensors)
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
    lost = ["a scaled rotation"] * scaled
    lost += ["a scaled rotation (rope_freqs.weight)"] * ("rope_freqs.weight" in names)
    if architecture in ("llama", "qwen3"):  # in qwen2 they are read
        lost += [name for name in names if name.endswith(".bias")]
    if lost:
        raise KoffError(
            f"{path} has {lost[0]}, which would be lost: a GGUF file is read without; name the model's"
            " Hugging Face folder"
        )
