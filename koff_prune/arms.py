"""What is compared: an arm is one way from the dense model to a trained, evaluated model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from koff_prune.recipe import Memory, MemoryKind, Recipe

if TYPE_CHECKING:
    from koff_prune.run import Run


@dataclass(frozen=True)
class Arm:
    """One way from the dense model to a trained, evaluated model.

    Attributes:
        method: dense, koff or a baseline.
        ranking: Of a baseline's scores; None for koff and dense.
        gates: koff's form.
        gates_rate: koff's gate learning rate.
        gates_start: The scores that koff's gates start from.
        learned_with: The memory that koff's mask is learned with.
        trained_with: The memory trained on the fixed plan.
        compensate: none or least_squares.
        lora_rank: Of its memories, where it is not the recipe's.
        kv_tokens: The same.
    """

    method: str
    ranking: str | None = None
    gates: str | None = None
    gates_rate: float = 0.0
    gates_start: str | None = None
    learned_with: MemoryKind | None = None
    trained_with: MemoryKind = "none"
    compensate: str = "none"
    lora_rank: int | None = None
    kv_tokens: int | None = None

    @property
    def slug(self) -> str:
        """Folder name of this arm."""
        parts = [self.method, self.ranking, self.gates, f"rate{self.gates_rate:g}" if self.gates else None]
        parts += [f"from-{self.gates_start}" if self.gates_start else None]
        parts += [
            f"learned-{self.learned_with}" if self.learned_with else None,
            f"trained-{self.trained_with}",
        ]
        sizes = [f"rank{self.lora_rank}" if self.lora_rank else None,
                 f"kv{self.kv_tokens}" if self.kv_tokens else None]  # fmt: skip
        return "_".join(p for p in [*parts, self.compensate, *sizes] if p)

    def memory(self, recipe: Recipe, kind: MemoryKind) -> Memory:
        """The memory of this kind, in the arm's own sizes."""
        memory = recipe.memory.only(kind)
        lora, kv = memory.lora, memory.kv
        if lora is not None and self.lora_rank:
            alpha = lora.alpha * self.lora_rank / lora.rank
            lora = lora.model_copy(update={"rank": self.lora_rank, "alpha": alpha})
        if kv is not None and self.kv_tokens:
            kv = kv.model_copy(update={"tokens": self.kv_tokens})
        return Memory(lora=lora, kv=kv)


def main_arm(run: Run) -> Arm:
    """The recipe's own koff."""
    recipe = run.recipe
    kind = recipe.memory.kind
    gates = recipe.learn.gates
    return Arm("koff", None, gates.form, gates.learning_rate, gates.start, kind, kind, recipe.cut.compensate)
