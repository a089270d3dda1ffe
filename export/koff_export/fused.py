"""The fused profile: the backbone's graph in ONNX Runtime's own operators, as onnxruntime-genai builds it.

Attention is one GroupQueryAttention per layer; residual and norm are one SkipSimplifiedLayerNormalization.
The rotation is an operator of its own, because GroupQueryAttention's takes no notice of `position_ids` while
it reads the first tokens (seen in ONNX Runtime 1.32), and padded rows would be rotated wrongly. Inputs, slots
and outputs are those of the portable graph (`koff_export.onnx.export_onnx`), so the two take the same
memories.

The memory goes in front of the cached text as the past that GroupQueryAttention sees, and is cut off from
what it hands back: the cache holds text only. The in_place graph has no slots for it: there the cache holds
memory and text. Padding on the left is hidden by the attention bias.

Needs torch, transformers and onnx; imported only when exporting.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from transformers import PreTrainedModel

from koff_export.files import disk_errors
from koff_export.graph import TOKEN_SLOTS, is_kv_slot
from koff_export.limits import check_fused
from koff_export.onnx import Pair, add_defaults, bake
from koff_export.tensors import TensorFile
from koff_export.writer import FLOAT, HIDDEN, INT32, GraphWriter


class _Fused(GraphWriter):
    """A graph of ONNX Runtime's own operators; with `memory`, it has slots for a learned KV."""

    def __init__(
        self, model: PreTrainedModel, weights: TensorFile, slots: Collection[str], memory: bool
    ) -> None:
        super().__init__(model, weights, slots)
        self.memory = memory
        self._rotation()
        shape = self.op("Shape", "attention_mask")
        batch, text = (self.op("Slice", shape, *map(self.numbers, (n, n + 1, 0))) for n in (0, 1))
        queries = self.op("Shape", "input_ids", start=1, end=2)
        one = self.numbers(1)
        hidden = self.op("Cast", self.op("Sub", one, "attention_mask"), to=FLOAT)
        hidden = self.op("Mul", hidden, self.scalar("hidden", HIDDEN))
        total, self.positions = text, "position_ids"
        if memory:  # in sight of every token, which stands behind it
            self.length = self.op("Shape", "memory.0.key", start=2, end=3)
            total = self.op("Add", text, self.length)
            self.positions = self.op("Add", "position_ids", self.length)
            zero = helper.make_tensor("zero", FLOAT, [1], [0.0])
            sight = self.op("ConstantOfShape", self.op("Concat", batch, self.length, axis=0), value=zero)
            hidden = self.op("Concat", sight, hidden, axis=1)
            self.front = self.op("Concat", batch, one, one, one, axis=0)
        self.last = self.op("Expand", self.op("Cast", self.op("Sub", total, one), to=INT32), batch)
        self.total = self.op("Cast", total, to=INT32)
        shape = self.op("Concat", batch, one, queries, total, axis=0)
        self.bias = self.op("Expand", self.op("Unsqueeze", hidden, self.numbers(1, 2)), shape)

    def _rotation(self) -> None:
        """Writes the rotation of every position, [positions, head_dim / 2], as the model computes it."""
        positions = torch.arange(self.model.config.max_position_embeddings)[None]
        with torch.no_grad():
            tables = self.model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.weight(name, table[0, :, : table.shape[-1] // 2])

    def norm(self, x: str, module: Any, path: str) -> str:
        """See `GraphWriter`."""
        scale, epsilon = self.scale_of(module, path)
        kind = "SimplifiedLayerNormalization"
        return self.op(kind, x, scale, axis=-1, epsilon=epsilon, stash_type=1)

    def add_norm(self, x: str, residual: str, module: Any, path: str) -> tuple[str, str]:
        """See `GraphWriter`."""
        scale, epsilon = self.scale_of(module, path)
        kind, y = "SkipSimplifiedLayerNormalization", f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(
            kind, [x, residual, scale], [y, "", "", f"{y}.sum"], name=f"{kind}.{y}", domain="com.microsoft",
            epsilon=epsilon,
        ))  # fmt: skip
        return y, f"{y}.sum"

    def attend(self, qkv: Sequence[str], module: Any, i: int) -> str:
        """See `GraphWriter`."""
        q, k = (
            self.op("RotaryEmbedding", x, self.positions, "cos", "sin", domain="com.microsoft")
            for x in qkv[:2]
        )
        past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for kind in ("key", "value")]
        whole = present
        if self.memory:
            front = [self.op("Expand", f"memory.{i}.{kind}", self.front) for kind in ("key", "value")]
            past = [self.op("Concat", *pair, axis=2) for pair in zip(front, past, strict=True)]
            whole = [f"{name}.whole" for name in present]
        inputs = [q, k, qkv[2], *past, self.last, self.total, "", "", "", self.bias]
        y = f"attention.{i}"
        self.nodes.append(helper.make_node(
            "GroupQueryAttention", inputs, [y, *whole], name=y, domain="com.microsoft", do_rotary=0,
            num_heads=module.q_proj.out_features // module.head_dim, scale=module.scaling,
            kv_num_heads=module.k_proj.out_features // module.head_dim,
        ))  # fmt: skip
        if self.memory:
            end = self.numbers(np.iinfo(np.int64).max)
            for name, all_of_it in zip(present, whole, strict=True):
                self.op("Slice", all_of_it, self.length, end, self.numbers(2), name=name)
        return y


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
    check_fused(model.config.to_dict())
    path = Path(target)
    interface = onnx.load(portable, load_external_data=False).graph
    names = [value.name for value in interface.input]
    slots = {n.removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight")}
    slots |= set(names) & set(TOKEN_SLOTS)
    memory = not in_place and (baked is None or baked[0][0].shape[1] > 0)
    with disk_errors(path), TensorFile(path, Path(portable)) as weights:
        writer = _Fused(model, weights, slots, memory)
        writer.logits()
        inputs = [v for v in interface.input if not (in_place and is_kv_slot(v.name))]
        graph = writer.finished(inputs, list(interface.output), own=True)
        if baked is not None and memory:
            bake(graph, baked)
        add_defaults(graph)
        onnx.save(graph, path)
