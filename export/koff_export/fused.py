"""The fused profile: the backbone's graph in ONNX Runtime's own operators, as onnxruntime-genai builds it.

Attention is one GroupQueryAttention per layer; residual and norm are one SkipSimplifiedLayerNormalization.
The rotation is an operator of its own, because GroupQueryAttention's takes no notice of `position_ids` while
it reads the first tokens (seen in ONNX Runtime 1.32), and padded rows would be rotated wrongly. Inputs, slots
and outputs are those of the portable graph (`koff_export.onnx.export_onnx`), so the two take the same
memories. The graph is written node by node, nothing is traced: an export takes seconds.

The memory goes in front of the cached text as the past that GroupQueryAttention sees, and is cut off from
what it hands back: the cache holds text only. The in_place graph has no slots for it: there the cache holds
memory and text. Padding on the left is hidden by the attention bias.

Needs torch, transformers and onnx; imported only when exporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.onnx import Pair, add_defaults, bake
from koff_export.tensors import TensorFile

# Families whose blocks are as `_layer` writes them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # a table of positions says all about them
_HIDDEN = -1e9  # added to the score of a padded position
_FLOAT, _INT64, _INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def check_fused(config: Any) -> None:
    """Refuses a model that the fused profile cannot hold.

    Raises:
        KoffError: the family, activation, rotation, head size or a sliding window, with the mend.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reason = None
    if config.model_type not in FAMILIES:
        reason = f"knows {', '.join(FAMILIES)}, not {config.model_type}"
    elif config.hidden_act != "silu":
        reason = f"knows the activation silu, not {config.hidden_act}"
    elif rope.get("rope_type", "default") not in _STATIC_ROPE:
        reason = f"knows rotations {', '.join(_STATIC_ROPE)}, not {rope['rope_type']}"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        reason = "has no sliding windows, which this model has"
    elif head_dim % 16:
        reason = f"wants heads of a multiple of 16, not of {head_dim}"
    if reason:
        raise KoffError(f"export.onnx.profiles: fused {reason}; leave fused out")


class _Graph:
    """Nodes and weights as they are written down."""

    def __init__(self, weights: TensorFile) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights = weights

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
        if not any(tensor.name == name for tensor in self.initializers):
            self.initializers.append(helper.make_tensor(name, _INT64, [len(values)], values))
        return name

    def linear(self, x: str, module: nn.Linear, path: str, slot: bool) -> str:
        """Adds x · Wᵀ + bias, and with a `slot` + (x · A) · B."""
        y = self.op("MatMul", x, self.weight(f"{path}.weight", module.weight.T))
        if module.bias is not None:
            y = self.op("Add", y, self.weight(f"{path}.bias", module.bias))
        if slot:
            inner = self.op("MatMul", x, f"{path}.lora_A.weight")
            y = self.op("Add", y, self.op("MatMul", inner, f"{path}.lora_B.weight"))
        return y

    def norm(self, x: str, module: Any, path: str) -> str:
        """RMSNorm over the last axis."""
        scale = self.weight(f"{path}.weight", module.weight)
        return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=module.variance_epsilon,
                       stash_type=1)  # fmt: skip

    def skip_norm(self, x: str, residual: str, module: Any, path: str) -> tuple[str, str]:
        """RMSNorm of x + residual, and that sum."""
        scale, y = self.weight(f"{path}.weight", module.weight), f"n{len(self.nodes)}"
        kind, outputs = "SkipSimplifiedLayerNormalization", [y, "", "", f"{y}.sum"]
        self.nodes.append(helper.make_node(
            kind, [x, residual, scale], outputs, name=f"{kind}.{y}", domain="com.microsoft",
            epsilon=module.variance_epsilon,
        ))  # fmt: skip
        return y, f"{y}.sum"


def _shared_inputs(g: _Graph, memory: bool) -> dict[str, str]:
    """What all layers' attention takes: lengths, positions and the bias that hides padding.

    Only a graph with a memory has `length`, of the memory, and `front`, the shape that repeats it by batch.
    """
    shape = g.op("Shape", "attention_mask")
    batch, text = (g.op("Slice", shape, g.numbers(i), g.numbers(i + 1), g.numbers(0)) for i in (0, 1))
    queries = g.op("Shape", "input_ids", start=1, end=2)
    one = g.numbers(1)
    hidden = g.op("Cast", g.op("Sub", one, "attention_mask"), to=_FLOAT)
    g.initializers.append(helper.make_tensor("hidden", _FLOAT, [], [_HIDDEN]))
    hidden, total, positions = g.op("Mul", hidden, "hidden"), text, "position_ids"
    shared = {}
    if memory:  # in sight of every token, which stands behind it
        length = g.op("Shape", "memory.0.key", start=2, end=3)
        total, positions = g.op("Add", text, length), g.op("Add", "position_ids", length)
        zero = helper.make_tensor("zero", _FLOAT, [1], [0.0])
        sight = g.op("ConstantOfShape", g.op("Concat", batch, length, axis=0), value=zero)
        hidden = g.op("Concat", sight, hidden, axis=1)
        shared = {"length": length, "front": g.op("Concat", batch, one, one, one, axis=0)}
    bias = g.op("Concat", batch, one, queries, total, axis=0)
    return {
        **shared,
        "last": g.op("Expand", g.op("Cast", g.op("Sub", total, one), to=_INT32), batch),
        "total": g.op("Cast", total, to=_INT32),
        "positions": positions,
        "bias": g.op("Expand", g.op("Unsqueeze", hidden, g.numbers(1, 2)), bias),
    }


