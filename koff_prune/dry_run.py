"""What a recipe would do, told from a config.json alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from koff_prune.recipe import Recipe

GIB = 2**30


def describe(recipe: Recipe, devices: int | None = None, tflops: float = 100.0) -> None:
    """Prints units, widths at the target, sizes and what learning needs; fetches no weights.

    Args:
        recipe: Checked.
        devices: Tell what each of so many accelerators would hold.
        tflops: 10^12 operations that one of them sustains each second.

    Raises:
        KoffError: No config.json is at hand, or the target cannot be reached.
    """
    from koff_prune.needs import dry_plan, memory_parameters, needs

    found = dry_plan(recipe)
    units, plan = found["units"], found["plan"]
    first = units.layers[0]
    slim, dense = plan.parameters["slim"], plan.parameters["dense"]
    memory, need = (
        memory_parameters(recipe, found["config"], plan),
        needs(recipe, found["config"], units, plan),
    )
    each = need.weights / dense
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
        f"backbone          {slim:>15,} parameters, {slim * each / GIB:.2f} GiB"
        f" ({plan.realised:.4f} removed)",
        f"one memory        {memory:>15,} parameters, {memory * 4 / GIB:.3f} GiB",
        f"all {len(recipe.domains)} memories    {memory * len(recipe.domains):>15,} parameters",
        f"RAM while learning, about {need.host / GIB:.1f} GiB",
        "Widths are even here; the learned plan moves them between layers.",
    ]
    if devices is not None:
        rate = devices * tflops * 1e12 / need.flops
        tokens = recipe.learn.tokens + recipe.learn.settle_tokens
        parts = (("weights", need.weights), ("memories with Adam", need.memories), ("gates", need.gates),
                 ("activations", need.activations), ("logits", need.logits))  # fmt: skip
        plural = "device" if devices == 1 else "devices"
        lines += ["", " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts) + " GiB"]
        for name, sharded in (("data parallel", False), ("weights sharded (FSDP)", True)):
            if devices > 1 or not sharded:
                size = need.device(devices, sharded=sharded) / GIB
                lines.append(f"{devices} {plural}, {name}: {size:.1f} GiB on each")
        lines += [
            f"host, for compensation: {need.second_moments / GIB:.1f} GiB of second moments",
            f"{need.flops / 1e9:.1f} GFLOP a token, {tflops:g} TFLOP/s on each: {rate:,.0f} tokens/s,"
            f" {tokens:,} tokens in {tokens / rate / 60:,.0f} minutes",
            "An estimate: accelerators are unproven (README, Limits).",
        ]
    console = Console(width=110)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)
