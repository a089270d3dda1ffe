"""Opens a graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from koff_export.errors import KoffError


def first_line(error: Exception) -> str:
    """The first line of ONNX Runtime's message, which may hold a stack of them."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def open_session(path: Path, threads: int | None = None, mapped: bool = False) -> ort.InferenceSession:
    """Opens a checked graph on the CPU.

    Args:
        path: The `.onnx` file, with its weights beside it.
        threads: None leaves the choice to ONNX Runtime.
        mapped: Leave float weights on the disk, read as they are needed.

    Raises:
        KoffError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures come back as exceptions; of optional slots it would warn
    if threads is not None:
        options.intra_op_num_threads = threads
    if mapped:  # a page of the file is as good as a copy that is arranged for the kernels, but slower
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise KoffError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
