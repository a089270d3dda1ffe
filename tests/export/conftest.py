"""Shared fixtures: one exported bundle for all tests."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "export"))

from export_helpers import BOS, WINDOW, Exported, lora_modules, random_kv, random_lora, tiny_model


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes behind a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": "<s>"}))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A Llama with per-layer widths, tied, held in bfloat16 while it is exported; three unlike memories."""
    from koff_export.bundle import write_manifest
    from koff_export.onnx import export_onnx, write_adapter

    folder = tmp_path_factory.mktemp("exported") / "bundle"
    folder.mkdir()
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: id(p) for name, p in model.named_parameters()}
    info = export_onnx(model, folder, lora_modules=lora_modules(model))
    after = model.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert pointers == {name: id(p) for name, p in model.named_parameters()}
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks for m in model.modules())
    model.float()
    memories = {
        "law": (random_lora(model, 3, 1), random_kv(model, 7, 2)),
        "math": (random_lora(model, 5, 3, skip="k_proj"), None),
        "music": ({}, random_kv(model, 4, 4)),
    }
    domains = {}
    for name, (lora, kv) in memories.items():
        path = f"onnx/memories/{name}.onnx_adapter"
        write_adapter(folder / path, lora, kv)
        domains[name] = {"kv_tokens": kv[0][0].shape[1] if kv else 0, "adapter": path, "parameters": 1}
    write_tokenizer(folder)
    graph = {**vars(info), "precisions": {"fp32": "onnx/model.onnx"}}
    manifest = {
        "koff_prune": "0.1.0",
        "model": {},
        "plan": "0",
        "parameters": {},
        "sparsity": {},
        "window": WINDOW,
    }
    manifest |= {"bos": BOS, "eos": [], "context": 128, "domains": domains, "graph": graph, "later_key": 1}
    write_manifest(folder, manifest)
    return Exported(folder, model, memories)


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """A private copy of the bundle, to be damaged."""
    return Path(shutil.copytree(exported.folder, tmp_path / "bundle"))
