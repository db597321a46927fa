"""`fastce.torch`: torch's semantics, derivatives of every kind, memory, and who may look on."""

import copy
import io
import itertools
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.testing import assert_close

import fastce
import fastce.torch as ft
from tests.checks import assert_gradient, assert_loss
from tests.oracle import cross_entropy as oracle

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])},
    "ignored": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.2},
    "normalizer": {"normalizer": 17.0},
    "z-loss": {"z_loss": 0.3},
    "softcap": {"softcap": 1.5},
}
SMOOTH = [name for name in OPTIONS if name not in ("z-loss", "softcap")]
REDUCTIONS = ["mean", "sum", "none"]
IN_JVP = pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own


def problem(shape=(6, 5), dtype=torch.float32, soft=False, axis=1, seed=0):
    """Logits that require a gradient, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if soft:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        rows = [*shape[:axis], *shape[axis + 1 :]]
        target = torch.randint(shape[axis], rows, generator=generator)
    return logits.requires_grad_(), target


def loss_and_gradients(function, arguments, upstream=1.0):
    """The loss and the gradients of all arguments that require one."""
    loss = function(*arguments)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    return loss.detach(), torch.autograd.grad(loss.sum() * upstream, leaves)


# Torch's own samples ------------------------------------------------------------------------------


def samples(name, dtype):
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    (info,) = [op for op in op_db if op.name == name and not op.variant_test_name]
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


def as_function(function, sample):
    """A sample as a function of its tensors, and these."""
    names = list(sample.kwargs)
    count = 1 + len(sample.args)

    def call(*arguments):
        return function(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

    return call, (sample.input, *sample.args, *sample.kwargs.values())


@pytest.mark.parametrize("upstream", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opinfo_samples(dtype, upstream):
    seen = 0
    for sample in samples("nn.functional.cross_entropy", dtype):
        call, arguments = as_function(ft.cross_entropy, sample)
        reference, _ = as_function(F.cross_entropy, sample)
        assert_close(
            loss_and_gradients(call, arguments, upstream),
            loss_and_gradients(reference, arguments, upstream),
        )
        seen += 1
    assert seen > 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opinfo_samples_in_16_bits(dtype):
    """Loss and gradients are those of float64, rounded once; torch's own are not."""
    seen = 0
    for sample in samples("nn.functional.cross_entropy", dtype):
        call, arguments = as_function(ft.cross_entropy, sample)
        reference, _ = as_function(F.cross_entropy, sample)
        exact = [
            a.detach().double().requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in arguments
        ]
        got, want = loss_and_gradients(call, arguments), loss_and_gradients(reference, exact)
        assert got[0].dtype == dtype
        for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert_close(a.double(), b, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)
        seen += 1
    assert seen > 15


def test_opinfo_samples_have_derivatives_of_both_orders():
    for sample in samples("nn.functional.cross_entropy", torch.float64):
        call, arguments = as_function(ft.cross_entropy, sample)
        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)


def test_opinfo_samples_of_the_head():
    """All but weights of more than two dimensions and targets that require a gradient."""
    seen = 0
    for sample in samples("nn.functional.linear_cross_entropy", torch.float64):
        if sample.args[0].ndim > 2:
            continue
        sample.args = (sample.args[0], sample.args[1].detach())
        call, arguments = as_function(ft.linear_cross_entropy, sample)
        reference, _ = as_function(F.linear_cross_entropy, sample)
        assert_close(
            loss_and_gradients(call, arguments, 1.5), loss_and_gradients(reference, arguments, 1.5)
        )
        assert torch.autograd.gradcheck(call, arguments)
        seen += 1
    assert seen > 20


# Options, dtypes, layouts -------------------------------------------------------------------------


