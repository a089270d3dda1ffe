"""The arithmetic of what learning needs: parameters, bytes, floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from koff_prune.models import check_architecture, native_dtype, open_config
from koff_prune.plan import Plan, even_plan
from koff_prune.recipe import Recipe
from koff_prune.units import Units, units_of_config


def dry_plan(recipe: Recipe) -> dict[str, Any]:
    """Units, widths and needs, from the model's config alone."""
    config = open_config(recipe.model)
    check_architecture(config)
    units = units_of_config(config)
    plan = even_plan(units, recipe.structure)
    return {"units": units, "plan": plan, "config": config}


@dataclass(frozen=True)
class Needs:
    """Bytes while learning, by what they are for, and operations per training token.

    Attributes:
        weights: Of the frozen dense model, once.
        memories: All domains' memories, their gradients and Adam's two moments, float32.
        gates: The same for gates, and what re-estimated ones gather.
        activations: What one micro-batch keeps for the way back.
        logits: The largest block of logits in float32, and their gradient.
        second_moments: Of compensation, on the host, float32.
        flops: Per token: forward, and back through weights that get no gradient of their own.
    """

    weights: int
    memories: int
    gates: int
    activations: int
    logits: int
    second_moments: int
    flops: float

    def device(self, devices: int, *, sharded: bool) -> int:
        """Bytes on each of `devices`: the weights in full (data parallel), or a share of them (FSDP)."""
        weights = self.weights // devices if sharded else self.weights
        return weights + self.memories + self.gates + self.activations + self.logits

    @property
    def host(self) -> int:
        """Bytes on a machine that learns on its processor."""
        return self.device(1, sharded=False) + 2 * self.second_moments


def needs(recipe: Recipe, config: Any, units: Units, plan: Plan) -> Needs:
    """What `recipe` needs around a model of this config."""
    learn = recipe.learn
    each = 4 if native_dtype(recipe.model.dtype) == "float32" else 2
    tokens, layers = learn.window * learn.batch, len(units.layers)
    kept = config.hidden_size * 14 + units.layers[0].ffn_neurons * 5  # of one layer, per token
    saved = (config.hidden_size * layers + kept) if learn.gradient_checkpointing else kept * layers
    memory = memory_parameters(recipe, config, plan)
    gated = sum(layer.count(kind) for layer in units.layers for kind in recipe.structure.units)
    dense = units.parameters
    passes = 4 + 2 * learn.gradient_checkpointing + 2 * (learn.loss.kl > 0)
    attention = layers * learn.window * config.num_attention_heads * units.layers[0].head_dim
    compensated = recipe.cut.compensate != "none"
    return Needs(
        weights=dense * each,
        memories=memory * len(recipe.domains) * 16,
        gates=gated * 4 * 10,
        activations=tokens * saved * each,
        logits=tokens * config.vocab_size * 4 * 3,
        second_moments=sum(layer.ffn_neurons**2 for layer in units.layers) * 4 if compensated else 0,
        flops=passes * (dense + attention) + 6 * memory,
    )


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
