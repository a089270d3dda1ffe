"""What a recipe would do, told from a config.json alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from koff_prune.recipe import Recipe


def describe(recipe: Recipe) -> None:
    """Prints units, widths at the target, sizes and the memory needed; fetches no weights.

    Raises:
        KoffError: No config.json is at hand, or the target cannot be reached.
    """
    from koff_prune.models import native_dtype
    from koff_prune.stages import dry_plan

    found = dry_plan(recipe)
    units, plan = found["units"], found["plan"]
    first = units.layers[0]
    bytes_each = 4 if native_dtype(recipe.model.dtype) == "float32" else 2
    slim, dense = plan.parameters["slim"], plan.parameters["dense"]
    memory = memory_parameters(recipe, found["config"], plan)
    gib = 2**30
    channels = sum(layer.ffn_neurons**2 for layer in units.layers)
    logits = recipe.learn.window * recipe.learn.batch * found["config"].vocab_size * 4 * 3
    activations = recipe.learn.window * recipe.learn.batch * len(units.layers) * (
        first.ffn_neurons * 5 + found["config"].hidden_size * 14) * bytes_each  # fmt: skip
    need = dense * bytes_each * 2 + channels * 8 + memory * len(recipe.domains) * 16 + logits + activations
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
    console = Console(width=110)
    console.print(table)
    console.print(
        f"dense model       {dense:>15,} parameters, {dense * bytes_each / gib:.2f} GiB", highlight=False
    )
    console.print(f"backbone          {slim:>15,} parameters, {slim * bytes_each / gib:.2f} GiB"
                  f" ({plan.realised:.4f} removed)", highlight=False)  # fmt: skip
    console.print(f"one memory        {memory:>15,} parameters, {memory * 4 / gib:.3f} GiB", highlight=False)
    console.print(
        f"all {len(recipe.domains)} memories    {memory * len(recipe.domains):>15,} parameters",
        highlight=False,
    )
    console.print(f"RAM while learning, about {need / gib:.1f} GiB", highlight=False)
    console.print("Widths are even here; the learned plan moves them between layers.", highlight=False)


def memory_parameters(recipe: Recipe, config: object, plan: object) -> int:
    """Parameters of one domain's memory around the backbone, all linear layers as LoRA targets."""
    hidden, head = config.hidden_size, getattr(config, "head_dim", None)  # type: ignore[attr-defined]
    head = head or hidden // config.num_attention_heads  # type: ignore[attr-defined]
    queries = config.num_attention_heads // config.num_key_value_heads  # type: ignore[attr-defined]
    lora, kv = recipe.memory.lora, recipe.memory.kv
    total = 0
    for neurons, groups in zip(plan.widths_of("ffn_neurons"), plan.widths_of("kv_groups"), strict=True):  # type: ignore[attr-defined]
        widths = {
            "q_proj": hidden + groups * queries * head, "k_proj": hidden + groups * head,
            "v_proj": hidden + groups * head, "o_proj": hidden + groups * queries * head,
            "gate_proj": hidden + neurons, "up_proj": hidden + neurons, "down_proj": hidden + neurons,
        }  # fmt: skip
        if lora is not None:
            names = list(widths) if lora.target == "all-linear" else lora.target
            total += lora.rank * sum(widths.get(name, 0) for name in names)
        if kv is not None:
            total += 2 * groups * kv.tokens * head
    return total
