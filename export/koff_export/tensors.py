"""Weights on their way into a graph's data file, or out of another graph's where they stand already."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx

_INLINE = 1024  # bytes; what is smaller stays in the graph
_ALIGN = 4096  # bytes; ONNX Runtime maps whole pages


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """Location, offset and length of a tensor outside of the graph."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"])


def _digest(array: np.ndarray) -> bytes:
    """SHA-256 of a contiguous array's bytes, without a copy of them."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()


class TensorFile:
    """The data file of one graph; a context manager.

    What is written twice stands in it once. Two profiles of one backbone have nearly all weights in common:
    what the other one's data file holds byte for byte is read from there.
    """

    def __init__(self, graph: Path, beside: Path | None = None) -> None:
        """Opens `graph`.data for writing.

        Args:
            graph: The graph that the weights are for; it is not touched.
            beside: Another graph in the same folder, whose data file is searched.
        """
        self.path = graph.with_name(f"{graph.name}.data")
        self._known: dict[bytes, tuple[str, int, int]] = {}
        if beside is not None:
            for tensor in onnx.load(beside, load_external_data=False).graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    location, offset, length = where = external(tensor)
                    data = np.memmap(beside.parent / location, np.uint8, "r", offset, (length,))
                    self._known.setdefault(_digest(data), where)
        self._file: BinaryIO = self.path.open("wb")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self.path.unlink()

    def put(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """The initializer `name` for a contiguous `array`: inside of the graph if it is small."""
        if array.nbytes < _INLINE:
            return onnx.numpy_helper.from_array(array, name)
        where = self._known.get(digest := _digest(array))
        if where is None:
            self._file.write(bytes(-self._file.tell() % _ALIGN))
            where = self._known[digest] = (self.path.name, self._file.tell(), array.nbytes)
            self._file.write(array.reshape(-1).view(np.uint8).data)
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in zip(("location", "offset", "length"), where, strict=True):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
