"""The one exception that means "the user can mend this", and what torch says when memory has run out."""

from __future__ import annotations

from pathlib import Path

NO_GRAPH = (
    "holds no ONNX graph: have its run write one,"
    " `koff-prune export RECIPE --resume --set 'export.formats=[safetensors, onnx]'`"
)


class KoffError(Exception):
    """A user's mistake, told in one sentence that names the key, the value and the mend.

    Command lines print it as ``error: …`` and exit with code 2, without a traceback.
    """


def no_bundle(folder: Path, manifest: str) -> KoffError:
    """What to say of a folder that has no `manifest`."""
    if folder.parts[:1] == ("hf:",):  # a path has one slash where the address has two
        what = "it is one's address on the hub; fetch it (`hf download`) and name the folder"
    elif not folder.exists():
        what = "there is no such folder"
    elif (folder / "bundle" / manifest).is_file():
        what = f"it is a run; its bundle is {folder / 'bundle'}"
    else:
        what = f"it has no {manifest}"
    return KoffError(f"{folder} is not a bundle: {what}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a RuntimeError means it: torch has an exception of its own for GPUs, on the CPU only words."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    )
