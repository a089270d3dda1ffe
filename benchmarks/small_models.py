"""Trains the small dense models of recipes/small from scratch: own BPE, Llama or Qwen3 of 0.9 M parameters.

python benchmarks/small_models.py recipes/small/llama.yaml --seed 0 [--tokens 2000000]

The texts are the training side of the recipe's domains, in equal shares; what is held out is never seen. The
model goes where the recipe looks for it: runs/small/<family>-<seed>/, with its losses in training.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import TensorDataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from koff_export.files import staged_dir, write_json
from koff_prune.domains import split_documents
from koff_prune.reading import load_recipe
from koff_prune.recipe import SEED

VOCABULARY, WINDOW, BATCH = 2048, 256, 4
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def windows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, count: int) -> torch.Tensor:
    """The first `count` windows of the texts laid end to end, int64 [count, WINDOW]."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * WINDOW:
            break
    count = min(count, len(ids) // WINDOW)
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest, as one optimizer.

    A third of the tokens that AdamW alone needs to the same loss: the models must be good enough to lose
    something when they are cut, and two cores are all there is.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        known = set(map(id, blocks))
        rest = [p for p in model.parameters() if id(p) not in known]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(blocks, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both, at the rates that the schedule has set here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = next(groups)["lr"]
            part.step()


class _Windows(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (ids,) = super().__getitem__(index)
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    assert isinstance(recipe.model.source, str)
    target = Path(recipe.model.source.replace(SEED, str(args.seed)))
    family = args.recipe.stem
    texts = {name: split_documents(name, d, seed=args.seed).train for name, d in recipe.domains.items()}
    share = args.tokens // WINDOW // len(texts)
    # the tokenizer sees as much of every domain as the model will, about three characters a token
    tokenizer = train_tokenizer(
        [t[: share * WINDOW * 3] for ts in texts.values() for t in _first(ts, share * WINDOW * 3)]
    )
    windows = torch.cat([windows_of(ts, tokenizer, share) for ts in texts.values()])
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE), dtype=torch.float32)
    begun = time.time()
    with staged_dir(target) as aside:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(aside / "trainer"), num_train_epochs=1, per_device_train_batch_size=BATCH,
                lr_scheduler_type="cosine", warmup_steps=20, seed=args.seed, use_cpu=True, save_strategy="no",
                report_to=[], logging_steps=100, disable_tqdm=True,
            ),
            train_dataset=_Windows(windows),
            optimizers=(_MuonAndAdamW(model), None),
        )  # fmt: skip
        trainer.train()
        losses = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_json(aside / "training.json", {
            "family": family, "seed": args.seed, "tokens": windows.numel(),
            "parameters": model.num_parameters(), "seconds": round(time.time() - begun), "losses": losses,
        })  # fmt: skip
    print(
        f"{target}: {model.num_parameters():,} parameters, {windows.numel():,} tokens, loss {losses[-1][1]}"
    )


def _first(texts: list[str], characters: int) -> list[str]:
    found, size = [], 0
    for text in texts:
        if size >= characters:
            break
        found.append(text)
        size += len(text)
    return found


if __name__ == "__main__":
    main()
