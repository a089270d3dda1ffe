"""Tokens per second of learning beside plain PEFT LoRA training: same model, settings and process.

    python benchmarks/learn_speed.py [--recipe RECIPE] [--steps 6] [--out benchmarks/learn_speed.json]

Prints and writes ratios within this one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from koff_prune.compensate import Compensation
from koff_prune.gates import Gates
from koff_prune.learn import Phase, train
from koff_prune.memory import Memories
from koff_prune.models import open_dense
from koff_prune.reading import load_recipe
from koff_prune.recipe import Learn, Loss, Memory, Structure
from koff_prune.run import versions
from koff_prune.scores import collect, score_units
from koff_prune.units import read_units


def plain_lora(model: Any, windows: dict[str, torch.Tensor], steps: int) -> float:
    """Tokens per second of PEFT LoRA on transformers' Trainer, nothing of ours: its own loss, one adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [
        {"input_ids": row, "labels": row}
        for at in range(steps)
        for w in windows.values()
        for row in w[at : at + 1]
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=len(windows), bf16=True, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=rows)
        begun = time.monotonic()
        trainer.train()
    return steps * sum(w.shape[1] for w in windows.values()) / (time.monotonic() - begun)


def ours(
    model: Any, windows: dict[str, torch.Tensor], steps: int, *, gates: bool, kv: bool, kl: float
) -> float:
    """Tokens per second of our learning."""
    window = next(iter(windows.values())).shape[1]
    memory = Memory() if kv else Memory(kv=None)
    structure, units = Structure(), read_units(model)
    learn = Learn(
        tokens=steps * window * len(windows), window=window, loss=Loss(kl=kl), checkpoint_steps=10_000
    )
    options: dict[str, Any] = {}
    if gates:
        statistics = collect(model, units, structure.units, [w[0] for w in windows.values()])
        start = score_units("fisher", model, units, structure, statistics)
        options = {
            "gates": Gates(units, structure, "straight_through", start, 0),
            "compensation": Compensation(statistics.second, 0.01, units),
            "sparsity": structure.sparsity,
        }
    prefill = {name: w[0][:32] for name, w in windows.items()}
    memories = Memories(model, memory, prefill, 0)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        tokens = train(memories, windows, learn, Phase(learn.tokens, 0, 1), Path(folder), **options)
    return tokens / (time.monotonic() - begun)


def main() -> None:
    """Runs every case on a fresh copy of the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/smollm2/quickstart.yaml", help="whose model is trained")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/learn_speed.json"))
    asked = parser.parse_args()
    dense = open_dense(load_recipe(asked.recipe).model)
    generator = torch.Generator().manual_seed(0)
    windows = {
        name: torch.randint(
            3, dense.model.config.vocab_size, (asked.steps, asked.window), generator=generator
        )
        for name in ("a", "b", "c")
    }
    cases: dict[str, Any] = {
        "plain PEFT LoRA": lambda m: plain_lora(m, windows, asked.steps),
        "ours, LoRA alone": lambda m: ours(m, windows, asked.steps, gates=False, kv=False, kl=0.0),
        "ours, LoRA + KV": lambda m: ours(m, windows, asked.steps, gates=False, kv=True, kl=0.0),
        "ours, gates + compensation + LoRA + KV": lambda m: ours(
            m, windows, asked.steps, gates=True, kv=True, kl=0.0
        ),
        "ours, the same with a live teacher": lambda m: ours(
            m, windows, asked.steps, gates=True, kv=True, kl=1.0
        ),
    }
    speeds: dict[str, float] = {}
    for name, case in cases.items():
        speeds[name] = case(copy.deepcopy(dense.model))
        print(
            f"{name}: {speeds[name]:.1f} tokens/s, {speeds[name] / speeds['plain PEFT LoRA']:.2f} x",
            flush=True,
        )
    base = speeds["plain PEFT LoRA"]
    result = {
        "command": "make benchmark",
        "tokens_per_second": {k: round(v, 1) for k, v in speeds.items()},
        "ratio_to_plain_lora": {k: round(v / base, 3) for k, v in speeds.items()},
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
