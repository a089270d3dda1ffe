"""What a recipe would do, told from a config.json alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from koff_export.errors import KoffError
from koff_prune.architecture import native_dtype
from koff_prune.needs import NOT_BOTH, Needs, dry_plan, memory_parameters, needs
from koff_prune.recipe import Recipe

GIB = 2**30
_TOKENS = (
    "Told as if every token stayed: what structure.vocabulary takes is known when the text is read, and units"
    " make up the rest."
)


def describe(recipe: Recipe, devices: int | None = None, tflops: float = 100.0, shard: bool = False) -> None:
    """Prints units, widths at the target, sizes and what learning needs; fetches no weights.

    Args:
        recipe: Checked.
        devices: Tell what each of so many accelerators would hold.
        shard: They share out the dense model's layers.
        tflops: 10^12 operations that one of them sustains each second.

    Raises:
        KoffError: No config.json is at hand, or the target cannot be reached.
    """
    if shard and recipe.learn.base != "full":
        raise KoffError(NOT_BOTH.format(recipe.learn.base))
    found = dry_plan(recipe)
    units, plan = found["units"], found["plan"]
    first = units.layers[0]
    slim, dense = plan.parameters["slim"], plan.parameters["dense"]
    memory = memory_parameters(recipe, units, plan)
    each = 4 if native_dtype(recipe.model.dtype) == "float32" else 2
    need = needs(recipe, found["config"], units, plan, devices or 1, shard)
    table = Table(
        title=f"{recipe.structure.sparsity:.1%} of {recipe.structure.of}, widths {recipe.structure.widths}"
    )
    for column in ("layers", "unit", "per layer", "parameters each", "kept on average"):
        table.add_column(column)
    for kind, count, cost in (
        ("ffn_neurons", first.ffn_neurons, first.ffn_cost), ("kv_groups", first.kv_groups, first.kv_cost),
    ):  # fmt: skip
        mean = sum(plan.widths_of(kind)) / len(plan.layers)
        gated = "" if kind in recipe.structure.units else " (not pruned)"
        table.add_row(str(len(units.layers)), kind + gated, str(count), f"{cost:,}", f"{mean:,.1f}")
    lines = [
        f"dense model       {dense:>15,} parameters, {dense * each / GIB:.2f} GiB",
        f"backbone          {slim:>15,} parameters, {slim * each / GIB:.2f} GiB ({plan.removed})",
        f"one memory        {memory:>15,} parameters, {memory * 4 / GIB:.3f} GiB",
        f"for {len(recipe.domains)} domains     {memory * len(recipe.domains):>15,} parameters",
        *([f"RAM while learning, about {need.host / GIB:.1f} GiB"] if devices is None else []),
        "Widths are even here; the learned plan moves them between layers.",
        *([_TOKENS] if recipe.structure.vocabulary is not None else []),
    ]
    if devices is not None:
        lines += ["", *_on_devices(recipe, need, devices, tflops)]
    console = Console(width=110)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _on_devices(recipe: Recipe, need: Needs, devices: int, tflops: float) -> list[str]:
    """What each device holds and how fast all of them learn, with the arithmetic."""
    learn = recipe.learn
    rate = devices * tflops * 1e12 / need.flops
    tokens = learn.tokens + learn.settle_tokens
    lines = [f"{size / GIB:8.2f} GiB {name + ':':<13}{said}" for name, said, size in need.parts]
    lines += [
        f"{need.device / GIB:8.2f} GiB on each of {devices} while learning, each from {need.windows} of"
        f" {learn.batch} windows (learn.batch)",
        f"{need.whole / GIB:8.2f} GiB on each before learning and while evaluating: the whole",
        f"{need.second_moments / GIB:8.2f} GiB in the host's memory while scoring: second moments, later on"
        " its disk",
        "",
        f"{need.flops / 1e9:.1f} GFLOP a token = {need.work}",
        f"{devices} x {tflops:g} TFLOP/s / that = {rate:,.0f} tokens/s;"
        f" {tokens:,} tokens in {_duration(tokens / rate)}, scoring and the solves of the"
        " compensation apart",
        "An estimate: accelerators are unproven (README, Limits); --tflops is what one sustains.",
    ]
    if learn.batch % devices:
        lines.append(f"learn.batch: {learn.batch} windows do not divide over {devices}; set a multiple")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
