"""The chunked loss equals plain torch, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import koff_prune.loss
from koff_prune.loss import head_loss


@pytest.mark.parametrize(("ce", "kl"), [(1.0, 0.0), (0.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("tokens", [5, 16, 37])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_equals_plain_torch(
    monkeypatch: pytest.MonkeyPatch, ce: float, kl: float, tokens: int, cap: float | None
) -> None:
    monkeypatch.setattr(koff_prune.loss, "logit_rows", lambda *_: 16)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden, teacher = hidden.float(), teacher.float()
    head = torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 50, (tokens,), generator=generator)
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = head_loss(a, head, labels, teacher, ce=ce, kl=kl, cap=cap)
    logits, there = b @ head.T, teacher @ head.T
    if cap is not None:
        logits, there = cap * torch.tanh(logits / cap), cap * torch.tanh(there / cap)
    q = functional.log_softmax(there, -1)
    wanted = ce * functional.cross_entropy(logits, labels)
    wanted = wanted + kl * functional.kl_div(
        functional.log_softmax(logits, -1), q, reduction="batchmean", log_target=True
    )
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (3 * found).backward()
    (3 * wanted).backward()
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_the_head_gets_no_gradient_and_16_bits_are_close() -> None:
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    head = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(9)
    exact = head_loss(hidden, head, labels)
    half = hidden.bfloat16().requires_grad_()
    loss = head_loss(half, head.bfloat16(), labels)
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact), rel=0.02)
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
