"""What learning costs beside plain PEFT LoRA training, and how the cost grows; a table and JSON.

    python benchmarks/learn_cost.py [--recipe RECIPE] [--steps 20] [--only beside,domains]
                                    [--out benchmarks/learn_cost.json]

Every point is a process of its own, so that its peak memory is its own. All of a group are open at once and
take turns, an optimizer step each, so that whatever slows the machine slows all alike; the first step is
warm-up. `beside`: the recipe's model, ours and plain. `domains`, `window`, `size`: ours on random Llamas, the
same tokens at every point, with the exponent of a fitted power law, drawn beside the JSON (.svg); so is
`processes`: one and two, with a thread each. Seconds are told by the wall and by the processor (all threads
and processes), memory as the sum of the processes' peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Random Llamas: hidden size, FFN neurons, layers, query heads, KV heads; 8,192 words, tied.
SIZES = {
    "10M": (256, 1024, 8, 4, 2), "30M": (512, 1536, 9, 8, 4), "100M": (768, 2304, 14, 12, 4),
    "300M": (1024, 3840, 21, 16, 8), "1B": (2048, 8192, 16, 32, 8),
}  # fmt: skip
GROWS = {
    "domains": "domains",
    "window": "tokens of a window",
    "size": "parameters",
    "processes": "processes",
}  # what x is, by group
TICK = "a step is done"


def points(group: str, steps: int) -> list[dict[str, Any]]:
    """The points of a group; `x` is what grows."""
    base = {
        "model": "10M",
        "domains": 4,
        "window": 128,
        "steps": steps,
        "memory": "both",
        "gates": True,
        "kl": 0.0,
    }
    if group == "beside":
        common = {**base, "model": "recipe", "domains": 3, "window": 256}
        return [
            {**common, "name": "plain PEFT LoRA", "plain": True},
            {**common, "name": "ours, LoRA alone", "memory": "lora", "gates": False},
            {**common, "name": "ours, LoRA + KV", "gates": False},
            {**common, "name": "ours, gates + compensation + LoRA + KV"},
            {**common, "name": "ours, gates and all with a live teacher", "kl": 1.0},
        ]
    if group == "domains":  # windows in all: 16 x steps
        return [{**base, "name": f"{n} domains", "x": n, "domains": n, "steps": 16 * steps // n}
                for n in (1, 2, 4, 8, 16)]  # fmt: skip
    if group == "window":
        return [{**base, "name": f"window {n}", "x": n, "window": n, "steps": max(4, 256 * steps // n)}
                for n in (64, 128, 256, 512)]  # fmt: skip
    if group == "processes":
        return [{**base, "name": f"{n} processes", "x": n, "processes": n, "model": "30M", "batch": 2}
                for n in (1, 2)]  # fmt: skip
    return [{**base, "name": f"{name} parameters", "model": name} for name in SIZES]


def open_model(name: str, recipe: str) -> Any:
    """The recipe's dense model, or a random one of `SIZES` in the dtype that this machine computes in."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from koff_prune.architecture import native_dtype
    from koff_prune.models import open_dense
    from koff_prune.reading import load_recipe

    if name == "recipe":
        return open_dense(load_recipe(recipe, check_files=False).model).model
    hidden, inner, layers, heads, groups = SIZES[name]
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, native_dtype())).eval().requires_grad_(False)


class Clock:
    """Time of every step: at its end the others have their turn, until a line comes in."""

    def __init__(self) -> None:
        """No step yet."""
        self.wall: list[float] = []  # seconds of every step after the first
        self.processor: list[float] = []
        self._begun: tuple[float, float] | None = None

    def __call__(self, *_: object) -> None:
        """A step is finished."""
        from torch import distributed

        from koff_prune import ranks

        now = time.monotonic(), time.process_time()
        if self._begun is not None:
            self.wall.append(now[0] - self._begun[0])
            self.processor.append(now[1] - self._begun[1])
        if not ranks.rank():
            print(TICK, flush=True)
            sys.stdin.readline()
        if ranks.world() > 1:
            distributed.barrier()
        self._begun = time.monotonic(), time.process_time()


