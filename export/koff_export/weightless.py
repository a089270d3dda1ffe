"""Tracing a model without its weights, and writing them behind the trace's back, one at a time.

Needs torch, onnx and onnx_ir; imported only when exporting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from koff_export.tensors import TensorFile


@contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """Holds a float32 tensor without numbers in the place of every weight, then puts the weights back.

    The exporter would keep a float32 copy of all weights alive, and a second one of those it transposes; a
    trace needs their shapes alone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    before: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}
    try:
        for module in model.modules():
            tables: Any = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    before.append((table, name, tensor))
                    if id(tensor) not in fakes:  # what is tied stays tied
                        with mode:
                            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                            fake = torch.empty(tensor.shape, dtype=dtype)
                            fakes[id(tensor)] = fake
                            if isinstance(tensor, nn.Parameter):
                                fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False)
                    table[name] = fakes[id(tensor)]
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """A weight as a graph holds it: float32, which bfloat16 and float16 fit in exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def take_out(model: Any, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Makes inputs of a traced `onnx_ir.Model`'s matrices, which the optimiser then leaves alone.

    What is smaller, such as a rotation's frequencies, it gets with its numbers; constants have their own.
    Returns the matrices' names.
    """
    graph, taken = model.graph, []
    for name, value in list(graph.initializers.items()):
        if name not in weights:
            continue
        if weights[name].dim() < 2:
            value.const_value = onnx_ir.tensor(_numbers(weights[name]), name=name)
        else:
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
            taken.append(name)
    return taken


def put_back(
    graph: onnx.GraphProto, taken: Sequence[str], weights: Mapping[str, Any], data: TensorFile
) -> None:
    """Writes the matrices that `take_out` took, one at a time.

    A matrix that is only ever transposed is written transposed; a tied embedding, looked up too, is written
    once and the head transposes it.
    """
    inputs = [value for value in graph.input if value.name not in taken]
    del graph.input[:]
    graph.input.extend(inputs)
    users: dict[str, list[onnx.NodeProto]] = {name: [] for name in taken}
    for node in graph.node:
        for name in set(node.input) & users.keys():
            users[name].append(node)
    same: dict[str, str] = {}
    for name, nodes in users.items():
        array = _numbers(weights[name])
        if nodes and all(node.op_type == "Transpose" for node in nodes) and array.ndim == 2:
            name, array = nodes[0].output[0], np.ascontiguousarray(array.T)
            same.update({node.output[0]: name for node in nodes})
            for node in nodes:
                graph.node.remove(node)
        if nodes:
            graph.initializer.append(data.put(name, array))
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
