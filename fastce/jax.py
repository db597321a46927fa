"""Softmax cross-entropy for JAX: under `jax.jit`, `jax.vmap` and every kind of derivative.

XLA calls the kernels of `fastce` through its foreign function interface, without Python and without
a copy: on CPUs, on its own threads; on CUDA devices of compute capability 8.0 or later, if the
extra ``fastce[cuda]`` is installed, on its own stream. Elsewhere XLA compiles a formula with the
same edge cases instead. The forward pass of a gradient computes the loss and its gradient in one;
forward mode, reverse mode and mixtures of them work, and derivatives beyond the first are computed
by JAX from the formula.

Where rows are divided among devices, under `jax.jit` or in `jax.shard_map`, each device computes
its own, and only sums are exchanged. Classes that are divided are brought together first. Losses
and gradients of rows have the bits that they have on one device.

`cross_entropy` is `fastce.cross_entropy` for JAX; `softmax_cross_entropy_with_integer_labels` and
`softmax_cross_entropy` stand in for those of optax.

Kernels are compiled, for some seconds, or taken from the cache: for CPUs when a function is first
lowered for a dtype, for CUDA devices before a program first runs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastce import _arguments as arguments
from fastce._jax_primitive import BAD, Options, formula, rows
from fastce.cpu.xla import IGNORED

__all__ = [
    "cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _losses(logits: Any, labels: Any, upstream: Any, options: Options) -> Any:
    """The loss of each row times its `upstream`, which the gradient is computed with."""
    return upstream * rows(logits, labels, options=options)[0]


@functools.partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(options: Options, primals: Any, tangents: Any) -> Any:
    logits, labels, upstream = primals
    zero = [isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents]
    losses, grad = _losses_and_grad(*primals, options)
    tangent = jnp.zeros_like(losses)
    if not zero[0]:
        axis = logits.ndim - 1 - options.trailing
        tangent += jnp.sum(grad * tangents[0], axis, dtype=losses.dtype)
    if not zero[1]:
        of_labels = lambda h: upstream * formula(logits, h, upstream, options)[0]  # noqa: E731
        tangent += jax.jvp(of_labels, (labels,), (tangents[1],))[1]
    if not zero[2]:
        tangent += losses * tangents[2]
    return upstream * losses, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _losses_and_grad(logits: Any, labels: Any, upstream: Any, options: Options) -> Any:
    """The losses, and the gradient times `upstream`."""
    return rows(logits, labels, upstream, options=options)


@_losses_and_grad.defjvp  # type: ignore[untyped-decorator]
def _losses_and_grad_jvp(options: Options, primals: Any, tangents: Any) -> Any:
    of_all = functools.partial(formula, options=options)
    return _losses_and_grad(*primals, options), list(jax.jvp(of_all, primals, tangents)[1])


# Public functions ---------------------------------------------------------------------------------


def cross_entropy(
    logits: Any,
    targets: Any,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: arguments.Reduction = "mean",
    normalizer: Any = None,
) -> Any:
    """`fastce.cross_entropy` of JAX arrays.

    Parameters
    ----------
    logits : jax.Array of float64, float32, float16 or bfloat16
    targets : jax.Array
        Integers shaped like `logits` without the class axis, or floats shaped like `logits`.
    axis, ignore_index, label_smoothing, z_loss, reduction
        As for `fastce.cross_entropy`; known when the function is traced.
    normalizer : float or jax.Array, optional
        What "mean" divides by instead of the number of rows that count.

    Returns
    -------
    jax.Array
        The loss: float64 for float64 logits, else float32. For "none" of the shape of the rows.

    Raises
    ------
    TypeError, ValueError
        As `fastce.cross_entropy` does, when the function is traced.

    Notes
    -----
    A row whose target is neither a class nor `ignore_index` has the loss NaN and a gradient of NaN,
    for there is no exception that compiled code of JAX could raise. Other edge cases are those of
    `fastce.cross_entropy`, and so is the accuracy of a row where there are kernels; the rows are
    summed by JAX, on each device its own and then what the devices have. What fails on a CUDA
    device is raised as `jax.errors.JaxRuntimeError`.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import fastce.jax
    >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> loss, grad = jax.value_and_grad(fastce.jax.cross_entropy)(logits, jnp.array([0, 1]))
    >>> print(f"{loss:.4f}")
    0.2887
    >>> print(np.asarray(grad).round(4))
    [[-0.1674  0.1224  0.045 ]
     [ 0.021  -0.0781  0.0571]]
    """
    logits, targets = _floats(logits), _array("targets", targets)
    chosen = arguments.options(ignore_index, label_smoothing, z_loss, None, reduction, None)
    fit = arguments.signature(
        "logits", np.dtype(logits.dtype), logits.shape, axis,
        np.dtype(targets.dtype), targets.shape, chosen.ignore_index,
    )  # fmt: skip
    reduction = chosen.reduction
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f'normalizer: expected reduction "mean", got {reduction!r}')
        normalizer = _one_number("normalizer", normalizer, fit.dtype)
    options = Options(logits.ndim - 1 - fit.axis, chosen.label_smoothing, chosen.z_loss)
    if fit.hard:
        labels = _classes(targets, fit.classes, chosen.ignore_index)
        count = jnp.sum(labels != IGNORED).astype(fit.dtype)
    else:
        labels = targets.astype(logits.dtype)
        count = jnp.asarray(fit.row_count, fit.dtype)
    scale = jnp.ones((), fit.dtype)
    if reduction == "mean":
        divisor = count if normalizer is None else normalizer
        scale = jnp.where(divisor == 0, 0, 1 / jnp.where(divisor == 0, 1, divisor))
    losses = _losses(logits, labels, jnp.broadcast_to(scale, fit.rows), options)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else jnp.where(divisor == 0, jnp.nan, total)


def softmax_cross_entropy_with_integer_labels(
    logits: Any, labels: Any, axis: int | tuple[int, ...] = -1, where: Any = None
) -> Any:
    """`optax.softmax_cross_entropy_with_integer_labels`, by the kernels of fastce.

    Parameters
    ----------
    logits : jax.Array
        Of floats.
    labels : jax.Array
        Integers in [0, C), shaped like `logits` without `axis`.
    axis : int or tuple of ints, default -1
        The class axis; of several, the label is the flat index.
    where : jax.Array of bool, optional
        Which logits count, or, of the shape of `labels`, which rows. A row without any has loss 0.

    Returns
    -------
    jax.Array
        One loss per row, of the dtype of `logits`.

    Notes
    -----
    It differs from optax's in precision, in that a label outside [0, C) always gives NaN (optax
    counts negative ones from the end), and in that a label where `where` is false gives +inf.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import fastce.jax
    >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    >>> labels = jnp.array([0, 1])
    >>> losses = fastce.jax.softmax_cross_entropy_with_integer_labels(logits, labels)
    >>> print(np.asarray(losses).round(4))
    [0.2761 2.9518]
    """
    logits, where, class_axis = _one_axis(_floats(logits), where, axis)
    labels = _array("labels", labels)
    fit = arguments.signature(
        "logits", np.dtype(logits.dtype), logits.shape, class_axis,
        np.dtype(labels.dtype), labels.shape, -100,
    )  # fmt: skip
    if not fit.hard:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    targets = _classes(labels, fit.classes, None)
    if where is not None:
        targets = jnp.where(where.any(class_axis), targets, IGNORED)
        logits = jnp.where(where, logits, -jnp.inf)
    options = Options(logits.ndim - 1 - class_axis)
    losses = _losses(logits, targets, jnp.ones(fit.rows, fit.dtype), options)
    return losses.astype(logits.dtype)


def softmax_cross_entropy(
    logits: Any, labels: Any, axis: int | tuple[int, ...] | None = -1, where: Any = None
) -> Any:
    """`optax.softmax_cross_entropy`, by the kernels of fastce.

    Parameters
    ----------
    logits : jax.Array
        Of floats.
    labels : jax.Array
        Probabilities, of a shape that can be broadcast to that of `logits`.
    axis : int or tuple of ints or None, default -1
        The class axis, or axes; None for all.
    where : jax.Array of bool, optional
        Which logits count, or, of the shape of the rows, which rows. A row without any has loss 0.

    Returns
    -------
    jax.Array
        One loss per row, of the dtype of `logits`.

    Notes
    -----
    It differs from optax's in precision, and in that a label of 0 at a logit of -inf counts for
    nothing.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import fastce.jax
    >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> losses = fastce.jax.softmax_cross_entropy(logits, labels)
    >>> print(np.asarray(losses).round(4))
    [0.2761 2.9518]
    """
    logits = _floats(logits)
    labels = jnp.broadcast_to(_array("labels", labels), logits.shape).astype(logits.dtype)
    labels = _one_axis(labels, None, axis)[0]
    logits, where, class_axis = _one_axis(logits, where, axis)
    fit = arguments.signature(
        "logits", np.dtype(logits.dtype), logits.shape, class_axis,
        np.dtype(labels.dtype), labels.shape, -100,
    )  # fmt: skip
    if where is not None:
        labels = jnp.where(where, labels, 0)
        # A row without any keeps its logits, so that 0 and not NaN comes of it.
        logits = jnp.where(where | ~where.any(class_axis, keepdims=True), logits, -jnp.inf)
    options = Options(logits.ndim - 1 - class_axis)
    losses = _losses(logits, labels, jnp.ones(fit.rows, fit.dtype), options)
    return losses.astype(logits.dtype)


def _one_number(name: str, value: Any, dtype: Any) -> Any:
    """A number, which may be known to a compiled program alone, as an array without axes."""
    known = isinstance(value, jax.Array)
    array = jnp.asarray(value if known else arguments.number(name, value), dtype)
    if array.size != 1:
        raise TypeError(f"{name}: expected a number, got an array of shape {array.shape}")
    return array.reshape(())


def _array(name: str, value: Any) -> Any:
    """An array of JAX; whatever is not one yet comes in through here."""
    arguments.refuse_mask(name, value)
    return jnp.asarray(value)


def _floats(logits: Any) -> Any:
    """Logits as an array of JAX, of a dtype that the kernels know."""
    logits = _array("logits", logits)
    arguments.float_array("logits", np.empty(0, logits.dtype))
    return logits


def _classes(targets: Any, classes: int, ignore_index: int | None) -> Any:
    """Targets of any integer dtype as int32: a class, IGNORED or BAD."""
    labels = jnp.where((targets >= 0) & (targets < classes), targets, BAD).astype(jnp.int32)
    info = jnp.iinfo(targets.dtype)
    if ignore_index is not None and info.min <= ignore_index <= info.max:
        labels = jnp.where(targets == ignore_index, IGNORED, labels)
    return labels


def _one_axis(logits: Any, where: Any, axis: int | tuple[int, ...] | None) -> tuple[Any, Any, int]:
    """Arrays with one class axis, where there were several brought to the end; and that axis."""
    if where is not None:
        where = _array("where", where)
        if where.ndim != logits.ndim:
            where = jnp.expand_dims(where, tuple(range(logits.ndim)) if axis is None else axis)
        where = jnp.broadcast_to(where, logits.shape)
    if axis is not None and not isinstance(axis, tuple | list):
        return logits, where, arguments.class_axis("logits", logits.shape, axis)
    axes = range(logits.ndim) if axis is None else axis
    of_classes = tuple(arguments.class_axis("logits", logits.shape, k) for k in axes)
    order = tuple(k for k in range(logits.ndim) if k not in of_classes)
    shape = (*(logits.shape[k] for k in order), math.prod(logits.shape[k] for k in of_classes))
    logits, where = (
        None if a is None else a.transpose(order + of_classes).reshape(shape)
        for a in (logits, where)
    )
    return logits, where, len(order)
