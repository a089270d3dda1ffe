"""Codes of 4 bits that were rounded together are nearer to the products than the nearest ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from model_helpers import memories_on, tiny_memory, tiny_shape, token_ids

from koff_export.onnx import export_onnx
from koff_export.quantize import BLOCK, LOWEST, Rounded, nearest, quantize
from koff_prune import rounding
from koff_prune.cut import save_backbone
from koff_prune.memory import save_memory
from koff_prune.rounding import round_matrices, round_matrix
from koff_prune.surgeon import damping


def weights_of(rounded: Rounded) -> torch.Tensor:
    """[outputs, inputs] that codes and scales stand for."""
    codes, scales = (torch.from_numpy(array).float() for array in rounded)
    return ((codes + LOWEST) * scales.repeat_interleave(BLOCK, 0)[: len(codes)]).T


@pytest.mark.parametrize("inputs", [64, 80])
def test_the_products_err_less_than_of_the_nearest_codes(inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    x = torch.randn(2000, inputs, generator=generator) @ mix  # inputs that say much of one another
    weight = torch.randn(48, inputs, generator=generator)
    found = round_matrix(weight, rounding.inverse_factor(x.T @ x))
    assert found[0].shape == (inputs, 48) and found[0].dtype == np.uint8 and found[0].max() < 16
    assert found[1].shape == (-(-inputs // BLOCK), 48)

    def error(rounded: Rounded) -> float:
        return float((x @ (weights_of(rounded) - weight).T).square().mean())

    assert error(found) < 0.5 * error(nearest(weight.T.contiguous().numpy()))


def test_the_inverse_is_factored_even_where_massive_inputs_say_the_same() -> None:
    """A fifth of the inputs alike at a thousand times the others' scale, and few tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 768, generator=generator)
    x[:, :153] = 1000 * x[:, :1]
    found = rounding.inverse_factor(x.T @ x)
    assert torch.isfinite(found).all() and (found.diagonal() > 0).all()
    assert torch.equal(found, found.triu())
    x = torch.randn(500, 40, generator=generator)
    second = x.T @ x
    damped = (second + torch.diag(damping(second, rounding.RIDGE))).double()
    found = rounding.inverse_factor(second).double()
    torch.testing.assert_close(found.T @ found @ damped, torch.eye(40).double(), atol=1e-4, rtol=0)


@pytest.fixture(params=["llama", "qwen2-tied"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A backbone, its float32 graph, and a memory that moves what its matrices multiply."""
    torch.set_num_threads(1)
    model = tiny_shape(request.param)
    save_backbone(model, tmp_path)
    export_onnx(model, tmp_path, lora_modules=[])
    memories = memories_on(model, ("law",))
    save_memory(tmp_path / "memories" / "law", memories.tensors("law"), tiny_memory(), "somewhere")
    return tmp_path


def read(graph: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(graph).graph.initializer}


def test_a_graph_holds_the_codes(bundle: Path) -> None:
    """Of every matrix that is not kept in 8 bits; as many bytes, whichever way they were found."""
    texts = {"law": token_ids(4, 32), "none": token_ids(4, 32)}
    rounded = round_matrices(bundle, texts, ["v_proj"])
    assert not [name for name in rounded if "v_proj" in name]
    graph = bundle / "onnx/model.onnx"
    for name, given in (("gptq", rounded), ("nearest", None)):
        quantize(graph, bundle / f"onnx/{name}.onnx", 4, keeps=["v_proj"], rounded=given)
    found, plain = (read(bundle / f"onnx/{name}.onnx") for name in ("gptq", "nearest"))
    assert {name: array.shape for name, array in found.items()} == {n: a.shape for n, a in plain.items()}
    four = [name.removesuffix(".int4") for name in found if name.endswith(".int4")]
    assert sorted(four) == sorted(rounded) and four
    for name in four:
        low, high = found[f"{name}.int4"] & 15, found[f"{name}.int4"] >> 4
        codes = np.stack([low, high], -1).reshape(len(low), -1)[:, : len(rounded[name][0])]
        assert np.array_equal(codes.T, rounded[name][0])
        assert not np.array_equal(found[f"{name}.int4"], plain[f"{name}.int4"])


def test_a_group_of_layers_at_a_time_finds_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a large model's second moments need is bounded; and the memory of a text counts."""
    texts = {"law": token_ids(4, 32)}
    whole = round_matrices(bundle, texts, [])
    monkeypatch.setattr(rounding, "MOMENTS", 1)
    for name, (codes, scales) in round_matrices(bundle, texts, []).items():
        assert np.array_equal(codes, whole[name][0]) and np.array_equal(scales, whole[name][1]), name
    bare = round_matrices(bundle, {"other": texts["law"]}, [])
    assert any(not np.array_equal(bare[name][0], whole[name][0]) for name in whole)
