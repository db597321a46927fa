"""The same work done by other libraries, where they are installed.

Each peer is a function that takes the arrays of a plain case and the name of a work, and returns
the call, or None where the library has nothing for that dtype, layout or work.  A peer that can be
given memory for its result is; the backward passes of torch and JAX cannot.
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import fastce
from benchmarks.cases import Array, Case, Data

Peer = Callable[[Data, str], Callable[[], Any] | None]

CACHE = 1 << 18  # bytes of logits in a block of the NumPy peer: they and their results fit in L2


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(fastce.get_num_threads())


def in_numpy(d: Data, work: str) -> Callable[[], Any] | None:
    """Blocks that fit the cache, memory used again, on as many threads."""
    if work not in ("loss", "loss and gradient") or d.logits.dtype.itemsize < 4:
        return None
    scale = 1 / d.targets.size
    gradient = work == "loss and gradient"

    def block(z: Array, place: tuple[Any, ...], out: Array, axis: int) -> float:
        top = z.max(axis=axis, keepdims=True)
        shifted = np.subtract(z, top, out=out if gradient else None)
        at_target = shifted[place]
        np.exp(shifted, out=shifted)
        total = shifted.sum(axis=axis, keepdims=True)
        if gradient:
            np.multiply(shifted, scale / total, out=shifted)
            shifted[place] -= scale
        return float(np.log(total).sum() - at_target.sum())

    blocks = list(_blocks(d))
    if len(blocks) == 1:
        return lambda: block(*blocks[0]) * scale
    return lambda: sum(_pool().map(block, *zip(*blocks, strict=True))) * scale


def _blocks(d: Data) -> Iterator[tuple[Array, tuple[Any, ...], Array, int]]:
    """Blocks: logits, the index of those of the targets, memory for the gradient, class axis."""
    axis = d.axis % d.logits.ndim
    classes = d.logits.shape[axis]
    # (outer, classes, inner), or (1, rows, classes) where the classes come last
    last = axis == d.logits.ndim - 1
    shape = (1, -1, classes) if last else (math.prod(d.logits.shape[:axis]), classes, -1)
    logits, out = d.logits.reshape(shape), d.out.reshape(shape)
    targets = d.targets.reshape(shape[0], -1)
    width = max(1, CACHE // (classes * d.logits.itemsize))
    for outer, start in itertools.product(range(len(logits)), range(0, targets.shape[1], width)):
        part = slice(start, start + width)
        y = targets[outer, part]
        if last:
            yield logits[outer, part], (np.arange(len(y)), y), out[outer, part], 1
        else:
            yield logits[outer, :, part], (y, np.arange(len(y))), out[outer, :, part], 0


def _at_targets(targets: Array, axis: int) -> tuple[Any, ...]:
    index: list[Any] = list(np.ix_(*map(np.arange, targets.shape)))
    index.insert(axis, targets)
    return tuple(index)


def in_scipy(d: Data, work: str) -> Callable[[], Any] | None:
    """`scipy.special`."""
    import scipy.special

    if d.logits.dtype.itemsize < 4:
        return None
    function = {"logsumexp": "logsumexp", "softmax": "softmax", "log_softmax": "log_softmax"}
    if work in function:
        return functools.partial(getattr(scipy.special, function[work]), d.logits, axis=d.axis)
    place = _at_targets(d.targets, d.axis % d.logits.ndim)

    def loss() -> Any:
        return -scipy.special.log_softmax(d.logits, axis=d.axis)[place].mean()

    def loss_and_gradient() -> Any:
        logarithms = scipy.special.log_softmax(d.logits, axis=d.axis)
        value = -logarithms[place].mean()
        gradient = np.exp(logarithms, out=logarithms)
        gradient[place] -= 1
        gradient /= d.targets.size
        return value, gradient

    return {"loss": loss, "loss and gradient": loss_and_gradient}.get(work)


def in_sklearn(d: Data, work: str) -> Callable[[], Any] | None:
    """scikit-learn's own Cython loop; it has no reduction, so that is NumPy's."""
    from sklearn._loss import HalfMultinomialLoss

    if d.logits.ndim != 2 or d.logits.dtype.itemsize < 4 or d.logits.shape[1] < 3:
        return None
    loss = HalfMultinomialLoss(n_classes=d.logits.shape[1])
    targets = d.targets.astype(d.logits.dtype)
    losses = np.empty_like(targets)
    options = {
        "y_true": targets, "raw_prediction": d.logits, "loss_out": losses,
        "n_threads": fastce.get_num_threads(),
    }  # fmt: skip

    def loss_and_gradient() -> Any:
        loss.loss_gradient(**options, gradient_out=d.out)
        return losses.mean()

    calls = {
        "loss": lambda: loss.loss(**options).mean(),
        "loss and gradient": loss_and_gradient,
    }
    return calls.get(work)


def _tensor(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def in_torch(d: Data, work: str, compiled: bool = False) -> Callable[[], Any]:
    """Eager torch, or compiled by Inductor."""
    import torch

    torch.set_num_threads(fastce.get_num_threads())
    z, y = _tensor(d.logits), torch.from_numpy(d.targets)
    compile_ = torch.compile if compiled else lambda function: function
    functions = {
        "logsumexp": torch.logsumexp, "softmax": torch.softmax, "log_softmax": torch.log_softmax,
    }  # fmt: skip
    if work in functions:
        out = {} if compiled or work == "logsumexp" else {"out": _tensor(d.out)}
        return functools.partial(compile_(functions[work]), z, d.axis, **out)
    cross_entropy = compile_(torch.nn.functional.cross_entropy)
    if work == "loss":
        return functools.partial(cross_entropy, z, y)
    leaf = z.detach().requires_grad_()

    def loss_and_gradient() -> Any:
        leaf.grad = None
        cross_entropy(leaf, y).backward()

    return loss_and_gradient


def in_jax(d: Data, work: str) -> Callable[[], Any]:
    """JAX compiled by XLA, written as optax writes it."""
    import jax  # type: ignore[import-not-found,unused-ignore]

    if d.logits.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    z, y = jax.numpy.asarray(d.logits), jax.numpy.asarray(d.targets)

    def cross_entropy(z: Any, y: Any) -> Any:
        chosen = jax.numpy.take_along_axis(z, jax.numpy.expand_dims(y, d.axis), d.axis)
        lse = jax.nn.logsumexp(z, axis=d.axis, keepdims=True)
        return (lse - chosen).mean()

    functions: dict[str, Any] = {
        "loss": cross_entropy,
        "loss and gradient": jax.value_and_grad(cross_entropy),
        "logsumexp": lambda z, y: jax.nn.logsumexp(z, axis=d.axis),
        "softmax": lambda z, y: jax.nn.softmax(z, axis=d.axis),
        "log_softmax": lambda z, y: jax.nn.log_softmax(z, axis=d.axis),
    }
    function = jax.jit(functions[work])
    return lambda: jax.block_until_ready(function(z, y))


# Name, what must be installed, the peer.
_PEERS: tuple[tuple[str, str, Peer], ...] = (
    ("NumPy", "numpy", in_numpy),
    ("SciPy", "scipy", in_scipy),
    ("scikit-learn", "sklearn", in_sklearn),
    ("torch", "torch", in_torch),
    ("JAX", "jax", in_jax),
)
_COMPILED: tuple[str, str, Peer] = (
    "torch.compile", "torch", functools.partial(in_torch, compiled=True),
)  # fmt: skip

WORKS = ("loss", "loss and gradient", "logsumexp", "softmax", "log_softmax")


def peers(case: Case, d: Data, work: str, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """The calls of all installed peers for a plain case; `compiled` adds torch.compile."""
    if case.option != "plain" or work not in WORKS:
        return {}
    found = {
        name: peer(d, work)
        for name, package, peer in (*_PEERS, *((_COMPILED,) if compiled else ()))
        if importlib.util.find_spec(package) is not None
    }
    return {name: call for name, call in found.items() if call is not None}
