"""The exported graph of every supported family against torch; its file against a hostile one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_helpers import Exported, lora_modules, random_kv, random_lora, tiny_model, torch_logits

from koff_export.errors import KoffError
from koff_export.graph import check_onnx
from koff_export.limits import check_portable
from koff_export.onnx import export_onnx, write_adapter

GEMMA = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "qwen2": {"per_layer": True, "hidden_act": "gelu"},
    "qwen3": {"per_layer": True, "tie_word_embeddings": True, "rope_parameters": YARN},
    "mistral": {"per_layer": False, "sliding_window": 3, "hidden_act": "gelu_new"},
    "gemma3": {"per_layer": False, "final_logit_softcapping": 2.0, **GEMMA},
    "llama": {"per_layer": False, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("family", CASES)
def test_graph_equals_torch(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **CASES[family])  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    lora, kv = random_lora(model, 3, 1), random_kv(model, 6, 2)
    for parameter in model.parameters():  # buffers stay float32, as in a model that was saved in bfloat16
        parameter.data = parameter.data.bfloat16()
    info = export_onnx(model, tmp_path, lora_modules=lora_modules(model))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    write_adapter(tmp_path / "a.onnx_adapter", lora, kv)
    session = ort.InferenceSession(tmp_path / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    assert [x.name for x in (*session.get_inputs(), *session.get_overridable_initializers())] == info.inputs
    adapter, with_memory = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(tmp_path / "a.onnx_adapter"))
    with_memory.add_active_adapter(adapter)
    ids, mask = torch.randint(3, 250, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    for i, heads in enumerate(info.kv_heads):
        for kind in ("key", "value"):
            arrays[f"past_key_values.{i}.{kind}"] = np.zeros((2, heads, 0, info.head_dim), np.float32)
    for options, memory in ((None, ({}, None)), (with_memory, (lora, kv))):
        logits, *present = session.run(None, arrays, options)
        # A memory must outlive the sliding window, which an ordinary cache would not let it.
        if "sliding_window" in CASES[family] and options is not None:
            want = _with_koff_attention(model, ids, mask, *memory)
        else:
            want = torch_logits(model, ids, memory[0], memory[1], mask)
        assert np.abs((logits - want.numpy())[mask.bool().numpy()]).max() < 1e-3
        assert present[0].shape == (2, info.kv_heads[0], 8, info.head_dim)
        # The last token alone, after a cache of the first seven.
        first = {k: v[:, :7] if v.ndim == 2 else v for k, v in arrays.items()}
        _, *past = session.run(None, first, options)
        last = {"input_ids": arrays["input_ids"][:, 7:], "attention_mask": arrays["attention_mask"]}
        last["position_ids"] = arrays["position_ids"][:, 7:]
        cached = zip((n for n in info.inputs if n.startswith("past")), past, strict=True)
        step = session.run(["logits"], {**last, **dict(cached)}, options)[0]
        assert np.abs(step[:, 0] - logits[:, 7]).max() < 1e-3


def _with_koff_attention(model, ids, mask, lora, kv):  # type: ignore[no-untyped-def]
    from koff_export.attention import set_attention

    for layer, pair in zip(model.model.layers, kv, strict=True):
        layer.self_attn.koff_kv = tuple(t[None] for t in pair)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + kv[0][0].shape[1]
    set_attention(model)
    return torch_logits(model, ids, lora, None, mask, positions)


def test_a_tied_embedding_is_written_once_and_no_path_of_this_machine(exported: Exported) -> None:
    weights = [p.numel() * 4 for p in exported.model.parameters()]
    # each begins on a page of its own
    assert (exported.folder / "onnx/model.onnx.data").stat().st_size < sum(w + -w % 4096 for w in weights)
    graph = (exported.folder / "onnx/model.onnx").read_bytes()
    assert b"site-packages" not in graph and str(Path(__file__).parent).encode() not in graph


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from koff_export.onnx import export_onnx

def model_of(width):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=width, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2)).to(torch.bfloat16)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = model_of(8192)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
export_onnx(model_of(64), sys.argv[1] + "/first", lora_modules=[])  # what is loaded once and for all
start = peak()
export_onnx(model, sys.argv[1] + "/second", lora_modules=["model.layers.0.mlp.up_proj"])
print((peak() - start) / sum(4 * t.numel() for t in before.values()))
assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="getrusage counts in other units there")
def test_exporting_holds_no_copy_of_the_weights(tmp_path: Path) -> None:
    """Else a model's export needs several times its size."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def test_what_a_graph_would_not_say_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"full_attention": {**rope, "rope_type": "dynamic", "factor": 2.0}, "sliding_attention": rope}
    for model, says in (
        (tiny_model("gemma3", False, rope_parameters=kinds, **GEMMA), "rotation dynamic"),  # type: ignore[arg-type]
        (tiny_model("gemma3", False, use_bidirectional_attention=True, **GEMMA), "looks ahead"),  # type: ignore[arg-type]
    ):
        with pytest.raises(KoffError, match=says):
            check_portable(model.config.to_dict())
    check_portable(tiny_model("llama", hidden_act="swish", hidden_activation="mish").config.to_dict())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_text_is_refused(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.raises(KoffError, match=f"rotation {kind}.*leave onnx out"):
        export_onnx(model, tmp_path, lora_modules=[])


def test_lora_modules_must_exist_and_be_linear(tmp_path: Path) -> None:
    model = tiny_model()
    for name, message in (("model.layers.9.mlp", "no module"), ("model.norm", "only linear")):
        with pytest.raises(KoffError, match=message):
            export_onnx(model, tmp_path, lora_modules=[name])


Change = Callable[[onnx.ModelProto], None]


def _save(path: Path, change: Change) -> Path:
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", kind, [2, 2])], [value("y", kind, [2, 2])], [weight]
    )
    model = onnx.helper.make_model(graph)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def _external(location: str, length: str = "16") -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    return change