def train_plain(model: Any, windows: dict[str, Any], steps: int, clock: Clock) -> None:
    """PEFT LoRA on transformers' Trainer, nothing of ours: its own loss, one adapter, the model's dtype."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock()

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"input_ids": w[at], "labels": w[at]} for at in range(steps) for w in windows.values()]
    half = next(model.parameters()).dtype == torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=len(windows),
            bf16=half, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(get_peft_model(model, lora), arguments, train_dataset=rows, callbacks=[Tick()]).train()


def train_ours(
    model: Any, windows: dict[str, Any], point: dict[str, Any], scored: Path, clock: Clock
) -> None:
    """Our learning as a recipe's defaults have it, gates from `curvature`."""
    from koff_prune.compensate import Compensation
    from koff_prune.gates import Gates
    from koff_prune.learn import Phase, train
    from koff_prune.memory import Memories
    from koff_prune.recipe import Learn, Memory, Structure
    from koff_prune.recipe_learn import Loss
    from koff_prune.scores import Statistics, removal_costs
    from koff_prune.units import read_units

    structure, window = Structure(), point["window"]
    memory = Memory() if point["memory"] == "both" else Memory(kv=None)
    batch = point.get("batch", 1)
    tokens = point["steps"] * window * len(windows) * batch
    learn = Learn(
        tokens=tokens, window=window, batch=batch, loss=Loss(kl=point["kl"]), checkpoint_steps=10**6
    )
    options: dict[str, Any] = {}
    if point["gates"]:
        units, found = read_units(model), Statistics.open(scored)
        start = removal_costs("curvature", model, units, structure, found)
        prior = learn.gates.prior_tokens
        options = {
            "gates": Gates(units, structure, learn.gates.form, start, 0, prior, found.tokens),
            "compensation": Compensation(found.second, 0.01, units),
            "sparsity": structure.sparsity,
        }
    memories = Memories(model, memory, {name: w[0][:32] for name, w in windows.items()}, 0)
    with tempfile.TemporaryDirectory() as folder:
        train(memories, windows, learn, Phase(tokens, 0, 1), Path(folder), report=clock, **options)


def work(point: dict[str, Any], recipe: str, scored: Path) -> dict[str, float]:
    """One point, in this process: seconds for each token after the first step, and memory in GiB."""
    import torch
    from torch import distributed

    from koff_prune import ranks

    ranks.join()
    model = open_model(point["model"], recipe)
    generator = torch.Generator().manual_seed(0)
    batch = point.get("batch", 1)
    shape = (point["steps"] * batch, point["window"])
    windows = {
        f"d{n}": torch.randint(3, model.config.vocab_size, shape, generator=generator)
        for n in range(point["domains"])
    }
    clock, before = Clock(), peak()
    if point.get("plain"):
        train_plain(model, windows, point["steps"], clock)
    else:
        train_ours(model, windows, point, scored, clock)
    spent = torch.tensor([sum(clock.processor), peak()], dtype=torch.float64)
    if ranks.world() > 1:
        distributed.all_reduce(spent)
    ranks.leave()
    tokens = len(clock.wall) * point["window"] * point["domains"] * batch
    return {
        "seconds": sum(clock.wall) / tokens,
        "processor": float(spent[0]) / tokens,
        "peak": float(spent[1]),
        "peak_before": before,
        "parameters": sum({id(p): p.numel() for p in model.parameters() if not p.requires_grad}.values()),
        "threads": torch.get_num_threads(),
    }


