"""A backbone's graph, written node by node: what all profiles of it have in common.

Nothing is traced: an export holds one weight at a time, and does not depend on what a tracer makes of a
model. What is written is what transformers computes in float32; `koff-prune export` and `verify` hold the two
against each other.

Needs torch, transformers and onnx; imported only when exporting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from transformers import PreTrainedModel

from koff_export.graph import EMBEDDING_SLOT, HEAD_SLOT
from koff_export.limits import ACTIVATIONS, activation_of
from koff_export.tensors import TensorFile

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
OPSET, IR_VERSION = 20, 10
HIDDEN = -1e9  # added to the score of what a token must not see: finite, or a padded row would be no number


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """How many of the last tokens each layer sees, itself included; None for all."""
    layers: Any = model.model.layers
    if model.config.model_type == "mistral":
        return [model.config.sliding_window] * len(layers)
    return [getattr(layer.self_attn, "sliding_window", None) for layer in layers]


class GraphWriter(ABC):
    """Nodes and weights as they are written down; a profile says how it attends and how it normalises.

    Args:
        model: Of a family in `limits.FAMILIES`; widths and head counts may differ per layer.
        weights: Where they go.
        slots: Paths of the linear modules that take a LoRA, and names of TOKEN_SLOTS.
    """

    def __init__(self, model: PreTrainedModel, weights: TensorFile, slots: Collection[str]) -> None:
        self.model, self.weights, self.slots = model, weights, slots
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._numbers: set[str] = set()
        self.sandwich = model.config.model_type == "gemma3_text"  # norms behind a block too, as 1 + weight

    @abstractmethod
    def norm(self, x: str, module: Any, path: str) -> str:
        """RMSNorm over the last axis."""

    @abstractmethod
    def attend(self, qkv: Sequence[str], module: Any, i: int) -> str:
        """One layer's attention over memory, cached text and new text; writes present.{i}.key/value.

        Args:
            qkv: Query, key and value, [batch, sequence, heads · head_dim] each; normed, not yet rotated.
            module: The attention module.
            i: Number of the layer.

        Returns:
            [batch, sequence, heads · head_dim].
        """

    def add_norm(self, x: str, residual: str, module: Any, path: str) -> tuple[str, str]:
        """RMSNorm of x + residual, and that sum."""
        both = self.op("Add", x, residual)
        return self.norm(both, module, path), both

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, `name` or a new one; returns that."""
        output = name or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}.{output}", **attributes))
        return output

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """Adds a tensor as float32."""
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        self.initializers.append(self.weights.put(name, array))
        return name

    def numbers(self, *values: int) -> str:
        """An int64 constant, one-dimensional."""
        name = "i" + "_".join(map(str, values)).replace("-", "m")
        return self._constant(name, INT64, [len(values)], values)

    def scalar(self, name: str, value: float) -> str:
        """A float32 constant; the same name is the same value."""
        return self._constant(name, FLOAT, [], [value])

    def _constant(self, name: str, kind: int, shape: Sequence[int], values: Sequence[float]) -> str:
        if name not in self._numbers:
            self._numbers.add(name)
            self.initializers.append(helper.make_tensor(name, kind, shape, values))
        return name

    def linear(self, x: str, module: Any, path: str) -> str:
        """Adds x · Wᵀ + bias, and with a slot + (x · A) · B."""
        y = self.op("MatMul", x, self.weight(f"{path}.weight", module.weight.T))
        if module.bias is not None:
            y = self.op("Add", y, self.weight(f"{path}.bias", module.bias))
        return self.lora(x, y, path)

    def lora(self, x: str, y: str, path: str) -> str:
        """Adds (x · A) · B to y where `path` has a slot."""
        if path not in self.slots:
            return y
        inner = self.op("MatMul", x, f"{path}.lora_A.weight")
        return self.op("Add", y, self.op("MatMul", inner, f"{path}.lora_B.weight"))

    def scale_of(self, module: Any, path: str) -> tuple[str, float]:
        """A norm's weight, and its epsilon."""
        if self.sandwich:
            return self.weight(f"{path}.weight", 1 + module.weight.detach().float()), module.eps
        return self.weight(f"{path}.weight", module.weight), module.variance_epsilon

    def logits(self) -> None:
        """Writes everything from input_ids to logits."""
        config, inner = self.model.config, self.model.model
        layers: Any = inner.layers
        table: Any = self.model.get_input_embeddings()
        embedding = self.weight("model.embed_tokens.weight", table.weight)
        residual = self._embedded(embedding, len(table.weight))
        if self.sandwich:
            residual = self.op("Mul", residual, self.scalar("embed_scale", float(table.embed_scale)))
        x = self.norm(residual, layers[0].input_layernorm, "model.layers.0.input_layernorm")
        for i, layer in enumerate(layers):
            path = f"model.layers.{i}"

            def behind(y: str, name: str, layer: Any = layer, path: str = path) -> str:
                return self.norm(y, getattr(layer, name), f"{path}.{name}") if self.sandwich else y

            y = behind(
                self._attention(x, layer.self_attn, f"{path}.self_attn", i), "post_attention_layernorm"
            )
            name = "pre_feedforward_layernorm" if self.sandwich else "post_attention_layernorm"
            x, residual = self.add_norm(y, residual, getattr(layer, name), f"{path}.{name}")
            y = behind(self._feed_forward(x, layer.mlp, f"{path}.mlp", config), "post_feedforward_layernorm")
            last = i == len(layers) - 1
            following = inner.norm if last else layers[i + 1].input_layernorm
            where = "model.norm" if last else f"model.layers.{i + 1}.input_layernorm"
            x, residual = self.add_norm(y, residual, following, where)
        head: Any = self.model.get_output_embeddings()
        if head.weight is table.weight:  # in the file once
            matrix = self.op("Transpose", embedding, perm=[1, 0], name="tied_head_weight")
        else:
            matrix = self.weight("lm_head.weight", head.weight.T)
        y = self.lora(x, self.op("MatMul", x, matrix), "lm_head")
        if EMBEDDING_SLOT in self.slots:
            y = self._own_logits(x, y, HEAD_SLOT if HEAD_SLOT in self.slots else EMBEDDING_SLOT)
        if cap := getattr(config, "final_logit_softcapping", None):
            limit = self.scalar("softcapping", cap)
            self.op("Mul", self.op("Tanh", self.op("Div", y, limit)), limit)
        self.nodes[-1].output[0] = "logits"

    def _embedded(self, embedding: str, tokens: int) -> str:
        """Rows of the backbone's embedding, and behind them those of a memory's own tokens."""
        if EMBEDDING_SLOT not in self.slots:
            return self.op("Gather", embedding, "input_ids")
        known = self.op("Gather", embedding, self.op("Min", "input_ids", self.numbers(tokens - 1)))
        first = self.op("Sub", "input_ids", self.numbers(tokens - 1))
        own = self.op("Gather", EMBEDDING_SLOT, self.op("Max", first, self.numbers(0)))
        is_own = self.op("Unsqueeze", self.op("Greater", first, self.numbers(0)), self.numbers(-1))
        return self.op("Where", is_own, own, known)

    def _own_logits(self, x: str, known: str, slot: str) -> str:
        """Logits of the backbone's tokens, and behind them those of a memory's own."""
        flat = self.op("Reshape", x, self.numbers(-1, self.model.config.hidden_size))
        shape = self.op("Concat", self.op("Shape", "input_ids"), self.numbers(-1), axis=0)
        own = self.op("Reshape", self.op("Gemm", flat, slot, transB=1), shape)  # never turned: it is large
        end = self.numbers(np.iinfo(np.int64).max)
        return self.op(
            "Concat", known, self.op("Slice", own, self.numbers(1), end, self.numbers(-1)), axis=-1
        )

    def _attention(self, x: str, module: Any, path: str, i: int) -> str:
        qkv = []
        for kind in ("q", "k", "v"):
            y = self.linear(x, getattr(module, f"{kind}_proj"), f"{path}.{kind}_proj")
            norm = getattr(module, f"{kind}_norm", None)
            if norm is not None:  # per head
                y = self.op("Reshape", y, self.numbers(0, 0, -1, module.head_dim))
                y = self.op("Reshape", self.norm(y, norm, f"{path}.{kind}_norm"), self.numbers(0, 0, -1))
            qkv.append(y)
        return self.linear(self.attend(qkv, module, i), module.o_proj, f"{path}.o_proj")

    def _feed_forward(self, x: str, module: Any, path: str, config: Any) -> str:
        gate, up = (
            self.linear(x, getattr(module, name), f"{path}.{name}") for name in ("gate_proj", "up_proj")
        )
        kind = ACTIVATIONS[activation_of(config.to_dict())]
        if kind == "silu":
            active = self.op("Mul", gate, self.op("Sigmoid", gate))
        elif kind == "relu":
            active = self.op("Relu", gate)
        else:
            active = self.op("Gelu", gate, approximate="tanh" if kind == "gelu_tanh" else "none")
        return self.linear(self.op("Mul", active, up), module.down_proj, f"{path}.down_proj")

    def finished(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], own: bool
    ) -> onnx.ModelProto:
        """The graph of all that was written; with `own`, ONNX Runtime's own operators are in it."""
        graph = helper.make_graph(self.nodes, "koff", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid("com.microsoft", 1)] * own
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
