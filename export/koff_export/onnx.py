"""One ONNX graph for the backbone, with a slot for every tensor of a memory; one adapter file per memory.

The slots (`memory.{i}.key/value`, `memory.tokens.embedding/head`, `{module}.lora_A/B.weight`) are graph
inputs with defaults that do nothing: left alone, the graph is the bare backbone; ONNX Runtime fills them from
an `.onnx_adapter` for the length of one call. The graph of `export_onnx` is the portable profile: operators
of the ONNX standard alone.

Needs torch, transformers and onnx; imported only when exporting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import nn
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.graph import EMBEDDING_SLOT, HEAD_SLOT, TOKEN_SLOTS, is_slot
from koff_export.limits import check_portable
from koff_export.tensors import TensorFile
from koff_export.writer import FLOAT, HIDDEN, INT64, GraphWriter, windows_of

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class GraphInfo:
    """What the manifest's `graph` says about an exported graph.

    Attributes:
        layers: Number of decoder layers.
        kv_heads: KV heads of each layer.
        head_dim: Size of one head.
        vocab_size: Width of the bare backbone's logits.
        inputs: Input names in order, slots included.
        outputs: Output names in order.
    """

    layers: int
    kv_heads: list[int]
    head_dim: int
    vocab_size: int
    inputs: list[str]
    outputs: list[str]


class _Portable(GraphWriter):
    """A graph of the standard's operators.

    The query heads that share a KV head are rows of one product, so keys and values are never repeated.
    """

    def __init__(self, model: PreTrainedModel, weights: TensorFile, slots: Sequence[str]) -> None:
        super().__init__(model, weights, slots)
        self.windows = windows_of(model)
        shape = self.op("Shape", "attention_mask")
        self.batch, self.total = (self.op("Slice", shape, *map(self.numbers, (n, n + 1, 0))) for n in (0, 1))
        self.length = self.op("Shape", "memory.0.key", start=2, end=3)
        self.sight = self.op("Add", self.total, self.length)  # tokens of memory and text
        one = self.numbers(1)
        self.front = self.op("Concat", self.batch, one, one, one, axis=0)
        self.positions = self.op("Cast", self.op("Add", "position_ids", self.length), to=FLOAT)
        self.biases = {window: self._bias(window) for window in dict.fromkeys(self.windows)}
        self.kinds = self._rotary_kinds()
        self.rotations = {kind: self._rotation(kind) for kind in dict.fromkeys(self.kinds)}

    def _bias(self, window: int | None) -> str:
        """What is added to the scores, [batch, 1, sequence, memory + text]: the memory is always in sight."""
        queries = self.op("Shape", "input_ids", start=1, end=2)
        zero, one = self.numbers(0), self.numbers(1)
        steps = (self.op("Squeeze", x, zero) for x in (zero, self.total, one))
        keys = self.op("Range", *steps)  # a text's tokens by their place in mask and cache
        own = self.op(
            "Unsqueeze", self.op("Slice", keys, self.op("Sub", self.total, queries), self.total), one
        )
        seen = self.op("LessOrEqual", keys, own)
        if window is not None:
            seen = self.op("And", seen, self.op("Greater", keys, self.op("Sub", own, self.numbers(window))))
        real = self.op(
            "Unsqueeze", self.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL), self.numbers(1, 2)
        )
        bias = self.op(
            "Where", self.op("And", seen, real), self.scalar("seen", 0.0), self.scalar("hidden", HIDDEN)
        )
        shape = self.op("Concat", self.batch, one, queries, self.length, axis=0)
        return self.op("Concat", self.op("Expand", "seen", shape), bias, axis=3)

    def _rotary_kinds(self) -> list[str]:
        """Of every layer: the prefix of its rotation's attributes."""
        if hasattr(self.model.model.rotary_emb, "inv_freq"):
            return [""] * len(self.windows)
        return [f"{layer.self_attn.layer_type}_" for layer in self.model.model.layers]

    def _rotation(self, kind: str) -> tuple[str, str]:
        """Cosine and sine of every position, [batch, 1, sequence, head_dim / 2]."""
        rotary = self.model.model.rotary_emb
        frequencies = self.weight(f"{kind}inv_freq", getattr(rotary, f"{kind}inv_freq"))
        angles = self.op("Mul", self.op("Unsqueeze", self.positions, self.numbers(1, 3)), frequencies)
        scaling = float(getattr(rotary, f"{kind}attention_scaling"))
        tables = (self.op("Cos", angles), self.op("Sin", angles))
        if scaling != 1:
            factor = self.scalar(f"{kind}attention_scaling", scaling)
            tables = tuple(self.op("Mul", table, factor) for table in tables)  # type: ignore[assignment]
        return tables

    def norm(self, x: str, module: Any, path: str) -> str:
        """See `GraphWriter`."""
        scale, epsilon = self.scale_of(module, path)
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.numbers(-1))
        root = self.op("Sqrt", self.op("Add", mean, self.scalar(f"epsilon_{epsilon:g}", epsilon)))
        return self.op("Mul", self.op("Div", x, root), scale)

    def _heads(self, x: str, head_dim: int) -> str:
        """[batch, sequence, heads · head_dim] to [batch, heads, sequence, head_dim]."""
        return self.op(
            "Transpose", self.op("Reshape", x, self.numbers(0, 0, -1, head_dim)), perm=[0, 2, 1, 3]
        )

    def _rotated(self, x: str, i: int) -> str:
        cos, sin = self.rotations[self.kinds[i]]
        halves = [f"n{len(self.nodes)}.{n}" for n in (0, 1)]
        self.nodes.append(
            helper.make_node("Split", [x], halves, name=f"Split.{halves[0]}", axis=3, num_outputs=2)
        )
        a, b = halves
        left = self.op("Sub", self.op("Mul", a, cos), self.op("Mul", b, sin))
        return self.op("Concat", left, self.op("Add", self.op("Mul", b, cos), self.op("Mul", a, sin)), axis=3)

    def attend(self, qkv: Sequence[str], module: Any, i: int) -> str:
        """See `GraphWriter`."""
        size = module.head_dim
        heads, kv_heads = (p.out_features // size for p in (module.q_proj, module.k_proj))
        q, k, v = (self._heads(x, size) for x in qkv)
        q = self.op("Mul", self._rotated(q, i), self.scalar(f"scaling_{module.scaling:.9g}", module.scaling))
        whole = []
        for kind, new in (("key", self._rotated(k, i)), ("value", v)):
            text = self.op("Concat", f"past_key_values.{i}.{kind}", new, axis=2, name=f"present.{i}.{kind}")
            front = self.op("Expand", f"memory.{i}.{kind}", self.front)
            whole.append(self.op("Concat", front, text, axis=2))
        keys, values = whole
        # [batch, kv_heads, queries of a group · sequence, head_dim] · [batch, kv_heads, head_dim, sight]
        grouped = self.op("Reshape", q, self.numbers(0, kv_heads, -1, size))
        scores = self.op("MatMul", grouped, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
        apart, together = (self.op("Concat", self.numbers(0, n, -1), self.sight, axis=0)
                           for n in (heads, kv_heads))  # fmt: skip
        scores = self.op("Add", self.op("Reshape", scores, apart), self.biases[self.windows[i]])
        shares = self.op("Reshape", self.op("Softmax", scores, axis=-1), together)
        y = self.op("Reshape", self.op("MatMul", shares, values), self.numbers(0, heads, -1, size))
        y = self.op("Transpose", y, perm=[0, 2, 1, 3])
        return self.op("Reshape", y, self.numbers(0, 0, -1))


def add_defaults(model: onnx.ModelProto) -> None:
    """Gives every slot among the graph's inputs its empty default, which makes the slot optional."""
    for value in model.graph.input:
        if is_slot(value.name):
            free = int(value.name in TOKEN_SLOTS)  # the row that is no token
            dims = value.type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else free for d in dims]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, dtype), value.name))