def _custom_op(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "evil.ops"


def _custom_op_in_a_branch(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("F", [], ["z"], domain="evil.ops")], "b", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", inner))


def _twice(model: onnx.ModelProto) -> None:
    """Readers differ in which of the two they take."""
    _external("data")(model)
    model.graph.initializer[0].external_data.add(key="location", value="other")


def _sparse_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.SparseTensorProto()
    tensor.values.CopyFrom(model.graph.initializer[0])
    tensor.values.ClearField("raw_data")
    tensor.values.data_location = onnx.TensorProto.EXTERNAL
    tensor.values.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"])
    constant.attribute.add(
        name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR
    ).sparse_tensor.CopyFrom(tensor)
    model.graph.node.append(constant)


def _functions_default(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[2, 2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    function = model.functions.add(name="f", domain="")
    function.attribute_proto.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)


def test_a_field_whose_number_other_readers_cut_off_is_refused(tmp_path: Path) -> None:
    """Protocol buffers keep 32 bits of a tag: this is field 7, the graph, to them, and unknown to us."""
    model = _save(tmp_path / "m.onnx", _external("data")).read_bytes()
    (tmp_path / "data").write_bytes(bytes(16))
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.SerializeToString()
    size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7]) if len(graph) > 127 else bytes([len(graph)])
    hidden = b"\xba\x80\x80\x80\x80\x01" + size + graph  # (7 << 3 | 2) + (1 << 35)
    (tmp_path / "m.onnx").write_bytes(model + hidden)
    with pytest.raises(KoffError, match="not an ONNX graph"):
        check_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_twice, "not an ONNX graph"),
        (_sparse_constant, "leads out"),
        (_functions_default, "leads out"),
        (_custom_op, "evil.ops"),
        (_custom_op_in_a_branch, "evil.ops"),
        (_external("../secret"), "leads out"),
        (_external("/etc/passwd"), "leads out"),
        (_external("link"), "leads out"),
        (_external("absent"), "missing"),
        (_external("data", "99"), "past the end"),
    ],
)
def test_hostile_graphs_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "data").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    assert check_onnx(_save(folder / "good.onnx", _external("data"))) == [folder / "data"]
    with pytest.raises(KoffError, match=message):
        check_onnx(_save(folder / "bad.onnx", change))


def test_truncated_or_foreign_files_are_refused(exported: Exported, tmp_path: Path) -> None:
    data = (exported.folder / "onnx/model.onnx").read_bytes()
    for content in (b"", b"\x80\x04\x95pickle", data[: len(data) // 2], b"\xff" * 100):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(KoffError, match="not an ONNX graph"):
            check_onnx(tmp_path / "x.onnx")
