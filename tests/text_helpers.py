"""A tokenizer, models and texts small enough to make in a test."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast


def tiny_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, ids 2 and up; 0 is <bos>, 1 is <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<bos>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one merge, which llama.cpp insists on."""
    made = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    made["model"]["merges"] = [["a", "b"]]
    made["model"]["vocab"]["ab"] = 258
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny_model(folder: Path, config: PretrainedConfig, **options: Any) -> Path:
    """A random model of `config` and a tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes records a line each, packed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