def peak() -> float:
    """Largest resident memory of this process so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of bytes, there, and of KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def score(name: str, recipe: str, path: Path) -> None:
    """The statistics that gates begin from, as a run keeps them: a file that learning maps."""
    import torch

    from koff_prune.recipe import Structure
    from koff_prune.scores import collect
    from koff_prune.tensor_file import save_tensors
    from koff_prune.units import read_units

    model = open_model(name, recipe)
    windows = torch.randint(3, model.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(1))
    save_tensors(collect(model, read_units(model), Structure().units, list(windows)).tensors(), path)


class Child:
    """A point at work in processes of its own, a step at a time."""

    def __init__(self, asked: argparse.Namespace, point: dict[str, Any], scored: Path) -> None:
        """Does not begin yet."""
        self.command = [__file__, "--recipe", asked.recipe, "--scored", scored, "--point", json.dumps(point)]
        self.environment = dict(os.environ)
        if count := point.get("processes"):
            self.environment["OMP_NUM_THREADS"] = "1"
            if count > 1:
                launcher = ["-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", 0,
                            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
                self.command = [*launcher, *self.command]
        self.steps, self.done = point["steps"], 0
        self.found: dict[str, float] | None = None

    def turn(self) -> None:
        """Does the next step; after the last, ends and leaves what was found."""
        if not self.done:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.process = subprocess.Popen(
                [sys.executable, *map(str, self.command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.errors, text=True, env=self.environment,
            )  # fmt: skip
        else:
            self._say()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == TICK:
                self.done += 1
                if self.done < self.steps:
                    return
                self._say()
            elif line.startswith('{"seconds"'):
                self.found = json.loads(line)
        if self.process.wait() or self.found is None:
            self.errors.seek(0)
            raise SystemExit(self.errors.read()[-3000:])

    def _say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def measure(group: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All points of a group, a step of each in turn; ratios and exponents."""
    import numpy as np

    chosen = points(group, asked.steps)
    for model in {p["model"] for p in chosen}:
        if not (path := folder / f"{model}.safetensors").exists():
            command = [sys.executable, __file__, "--recipe", asked.recipe, "--score", model, "--scored", path]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    children = [Child(asked, point, folder / f"{point['model']}.safetensors") for point in chosen]
    while unfinished := [child for child in children if child.found is None]:
        min(unfinished, key=lambda child: child.done / child.steps).turn()
    rows = []
    for point, child in zip(chosen, children, strict=True):
        assert child.found is not None
        row = dict(child.found)
        row["x"] = point.get("x", row["parameters"])
        rows.append({"name": point["name"], **row})
    first = rows[0]
    for row in rows:
        row["speed_ratio"] = first["seconds"] / row["seconds"]
        row["processor_speed_ratio"] = first["processor"] / row["processor"]
        row["peak_ratio"] = row["peak"] / first["peak"]
        print(f"{row['name']}: {1 / row['seconds']:.1f} tokens/s, {row['speed_ratio']:.2f} x"
              f" ({row['processor_speed_ratio']:.2f} x by processor), peak {row['peak']:.2f} GiB,"
              f" {row['peak_ratio']:.2f} x", flush=True)  # fmt: skip
    result: dict[str, Any] = {"rows": rows}
    if group != "beside":
        x = np.log([row["x"] for row in rows])
        for key in ("seconds", "processor", "peak"):
            slope = float(np.polyfit(x, np.log([row[key] for row in rows]), 1)[0])
            result[f"exponent_{key}"] = round(slope, 3)
        print(f"{group}: time for each token grows as x^{result['exponent_seconds']}"
              f" (by processor {result['exponent_processor']}), {2 ** result['exponent_seconds']:.3f} x for"
              f" each doubling; peak memory as x^{result['exponent_peak']}", flush=True)  # fmt: skip
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Time for each token and peak memory as each group grows, beside straight lines of the exponents."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from koff_prune.figures import BLUE, ORANGE

    groups = [group for group in GROWS if group in result]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "learn", "font.size": 10,
                     "axes.spines.top": False, "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=(3.6 * len(groups), 3.6), layout="constrained")
        for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            rows = result[group]["rows"]
            x = [row["x"] for row in rows]
            for key, colour, label in (("seconds", BLUE, "time a token"), ("peak", ORANGE, "peak memory")):
                y = [row[key] / rows[0][key] for row in rows]
                axes.plot(
                    x, y, "o-", color=colour, label=f"{label}: x^{result[group][f'exponent_{key}']:.2f}"
                )
            axes.set(xlabel=GROWS[group], xscale="log", yscale="log")
            ticks = [0.5, 1, 2, 5, 10, 20, 50]
            top = max(row[key] / rows[0][key] for row in rows for key in ("seconds", "peak"))
            axes.set_yticks(ticks, [str(tick) for tick in ticks])
            axes.set_ylim(0.4, max(2.5, 1.3 * top))
            axes.set_xticks(x, [f"{value:.3g}" if value < 1e6 else f"{value / 1e6:.0f} M" for value in x])
            axes.minorticks_off()
            axes.legend(frameon=False, loc="upper left")
        figure.supylabel("beside the first point")
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measures the groups asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="recipes/smollm2/quickstart.yaml", help="whose model is trained")
    parser.add_argument(
        "--steps", type=int, default=20, help="of a point with a usual window and few domains"
    )
    parser.add_argument("--only", default="beside,domains,window,size,processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/learn_cost.json"))
    for inner in ("--point", "--score", "--scored"):  # what the children are told
        parser.add_argument(inner, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(work(json.loads(asked.point), asked.recipe, Path(asked.scored))))
        return
    if asked.score:
        score(asked.score, asked.recipe, Path(asked.scored))
        return
    from koff_prune.run import versions

    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        for group in asked.only.split(","):
            result[group] = measure(group, asked, Path(folder))
            asked.out.write_text(json.dumps(result, indent=2) + "\n")
    if GROWS.keys() & result.keys():
        draw(result, asked.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
