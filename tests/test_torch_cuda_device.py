"""`fastce.torch` on a CUDA device: a real one, or in its place tensors that say they lie there.

As `test_cuda_device.py` is run: on the card at hand, or with NUMBA_ENABLE_CUDASIM=1 in numba's
simulator, where tensors of the CPU are taken for tensors of a device.
"""

import contextlib
import itertools
import os
import re

import pytest
import torch

import fastce

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if not SIMULATED and not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

if SIMULATED:
    from tests.cuda_simulator import take_tensors_for_its_own

import fastce.torch as ft  # noqa: E402
from fastce import cuda  # noqa: E402
from tests.test_torch import OPTIONS, as_array, as_tensor, problem  # noqa: E402

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    if SIMULATED:
        take_tensors_for_its_own(monkeypatch)


def place(value):
    if isinstance(value, torch.Tensor) and not SIMULATED:
        return value.detach().cuda().requires_grad_(value.requires_grad)
    return value


def assert_close(got, want, dtype):
    assert got.is_cuda
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.detach().cpu().double(), want.double(), rtol=max(1e-5, eps) if dtype is not FLOATS[0]
        else 1e-12, atol=1e-7 if dtype is not FLOATS[0] else 1e-15,
    )  # fmt: skip


CASES = [
    (name, reduction, dtype, soft)
    for name, reduction, dtype, soft in itertools.product(
        OPTIONS, ["mean", "sum", "none"], FLOATS, [False, True]
    )
    if not (soft and name == "ignored") and not (name == "normalizer" and reduction != "mean")
    and (dtype is torch.float32 or (name, soft) in (("plain", False), ("weight", True)))
]  # fmt: skip


@pytest.mark.parametrize("name, reduction, dtype, soft", CASES)
def test_the_numbers_are_those_of_the_core(name, reduction, dtype, soft):
    """In all ways of eager mode, with and without memory of its own, and as an operator."""
    logits, target = problem((2, 5, 3), dtype, soft)
    options = {**OPTIONS[name], "reduction": reduction}
    arrays = {k: as_array(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.rand(2, 3) if reduction == "none" else torch.tensor(1.5)
    want, grad = map(as_tensor, fastce.cross_entropy_and_grad(
        as_array(logits), as_array(target), axis=1, **arrays, grad_output=upstream.numpy()
    ))  # fmt: skip
    logits, target, upstream = place(logits), place(target), place(upstream)
    options = {name: place(option) for name, option in options.items()}
    leaf = logits.detach().clone().requires_grad_()
    for z, in_place in ((logits, False), (leaf * 1, True)):
        loss = ft.cross_entropy(z, target, **options, dtype=want.dtype, in_place=in_place)
        assert_close(loss, want, want.dtype)
        (got,) = torch.autograd.grad(loss, logits if z is logits else leaf, upstream.to(loss.dtype))
        assert_close(got, grad, dtype)
        if in_place:
            assert_close(z, grad, dtype)
    weight = options.pop("weight", None)
    given = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None,
             "reduction": "", "normalizer": None, **options}  # fmt: skip
    operators, arguments = torch.ops.fastce, (logits.detach(), target, weight, 1, *given.values())
    assert_close(operators.cross_entropy(*arguments), want, want.dtype)
    got = operators.cross_entropy_grad(upstream.to(want.dtype), *arguments)
    assert_close(got, grad, dtype)


@contextlib.contextmanager
def nobody_waits(monkeypatch):
    """Fail where the host asks for a number that is on the device."""
    if not SIMULATED:
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
        return

    def refuse(*arguments, **given):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patches:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patches.setattr(torch.Tensor, name, refuse, raising=False)
        yield


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("in_place", [False, True])
def test_nobody_waits(monkeypatch, reduction, in_place):
    leaf, target = map(place, problem((3, 5)))
    upstream = place(torch.tensor(2.0))
    for patched in (contextlib.nullcontext(), nobody_waits(monkeypatch)):  # the first one compiles
        with patched:
            logits = leaf * 1
            loss = ft.cross_entropy(logits, target, reduction=reduction, in_place=in_place)
            torch.autograd.grad(loss.sum() * upstream, leaf)


def test_the_gradient_is_made_in_backward():
    logits, target = map(place, problem((3, 5)))
    loss = ft.cross_entropy(logits, target)
    assert not hasattr(loss.grad_fn, "gradient")
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_a_bad_target_is_reported_later():
    logits, target = map(place, problem((3, 5)))
    target = target.clone()
    target[1] = 7
    losses = ft.cross_entropy(logits, target, reduction="none")
    with pytest.raises(IndexError, match=r"targets: .* got 7 at index \(1,\)"):
        cuda.synchronize(logits.device.index)
    assert losses.isnan().tolist() == [False, True, False]


def test_transforms():
    logits, target = problem((4, 5))
    want = fastce.cross_entropy_and_grad(as_array(logits), as_array(target), reduction="sum")[1]
    z, y = place(logits.detach()), place(target)
    per_row = torch.func.vmap(torch.func.grad(ft.cross_entropy))(z, y)
    assert_close(per_row, as_tensor(want), torch.float32)
    whole = torch.func.grad(lambda z: ft.cross_entropy(z, y, reduction="sum"))(z)
    assert_close(whole, as_tensor(want), torch.float32)


def test_what_is_not_there():
    logits, target = map(place, problem((3, 5)))
    device = re.escape(str(logits.device))
    (grad,) = torch.autograd.grad(ft.cross_entropy(logits, target), logits, create_graph=True)
    match = f"second derivatives: expected logits on the CPU, got some on {device}.*hessian_vector"
    with pytest.raises(NotImplementedError, match=match):
        grad.sum().backward()
    with pytest.raises(
        NotImplementedError, match=f"on the CPU, got one on {device}; .*cross_entropy"
    ):
        ft.linear_cross_entropy(logits.detach(), logits.detach(), target)
    if not SIMULATED:
        with pytest.raises(TypeError, match="targets: expected an array on CUDA device 0"):
            ft.cross_entropy(logits, target.cpu())
        with pytest.raises(NotImplementedError, match="on the CPU, got one on cuda"):
            ft.cross_entropy(logits.detach().cpu(), target)
