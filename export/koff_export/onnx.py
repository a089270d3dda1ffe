"""One ONNX graph for the backbone, with a slot for every tensor of a memory; one adapter file per memory.

The slots (`memory.{i}.key/value`, `{module}.lora_A/B.weight`) are graph inputs with zero-size defaults: left
alone, the graph is the bare backbone; ONNX Runtime fills them from an `.onnx_adapter` for the length of one
call.

Needs torch, transformers, onnx and onnxscript; imported only when exporting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from koff_export.attention import attention
from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.graph import is_slot
from koff_export.tensors import TensorFile
from koff_export.weightless import put_back, take_out, weightless

Pair = tuple[torch.Tensor, torch.Tensor]

# Sizes to trace with: distinct and at least 2, because the exporter takes 0, 1 and equal sizes as fixed.
_BATCH, _SEQUENCE, _PAST, _MEMORY, _RANK = 2, 5, 3, 4, 6


@dataclass(frozen=True)
class GraphInfo:
    """What the manifest's `graph` says about an exported graph.

    Attributes:
        layers: Number of decoder layers.
        kv_heads: KV heads of each layer.
        head_dim: Size of one head.
        vocab_size: Width of the logits.
        inputs: Input names in order, slots included.
        outputs: Output names in order.
    """

    layers: int
    kv_heads: list[int]
    head_dim: int
    vocab_size: int
    inputs: list[str]
    outputs: list[str]


class _Slots(nn.Module):
    """The model with its cache, memory and LoRA as plain tensor arguments."""

    def __init__(self, model: PreTrainedModel, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.linears = linears  # a plain list: the modules already belong to `model`
        self.lora: Sequence[Pair] = []

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Sequence[Pair],
        memory: Sequence[Pair],
        lora: Sequence[Pair],
    ) -> tuple[torch.Tensor, list[Pair]]:
        for layer, pair in zip(self.model.model.layers, memory, strict=True):
            layer.self_attn.koff_kv = pair
        self.lora = lora
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids + memory[0][0].shape[2],
            # No config: every layer keeps all of its text, and sliding windows are left to the mask.
            past_key_values=DynamicCache(list(past_key_values)),
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    def hook(self, index: int) -> Callable[..., torch.Tensor]:
        def add_lora(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            a, b = self.lora[index]
            return output + (args[0] @ a) @ b

        return add_lora


@contextmanager
def _prepared(model: PreTrainedModel, slots: _Slots) -> Iterator[None]:
    """Hooks the slots into `model`, and takes every trace of them out again."""
    training = {module: module.training for module in model.modules()}
    attentions = [layer.self_attn for layer in model.model.layers]
    kv_before = [(a, a.__dict__["koff_kv"]) for a in attentions if "koff_kv" in a.__dict__]
    handles = [linear.register_forward_hook(slots.hook(i)) for i, linear in enumerate(slots.linears)]
    try:
        model.eval()
        with attention(model), weightless(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in attentions:
            module.__dict__.pop("koff_kv", None)
        for module, kv in kv_before:
            module.koff_kv = kv
        for module, mode in training.items():
            module.training = mode


def _kv_samples(kv_heads: list[int], head_dim: int, batch: int, length: int) -> list[Pair]:
    return [
        (torch.zeros(batch, h, length, head_dim), torch.zeros(batch, h, length, head_dim)) for h in kv_heads
    ]


def _tidy(model: Any) -> None:
    """Drops an `onnx_ir.Model`'s notes, which hold stack traces and paths of this machine, in place."""
    graph = model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def add_defaults(model: onnx.ModelProto) -> None:
    """Gives every slot among the graph's inputs its zero-size default, which makes the slot optional."""
    for value in model.graph.input:
        if is_slot(value.name):
            shape = [d.dim_value if d.HasField("dim_value") else 0 for d in value.type.tensor_type.shape.dim]
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


