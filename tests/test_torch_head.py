"""Derivatives of both orders of the linear head, by whichever way torch asks for them."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.testing import assert_close

import fastce.torch as ft

ROWS, FEATURES, CLASSES = 6, 4, 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "all": {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3},
    "normalizer": {"normalizer": 17.0},
}
CURVED = {"z-loss": {"z_loss": 0.3}, "softcap": {"softcap": 1.5}}
IN_JVP = pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own


def layer(dtype=torch.float64, bias=True, seed=0):
    """Hidden states, weights and bias, all of which require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)][: 3 if bias else 2]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in drawn]


def labels(soft=False):
    generator = torch.Generator().manual_seed(9)
    if soft:
        return torch.rand((ROWS, CLASSES), generator=generator, dtype=torch.float64)
    return torch.randint(CLASSES, (ROWS,), generator=generator)


def losses(options, reduction="mean", soft=False):
    """Ours and torch's, as functions of the layer."""
    options, target = {**options, "reduction": reduction}, labels(soft)
    if soft:
        options.pop("ignore_index", None)
    normalizer = options.get("normalizer")

    def ours(x, weight, bias=None):
        given = options
        if "weight" in given:
            given = given | {"weight": given["weight"].to(weight.dtype)}
        y = target.to(x.dtype) if soft else target
        return ft.linear_cross_entropy(x, weight, y, linear_bias=bias, **given)

    def theirs(x, weight, bias=None):
        given = {key: value for key, value in options.items() if key != "normalizer"}
        if normalizer is not None:
            given["reduction"] = "sum"
        return F.cross_entropy(F.linear(x, weight, bias), target, **given) / (normalizer or 1.0)

    return ours, theirs


def second(function, point, seed=3):
    """Gradients of some combination of the gradients, for an upstream gradient other than 1."""
    loss = function(*point)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    upstream.requires_grad_()
    first = torch.autograd.grad(loss, point, upstream, create_graph=True)
    along = [t.detach() for t in layer(point[0].dtype, len(point) > 2, seed)]
    return torch.autograd.grad(first, [*point, upstream], along)


@IN_JVP
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "name, reduction",
    [*itertools.product(["plain", "all"], ["mean", "sum", "none"]), ("normalizer", "mean")],
)
def test_derivatives_of_both_orders(name, reduction, soft):
    ours, theirs = losses(OPTIONS[name], reduction, soft)
    for bias in (True, False):
        point = layer(bias=bias)
        assert torch.autograd.gradcheck(ours, point, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, point, check_fwd_over_rev=True)
        assert_close(second(ours, point), second(theirs, point))


@IN_JVP
def test_hessians_whichever_way_around():
    ours, theirs = losses(OPTIONS["all"])
    point, func, every = [t.detach() for t in layer()], torch.func, (0, 1, 2)
    want = func.hessian(theirs, every)(*point)
    for outer, inner in itertools.product((func.jacrev, func.jacfwd), repeat=2):
        if outer is not inner or outer is func.jacrev:
            assert_close(outer(inner(ours, every), every)(*point), want)
    assert_close(func.hessian(ours, 1)(*point), want[1][1])
    with pytest.raises(NotImplementedError, match="forward mode in forward mode"):
        func.jacfwd(func.jacfwd(ours))(*point)


@IN_JVP
def test_hessians_of_a_batch():
    target = labels()
    x, weight = (t.detach() for t in layer(bias=False))

    def hessians(loss):
        return torch.func.vmap(torch.func.hessian(loss), in_dims=(0, None, 0))(
            x[:, None], weight, target[:, None]
        )

    assert_close(
        hessians(ft.linear_cross_entropy),
        hessians(lambda x, weight, y: F.cross_entropy(F.linear(x, weight), y)),
    )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_of_some_arguments(wanted):
    """Where some require no gradient, or theirs lead nowhere."""
    ours, theirs = losses(OPTIONS["all"])
    found = []
    for function in (ours, theirs):
        point = layer()
        for t, asked in zip(point, wanted, strict=True):
            t.requires_grad_(asked)
        leaves = [t for t in point if t.requires_grad]
        for leaf in leaves:
            (first,) = torch.autograd.grad(function(*point), leaf, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), leaves))
    half = len(found) // 2
    assert_close(found[:half], found[half:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_dtypes(dtype, soft):
    ours, theirs = losses(OPTIONS["all"], soft=soft)
    point = layer(dtype)
    got = second(ours, point)
    exact = [t.detach().double().requires_grad_() for t in point]
    along = second(theirs, exact)
    assert [g.dtype for g in got] == [*(t.dtype for t in point), dtype]
    # Upstream gradients, directions and the first derivatives are rounded to 16 bits as well.
    rtol = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    for a, b in zip(got, along, strict=True):
        assert_close(a.double(), b, rtol=rtol, atol=rtol * float(b.abs().max()))


@IN_JVP
@pytest.mark.parametrize("name", CURVED)
def test_curved_options_have_first_derivatives_alone(name):
    ours, _ = losses(CURVED[name])
    point = layer()
    assert torch.autograd.gradcheck(ours, point, check_forward_ad=True)
    grads = torch.autograd.grad(ours(*point), point, create_graph=True)
    for gradient in grads:
        with pytest.raises(NotImplementedError, match=r"second derivatives: .*z_loss nor softcap"):
            gradient.sum().backward(retain_graph=True)
    values = [t.detach() for t in point]
    for outer, inner in (("jacfwd", "jacrev"), ("jacrev", "jacfwd")):
        transform = getattr(torch.func, outer)(getattr(torch.func, inner)(ours))
        with pytest.raises(NotImplementedError, match=r"second derivatives: .*z_loss nor softcap"):
            transform(*values)


def test_no_third_derivatives():
    ours, _ = losses({})
    point = layer()
    first = torch.autograd.grad(ours(*point), point, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), point, create_graph=True)
    for gradient in second:
        with pytest.raises(NotImplementedError, match="third derivatives"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, reduction, bias):
    x, weight, b = (t.detach() for t in layer(dtype))
    u, v, c = (t.detach() for t in layer(dtype, seed=1))
    b, c = (b, c) if bias else (None, None)
    given = (x, weight, labels(), b, None, -100, 0.0, 0.0, None, reduction, None)
    ops = torch.ops.fastce
    upstream = torch.ones(ROWS if reduction == "none" else (), dtype=torch.float64)
    torch.library.opcheck(ops.linear_cross_entropy_slope.default, (u, v, c, *given))
    torch.library.opcheck(ops.linear_cross_entropy_second.default, (upstream, None, v, c, *given))
