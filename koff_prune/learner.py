"""Gates, memories and the frozen model as one module, whose forward is the loss of one domain's windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from koff_export.errors import KoffError
from koff_prune import ranks
from koff_prune.chat import IGNORED, tokens_and_labels
from koff_prune.compensate import Compensation, PredictionHooks
from koff_prune.gates import GateHooks, Gates
from koff_prune.loss import head_loss
from koff_prune.memory import Memories
from koff_prune.progress import say
from koff_prune.recipe import Learn

GATES = ":gates/"  # before the names of their tensors; no domain is called so
SKIPS = 16  # batches that are not finite, in one step or in neighbouring ones, before skipping gives up


class Learner(nn.Module):
    """Gates, memories and the frozen model as one module for the Trainer; forward gives the loss.

    Args:
        memories: Around the dense model (joint) or a backbone (settling).
        gates: None where the plan is fixed.
        compensation: Predicts closed straight-through units while learning; None for none.
        learn: Loss weights, and what to do about a loss that is not finite.
        hooks: Where the gates sit; None without gates.
    """

    def __init__(
        self,
        memories: Memories,
        gates: Gates | None,
        compensation: Compensation | None,
        learn: Learn,
        hooks: GateHooks | None,
    ) -> None:
        super().__init__()
        self.model, self.gates, self.loss = memories.model, gates, learn.loss
        self.kv = nn.ModuleList(memories.kv.values())
        self.memories, self.hooks = memories, hooks
        self.predictions = None
        if gates is not None and compensation is not None and gates.form != "hard_concrete":
            self.predictions = PredictionHooks(memories.model, compensation)
        self.step = 0
        self.said = self.read = 0  # predicted tokens of the step in all processes: learned, and all
        self.skips = learn.non_finite == "skip"
        self.skipped, self.last_skipped = 0, -2  # in a row, and the step of the last

    def begin_step(self, step: int, target: float) -> None:
        """Draws the step's mask, and solves its prediction where the mask changed."""
        self.step, self.said, self.read = step, 0, 0
        if self.gates is None:
            return
        self.gates.advance(step, target)
        if self.predictions is not None:
            self.predictions.refresh(self.gates.kept_now(), next(self.memories.base.parameters()))

    def forward(self, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        """Loss in nats per token of windows int64 [batch, window] of one domain.

        Raises:
            KoffError: It is not finite.
        """
        memories = self.memories
        name = memories.domains[int(domain[0])]
        hidden, head = memories.base.model, memories.base.get_output_embeddings().weight
        # counted where they come from: what is asked of a device waits for it
        input_ids, labels = tokens_and_labels(input_ids)
        input_ids, labels = input_ids.to(memories.device), labels[:, 1:].reshape(-1)
        said = labels != IGNORED
        count = int(said.sum())
        all_said, all_read = ranks.sum_of(count), len(said) * ranks.world()
        self.said, self.read = self.said + all_said, self.read + all_read
        teacher = None
        if self.loss.kl > 0 and self.gates is not None:  # a model that was cut is no teacher
            teacher = self._dense(hidden, input_ids)
        memories.activate(name)
        if self.gates is not None and self.hooks is not None:
            self.hooks.set(self.gates, self.gates.draw())
            self.hooks.scale = (all_said / all_read) ** 2
            if self.predictions is not None:
                self.predictions.z = self.hooks.z
        with memories.autocast():
            out = hidden(input_ids=input_ids, use_cache=False).last_hidden_state
        out = out[:, :-1].reshape(-1, out.shape[-1])
        if count < len(said):
            rows = said.nonzero()[:, 0]
            labels, rows = labels[rows], rows.to(out.device)
            out, teacher = out[rows], teacher[rows] if teacher is not None else None
        labels = labels.to(out.device)
        if memories.own is not None:
            head, labels = memories.own.head(head, name), memories.own.numbered(labels, name)
        share = count * ranks.world() / max(1, all_said)  # so that a token weighs the same everywhere
        parts = {"ce": self.loss.ce, "kl": self.loss.kl} if teacher is not None else {"ce": 1.0, "kl": 0.0}
        cap = getattr(memories.base.config, "final_logit_softcapping", None)
        loss = head_loss(out, head, labels, teacher, **parts, cap=cap) * share
        finite = math.isfinite(value := float(loss.detach()))
        if ranks.sharded() and self.skips:  # the backward pass needs all: they skip together
            finite = not ranks.any_of(not finite)
        if not finite:
            what = f"the loss is {value}"
            if math.isfinite(value):
                what = "the loss of another process is not finite"
            self.not_finite(f"{what} at step {self.step + 1}, on a batch of {name}")
            return torch.zeros((), requires_grad=True)  # nothing to learn from
        return loss.cpu()  # where Trainer is told to be

    def not_finite(self, what: str) -> None:
        """Stops, or under `non_finite: skip` says what is left out; too often in a row is no accident.

        Raises:
            KoffError: See above.
        """
        mend = "lower learn.rates or learn.gates.learning_rate"
        if not self.skips:
            raise KoffError(f"learn: {what}; {mend}")
        self.skipped = (self.skipped if self.step - self.last_skipped <= 1 else 0) + 1
        self.last_skipped = self.step
        if self.skipped > SKIPS:
            raise KoffError(f"learn: {what}, after {SKIPS} others that were skipped; {mend}")
        say(f"skipped: {what}")

    @torch.no_grad()
    def _dense(self, hidden: Any, input_ids: torch.Tensor) -> torch.Tensor:
        with self.memories.off():
            if self.hooks is not None:
                self.hooks.z = {}
            if self.predictions is not None:
                self.predictions.z = {}
            out = hidden(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        return out.reshape(-1, out.shape[-1])

    def trained(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint must hold, by name, detached."""
        state = {}
        for name in self.memories.names:
            for part, tensors in self.memories.tensors(name).items():
                state.update({f"{name}/{part}/{k}": v for k, v in tensors.items()})
        if self.gates is not None:
            state.update({GATES + name: tensor for name, tensor in self.gates.state().items()})
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """The reverse of `trained`, in place, so that the optimizer keeps its parameters."""
        for name in self.memories.names:
            mine = {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for key, tensor in mine.items():
                part, _, rest = key.partition("/")
                parts.setdefault(part, {})[rest] = tensor
            self.memories.load(name, parts)
        if self.gates is not None:
            mine = {k.removeprefix(GATES): v for k, v in state.items() if k.startswith(GATES)}
            self.gates.load(mine)