def bake(model: onnx.ModelProto, kv: Sequence[Pair]) -> None:
    """Replaces the memory's slots by constants: the graph then knows this one learned KV and no other."""
    constants = {f"memory.{i}.{kind}": pair[n] for i, pair in enumerate(kv)
                 for n, kind in enumerate(("key", "value"))}  # fmt: skip
    for name, tensor in constants.items():
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy()[None])
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"merged.{name}"))
    for node in model.graph.node:
        node.input[:] = [f"merged.{name}" if name in constants else name for name in node.input]
    stay = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(stay)


def interface(
    model: PreTrainedModel, lora_modules: Sequence[str], token_slots: Sequence[str] = ()
) -> tuple[list[Any], list[Any]]:
    """Inputs, slots among them, and outputs of a backbone's graph, as ONNX describes them."""
    layers: Any = model.model.layers
    size = layers[0].self_attn.head_dim
    text: Any = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total"],
                 "position_ids": ["batch", "sequence"]}  # fmt: skip
    value = helper.make_tensor_value_info
    inputs = [value(name, INT64, shape) for name, shape in text.items()]
    words: Any = "words" if token_slots else _words(model)
    outputs = [value("logits", FLOAT, ["batch", "sequence", words])]
    memory = []
    for i, layer in enumerate(layers):
        heads = layer.self_attn.k_proj.out_features // size
        for kind in ("key", "value"):
            inputs.append(value(f"past_key_values.{i}.{kind}", FLOAT, ["batch", heads, "past", size]))
            memory.append(value(f"memory.{i}.{kind}", FLOAT, [1, heads, "memory", size]))
            outputs.append(value(f"present.{i}.{kind}", FLOAT, ["batch", heads, "total", size]))
    inputs += memory
    inputs += [value(name, FLOAT, ["tokens", model.config.hidden_size]) for name in token_slots]
    for n, name in enumerate(lora_modules):
        module = _linear(model, name)
        # A rank of its own for every module: a memory may leave modules out, and ONNX Runtime shares buffers
        # between tensors whose named sizes agree.
        inputs.append(value(f"{name}.lora_A.weight", FLOAT, [module.in_features, f"rank_{n}"]))
        inputs.append(value(f"{name}.lora_B.weight", FLOAT, [f"rank_{n}", module.out_features]))
    return inputs, outputs