def _attention(
    g: _Graph, x: str, module: Any, path: str, i: int, shared: dict[str, str], slots: set[str]
) -> str:
    """One layer's attention over memory, cached text and new text; writes present.{i}.key/value."""
    qkv = []
    for kind in ("q", "k", "v"):
        name = f"{path}.{kind}_proj"
        y = g.linear(x, getattr(module, f"{kind}_proj"), name, name in slots)
        norm = getattr(module, f"{kind}_norm", None)
        if norm is not None:  # per head, before the rotation
            y = g.op("Reshape", y, g.numbers(0, 0, -1, module.head_dim))
            y = g.op("Reshape", g.norm(y, norm, f"{path}.{kind}_norm"), g.numbers(0, 0, -1))
        if kind != "v":
            y = g.op("RotaryEmbedding", y, shared["positions"], "cos", "sin", domain="com.microsoft")
        qkv.append(y)
    past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
    present = [f"present.{i}.{kind}" for kind in ("key", "value")]
    memory, whole = "front" in shared, present
    if memory:
        front = [g.op("Expand", f"memory.{i}.{kind}", shared["front"]) for kind in ("key", "value")]
        past = [g.op("Concat", *pair, axis=2) for pair in zip(front, past, strict=True)]
        whole = [f"{name}.whole" for name in present]
    inputs = [*qkv, *past, shared["last"], shared["total"], "", "", "", shared["bias"]]
    y = f"attention.{i}"
    g.nodes.append(helper.make_node(
        "GroupQueryAttention", inputs, [y, *whole], name=y, domain="com.microsoft", do_rotary=0,
        num_heads=module.q_proj.out_features // module.head_dim, scale=module.scaling,
        kv_num_heads=module.k_proj.out_features // module.head_dim,
    ))  # fmt: skip
    if memory:
        end = g.numbers(np.iinfo(np.int64).max)
        for name, all_of_it in zip(present, whole, strict=True):
            g.op("Slice", all_of_it, shared["length"], end, g.numbers(2), name=name)
    return g.linear(y, module.o_proj, f"{path}.o_proj", f"{path}.o_proj" in slots)


def _feed_forward(g: _Graph, x: str, module: Any, path: str, slots: set[str]) -> str:
    def linear(y: str, kind: str) -> str:
        return g.linear(y, getattr(module, kind), f"{path}.{kind}", f"{path}.{kind}" in slots)

    gate, up = linear(x, "gate_proj"), linear(x, "up_proj")
    return linear(g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up), "down_proj")


def _rotation(g: _Graph, model: PreTrainedModel) -> None:
    """Writes the rotation of every position, [positions, head_dim / 2], as the model itself computes it."""
    positions = torch.arange(model.config.max_position_embeddings)[None]
    with torch.no_grad():
        tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    for name, table in zip(("cos", "sin"), tables, strict=True):
        g.weight(name, table[0, :, : table.shape[-1] // 2])


def export_fused(
    model: PreTrainedModel,
    target: str | Path,
    portable: str | Path,
    *,
    baked: Sequence[Pair] | None = None,
    in_place: bool = False,
) -> None:
    """Writes the fused graph, float32, with the inputs, slots and outputs of the portable one.

    The memory's slots cost two copies of the cache at every token, one in front and one behind. With
    `in_place` there are none: a runtime puts the learned KV at the beginning of the cache, counts it among
    the tokens of mask and positions, and gives `present` the block that `past` lies in, which may be longer.

    Args:
        model: A causal LM that `check_fused` accepts; widths and head counts may differ per layer.
        target: The file to write, e.g. onnx/fused.onnx; weights go into fused.onnx.data beside it.
        portable: The graph that `export_onnx` wrote of the same model, in the same folder. Weights that its
            data file holds are read from there: a second profile adds next to nothing to a bundle.
        baked: The learned KV that the graph is to hold for good, as for `export_onnx`.
        in_place: Without slots for a learned KV.

    Raises:
        KoffError: a model that the profile cannot hold, or the disk refuses.
    """
    check_fused(model.config)
    path = Path(target)
    interface = onnx.load(portable, load_external_data=False).graph
    names = [value.name for value in interface.input]
    slots = {n.removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight")}
    memory = not in_place and (baked is None or baked[0][0].shape[1] > 0)
    with disk_errors(path), TensorFile(path, Path(portable)) as weights:
        g = _Graph(weights)
        _rotation(g, model)
        shared = _shared_inputs(g, memory)
        table: Any = model.get_input_embeddings().weight
        embedding = g.weight("model.embed_tokens.weight", table)
        residual = g.op("Gather", embedding, "input_ids")
        x = ""
        for i, layer in enumerate(model.model.layers):
            here = f"model.layers.{i}"
            if i == 0:
                x = g.norm(residual, layer.input_layernorm, f"{here}.input_layernorm")
            else:
                x, residual = g.skip_norm(x, residual, layer.input_layernorm, f"{here}.input_layernorm")
            x = _attention(g, x, layer.self_attn, f"{here}.self_attn", i, shared, slots)
            after = layer.post_attention_layernorm
            x, residual = g.skip_norm(x, residual, after, f"{here}.post_attention_layernorm")
            x = _feed_forward(g, x, layer.mlp, f"{here}.mlp", slots)
        x, _ = g.skip_norm(x, residual, model.model.norm, "model.norm")
        head: Any = model.get_output_embeddings().weight
        if head is table:  # in the file once
            last = g.op("Transpose", embedding, perm=[1, 0], name="tied_head_weight")
        else:
            last = g.weight("lm_head.weight", head.T)
        g.op("MatMul", x, last, name="logits")
        graph = helper.make_graph(g.nodes, "fused", [], list(interface.output), g.initializers)
        graph.input.extend(v for v in interface.input if not (in_place and v.name.startswith("memory.")))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        if baked is not None and memory:
            bake(proto, baked)
        add_defaults(proto)
        onnx.save(proto, path)
