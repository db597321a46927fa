"""Torch gives the same results where it agrees with the contract."""

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import fastce
from tests.checks import draw, draw_soft, draw_targets, draw_weight

RTOL = {"float32": 1e-5, "float64": 1e-12}

TORCH_OPTIONS = {
    "plain": {},
    "weight": {"weight": draw_weight(7)},
    "ignored": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"weight": draw_weight(7), "ignore_index": 3, "label_smoothing": 0.2},
}


def torch_loss_and_grad(function, logits, targets, **options):
    z = torch.tensor(logits, requires_grad=True)
    tensors = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    loss = function(z, torch.tensor(targets), **tensors)
    loss.sum().backward()
    return loss.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("option", TORCH_OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("soft", [False, True])
def test_torch_cross_entropy(option, reduction, dtype, soft):
    shape, options = (6, 7, 5), dict(TORCH_OPTIONS[option])
    if "weight" in options:
        options["weight"] = options["weight"].astype(dtype)
    logits = draw(shape, dtype, scale=2)
    if soft:
        options.pop("ignore_index", None)
        targets = draw_soft(shape, dtype, axis=1)
    else:
        targets = draw_targets((6, 5), 7)
    got = fastce.cross_entropy_and_grad(logits, targets, axis=1, reduction=reduction, **options)
    want = torch_loss_and_grad(F.cross_entropy, logits, targets, reduction=reduction, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=RTOL[dtype], atol=RTOL[dtype] / 20)


@pytest.mark.parametrize("option", ["plain", "weight", "ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torch_nll_loss(option, reduction):
    lp = fastce.log_softmax(draw((20, 7)))
    targets, options = draw_targets((20,), 7), TORCH_OPTIONS[option]
    got = fastce.nll_loss_and_grad(lp, targets, reduction=reduction, **options)
    want = torch_loss_and_grad(F.nll_loss, lp, targets, reduction=reduction, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"pos_weight": draw_weight(5)}, {"weight": draw_weight(5)}], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torch_binary(options, reduction):
    logits, targets = draw((9, 5), scale=3), (draw((9, 5), seed=1) > 0).astype("f4")
    got = fastce.binary_cross_entropy_and_grad(logits, targets, reduction=reduction, **options)
    want = torch_loss_and_grad(
        F.binary_cross_entropy_with_logits, logits, targets,
        reduction=reduction, **options,
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_in_16_bits(dtype):
    """Our float32 loss lies where torch's own rounding to 16 bits allows."""
    wide = draw((16, 9), scale=2)
    targets = draw_targets((16,), 9)
    z = torch.tensor(wide).to(getattr(torch, dtype)).requires_grad_()
    loss = F.cross_entropy(z, torch.tensor(targets), reduction="none")
    loss.sum().backward()
    logits = (
        z.detach().float().numpy().astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    )
    got, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    unit = float(torch.finfo(getattr(torch, dtype)).eps)
    np.testing.assert_allclose(got, loss.detach().float().numpy(), rtol=4 * unit)
    np.testing.assert_allclose(grad.astype("f4"), z.grad.float().numpy(), rtol=8 * unit, atol=unit)
