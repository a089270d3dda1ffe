"""Gates over units, and what holds their sparsity at its target.

One gate per unit, shared by all domains, multiplies the input of the unit's consumer (`down_proj`, `o_proj`)
as PEFT wrapped it, so that LoRA sees the gated input too. Three forms behind one interface:

* re-estimated: the hard mask of the units of lowest cost at the step's target, where a unit's cost is what
  its removal is expected to add to the loss, to second order (LeCun et al. 1989, "Optimal Brain Damage", with
  the first-order term kept: here it is not zero), in nats per token: h/2, h being the Fisher information of
  its gate on the scoring text and on what the memories learn from (`surgeon.py`: what is left of it at the
  unit's turn), minus the mean gradient of its gate while they learn. A mean over n tokens is shrunk by
  n / (n + prior_tokens), signal over signal and noise: the variance of both is proportional to h.
* hard concrete (Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", 2.2): a
  stretched binary concrete sample, one draw per optimizer step from a generator seeded by (seed, step);
  expected sparsity held at its target by an augmented Lagrangian (CoFi, Xia et al. 2022; Sheared-LLaMA, Xia
  et al. 2023).
* straight-through top-k: the hard mask of the lowest-ranked units at the step's target; gradients pass
  through sigmoid(alpha) (Bengio et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from koff_prune import ranks
from koff_prune.device import device_of
from koff_prune.plan import Kept, Scores, choose
from koff_prune.recipe import Structure
from koff_prune.surgeon import MEND
from koff_prune.units import KINDS, UnitKind, Units, decoder_layers

RE_ESTIMATED = "re_estimated"
EVERY = 8  # steps between two choices of a re-estimated mask: each one costs a solve of the compensation
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
OPEN = 2.5  # alpha of hard-concrete gates at the start is centred here: P(z > 0) is about 0.99
SPREAD = 1.0  # standard deviation of alpha over units at the start


class Gates(nn.Module):
    """The gates of one model.

    Args:
        units: Of the dense model.
        structure: Which kinds have gates, and the target.
        form: `re_estimated`, `hard_concrete` or `straight_through`.
        start: Scores that order the gates at the start; None starts them all alike. Re-estimated gates need
            costs of removal (`scores.removal_costs`).
        seed: Of the draws.
        prior_tokens: Tokens of gradients that weigh as much as the start (re-estimated gates alone); None:
            the start is kept.
        scored_tokens: That the start's costs were estimated on.
        information: Half of every unit's Fisher information on the scoring text, which that of the training
            text is pooled with; None where the start is just that.

    Attributes:
        alpha: float32 [gated units], the only parameter; higher means keep. Of re-estimated gates the cost,
            in nats per token (by parameter where kinds are mixed).
        lagrange: float32 [2], multipliers of the sparsity constraint (hard concrete alone), trained by
        ascent.
    """

    alpha: nn.Parameter
    lagrange: nn.Parameter
    cost: torch.Tensor
    step: torch.Tensor
    target: torch.Tensor
    prior: torch.Tensor
    chosen: torch.Tensor
    surprise: torch.Tensor
    squares: torch.Tensor
    weights: torch.Tensor

    def __init__(
        self,
        units: Units,
        structure: Structure,
        form: str,
        start: Scores | None,
        seed: int,
        prior_tokens: float | None = None,
        scored_tokens: int = 0,
        information: Scores | None = None,
    ) -> None:
        super().__init__()
        self.units, self.structure, self.form, self.seed = units, structure, form, seed
        self.slots: list[tuple[int, UnitKind, int, int]] = []  # layer, kind, first, last + 1
        costs = []
        at = 0
        for kind in structure.units:
            for i, layer in enumerate(units.layers):
                self.slots.append((i, kind, at, at + layer.count(kind)))
                costs.append(torch.full((layer.count(kind),), float(layer.cost(kind))))
                at += layer.count(kind)
        self.register_buffer("cost", torch.cat(costs))
        self.alpha = nn.Parameter(self._start(start, at))
        self.lagrange = nn.Parameter(torch.zeros(2), requires_grad=form == "hard_concrete")
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("target", torch.zeros(()))
        self._drawn: tuple[Any, torch.Tensor] | None = None
        self._squared: torch.Tensor  # `squares` before the step, the same in every process, on the CPU
        self.prior_tokens, self.scored_tokens = prior_tokens, scored_tokens
        self.register_buffer("prior", self.alpha.detach().clone())
        self.information = self.prior if information is None else self._start(information, at)
        self.power = 1.0 if information is None else MEND  # of a cost in its unit's information
        self.register_buffer("chosen", self.alpha.detach().clone())  # alpha that the step's mask comes from
        self.register_buffer("surprise", torch.zeros_like(self.cost))  # weighted mean, see `observe`
        self.register_buffer("squares", torch.zeros_like(self.cost))  # of gradients by token, summed
        self._squared = self.squares.clone()
        # sums of weight, of weight^2, of tokens
        self.register_buffer("weights", torch.zeros(3, dtype=torch.float64))

    def _start(self, start: Scores | None, count: int) -> torch.Tensor:
        """Normal quantiles of the start's ranks: one scale, so that one learning rate fits every start."""
        centre = OPEN if self.form == "hard_concrete" else 0.0
        if start is None:
            return torch.full((count,), centre)
        flat = torch.cat([start[kind][i].double() for i, kind, _, _ in self.slots])
        if self.form == RE_ESTIMATED:
            return flat.float()
        if (
            self.structure.widths == "uniform"
        ):  # the target is held per layer, so only the order inside a layer counts
            ranks = torch.empty_like(flat)
            for n in range(len(self.units.layers)):
                mine = torch.cat([torch.arange(a, b) for i, _, a, b in self.slots if i == n])
                ranks[mine] = _ranks(flat[mine])
        else:
            ranks = _ranks(flat)
        return (centre + SPREAD * math.sqrt(2) * torch.erfinv(2 * ranks - 1)).float()

    def scores(self) -> Scores:
        """Alpha as scores, for the cut: P(z > 0) saturates into ties."""
        return self._table(self.alpha.detach())

    def _table(self, flat: torch.Tensor) -> Scores:
        result: Scores = {kind: [] for kind in KINDS}
        for _, kind, a, b in self.slots:
            result[kind].append(flat[a:b].clone())
        return result

    def kept(self, target: float | None = None) -> Kept:
        """What stays at `target` (default: the recipe's)."""
        return choose(
            self.scores(), self.units, self.structure, self.structure.sparsity if target is None else target
        )

    def mask(self, kept: Kept) -> torch.Tensor:
        """Bool [gated units]: True where kept."""
        mask = torch.zeros_like(self.cost, dtype=torch.bool)
        for i, kind, a, _ in self.slots:
            mask[a + torch.tensor(kept[i][kind])] = True
        return mask

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, by name, detached; `load` takes it back."""
        kept = {"alpha": self.alpha, "lagrange": self.lagrange}
        if self.form == RE_ESTIMATED:
            kept |= {
                name: getattr(self, name) for name in ("prior", "chosen", "surprise", "squares", "weights")
            }
        return {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """The reverse of `state`, in place."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self._squared = self.squares.cpu().clone()

    def gathered(self, device: torch.device) -> torch.Tensor:
        """`squares` where the backward pass adds to them: on the model's device, so that it need not wait."""
        self.squares = self.squares.to(device)
        return self.squares

    @property
    def gradient(self) -> torch.Tensor | None:
        """Of the step's draw, [gated units]: what re-estimated gates learn from; None before the way back."""
        return None if self._drawn is None else self._drawn[1].grad

    @torch.no_grad()
    def share(self) -> None:
        """Brings together what several processes found in the step, before `observe`."""
        z = self._drawn[1] if self._drawn is not None else None
        if self.prior_tokens is None or z is None:
            return
        if ranks.world() > 1 and ranks.any_of(z.grad is not None):
            # per token the loss of a share of the batch weighs more, as often as there are shares
            added = (self.squares.cpu() - self._squared) / ranks.world()
            if z.grad is None:  # every batch of this process was skipped
                z.grad = torch.zeros_like(z)
            ranks.share_mean([z.grad, added])
            self.squares.copy_(self._squared + added)
        self._squared = self.squares.cpu().clone()

    @torch.no_grad()
    def discard(self) -> None:
        """Forgets what the step's gradients said, in every process alike: they are not finite."""
        if self._drawn is not None and self.prior_tokens is not None:
            self._drawn[1].grad = None
            self.squares.copy_(self._squared)

    @torch.no_grad()
    def observe(self, tokens: int) -> None:
        """Takes the gradients of the step's draw into the costs of removal (re-estimated gates alone).

        An open unit's gradient g says that closing it costs -g beyond its h/2; for a closed one g has the
        whole curvature in it, which is taken out as the share of the prior that fits all closed units
        best. Later steps weigh more, as their number: what the memories have yet to learn is not the mask's.
        What `squares` has gathered tells h of a training text up to a factor, one for the open and one for
        the closed units, and is pooled with that of the scoring text by tokens; the start grows with it.

        Args:
            tokens: That the step's gradient is a mean over; what is read and not learned is none.
        """
        z = self._drawn[1] if self._drawn is not None else None
        if self.prior_tokens is None or z is None or z.grad is None:
            return
        g = z.grad / self.cost if len(self.structure.units) > 1 else z.grad
        closed = z < 0.5
        fit = g[closed].sum() / self.prior[closed].sum().clamp_min(1e-30)
        found = torch.where(closed, fit * self.prior - g, -g)
        weight = float(self.step) + 1
        self.weights += torch.tensor([weight, weight**2, tokens], dtype=torch.float64)
        self.surprise += (found - self.surprise) * float(weight / self.weights[0])
        seen, half, known = float(self.weights[2]), self.prior.clone(), self.information
        squares = self.squares.cpu()
        if len(self.structure.units) > 1:
            squares = squares / self.cost
        for state in (closed, ~closed):
            typical = float(squares[state].median()) if state.any() else 0.0
            if typical > 0:
                there = squares[state] * (known[state].median() / typical)
                grown = there / known[state].clamp_min(1e-30)
                half[state] *= (1 + (grown - 1) * (seen / (seen + self.scored_tokens))) ** self.power
        steps = float(self.weights[0] ** 2 / self.weights[1])  # equally weighted ones that are as noisy
        self.alpha.copy_(half + steps * tokens / (steps * tokens + self.prior_tokens) * self.surprise)
        z.grad = None

    def advance(self, step: int, target: float) -> None:
        """Makes `step` the current optimizer step: a new draw, and the target to hold."""
        if step % EVERY == 0:
            self.chosen.copy_(self.alpha.detach())
        self.step.fill_(step)
        of = self.structure.of  # a target that rises does so from what left with tokens
        self.target.fill_(max(target, self.units.gone(of) / self.units.denominator(of)))
        self._drawn = None

    def kept_now(self) -> Kept:
        """What the hard mask of the current step leaves open."""
        source = self.chosen if self.form == RE_ESTIMATED else self.alpha.detach()
        return choose(self._table(source), self.units, self.structure, float(self.target))

    def draw(self) -> torch.Tensor:
        """Z of the current step, float32 [gated units], the same however often it is asked for."""
        key = (int(self.step), float(self.target))
        if self._drawn is None or self._drawn[0] != key:
            if self.form == "hard_concrete":
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))
                noise = torch.rand(self.alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
                self._drawn = (key, noise.log() - (-noise).log1p())
            else:
                self._drawn = (key, self.mask(self.kept_now()).float())
                if self.form == RE_ESTIMATED:
                    self._drawn[1].requires_grad_()
        drawn = self._drawn[1]
        if self.form == RE_ESTIMATED:
            return drawn
        if self.form == "hard_concrete":
            s = torch.sigmoid((drawn + self.alpha) / BETA)
            return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        soft = torch.sigmoid(self.alpha)
        return drawn + (soft - soft.detach())

    def expected_sparsity(self) -> torch.Tensor:
        """Share of parameters expected to be removed: of the draw's distribution, or of the hard mask."""
        whole, gone = self.units.denominator(self.structure.of), self.units.gone(self.structure.of)
        if self.form == "hard_concrete":
            open_ = torch.sigmoid(self.alpha - BETA * math.log(-GAMMA / ZETA))
            return (gone + (self.cost * (1 - open_)).sum()) / whole
        return (gone + (self.cost * (1 - self.draw().detach().round())).sum()) / whole

    def penalty(self) -> torch.Tensor:
        """lambda_1 (s - t) + lambda_2 (s - t)^2 in nats; 0 for straight-through gates, which meet t exactly.

        Under uniform widths the constraint is held in every layer; the penalty is their mean.
        """
        if self.form != "hard_concrete":
            return self.alpha.new_zeros(())
        if self.structure.widths == "uniform":
            closed = self.cost * (1 - torch.sigmoid(self.alpha - BETA * math.log(-GAMMA / ZETA)))
            layers = [torch.stack([closed[a:b].sum() for i, _, a, b in self.slots if i == n]).sum()
                      for n in range(len(self.units.layers))]  # fmt: skip
            whole, gone = self.units.denominator(self.structure.of), self.units.gone(self.structure.of)
            miss = (torch.stack(layers) * len(layers) + gone) / whole - self.target
        else:
            miss = (self.expected_sparsity() - self.target)[None]
        return self.lagrange[0] * miss.mean() + self.lagrange[1] * miss.square().mean()


class _Gate(torch.autograd.Function):
    """x * z, whose way back adds to `into`, for every unit: `scale` * sum over tokens of (dL/dz by it)^2.

    z is 0 or 1. What is open stands in the product, which the LoRA behind keeps as well; of x itself only the
    closed channels are kept, or the gates would keep another copy of every layer's activations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, z: torch.Tensor, closed: torch.Tensor, into: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """X [..., channels] in any dtype, z float32 [channels], closed int64: where z is 0, into [units]."""
        gated = x * z.to(x.dtype)
        ctx.save_for_backward(gated, x[..., closed], closed, z)
        ctx.into, ctx.scale = into, scale
        return gated

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Gradients of x and z."""
        gated, behind, closed, z = ctx.saved_tensors
        parts = grads[0] * gated
        parts[..., closed] = grads[0][..., closed] * behind
        parts = parts.reshape(-1, len(z)).float()
        by_unit = parts if len(z) == len(ctx.into) else parts.view(len(parts), len(ctx.into), -1).sum(2)
        ctx.into += by_unit.square().sum(0) * ctx.scale
        return grads[0] * z.to(gated.dtype), parts.sum(0), None, None, None


class GateHooks:
    """Puts the gates in front of their consumers in a (PEFT-wrapped) model.

    `z` holds what every consumer multiplies its input with, by (layer, kind); empty means gates off.
    """

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.device = device_of(model)
        self.z: dict[tuple[int, UnitKind], torch.Tensor] = {}
        self.closed: dict[tuple[int, UnitKind], torch.Tensor] = {}  # channels, of the step's draw
        self._draw: torch.Tensor | None = None  # that `closed` is of
        self.squares: dict[tuple[int, UnitKind], torch.Tensor] = {}
        self.scale = 1.0  # of the squares: a mean over fewer tokens has larger gradients by token
        self._handles = []
        for i, layer in enumerate(decoder_layers(model)):
            self._handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._hook(i, "ffn_neurons")))
            self._handles.append(layer.self_attn.o_proj.register_forward_pre_hook(self._hook(i, "kv_groups")))
        self.units = units

    def _hook(self, layer: int, kind: UnitKind) -> Any:
        def gate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            z = self.z.get((layer, kind))
            if z is None:
                return None
            x, into = args[0], self.squares.get((layer, kind))
            if into is None:
                return (x * z.to(x.dtype), *args[1:])
            return (_Gate.apply(x, z, self.closed[(layer, kind)], into, self.scale), *args[1:])

        return gate

    def set(self, gates: Gates, z: torch.Tensor) -> None:
        """Closes and opens units: z is float [gated units], with or without a gradient."""
        self.z = {}
        new, self._draw = z is not self._draw, z
        there = z.to(self.device)
        for i, kind, a, b in gates.slots:
            have = self.units.layers[i]
            # a KV group gates the outputs of all its query heads
            channels = have.queries * have.head_dim if kind == "kv_groups" else 1
            part = there[a:b]
            self.z[(i, kind)] = _spread(part, channels)
            if gates.form == RE_ESTIMATED:
                self.squares[(i, kind)] = gates.gathered(self.device)[a:b]
                if new:  # looked up where the draw is, once a step: a pass must not wait for its device
                    shut = _spread(z.detach()[a:b] == 0, channels).nonzero().squeeze(1)
                    self.closed[(i, kind)] = shut.to(self.device)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def _spread(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Each value as often as its unit has channels; `repeat_interleave` would wait for its device."""
    return values[:, None].expand(-1, channels).reshape(-1)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks scaled into (0, 1), ties broken by place."""
    order = torch.argsort(values, stable=True)
    ranks = torch.empty_like(values)
    ranks[order] = torch.arange(len(values), dtype=values.dtype)
    return (ranks + 0.5) / len(values)
