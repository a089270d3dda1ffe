"""Reading an ONNX file without the onnx package: names of slots, and what a foreign graph must not contain.

Protocol buffers are walked by hand, field by field; tensors are skipped, so a large graph costs milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from koff_export.errors import KoffError
from koff_export.files import inside, safe_join

# What ONNX Runtime implements itself. Any other domain would need a library of custom operators.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_MAX_DEPTH = 16  # nested graphs; an exported decoder has none

Buffer = memoryview


# The slots of a memory's own tokens: rows of the embedding, and of a head that is not tied to it. The first
# row is no token, and zero: a graph looks up something there for every other token of a text.
EMBEDDING_SLOT, HEAD_SLOT = "memory.tokens.embedding", "memory.tokens.head"
TOKEN_SLOTS = (EMBEDDING_SLOT, HEAD_SLOT)


def is_slot(name: str) -> bool:
    """Whether a graph input belongs to a memory: it has a default that does nothing, and may be left out."""
    return is_kv_slot(name) or name in TOKEN_SLOTS or name.endswith((".lora_A.weight", ".lora_B.weight"))


def is_kv_slot(name: str) -> bool:
    """Whether it is one of the learned KV's."""
    return name.startswith("memory.") and name not in TOKEN_SLOTS


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than 10 bytes")


def _fields(data: Buffer) -> Iterator[tuple[int, int | Buffer]]:
    """Yields (field number, value) of one message: an int for numbers, the bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        if tag >> 32:  # other readers cut it off there, and see another field
            raise ValueError("a field's number is too large")
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("a field has an unknown wire type")
        if at + size > end:
            raise ValueError("a field is longer than the file")
        yield tag >> 3, data[at : at + size]
        at += size


def _inside(data: Buffer, field: int) -> Iterator[Buffer]:
    """All messages or strings of one field."""
    for number, value in _fields(data):
        if number == field:
            if isinstance(value, int):
                raise ValueError("a number stands where a message belongs")
            yield value


def _text(data: Buffer, field: int) -> str:
    """A string of a message, "" if it is not there."""
    found = [str(value, "utf-8") for value in _inside(data, field)]
    if len(found) > 1:
        raise ValueError("a name stands twice")
    return found[0] if found else ""


class _Checker:
    """Walks the messages of one ModelProto; numbers in comments are the fields of onnx.proto."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.external: set[Path] = set()

    def domain(self, name: str) -> None:
        if name not in DOMAINS:
            raise KoffError(
                f"{self.path} uses operators of the domain {name!r}: only those of ONNX and ONNX Runtime run"
            )

    def tensor(self, data: Buffer) -> None:
        pairs = [(_text(e, 1), _text(e, 2)) for e in _inside(data, 13)]  # TensorProto.external_data
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a tensor's data is told twice")
        if not entries:
            return
        # ONNX resolves locations beside the graph; the file must also stay inside the bundle.
        file = safe_join(self.path.parent, entries.get("location", ""))
        if not inside(self.root, file):
            raise KoffError(f"{self.path} reads {file}, outside of the bundle: it is damaged or hostile")
        if file not in self.external and not file.is_file():
            raise KoffError(f"{self.path} needs {file.name}, which is missing: fetch the bundle again")
        self.external.add(file)
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise KoffError(
                f"{self.path} reads past the end of {file.name}: the file is truncated, fetch it again"
            )

    def nodes(self, data: Buffer, node_field: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("graphs are nested too deeply")
        for node in _inside(data, node_field):
            self.domain(_text(node, 7))
            for attribute in _inside(node, 5):
                self.attribute(attribute, depth)

    def attribute(self, data: Buffer, depth: int) -> None:
        for field, value in _fields(data):
            if field in (5, 10) and not isinstance(value, int):  # t, tensors
                self.tensor(value)
            elif field in (6, 11) and not isinstance(value, int):  # g, graphs
                self.graph(value, depth + 1)
            elif field in (22, 23) and not isinstance(value, int):  # sparse_tensor, sparse_tensors
                self.sparse(value)

    def sparse(self, data: Buffer) -> None:
        for field in (1, 2):  # values, indices
            for tensor in _inside(data, field):
                self.tensor(tensor)

    def graph(self, data: Buffer, depth: int = 0) -> None:
        self.nodes(data, 1, depth)  # GraphProto.node
        for initializer in _inside(data, 5):
            self.tensor(initializer)
        for sparse in _inside(data, 15):
            self.sparse(sparse)

    def model(self, data: Buffer) -> None:
        for opset in _inside(data, 8):
            self.domain(_text(opset, 1))
        graphs = list(_inside(data, 7))
        if len(graphs) != 1:
            raise ValueError("it holds no graph")
        self.graph(graphs[0])
        for function in _inside(data, 25):
            self.nodes(function, 7, 0)
            for attribute in _inside(function, 11):  # attribute_proto: defaults
                self.attribute(attribute, 0)


def check_onnx(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Refuses a graph that is no ONNX file, wants foreign operators, or keeps data outside of its bundle.

    Whether the operators fit together is left to ONNX Runtime, which checks that when it opens the graph.

    Args:
        path: The .onnx file.
        root: The bundle's folder; by default the graph's own.

    Returns:
        The external data files the graph reads.

    Raises:
        KoffError: for each of the above.
    """
    file = Path(path)
    checker = _Checker(file, Path(root) if root is not None else file.parent)
    try:
        checker.model(
            memoryview(file.read_bytes())
        )  # koff's graphs keep their weights in a file of their own
    except OSError as error:
        raise KoffError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, IndexError) as error:
        raise KoffError(f"{file} is not an ONNX graph ({error}): fetch or export it again") from error
    return sorted(checker.external)
