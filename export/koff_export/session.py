"""Opens a graph in ONNX Runtime, and holds it against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from koff_export.bundle import Manifest
from koff_export.errors import KoffError
from koff_export.graph import EMBEDDING_SLOT, is_slot

INT8_DYNAMIC = "int8_dynamic"  # the precision of an int8 graph whose products are computed in 8 bits too
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Slot:
    """A slot that the graph has not, in ONNX Runtime's words: the learned KV of a cache in place."""

    name: str
    type: str
    shape: list[Any]


def first_line(error: Exception) -> str:
    """The first line of ONNX Runtime's message, which may hold a stack of them."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def open_session(
    path: Path, threads: int | None = None, mapped: bool = False, dynamic: bool = False
) -> ort.InferenceSession:
    """Opens a checked graph on the CPU.

    Args:
        path: The `.onnx` file, with its weights beside it.
        threads: None leaves the choice to ONNX Runtime.
        mapped: Leave float weights on the disk, read as they are needed.
        dynamic: Let products with int8 weights round their inputs to 8 bits and compute in those.

    Raises:
        KoffError: ONNX Runtime refuses the graph, or threads that no machine has.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise KoffError(f"threads: {threads} is not possible; give 1 to 1024")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures come back as exceptions; of optional slots it would warn
    if threads is not None:
        options.intra_op_num_threads = threads
    if not dynamic:  # the weights become float32 here, once
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    off: list[str] = []
    if mapped:  # pages of the file do where a copy was arranged for the kernels, or a tied head transposed
        options.add_session_config_entry("session.disable_prepacking", "1")
        off = ["ConstantFolding"]
    try:
        return ort.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=off
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise KoffError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error


@contextmanager
def run_errors() -> Iterator[None]:
    """Turns what ONNX Runtime says of a failed call into a KoffError."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise KoffError(f"ONNX Runtime failed while running the graph: {first_line(error)}") from error


def check_session(
    session: ort.InferenceSession, manifest: Manifest, profile: str
) -> tuple[dict[str, ort.OrtValue], dict[str, Any], dict[str, Any]]:
    """Compares a graph's inputs and outputs with the manifest.

    Returns:
        A cache of length 0, by input; the slots by name; and those that a cache in place stands for.

    Raises:
        KoffError: they differ.
    """
    graph = manifest.graph
    assert graph is not None
    slots = {value.name: value for value in session.get_overridable_initializers()}
    found = {value.name: value for value in (*session.get_inputs(), *slots.values())}
    cache: dict[str, ort.OrtValue] = {}
    stands_for: dict[str, Any] = {}
    for i, heads in enumerate(graph.kv_heads):
        for kind in ("key", "value"):
            past, memory = f"past_key_values.{i}.{kind}", f"memory.{i}.{kind}"
            if past in found and profile == "in_place":
                stands_for[memory] = Slot(memory, found[past].type, [1, heads, "memory", graph.head_dim])
            with_slots = not manifest.merged and profile != "in_place"
            for name, first in ((past, None), *(((memory, 1),) if with_slots else ())):
                shape = found[name].shape if name in found else []
                if (
                    len(shape) != 4
                    or [shape[1], shape[3]] != [heads, graph.head_dim]
                    or first not in (None, shape[0])
                ):
                    raise KoffError(
                        f"the graph's input {name!r} is not as koff.json says: fetch the bundle again"
                    )
            dtype = _FLOATS.get(found[past].type)
            if dtype is None:
                raise KoffError(
                    f"the graph's input {past!r} has the type {found[past].type}, which no bundle has"
                )
            cache[past] = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, graph.head_dim), dtype))
    expected = {"input_ids", "attention_mask", "position_ids", *cache}
    words = session.get_outputs()[0].shape[-1]
    required = {value.name for value in session.get_inputs()}
    outputs = ["logits"] + [name.replace("past_key_values", "present") for name in cache]
    there = [output.name for output in session.get_outputs()]
    if (
        required != expected
        or there != outputs
        or not all(map(is_slot, slots))
        or stands_for.keys() & slots.keys()
        or (words != graph.vocab_size and (isinstance(words, int) or EMBEDDING_SLOT not in slots))
    ):
        raise KoffError("the graph's inputs and outputs are not as koff.json says: fetch the bundle again")
    return cache, slots, stands_for
