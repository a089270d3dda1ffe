"""fp16, int8 and int4 graphs: the weights alone, memory slots kept.

fp16 halves the file: its weights are cast to float32 when the graph is opened, and inputs and outputs stay
float32, so that it runs wherever the float32 graph does. int8 is the standard's DequantizeLinear by block in
front of each product; whoever opens it chooses what that means: ONNX Runtime by itself fuses the two, rounds
the product's inputs to 8 bits as well and computes in them (`int8_dynamic`: fast, small in memory); told not
to, it computes the float32 weights once (`int8`: exact, as fast and as large in memory as float32). int4 is
`MatMulNBits`, inputs rounded to 8 bits, whose codes come from elsewhere (`rounded`) or are the nearest; but
for what `keeps` names, unsaid the matrix of a layer that 4 bits hurt most for its size: this has 8, as
`int8_dynamic`.

The embedding has 8 bits in both: words are looked up in bytes, and the few that were are made float32. A tied
head that has 8 as well multiplies with the very same bytes, which stand in the file once.

Needs onnx; imported only when exporting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.graph import is_slot
from koff_export.onnx import add_defaults
from koff_export.tensors import TensorFile, external

BITS = {"fp16": 16, "int8": 8, "int4": 4}  # of the precisions that have a file of their own, beside fp32
BLOCK = 32  # weights that share a scale
LOWEST = -8  # of 4 bits, stored as 0
INT4_KEEPS = ("v_proj",)  # in 8 bits: the matrix that 4 bits hurt most for its size
_HEAD = {"head": ("head_weight", "lm_head.weight")}  # tied, and its own
_ROUND_INPUTS = 4  # `MatMulNBits`' accuracy_level: next to nothing beside what 4 bits lose
_OPSET = 21  # the first whose DequantizeLinear knows blocks
_ZERO = 128  # what stands for 0 in 8 bits: ONNX Runtime's kernels are made for unsigned ones


class _Arrays:
    """The arrays of a graph's initializers, each read out of its data file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.turned: dict[str, np.ndarray] = {}  # of initializers that are others, transposed

    def __call__(self, tensor: onnx.TensorProto) -> np.ndarray:
        if tensor.name in self.turned:
            return self.turned[tensor.name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        location, offset, _ = external(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self.folder / location, dtype, "r", offset, tuple(tensor.dims))


def _fold_transposes(graph: onnx.GraphProto, arrays: _Arrays) -> dict[str, str]:
    """Replaces Transpose(initializer) by a transposed initializer: only constant operands are quantised.

    Returns:
        The new initializers' names by the old ones'.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        tensor, name = weights[node.input[0]], node.output[0]
        array = arrays.turned[name] = np.transpose(arrays(tensor), perm)
        graph.initializer.append(onnx.TensorProto(name=name, data_type=tensor.data_type, dims=array.shape))
        graph.node.remove(node)
        found[node.input[0]] = node.output[0]
    return found


def _halve(graph: onnx.GraphProto, arrays: _Arrays) -> None:
    """Stores float32 matrices as float16, and casts them back where they are used; a rotation stays exact."""
    casts = []
    exact = {name for node in graph.node if node.op_type == "RotaryEmbedding" for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and tensor.name not in exact:
            name, array = tensor.name, arrays(tensor)
            largest = np.finfo(np.float16).max
            half = np.clip(array, -largest, largest).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _to_bytes(model: onnx.ModelProto, suffixes: tuple[str, ...], arrays: _Arrays) -> None:
    """Stores the embedding and the matrices of products whose names end so, in 8 bits, symmetric by block."""
    graph = model.graph
    tied = _fold_transposes(graph, arrays)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    used = {n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1].endswith(suffixes)}
    nodes = []
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(used & weights.keys()):
        parts[name] = _in_bytes(arrays(weights.pop(name)))
        nodes.append(_dequantized([f"{name}.{key}" for key in parts[name]], name, axis=0))
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in weights:
            nodes.append(node)
            continue
        (table, ids), words = node.input, node.output[0]
        matrix = weights.pop(table)  # laid out as the matrix of a tied head, to be the same bytes
        if tied.get(table) in parts:
            parts[table] = parts[tied[table]]
        else:
            parts[table] = _in_bytes(arrays(matrix).T)
        for key in parts[table]:
            name = f"{table}.{key}"
            columns, rows = f"{name}.columns", f"{name}.rows"
            nodes.append(onnx.helper.make_node("Gather", [name, ids], [columns], columns, axis=1))
            nodes.append(onnx.helper.make_node("Transpose", [columns], [rows], rows, perm=[1, 2, 0]))
        nodes.append(_dequantized([f"{table}.{key}.rows" for key in parts[table]], words, axis=2))
    kept = list(weights.values())
    for name, found in parts.items():
        kept += [onnx.numpy_helper.from_array(part, f"{name}.{key}") for key, part in found.items()]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = _OPSET


def _in_bytes(weight: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix [inputs, outputs] as uint8, with a scale and a zero for every block of inputs."""
    blocks = (-(-len(weight) // BLOCK), weight.shape[1])
    rounded, scales = np.empty(weight.shape, np.uint8), np.empty(blocks, np.float32)
    for i, scale in enumerate(scales):  # one row of blocks at a time: the matrix may be most of the model
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        np.divide(np.abs(weight[rows]).max(0), 127, out=scale)
        scale[scale == 0] = 1
        rounded[rows] = np.rint(weight[rows] / scale) + _ZERO
    return {"int8": rounded, "scale": scales, "zero": np.full(blocks, _ZERO, np.uint8)}


Rounded = tuple[np.ndarray, np.ndarray]  # codes uint8 [inputs, outputs], scales float32 [blocks, outputs]


def nearest(weight: np.ndarray) -> Rounded:
    """A matrix [inputs, outputs] in 4 bits, symmetric by block of inputs, each weight to what is nearest."""
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty((-(-len(weight) // BLOCK), weight.shape[1]), np.float32)
    for i, scale in enumerate(scales):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        block = weight[rows]
        scale[:] = np.take_along_axis(block, np.abs(block).argmax(0)[None], 0)[0] / LOWEST
        scale[scale == 0] = 1
        codes[rows] = np.clip(np.rint(block / scale), LOWEST, -1 - LOWEST) - LOWEST
    return codes, scales


def _to_nibbles(model: onnx.ModelProto, rounded: Mapping[str, Rounded], arrays: _Arrays) -> None:
    """Makes every product with a matrix that still has 32 bits a `MatMulNBits` of 4."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, made = [], {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        name = node.input[1]
        inputs, outputs = weights[name].dims
        if name not in made:
            found = rounded[name] if name in rounded else nearest(arrays(weights[name]))
            made[name] = _packed(*found)
        nodes.append(onnx.helper.make_node(
            "MatMulNBits", [node.input[0], f"{name}.int4", f"{name}.scale"], node.output, node.name,
            domain="com.microsoft", K=inputs, N=outputs, bits=4, block_size=BLOCK,
            accuracy_level=_ROUND_INPUTS,
        ))  # fmt: skip
    kept = [tensor for name, tensor in weights.items() if name not in made]
    for name, (codes, scales) in made.items():
        kept.append(onnx.numpy_helper.from_array(codes, f"{name}.int4"))
        kept.append(onnx.numpy_helper.from_array(scales, f"{name}.scale"))
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _packed(codes: np.ndarray, scales: np.ndarray) -> Rounded:
    """As `MatMulNBits` reads them: uint8 [outputs, blocks, 16], the first of two in the low half."""
    blocks = np.full((codes.shape[1], len(scales) * BLOCK), -LOWEST, np.uint8)
    blocks[:, : len(codes)] = codes.T
    halves = blocks.reshape(len(blocks), len(scales), BLOCK)
    return halves[..., ::2] | halves[..., 1::2] << 4, np.ascontiguousarray(scales.T).reshape(-1)


def _dequantized(parts: Sequence[str], name: str, axis: int) -> onnx.NodeProto:
    return onnx.helper.make_node(
        "DequantizeLinear", parts, [name], name=f"{name}.float", axis=axis, block_size=BLOCK
    )


def quantize(
    model_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    bits: int,
    beside: str | os.PathLike[str] | None = None,
    keeps: Sequence[str] = INT4_KEEPS,
    rounded: Mapping[str, Rounded] | None = None,
) -> None:
    """Writes a copy in few bits of an exported float32 graph, with its `.data` file beside it.

    Args:
        model_path: A graph written by `export_onnx` or `export_fused`.
        out_path: Where to write, e.g. `onnx/model_int8.onnx`.
        bits: 16, 8 or 4.
        beside: A graph of the same bits in the same folder; weights in its data file are read from there.
        keeps: What has 8 bits instead of 4: head, or the names of a layer's matrices, e.g. down_proj.
        rounded: 4-bit codes of matrices, by name in the graph; the others' weights go to what is nearest.

    Raises:
        KoffError: another number of bits, or the disk refuses.
    """
    if bits not in (4, 8, 16):
        raise KoffError(f"{bits} bits are not supported: choose 16 (fp16), 8 (int8) or 4 (int4)")
    model, arrays = onnx.load(model_path, load_external_data=False), _Arrays(Path(model_path).parent)
    # The slots' defaults are constants to the quantiser, which would quantise the slots away.
    constants = [tensor for tensor in model.graph.initializer if not is_slot(tensor.name)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    if bits == 16:
        _halve(model.graph, arrays)
    elif bits == 8:
        _to_bytes(model, ("",), arrays)
    else:
        _to_bytes(model, tuple(e for name in keeps for e in _HEAD.get(name, (f"{name}.weight",))), arrays)
        _to_nibbles(model, rounded or {}, arrays)
    target = Path(out_path)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TensorFile(target, None if beside is None else Path(beside)) as data:
            for tensor in model.graph.initializer:
                tensor.CopyFrom(data.put(tensor.name, np.asarray(arrays(tensor), order="C")))
        add_defaults(model)
        onnx.save(model, target)