def as_array(tensor):
    """A tensor as an array of the dtypes that NumPy and ml_dtypes have."""
    if tensor.dtype is torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def as_tensor(array):
    """And back."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.as_tensor(array)


CASES = [
    (name, reduction, dtype, soft)
    for name, reduction, dtype, soft in itertools.product(
        OPTIONS, REDUCTIONS, FLOATS, [False, True]
    )
    if not (soft and name == "ignored") and not (name == "normalizer" and reduction != "mean")
]


@pytest.mark.parametrize("name, reduction, dtype, soft", CASES)
def test_the_numbers_are_those_of_the_core(name, reduction, dtype, soft):
    """To the last bit, in every way a call can go in eager mode, for any upstream gradient."""
    logits, target = problem((4, 5, 3), dtype, soft)
    options = {**OPTIONS[name], "reduction": reduction}
    arrays = {k: as_array(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.rand(4, 3) if reduction == "none" else torch.tensor(1.5)
    want, grad = map(as_tensor, fastce.cross_entropy_and_grad(
        as_array(logits), as_array(target), axis=1, **arrays, grad_output=upstream.numpy()
    ))  # fmt: skip
    with torch.no_grad():
        loss = ft.cross_entropy(logits, target, **options, dtype=want.dtype)
    assert_close(loss, want, rtol=0, atol=0)
    assert_close(ft.cross_entropy(logits, target, **options).detach(), want.to(dtype))
    loss = ft.cross_entropy(logits, target, **options, dtype=want.dtype)
    assert_close(loss.detach(), want, rtol=0, atol=0)
    for _ in range(2):  # the second one has no gradient left from the forward pass
        (got,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype), retain_graph=True)
        assert_close(got, grad, rtol=0, atol=0)
    if reduction != "none":
        unit = fastce.cross_entropy_and_grad(as_array(logits), as_array(target), axis=1, **arrays)
        loss = ft.cross_entropy(logits, target, **options)
        assert_close(torch.autograd.grad(loss, logits)[0], as_tensor(unit[1]), rtol=0, atol=0)


def test_gradients_fit_the_oracle():
    logits, target = problem((50, 7))
    loss = ft.cross_entropy(logits, target)
    loss.backward()
    want = oracle(logits.detach().numpy(), target.numpy())
    assert_loss(loss.detach().numpy(), want.loss, np.float32)
    assert_gradient(logits.grad.numpy(), want.grad, np.float32)


LAYOUTS = {
    "channels last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "transposed": lambda z: z.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda z: torch.cat([z, z], 3)[..., ::2],
    "expanded": lambda z: z[:1].expand_as(z),
    "one dimension": lambda z: z[0, :, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout, dtype):
    z = LAYOUTS[layout](problem((2, 5, 4, 6), dtype)[0].detach()).requires_grad_()
    target = torch.randint(5, z.shape[:1] + z.shape[2:] if z.ndim > 1 else ())
    loss, grads = loss_and_gradients(ft.cross_entropy, (z, target))
    wide = z.detach().float().requires_grad_()
    want, wanted = loss_and_gradients(F.cross_entropy, (wide, target))
    assert_close((loss, *grads), (want.to(dtype), wanted[0].to(dtype)), rtol=2e-2, atol=1e-3)
    assert grads[0].stride() == torch.empty_like(z).stride()


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_class_axis(axis):
    logits, target = problem((4, 5, 3), axis=axis % 3)
    got = loss_and_gradients(lambda z: ft.cross_entropy(z, target, axis=axis), (logits,))
    want = loss_and_gradients(lambda z: F.cross_entropy(z.movedim(axis, 1), target), (logits,))
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16], ids=str)
def test_targets_of_any_integer_dtype(dtype):
    logits, target = problem()
    assert_close(ft.cross_entropy(logits, target.to(dtype)), F.cross_entropy(logits, target))


def test_what_torch_had_before_reduction():
    logits, target = problem()
    with pytest.warns(UserWarning, match="deprecated"):
        loss = ft.cross_entropy(logits, target, None, False)
    assert_close(loss, F.cross_entropy(logits, target, reduction="sum"))


@pytest.mark.parametrize("function", [ft.cross_entropy, F.cross_entropy])
def test_dtype_of_the_loss(function):
    logits, target = problem(dtype=torch.bfloat16)
    assert function(logits, target).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert function(logits, target).dtype is torch.float32
    assert ft.cross_entropy(logits, target, dtype=torch.float64).dtype is torch.float64


def test_digits_of_the_loss_are_to_be_had_in_16_bits():
    logits, target = problem((300, 50), torch.bfloat16)
    loss = ft.cross_entropy(logits, target, dtype=torch.float32)
    assert_close(loss, F.cross_entropy(logits.float(), target), rtol=1e-6, atol=0)


# What is different from torch, and said to be -----------------------------------------------------

NAN, INF = float("nan"), float("inf")
DIFFERENCES = {
    "an ignored row holding NaN": ([[1.0, 2.0], [NAN, 0.0]], [0, -100], {}),
    "weights all 0": ([[1.0, 2.0]], [0], {"weight": torch.zeros(2)}),
    "probability 0 at -inf": ([[1.0, -INF]], [[1.0, 0.0]], {}),
    "weight 0 at -inf": ([[1.0, -INF], [0.0, 1.0]], [1, 0], {"weight": torch.tensor([1.0, 0.0])}),
    "a confident row": ([[0.0, 40.0]], [1], {}),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_to_torch(name):
    rows, labels, options = DIFFERENCES[name]
    logits, target = torch.tensor(rows, requires_grad=True), torch.tensor(labels)
    ours = loss_and_gradients(lambda z: ft.cross_entropy(z, target, **options), (logits,))
    theirs = loss_and_gradients(lambda z: F.cross_entropy(z, target, **options), (logits,))
    loss, grad = fastce.cross_entropy_and_grad(
        logits.detach().numpy(), target.numpy(),
        **{k: v.numpy() for k, v in options.items()},
    )  # fmt: skip
    want = torch.as_tensor(loss), (torch.from_numpy(grad),)
    assert_close(ours, want, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(AssertionError):  # or it need not be in the list
        assert_close(ours, theirs, rtol=1e-3, atol=0, equal_nan=True)


ERRORS = {
    "a class too many": (IndexError, "targets: .* got 5 at index .3,", {"target": [0, 1, 2, 5]}),
    "targets that do not fit": (ValueError, "targets: expected shape", {"target": [0]}),
    "a bad reduction": (ValueError, "reduction", {"reduction": "median"}),
    "smoothing below 0": (ValueError, "label_smoothing", {"label_smoothing": -0.1}),
    "a weight too few": (ValueError, "weight", {"weight": torch.ones(4)}),
    "a gradient of the weight": (
        ValueError, "weight: .*no gradient", {"weight": torch.ones(5, requires_grad=True)}
    ),
    "integer logits": (TypeError, "logits", {"input": torch.ones(4, 5, dtype=torch.int64)}),
    "another device": (
        NotImplementedError, "CPU, got one on meta", {"weight": torch.ones(5, device="meta")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, differentiated):
    kind, message, change = ERRORS[name]
    arguments = {"input": problem((4, 5))[0].detach(), "target": [0, 1, 2, 3], **change}
    arguments["target"] = torch.tensor(arguments["target"])
    if arguments["input"].is_floating_point():
        arguments["input"].requires_grad_(differentiated or "gradient" in name)
    before = arguments["input"].detach().clone()
    with pytest.raises(kind, match=message):
        ft.cross_entropy(**arguments)
    assert torch.equal(arguments["input"], before)


# Memory -------------------------------------------------------------------------------------------


def grown(function):
    """Bytes that a call allocates for tensors, and for arrays that are left of it."""
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
        snapshot = tracemalloc.take_snapshot()
    tracemalloc.stop()
    arrays = snapshot.filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
    sizes = [trace.size for trace in arrays.traces]
    return sum(sizes) + sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_copied(dtype):
    """The one array of the size of the logits is the gradient, and backward hands it over."""
    logits, target = problem((64, 500), dtype)
    size = logits.numel() * logits.element_size()
    with torch.no_grad():
        assert grown(lambda: ft.cross_entropy(logits, target)) < size / 4
    losses = []
    assert size <= grown(lambda: losses.append(ft.cross_entropy(logits, target))) < 1.25 * size
    address = losses[0].grad_fn.gradient.data_ptr() if dtype is torch.float32 else None
    assert grown(losses[0].backward) < size / 4
    assert address in (None, logits.grad.data_ptr())


def test_a_graph_that_is_kept_owns_no_gradient_that_is_handed_over():
    """Gradients add up into the first one, which no later pass may see again."""
    logits, target = problem()
    loss = ft.cross_entropy(logits, target)
    for upstream in (1.0, 2.0, 1.0):
        loss.backward(torch.tensor(upstream), retain_graph=True)
    (once,) = torch.autograd.grad(ft.cross_entropy(logits, target), logits)
    assert_close(logits.grad, 4 * once)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_in_place(reduction, dtype, upstream):
    leaf, target = problem(dtype=dtype)

    def gradient(in_place):
        logits, seen = 2 * leaf, []
        logits.register_hook(seen.append)
        version = logits._version
        loss = ft.cross_entropy(logits, target, reduction=reduction, in_place=in_place)
        (loss.sum() * upstream).backward()
        assert (seen[0].data_ptr() == logits.data_ptr()) == in_place
        assert (logits._version > version) == in_place
        return loss.detach(), seen[0]

    assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_in_place_tells_who_needs_the_logits():
    leaf, target = problem()
    loss = ft.cross_entropy(leaf.exp(), target, in_place=True)  # exp's derivative is its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = 2 * leaf
    loss = ft.cross_entropy(logits, target, in_place=True)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = 2 * ft.cross_entropy(2 * leaf, target, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = ft.cross_entropy(2 * leaf, target, in_place=True)
    with pytest.raises(RuntimeError, match=r"in_place: .* create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("upstream", [65536.0, 1 / 3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_in_place_multiplies_before_it_rounds(reduction, dtype, upstream):
    """So that a loss scale finds numbers that 16 bits have not; for losses of rows one factor each.

    The gradients that a scale of 65536 saves are 1e-9 here, nothing in float16.
    """
    leaf, target = torch.zeros(300, 5, dtype=dtype, requires_grad=True), torch.arange(300) % 5
    with torch.no_grad():
        leaf[:, 0] = 15.0
    factor = upstream * (torch.rand(300) if reduction == "none" else torch.tensor(1.0))

    def gradient(in_place):
        options = {"reduction": reduction, "dtype": torch.float32, "in_place": in_place}
        loss = ft.cross_entropy(1 * leaf, target, **options)
        return torch.autograd.grad(loss, leaf, factor)[0]

    assert_close(gradient(True), gradient(False), rtol=0, atol=0)
    if upstream > 1:
        assert (gradient(True)[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_place_leaves_16_bit_logits_until_backward(dtype):
    """As many losses as one likes, of which the first to be differentiated is not in place."""
    leaf, target = problem(dtype=dtype)
    logits = 2 * leaf
    before = logits.detach().clone()
    loss = ft.cross_entropy(logits, target, in_place=True)
    assert torch.equal(logits, before)
    total = loss + ft.cross_entropy(logits, target, label_smoothing=0.1)
    want = sum(ft.cross_entropy(2 * leaf, target, label_smoothing=e) for e in (0.0, 0.1))
    got, want = (torch.autograd.grad(value, leaf)[0] for value in (total, want))
    assert_close(got, want, rtol=0, atol=torch.finfo(dtype).eps)


PARTS = {
    "itself": lambda z: z,
    "a view": lambda z: z.view(-1, 10)[:, :5],
    "rows": lambda z: z[4:],
    "detached": lambda z: z.detach(),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_overwritten_logits_have_no_second_loss(reduction, dtype, part):
    """It would be that of the gradient."""
    leaf, target = problem(dtype=dtype)
    logits = 2 * leaf
    upstream = torch.tensor(1.5) if reduction == "mean" else torch.rand(6)
    loss = ft.cross_entropy(logits, target, reduction=reduction, in_place=True)
    loss.backward(upstream.to(dtype))
    same = PARTS[part](logits)
    for in_place in (False, True):
        with pytest.raises(RuntimeError, match="logits: expected logits, got memory"):
            ft.cross_entropy(same, target[: len(same)], in_place=in_place)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="logits: expected logits, got memory"):
            ft.cross_entropy(same, target[: len(same)])
        logits.copy_(leaf)  # logits again
        ft.cross_entropy(same, target[: len(same)])


def test_a_second_loss_of_logits_that_the_first_has_overwritten_at_once():
    leaf, target = problem()
    logits = 2 * leaf
    ft.cross_entropy(logits, target, in_place=True)
    for call in (ft.cross_entropy, torch.compile(ft.cross_entropy, backend="eager")):
        with pytest.raises(RuntimeError, match="logits: expected logits, got memory"):
            call(logits, target)


@pytest.mark.parametrize("upstream", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_in_place_one_by_one(dtype, upstream):
    """What is overwritten are those parts that had their turn."""
    leaf, target = problem(dtype=dtype)
    logits, labels = 2 * leaf, target.split(2)
    parts = [logits[k : k + 2] for k in (0, 2, 4)]
    for z, y in zip(parts, labels, strict=True):
        (upstream * ft.cross_entropy(z, y, in_place=True)).backward(retain_graph=True)
    for z, y in zip(parts, labels, strict=True):
        with pytest.raises(RuntimeError, match="logits: expected logits, got memory"):
            ft.cross_entropy(z, y)
    got = leaf.grad
    whole = sum(ft.cross_entropy(2 * z, y) for z, y in zip(leaf.split(2), labels, strict=True))
    assert_close(got, torch.autograd.grad(upstream * whole, leaf)[0])


def test_in_place_only_when_it_can_be():
    leaf, target = problem()
    before = leaf.detach().clone()
    for logits in (leaf, leaf.view(-1, 5)):
        with pytest.raises(ValueError, match=r"in_place: .* leaf"):
            ft.cross_entropy(logits, target, in_place=True)
    with pytest.raises(NotImplementedError, match="in_place"):
        torch.func.grad(lambda z: ft.cross_entropy(2 * z, target, in_place=True))(before)
    with torch.no_grad():  # without a gradient there is nothing to put there
        ft.cross_entropy(leaf, target, in_place=True)
    with pytest.raises(IndexError):
        ft.cross_entropy(2 * leaf, target + 3, in_place=True)
    assert torch.equal(leaf, before)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_derivative_by_probabilities_keeps_masks_under_a_cap(dtype):
    """-log p is infinite at -inf, and finite at logits far beyond the cap."""
    far = torch.finfo(dtype).min
    z = torch.tensor([[-torch.inf, far, 0.0, 1.0]], dtype=dtype)
    h = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=dtype, requires_grad=True)
    loss = ft.cross_entropy(z, h, softcap=2.0**-14, reduction="sum")
    (surprise,) = torch.autograd.grad(loss, h)
    assert surprise[0, 0] == torch.inf
    assert torch.allclose(surprise[0, 1:].double(), torch.tensor(3.0).double().log(), rtol=1e-3)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, reduction, soft):
    logits, target = problem((2, 5), torch.float64, soft)
    options = {**OPTIONS[name], "reduction": reduction}
    if reduction != "mean":
        options.pop("normalizer", None)
    if soft:
        options.pop("ignore_index", None)
        target.requires_grad_()

    def function(z, h=target):
        return ft.cross_entropy(z, h, **options)

    inputs = (logits, target) if soft else (logits,)
    assert torch.autograd.gradcheck(function, inputs)
    if name in ("z-loss", "softcap"):
        (grad,) = torch.autograd.grad(function(logits).sum(), logits, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"second derivatives: .*z_loss nor softcap"):
            grad.sum().backward()
    else:
        assert torch.autograd.gradgradcheck(function, inputs)


def test_no_third_derivatives():
    logits, target = problem()
    (grad,) = torch.autograd.grad(ft.cross_entropy(logits, target), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad[:, 0].sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        second.sum().backward()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms(reduction, name, soft):
    """Values, gradients and Hessians of a batch are those of its entries."""
    options = {**OPTIONS[name], "reduction": reduction}
    if reduction != "mean":
        options.pop("normalizer", None)
    if soft:
        options.pop("ignore_index", None)
    batch, targets = problem((4, 5, 3), soft=soft)
    batch = batch.detach()

    def loss(z, y):
        return ft.cross_entropy(z, y, **options).sum()

    def one_by_one(transform):
        return torch.stack(
            [transform(loss)(z[None], y[None]) for z, y in zip(batch, targets, strict=True)]
        )

    func = torch.func
    for transform in (lambda f: f, func.grad, lambda f: func.jacrev(func.grad(f))):
        got = func.vmap(transform(loss))(batch[:, None], targets[:, None])
        assert_close(got, one_by_one(transform))
    moved = func.vmap(func.grad(loss), in_dims=(2, 0))(
        batch[:, None].movedim(0, 2), targets[:, None]
    )
    assert_close(moved, one_by_one(func.grad))
    shared = func.vmap(func.grad(loss), in_dims=(0, None))(batch[:, None], targets[:1])
    assert_close(shared[0], one_by_one(func.grad)[0])


def test_transforms_agree_with_autograd():
    logits, target = problem()
    want = torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
    z = logits.detach()
    assert_close(torch.func.grad(lambda z: ft.cross_entropy(z, target))(z), want)
    per_row = torch.func.vmap(torch.func.grad(lambda z, y: ft.cross_entropy(z, y)))(z, target)
    assert_close(per_row / len(z), want)
    nothing = torch.full_like(target, -100)
    losses = torch.func.vmap(lambda z, y: ft.cross_entropy(z, y))(z, nothing)
    assert losses.isnan().all()
    assert not torch.func.vmap(torch.func.grad(ft.cross_entropy))(z, nothing).any()
    weightless = torch.func.vmap(torch.func.grad(ft.cross_entropy), in_dims=(0, 0, None))
    assert not weightless(z, target, torch.zeros(5)).any()


@IN_JVP
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode(reduction, name, soft):
    """Tangents are those that reverse mode has; Hessians are the same whichever way around."""
    logits, target = problem((1, 5, 2), torch.float64, soft)
    options = {**OPTIONS[name], "reduction": reduction}
    if reduction != "mean":
        options.pop("normalizer", None)
    if soft:
        options.pop("ignore_index", None)
        target.requires_grad_()

    def function(z, h=target):
        return ft.cross_entropy(z, h, **options)

    inputs = (logits, target) if soft else (logits,)
    given = {"check_backward_ad": False, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **given
    )
    if name in SMOOTH:
        assert torch.autograd.gradgradcheck(
            function, inputs, check_fwd_over_rev=True, check_rev_over_rev=False,
            check_undefined_grad=False,
        )  # fmt: skip
        z, func = logits.detach(), torch.func

        def sum_(z):
            return function(z, target.detach()).sum()

        want = func.jacrev(func.grad(sum_))(z)
        assert_close(func.hessian(sum_)(z), want)
        assert_close(func.jacrev(func.jacfwd(sum_))(z), want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    if name not in ("z-loss", "softcap"):  # the same for every class: the loss stays
        assert_close(tangent, torch.zeros_like(tangent))


@IN_JVP
def test_forward_mode_in_16_bits():
    logits, target = problem(dtype=torch.bfloat16)
    z, v = logits.detach(), problem(dtype=torch.bfloat16, seed=1)[0].detach()
    loss, tangent = torch.func.jvp(lambda z: ft.cross_entropy(z, target), (z,), (v,))
    want = torch.func.jvp(lambda z: F.cross_entropy(z, target), (z.float(),), (v.float(),))
    assert_close(loss, want[0].bfloat16())
    # The gradient of which it is the product is rounded to 16 bits.
    assert_close(tangent.float(), want[1], rtol=0, atol=2 * torch.finfo(z.dtype).eps)


@IN_JVP
def test_transforms_that_cannot_be():
    logits, target = problem()
    z, weights = logits.detach(), torch.ones(6, 5)
    with pytest.raises(NotImplementedError, match="vmap: expected one weight"):
        torch.func.vmap(ft.cross_entropy)(z, target, weights)
    with pytest.raises(NotImplementedError, match="vmap: expected a normalizer"):
        torch.func.vmap(lambda z, y: ft.cross_entropy(z, y, weights[0], z_loss=0.1))(z, target)
    with pytest.raises(NotImplementedError, match="got forward mode in forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda z: ft.cross_entropy(z, target)))(z)
    with pytest.raises(NotImplementedError, match=r"second derivatives: .*z_loss nor softcap"):
        torch.func.hessian(lambda z: ft.cross_entropy(z, target, softcap=2.0))(z)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, z)
        with pytest.raises(NotImplementedError, match="in_place"):
            ft.cross_entropy(dual, target, in_place=True)


# Operators and compilation ------------------------------------------------------------------------

PLAIN = (-100, 0.0, 0.0, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, dtype):
    logits, target = problem(dtype=dtype)
    options = (1, *PLAIN, reduction, None)
    ops = torch.ops.fastce
    upstream = torch.ones(
        6 if reduction == "none" else (),
        dtype=torch.float64 if dtype is torch.float64 else torch.float32,
    )
    torch.library.opcheck(ops.cross_entropy.default, (logits, target, None, *options))
    torch.library.opcheck(
        ops.cross_entropy_grad.default, (upstream, logits, target, None, *options)
    )
    torch.library.opcheck(
        ops.hessian_vector_product.default,
        (logits.detach(), logits.detach(), torch.ones(6, dtype=torch.float64), 1),
    )
    x, weight = (problem(shape, dtype)[0] for shape in ((6, 4), (5, 4)))
    for bias in (None, torch.zeros(5, dtype=dtype)):
        torch.library.opcheck(
            ops.linear_cross_entropy.default, (x, weight, target, bias, None, *options[1:])
        )
        torch.library.opcheck(
            ops.linear_cross_entropy_grad.default,
            (upstream, x.detach(), weight.detach(), target, bias, None, *options[1:]),
        )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_whole(name, dtype):
    logits, target = problem(dtype=dtype)
    options = OPTIONS[name]

    def step(z):
        return 2 * ft.cross_entropy(z * 3, target, **options)

    torch._dynamo.reset()  # or it counts the cases as so many compilations of one function
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(loss_and_gradients(compiled, (logits,)), loss_and_gradients(step, (logits,)))


def test_compiled_head():
    x, _ = problem((6, 4))
    head, target = ft.LinearCrossEntropyLoss(4, 5, bias=True), torch.arange(6) % 5
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for module in (head, compiled):
        x.grad = None
        head.zero_grad()
        module(x, target).backward()
        gradients = [p.grad.clone() for p in (x, *head.parameters())]
        if module is head:
            want = gradients
    assert_close(gradients, want)


def test_fake_tensors_and_tracers_see_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        loss = ft.cross_entropy(torch.empty(6, 5), torch.empty(6, dtype=torch.int64))
    assert loss.shape == ()
    logits, target = problem()
    traced = make_fx(lambda z: ft.cross_entropy(z, target))(logits.detach())
    assert torch.ops.fastce.cross_entropy.default in {node.target for node in traced.graph.nodes}
    other = problem(seed=1)[0].detach()
    assert_close(traced(other), ft.cross_entropy(other, target))


# The head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction, soft", [("mean", False), ("sum", True), ("none", False)])
def test_head(reduction, soft, dtype):
    """As a linear layer in float64 and its loss; for any number of leading dimensions."""
    x, weight = problem((2, 6, 4), dtype)[0], problem((5, 4), dtype, seed=1)[0]
    bias = problem((1, 5), dtype, seed=2)[0].detach()[0].requires_grad_()
    target = problem((12, 5), dtype, soft)[1]
    target = target.reshape(2, 6, 5) if soft else target.reshape(2, 6)

    def reference(x, weight, bias):
        logits = F.linear(x.double(), weight.double(), bias.double()).reshape(-1, 5)
        labels = target.reshape(-1, 5).double() if soft else target.reshape(-1)
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.1)

    def ours(x, weight, bias):
        return ft.linear_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.1
        )

    for upstream in (1.0, 1.5):
        loss, grads = loss_and_gradients(ours, (x, weight, bias), upstream)
        want, wanted = loss_and_gradients(reference, (x, weight, bias), upstream)
        assert loss.dtype == dtype
        assert loss.shape == ((2, 6) if reduction == "none" else ())
        rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
        assert_close(loss.reshape(-1).double(), want.reshape(-1), rtol=rtol, atol=rtol)
        for a, b in zip(grads, wanted, strict=True):
            assert_close(a, b.to(dtype), rtol=rtol, atol=rtol)


def test_head_again():
    x, weight, target = problem((6, 4))[0], problem((5, 4), seed=1)[0], torch.arange(6) % 5
    loss = ft.linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(1.5 * loss, (x, weight), retain_graph=True)
    assert_close(torch.autograd.grad(1.5 * loss, (x, weight), retain_graph=True), first)
    per_entry = torch.func.vmap(torch.func.grad(ft.linear_cross_entropy), in_dims=(0, None, 0))
    got = per_entry(x.detach()[:, None], weight.detach(), target[:, None])
    assert_close(1.5 * got[:, 0] / 6, first[0])


@pytest.mark.parametrize("change, message", [
    ({"target": torch.zeros(5, dtype=torch.int64)}, "target: expected shape"),
    ({"linear_weight": torch.zeros(5, 3)}, "weight: expected shape"),
    ({"target": torch.ones(6, 5, requires_grad=True)}, "target: .*no gradient"),
    ({"linear_bias": torch.zeros(4)}, "bias"),
])  # fmt: skip
def test_errors_of_the_head(change, message):
    arguments = {
        "input": torch.zeros(6, 4), "linear_weight": torch.zeros(5, 4),
        "target": torch.zeros(6, dtype=torch.int64), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ft.linear_cross_entropy(**arguments)


# Modules ------------------------------------------------------------------------------------------


def saved_and_loaded(module, other):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    return other


def test_modules_take_the_place_of_torchs():
    logits, target = problem()
    options = {"weight": OPTIONS["weight"]["weight"], "ignore_index": 2, "label_smoothing": 0.1}
    ours, theirs = ft.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert_close(ours(logits, target), theirs(logits, target))
    zeros = ft.CrossEntropyLoss(torch.zeros(5), ignore_index=2, label_smoothing=0.1)
    assert_close(saved_and_loaded(theirs, zeros)(logits, target), theirs(logits, target))
    assert_close(copy.deepcopy(ours)(logits, target), theirs(logits, target))
    assert ours.double().weight.dtype is torch.float64
    assert "label_smoothing=0.1" in repr(ours)
    assert "softcap=3" in repr(ft.CrossEntropyLoss(softcap=3.0))


def test_module_of_the_head_takes_the_place_of_torchs():
    x, target = problem((6, 4))[0], torch.arange(6) % 5
    weight = OPTIONS["weight"]["weight"]
    ours = ft.LinearCrossEntropyLoss(4, 5, bias=True, weight=torch.zeros(5))
    theirs = torch.nn.LinearCrossEntropyLoss(4, 5, bias=True, weight=weight)
    saved_and_loaded(theirs, ours)
    loss = ours(x, target)
    assert_close(loss, theirs(x, target))
    loss.backward()
    theirs(x, target).backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert "reduction=mean" in repr(ours)


# Threads ------------------------------------------------------------------------------------------


def test_threads():
    """Many at once, forward and backward, and through one graph that is kept."""
    logits, target = problem((300, 500))
    loss = ft.cross_entropy(logits, target)
    (want,) = torch.autograd.grad(loss, logits, retain_graph=True)
    found = []

    def work():
        for _ in range(3):
            z = logits.detach().clone().requires_grad_()
            ft.cross_entropy(z, target).backward()
            found.append(z.grad)
            found.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 36
    assert all(torch.equal(grad, want) for grad in found)


def test_import_of_fastce_leaves_torch_alone(python):
    python("import sys, fastce; assert 'torch' not in sys.modules")
