"""The recipe's `learn`: gates, and the training of memories with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from koff_prune.fields import Bool, Float, Int, Section

if TYPE_CHECKING:
    from koff_prune.recipe import CompareRow

Start = Literal[
    "constant", "magnitude", "wanda", "taylor", "fisher", "fisher_tokens", "curvature", "surgeon", "random"
]
Form = Literal["re_estimated", "straight_through", "hard_concrete"]
COSTS = ("fisher", "fisher_tokens", "curvature", "surgeon")  # starts in nats, as re-estimated gates need them


class Gates(Section):
    """Gates over units, shared by all domains."""

    form: Form = Field(
        default="re_estimated",
        description="re_estimated: costs in nats, estimated anew from the gradients of every step;"
        " straight_through: the best units by scores that Adam moves; hard_concrete: gates that are drawn"
        " (Louizos et al. 2018).",
    )
    start: Start = Field(
        default="surgeon",
        description="Orders the units at first; curvature is the true Fisher, labels drawn from the model;"
        " surgeon what is left of it when units go one after another and the others take over what they can"
        " (without cut.compensate: curvature).",
    )
    learning_rate: Float = Field(
        default=0.05,
        ge=0,
        description="0 keeps the start, in every form; else of Adam, which re_estimated gates do without.",
    )
    prior_tokens: Int = Field(
        default=1_000_000,
        gt=0,
        description="Re-estimated: tokens of gradients that weigh as much as the start.",
    )
    ramp: Float = Field(
        default=0.05, ge=0, le=1, description="Share of the joint steps while the target rises."
    )

    @model_validator(mode="after")
    def _begins_in_nats(self) -> Gates:
        if self.form == "re_estimated" and self.learning_rate > 0 and self.start not in COSTS:
            raise ValueError(
                f"re_estimated gates cannot begin from {self.start}, which is no cost in nats:"
                f" choose start: {', '.join(COSTS)}, or form: straight_through"
            )
        return self

    def of_row(self, row: CompareRow) -> Gates:
        """These gates with what a koff row of `compare` overrides."""
        asked = {"form": row.gates_form, "start": row.gates_start, "learning_rate": row.gates_learning_rate}
        return Gates(**{**self.model_dump(), **{k: v for k, v in asked.items() if v is not None}})


class Rates(Section):
    """Adam learning rates."""

    lora: Float = Field(default=2e-3, gt=0, description="Of the LoRA.")
    kv: Float = Field(default=5e-3, gt=0, description="Of the learned KV.")


class Loss(Section):
    """ce * cross-entropy + kl * KL(dense || gated + memory), mean over domains, while gates are learned.

    On a fixed plan the dense model is gone, and memories learn by cross-entropy alone.
    """

    ce: Float = Field(default=1.0, ge=0, description="Weight of the cross-entropy.")
    kl: Float = Field(
        default=0.0,
        ge=0,
        description="Weight of the divergence from the dense model, run beside: slower.",
    )

    @model_validator(mode="after")
    def _some(self) -> Loss:
        if self.ce + self.kl <= 0:
            raise ValueError("ce and kl cannot both be 0")
        return self


class Learn(Section):
    """The joint training and the settling after the cut. Tokens are counted over all domains."""

    tokens: Int = Field(default=60_000, ge=0, description="Joint phase: gates and memories together.")
    settle_tokens: Int = Field(default=20_000, ge=0, description="After the cut: memories alone.")
    window: Int = Field(default=512, ge=16, description="Tokens of a training window.")
    batch: Int = Field(default=1, ge=1, description="Windows per domain (and weight) in an optimizer step.")
    loss: Loss = Loss()
    rates: Rates = Rates()
    warmup: Float = Field(default=0.05, ge=0, le=0.5, description="Share of steps with rising learning rate.")
    gates: Gates = Gates()
    checkpoint_steps: Int = Field(default=20, ge=1, description="Optimizer steps between checkpoints.")
    gradient_checkpointing: Bool = Field(
        default=False,
        description="Keep one activation a layer and compute the rest again: less memory.",
    )
    base: Literal["full", "nf4"] = Field(
        default="full",
        description="The frozen model while training: nf4 holds its linear layers in 4 bits (extra"
        " `quantised`); scores, cut and export take the full weights either way.",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="What to do about a loss that is not finite; skip leaves its batch out."
    )