def check_rotation(model: nn.Module) -> None:
    """Refuses a rotation that changes with the length of the text, which a traced graph cannot follow.

    Raises:
        KoffError: there is one, with the mend.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                raise KoffError(
                    f"export.formats: onnx cannot hold the rotation {kind}, which depends on the text's"
                    " length; leave onnx out"
                )


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    lora_modules: Sequence[str],
    baked: Sequence[Pair] | None = None,
    progress: Callable[[str], None] | None = None,
) -> GraphInfo:
    """Writes `folder`/onnx/model.onnx (+ model.onnx.data), float32.

    Inputs, int64, of the text alone (the memory's length is added inside): input_ids [batch, sequence],
    attention_mask [batch, past + sequence], position_ids [batch, sequence]. Inputs, float32:
    past_key_values.{i}.key/value [batch, kv_heads_i, past, head_dim]. Slots, float32: memory.{i}.key/value
    [1, kv_heads_i, M, head_dim], {module}.lora_A.weight [in, r], {module}.lora_B.weight [r, out] with the
    LoRA scale folded in. Outputs, float32: logits [batch, sequence, vocabulary], present.{i}.key/value
    [batch, kv_heads_i, past + sequence, head_dim].

    Args:
        model: A plain causal LM of the Llama family (Llama, Qwen2, Qwen3, Gemma 3 text); widths and head
            counts may differ per layer. It is left exactly as it was, dtype included.
        folder: The bundle's folder; `onnx/` is made in it.
        lora_modules: Paths of the linear modules that get a LoRA slot ("model.layers.0.mlp.up_proj").
        baked: A learned KV, one (key, value) [kv_heads_i, P, head_dim] per layer, P may be 0, that the graph
            is to hold for good: it then has no slots for another.
        progress: Called with one line before each slow step.

    Raises:
        KoffError: a module does not exist or is not linear, no graph holds the rotation, or the disk refuses.
    """
    say = progress or (lambda line: None)
    linears: list[nn.Linear] = []
    for name in lora_modules:
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise KoffError(f"the model has no module {name!r} for a LoRA slot") from error
        if not isinstance(linear, nn.Linear):
            raise KoffError(f"{name!r} is a {type(linear).__name__}: only linear layers take a LoRA slot")
        linears.append(linear)
    check_rotation(model)
    layers = list(model.model.layers)
    head_dim = layers[0].self_attn.head_dim
    kv_heads = [layer.self_attn.k_proj.out_features // head_dim for layer in layers]
    pairs = [(i, kind) for i in range(len(layers)) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    inputs += [f"past_key_values.{i}.{kind}" for i, kind in pairs] + [
        f"memory.{i}.{kind}" for i, kind in pairs
    ]
    inputs += [f"{name}.lora_{half}.weight" for name in lora_modules for half in "AB"]
    outputs = ["logits"] + [f"present.{i}.{kind}" for i, kind in pairs]

    samples: dict[str, Any] = {
        "input_ids": torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous(),
        "past_key_values": _kv_samples(kv_heads, head_dim, _BATCH, _PAST),
        "memory": _kv_samples(kv_heads, head_dim, 1, _MEMORY),
        "lora": [(torch.zeros(x.in_features, _RANK), torch.zeros(_RANK, x.out_features)) for x in linears],
    }
    past, memory = {0: "batch", 2: "past"}, {2: "memory"}
    dynamic = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "sequence"},
        "past_key_values": [(past, past)] * len(layers),
        "memory": [(memory, memory)] * len(layers),
        # A rank of its own for every module: a memory may leave modules out, and ONNX Runtime shares buffers
        # between tensors whose named sizes agree.
        "lora": [({1: f"rank_{i}"}, {0: f"rank_{i}"}) for i in range(len(linears))],
    }
    target = Path(folder) / "onnx" / "model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    slots = _Slots(model, linears)
    say("tracing the backbone")
    with _prepared(model, slots), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals, at length
        program = torch.onnx.export(
            slots,
            kwargs=samples,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    weights = {**dict(slots.named_parameters(remove_duplicate=False)),
               **dict(slots.named_buffers(remove_duplicate=False))}  # fmt: skip
    taken = take_out(program.model, weights)
    program.optimize()
    _tidy(program.model)
    say("writing model.onnx")
    graph = onnx_ir.to_proto(program.model)
    del program
    del graph.graph.value_info[:]  # only a hint to readers, as large as the graph itself
    with disk_errors(target), TensorFile(target) as data:
        put_back(graph.graph, taken, weights, data)
        if baked is not None:
            bake(graph, baked)
            inputs = [name for name in inputs if not is_slot(name)]
        add_defaults(graph)
        onnx.save(graph, target)
    vocab_size = graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    return GraphInfo(len(layers), kv_heads, head_dim, vocab_size, inputs, outputs)


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
) -> None:
    """Writes one memory as an `.onnx_adapter`, float32.

    What a memory does not carry is left out: the graph's zero-size default then stands.

    Args:
        path: The file to write.
        lora: By module path: A [r, in], B [out, r] as PEFT holds them, and the scale to fold into B.
        kv: One (key, value) per layer, each [kv_heads, P, head_dim] or with a leading 1, post-RoPE; or None.

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
