"""Several memories as one: the sums are exact, and every cache is as far from the text as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import SHAPES, memories_on, tiny_config, tiny_model, tiny_shape, token_ids
from run_helpers import koff_prune, recipe_of
from transformers import DynamicCache

import koff_prune as package
from koff_export.errors import KoffError
from koff_export.runtime import Runtime
from koff_prune import load_backbone, load_bundle
from koff_prune.attach import attach_memory
from koff_prune.compose import compose, move
from koff_prune.memory import load_memory, memory_of_folder, save_memory
from koff_prune.recipe import Kv, Lora, Memory


def keys_at(name: str, start: int) -> tuple[list[torch.Tensor], torch.nn.Module]:
    """Every layer's keys [kv_heads, 5, head_dim] of five tokens that begin at position `start`."""
    model = tiny_shape(name)
    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=token_ids(1, 5), position_ids=torch.arange(start, start + 5)[None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    return [layer.keys[0] for layer in cache.layers], model


@pytest.mark.parametrize("name", SHAPES)
def test_a_moved_key_is_one_computed_there(name: str) -> None:
    """For every family, and for both rotations of Gemma: what the model itself gives further on."""
    here, model = keys_at(name, 0)
    there, _ = keys_at(name, 7)
    for i, (key, wanted) in enumerate(zip(here, there, strict=True)):
        assert (move(model, i, key, 7) - wanted).abs().max() < 1e-5
        assert (key - wanted).abs().max() > 1e-2


def test_lora_is_summed_with_weights() -> None:
    """Per module, B A of the sum is the weighted sum of B A; a module that one part lacks counts as zero."""
    memories = memories_on(tiny_model())
    sections = [Memory(lora=Lora(rank=3, alpha=6), kv=None), Memory(lora=Lora(rank=3, alpha=1.5), kv=None)]
    loras = [dict(memories.tensors(d)["lora"]) for d in ("law", "law2")]
    loras[1] = {k: t for k, t in loras[1].items() if "q_proj" not in k}
    tensors, section = compose(
        tiny_model(), [({"lora": t}, s) for t, s in zip(loras, sections, strict=True)], [0.7, -0.2]
    )
    assert section.lora is not None and section.kv is None
    assert (section.lora.rank, section.lora.alpha) == (6, 6)
    for name in [n for n in tensors["lora"] if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        got = tensors["lora"][other] @ tensors["lora"][name]
        wanted = 0.7 * 2 * loras[0][other] @ loras[0][name]
        if name in loras[1]:
            wanted = wanted - 0.2 * 0.5 * loras[1][other] @ loras[1][name]
        assert (got - wanted).abs().max() < 1e-5


def saved(folder: Path, tokens: int, seed: int) -> Path:
    """A random memory with a cache of `tokens` positions around the tiny model."""
    memories = memories_on(tiny_model(), (folder.name,), seed=seed)
    tensors = memories.tensors(folder.name)
    tensors["kv"] = {k: t[:, :tokens].contiguous() for k, t in tensors["kv"].items()}
    save_memory(folder, tensors, Memory(lora=Lora(rank=3, alpha=6), kv=Kv(tokens=tokens)), "tiny")
    return folder


def composed_logits(places: list[Path], weights: list[float] | None, to: Path) -> torch.Tensor:
    parts = [(load_memory(p), memory_of_folder(p)) for p in places]
    save_memory(to, *compose(tiny_model(), parts, weights), "tiny")
    attached = attach_memory(tiny_model(), to)
    with torch.no_grad():
        logits: torch.Tensor = attached.base(input_ids=token_ids(2, 9), use_cache=False).logits
    return logits


def test_one_part_is_itself_and_the_order_does_not_matter(tmp_path: Path) -> None:
    """Of caches of unlike length; and both parts are there."""
    law, sea = saved(tmp_path / "law", 5, 1), saved(tmp_path / "sea", 3, 2)
    with torch.no_grad():
        base = attach_memory(tiny_model(), law).base
        alone = base(input_ids=token_ids(2, 9), use_cache=False).logits
    assert (composed_logits([law], None, tmp_path / "one") - alone).abs().max() < 1e-5
    one = composed_logits([law, sea], [0.7, 0.3], tmp_path / "two")
    other = composed_logits([sea, law], [0.3, 0.7], tmp_path / "three")
    assert (one - other).abs().max() < 1e-4
    assert (one - alone).abs().max() > 1e-2


def test_a_cache_is_as_far_from_the_text_as_alone(tmp_path: Path) -> None:
    """Its part of the sum, seen from the text of the sum, acts as it does alone."""
    law, sea = saved(tmp_path / "law", 5, 1), saved(tmp_path / "sea", 3, 2)
    model = tiny_model()
    with torch.no_grad():
        base = attach_memory(model, law).base
        wanted = base(input_ids=token_ids(2, 9), use_cache=False).logits
    tensors, section = compose(
        tiny_model(), [(load_memory(p), memory_of_folder(p)) for p in (law, sea)], [1.0, 0.0]
    )
    attached_to = tmp_path / "both"
    save_memory(attached_to, tensors, section, "tiny")
    attached = attach_memory(tiny_model(), attached_to)
    assert attached.tokens == 8
    for attention in attached.attentions:  # take the second cache away; positions stay as they are
        attention.koff_kv = tuple(t[:, :, :5] for t in attention.koff_kv)
    with torch.no_grad():
        got = attached.base(input_ids=token_ids(2, 9), use_cache=False).logits
    assert (got - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "must be 2 numbers"),
        ([0.2, 0.3, 0.5], "must be 2 numbers"),
        ([1.0, float("nan")], "must be finite"),
        ([0.0, 0.0], "not all of them 0"),
    ],
)
def test_weights_that_do_not_fit_are_told(tmp_path: Path, weights: list[float], says: str) -> None:
    parts = [(load_memory(p), memory_of_folder(p)) for p in [saved(tmp_path / "law", 5, 1)] * 2]
    with pytest.raises(KoffError, match=says):
        compose(tiny_model(), parts, weights)


