"""A tokenizer, models and texts small enough to make in a test."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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


def trained_tokenizer(texts: list[str], size: int, *, pieces: bool = False) -> PreTrainedTokenizerFast:
    """Byte-pair encoding trained on `texts`: on bytes (Llama 3, Qwen), or on `pieces` (Gemma, Llama 2).

    0 is <bos>, 1 is <eos>, 2 is <unused0>, 3 is <sep>.
    """
    special = ["<bos>", "<eos>", "<unused0>", "<sep>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<eos>" if pieces else None))
    letters: list[str] = []
    if pieces:
        special += [f"<0x{n:02X}>" for n in range(256)]
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        letters = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([part for text in texts for part in text.splitlines(True)], trainer)
    if pieces:  # bytes are no special tokens
        made = json.loads(tokenizer.to_str())
        made["added_tokens"] = made["added_tokens"][:4]
        tokenizer = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
