"""Cross-entropy and KL through a frozen output head, in chunks, without keeping the logits.

The head is frozen, so the gradient with respect to the hidden states is known as soon as a chunk's logits
are: it is computed in the forward pass, chunk by chunk, and only [tokens, hidden] is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from koff_prune.needs import logit_rows


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        teacher: torch.Tensor | None,
        ce: float,
        kl: float,
        cap: float | None,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        chunk = logit_rows(len(head), hidden.device.type, teacher is not None)
        for at in range(0, len(hidden), chunk):
            rows = slice(at, at + chunk)
            logits = _capped(hidden[rows] @ head.T, cap)
            log_p = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            total += ce * functional.nll_loss(log_p, labels[rows], reduction="sum")
            q = None
            if teacher is not None:
                there = _capped(teacher[rows] @ head.T, cap)
                log_q = functional.log_softmax(there, dim=-1, dtype=torch.float32)
                q = log_q.exp()
                total += kl * log_q.sub_(log_p).mul_(q).sum()
                del log_q
            d = log_p.exp_()
            d = d.mul_(ce) if q is None else d.mul_(ce + kl).sub_(q, alpha=kl)
            d[torch.arange(len(d), device=d.device), labels[rows]] -= ce
            if cap is not None:
                d.mul_(1 - (logits.float() / cap).square())
            gradient[rows] = d.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] / ctx.count).to(gradient.dtype), None, None, None, None, None, None


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None = None,
    *,
    ce: float = 1.0,
    kl: float = 0.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Ce * cross-entropy + kl * KL(teacher || model), mean nats per token.

    Args:
        hidden: Last hidden states [tokens, hidden], in the head's dtype.
        head: Frozen output weight [vocabulary, hidden].
        labels: int64 [tokens].
        teacher: The teacher's last hidden states [tokens, hidden]; needed where kl > 0.
        ce: Weight of the cross-entropy.
        kl: Weight of the divergence.
        cap: Logits are cap * tanh(logits / cap) (Gemma 2, Riviere et al. 2024, section 2); None: as they are.

    Returns:
        float32 scalar.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        result: torch.Tensor = _HeadLoss.apply(
            hidden.to(head.dtype), head, labels, teacher if kl > 0 else None, ce, kl, cap
        )
    return result