def token_slots_of(model: PreTrainedModel) -> list[str]:
    """The slots of own tokens: one for an embedding that the head is tied to, else one for each."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    return [EMBEDDING_SLOT] if tied else [EMBEDDING_SLOT, HEAD_SLOT]


def _words(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return int(head.out_features)


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise KoffError(f"the model has no module {name!r} for a LoRA slot") from error
    if not isinstance(module, nn.Linear):
        raise KoffError(f"{name!r} is a {type(module).__name__}: only linear layers take a LoRA slot")
    return module


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    lora_modules: Sequence[str],
    baked: Sequence[Pair] | None = None,
    own_tokens: bool = False,
) -> GraphInfo:
    """Writes `folder`/onnx/model.onnx (+ model.onnx.data), float32.

    Inputs, int64, of the text alone (the memory's length is added inside): input_ids [batch, sequence],
    attention_mask [batch, past + sequence], position_ids [batch, sequence]. Inputs, float32:
    past_key_values.{i}.key/value [batch, kv_heads_i, past, head_dim]. Slots, float32: memory.{i}.key/value
    [1, kv_heads_i, M, head_dim], {module}.lora_A.weight [in, r], {module}.lora_B.weight [r, out] with the
    LoRA scale folded in; with `own_tokens` memory.tokens.embedding and, of a head that is not tied,
    memory.tokens.head, [1 + n, hidden] for n tokens, the first row zero. Outputs, float32: logits [batch,
    sequence, vocabulary + n], present.{i}.key/value [batch, kv_heads_i, past + sequence, head_dim].

    Args:
        model: A plain causal LM of the Llama family (Llama, Mistral, Qwen2, Qwen3, Gemma 3 text) in any float
            dtype; widths and head counts may differ per layer. It is only read.
        folder: The bundle's folder; `onnx/` is made in it.
        lora_modules: Paths of the linear modules that get a LoRA slot ("model.layers.0.mlp.up_proj").
        baked: A learned KV, one (key, value) [kv_heads_i, P, head_dim] per layer, P may be 0, that the graph
            is to hold for good: it then has no slots for another.
        own_tokens: Whether memories have tokens of their own.

    Raises:
        KoffError: no graph holds the model, a module does not exist or is not linear, or the disk refuses.
    """
    check_portable(model.config.to_dict())
    slots = token_slots_of(model) if own_tokens else []
    inputs, outputs = interface(model, lora_modules, slots)
    target = Path(folder) / "onnx" / "model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target), TensorFile(target) as weights:
        writer = _Portable(model, weights, [*lora_modules, *slots])
        writer.logits()
        graph = writer.finished(inputs, outputs, own=False)
        if baked is not None:
            bake(graph, baked)
        add_defaults(graph)
        onnx.save(graph, target)
    attentions = [layer.self_attn for layer in model.model.layers]
    return GraphInfo(
        layers=len(attentions),
        kv_heads=[a.k_proj.out_features // a.head_dim for a in attentions],
        head_dim=attentions[0].head_dim,
        vocab_size=_words(model),
        inputs=[v.name for v in inputs if baked is None or not is_slot(v.name)],
        outputs=[v.name for v in outputs],
    )


def write_required(folder: str | Path, path: str) -> str:
    """Writes a copy of a bundle's graph whose slots are required inputs, around the same file of weights.

    onnxruntime-web refuses optional inputs, and onnxruntime-node drops them without a word.

    Args:
        folder: The bundle.
        path: Of the graph in it, such as onnx/model.onnx.

    Returns:
        The path of the copy, such as onnx/model_js.onnx.

    Raises:
        KoffError: the disk refuses.
    """
    model = onnx.load(Path(folder) / path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if not is_slot(tensor.name)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    copy = path.removesuffix(".onnx") + "_js.onnx"
    with disk_errors(Path(folder) / copy):
        onnx.save(model, Path(folder) / copy)
    return copy


def write_adapter(
    path: str | Path,
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
    kv: Sequence[Pair] | None,
    tokens: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes one memory as an `.onnx_adapter`, float32.

    What a memory does not carry is left out: the graph's default then stands.

    Args:
        path: The file to write.
        lora: By module path: A [r, in], B [out, r] as PEFT holds them, and the scale to fold into B.
        kv: One (key, value) per layer, each [kv_heads, P, head_dim] or with a leading 1, post-RoPE; or None.
        tokens: Rows [n, hidden] of its own tokens, `embedding` and maybe `head`.

    Raises:
        KoffError: the disk refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, (key, value) in enumerate(kv or ()):
        for kind, tensor in (("key", key), ("value", value)):
            tensors[f"memory.{i}.{kind}"] = tensor if tensor.dim() == 4 else tensor[None]
    for module, (a, b, scale) in lora.items():
        tensors[f"{module}.lora_A.weight"] = a.T
        tensors[f"{module}.lora_B.weight"] = b.float().T * scale
    for part, rows in (tokens or {}).items():
        place = {"embedding": EMBEDDING_SLOT, "head": HEAD_SLOT}[part]
        tensors[place] = torch.cat([torch.zeros_like(rows[:1]), rows])
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t.detach().float().cpu().numpy()))
        for name, t in tensors.items()
    }
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        adapter.export_adapter(str(path))