def test_what_is_too_large_or_cannot_be_moved_is_told(tmp_path: Path) -> None:
    part = [(load_memory(p), memory_of_folder(p)) for p in [saved(tmp_path / "law", 5, 1)]]
    with pytest.raises(KoffError, match="compose fewer"):
        compose(tiny_model(), part * 171)
    model = tiny_model(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    with pytest.raises(KoffError, match="dynamic positions"):
        compose(model, part * 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_of(
        folder, tiny_config("qwen2", num_hidden_layers=2, tie_word_embeddings=True),
        learn={"rates": {"lora": 0.05, "kv": 0.2}}, export={"formats": ["safetensors", "onnx"]},
    )  # fmt: skip
    package.apply(recipe, folder / "run")
    return folder / "run" / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_two_memories_at_once_in_torch_and_on_a_device(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What torch composes when it loads is what `memory compose` writes and the device runs."""
    ids = token_ids(1, 9)
    running = Runtime.open(bundle)
    with torch.no_grad():
        both = load_bundle(bundle, "law+code", torch.float32, weights=[0.7, 0.3])
        wanted = both(input_ids=ids).logits[0].numpy()
        assert both.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 12)
        for one in ("law", "code"):
            alone = load_bundle(bundle, one, torch.float32)(input_ids=ids).logits[0].numpy()
            assert np.abs(alone - wanted).max() > 1e-2
    answer = koff_prune(
        capsys, "memory", "compose", bundle, "--name", "both", "--of", "law+code", "--weights", "0.7,0.3"
    )
    assert answer.code == 0, answer.err
    assert np.abs(running.logits(ids[0].tolist(), "both") - wanted).max() < 1e-3
    told = json.loads(koff_prune(capsys, "memory", "inspect", bundle, "both").out)
    assert (told["lora_rank"], told["kv_tokens"]) == (4, 8)
    assert told["composed"] == {"of": ["law", "code"], "weights": [0.7, 0.3]}
    assert koff_prune(capsys, "verify", bundle).code == 0


def test_equal_weights_are_equal_among_what_has_a_lora(bundle: Path) -> None:
    """A part that is a cache alone takes nothing from the others' LoRA."""
    law, section = load_memory(bundle / "memories/law"), memory_of_folder(bundle / "memories/law")
    cache = {"kv": load_memory(bundle / "memories/code")["kv"]}
    tensors, _ = compose(load_backbone(bundle), [(law, section), (cache, section.only("kv"))])
    a, b = (f"base_model.model.model.layers.0.mlp.down_proj.lora_{half}.weight" for half in "AB")
    assert section.lora is not None
    wanted = section.lora.alpha / section.lora.rank * law["lora"][b] @ law["lora"][a]
    assert (tensors["lora"][b] @ tensors["lora"][a] - wanted).abs().max() < 1e-6 < wanted.abs().max()


def test_mistakes_are_one_sentence(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        (("--name", "both", "--of", "law+sea"), "'sea': not in"),
        (("--name", "law", "--of", "law+code"), "--replace"),
        (("--name", "Law", "--of", "law+code"), "only in case"),
        (("--name", "auto", "--of", "law+code"), "koff-run"),
        (("--name", "both", "--of", "law+code", "--weights", "a,b"), "0.7,0.3"),
        (("--name", "both", "--of", "law+code", "--weights", "1"), "2 numbers"),
    ):
        answer = koff_prune(capsys, "memory", "compose", bundle, *options)
        assert answer.code == 2 and answer.err.count("\n") == 1 and says in answer.err, answer.err
    with pytest.raises(KoffError, match="'sea': not in"):
        load_bundle(bundle, "law+sea")
