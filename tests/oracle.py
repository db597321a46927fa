"""The formulas of the contract in extended precision, written without a look at the kernels.

Every function takes what the public function of the same name takes and returns `Expected` results
in ``numpy.longdouble`` (64 bits of mantissa on x86), not rounded to any dtype.  Inputs count as
exact: round them to the dtype under test first.

The identities that keep the digits, for a row z with maximum m at one index, e_j = exp(z_j - m) and
``others_j`` = the sum of e_k over k != j (added up, never subtracted):

    -log p_j = (m - z_j) + log1p(others at the maximum)       every term non-negative
    1 - p_j  = others_j / S

and for L = sum_j g_j (-log p_j), with constant coefficients g,

    dL/dz_j  = p_j * sum_{k != j} g_k  -  g_j * (1 - p_j)

`Expected.scale` is the sum of the magnitudes of the terms a result is added up from: where terms of
both signs meet, rounding errors are proportional to it and not to the result.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Exact = np.longdouble
Array = NDArray[np.longdouble]

assert np.finfo(Exact).nmant >= 63, "the oracle needs a long double of at least 64 bits of mantissa"


@dataclass(frozen=True)
class Expected:
    """An exact result and the magnitude that its rounding error is measured against."""

    value: Array
    scale: Array


def exact(x: Any) -> Array:
    """`x` in extended precision, unchanged in value; 16-bit floats have no direct cast."""
    array = np.asarray(x)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if array.dtype.kind not in "iu":
            array = array.astype(np.float64)
        return np.asarray(array.astype(Exact))


def times(factor: Array, x: Array) -> Array:
    """The product in which 0 * inf is 0, and NaN stays NaN."""
    factor, x = np.broadcast_arrays(factor, x)
    with np.errstate(invalid="ignore"):
        return np.where((factor == 0) & ~np.isnan(x), Exact(0), factor * x)


def others(terms: Array) -> Array:
    """For every entry of the last axis the sum of the other entries."""
    before = np.zeros_like(terms)
    after = np.zeros_like(terms)
    np.cumsum(terms[..., :-1], axis=-1, out=before[..., 1:])
    np.cumsum(terms[..., :0:-1], axis=-1, out=after[..., -2::-1])
    return before + after


class Rows:
    """Softmax of the last axis: p, 1 - p, -log p and the log-sum-exp; NaN where it has no value."""

    def __init__(self, z: Array) -> None:
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            top = z.max(axis=-1, keepdims=True)  # NaN if any entry is
            m = np.where(np.isfinite(top), top, Exact(np.nan))
            e = np.exp(z - m)
            other = others(e)
            at_top = np.argmax(z, axis=-1)[..., None]
            rest = np.take_along_axis(other, at_top, axis=-1)
            self.top = top[..., 0]
            self.p = e / (1 + rest)
            self.one_minus_p = other / (1 + rest)
            self.minus_log_p = (m - z) + np.log1p(rest)
            self.lse = np.where(np.isfinite(top), m + np.log1p(rest), top)[..., 0]
            self.lse_scale = (np.abs(m) + np.log1p(rest))[..., 0]


def _class_last(x: Any, axis: int) -> Array:
    return np.moveaxis(exact(x), axis, -1)


def _soft(targets: Any) -> bool:
    return np.asarray(targets).dtype.kind not in "iub"


def _one_hot(
    targets: Any, classes: int, ignore_index: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_], Array]:
    index = np.asarray(targets)
    valid = np.asarray(index != ignore_index)
    index = np.where(valid, index, 0).astype(np.intp)
    hot = (np.arange(classes) == index[..., None]) & valid[..., None]
    return index, valid, hot.astype(Exact)


def _coefficients(
    targets: Any,
    shape: tuple[int, ...],
    axis: int,
    weight: Any,
    ignore_index: int,
    smoothing: float,
) -> tuple[Array, NDArray[np.bool_], Array]:
    """Coefficients g of -log p, which rows count, each row's share of the "mean" denominator."""
    classes = shape[-1]
    w = np.ones(classes, Exact) if weight is None else exact(weight)
    e = Exact(smoothing)
    if _soft(targets):
        h = _class_last(targets, axis)
        valid = np.ones(shape[:-1], bool)
        return ((1 - e) * h + e / classes) * w, valid, np.ones(shape[:-1], Exact)
    index, valid, hot = _one_hot(targets, classes, ignore_index)
    g = (1 - e) * hot * w + valid[..., None] * (e / classes) * w
    return g, valid, w[index] * valid


def _divide(total: Any, by: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / by


def _upstream(grad_output: Any, rows: tuple[int, ...]) -> Array:
    upstream = exact(1.0 if grad_output is None else grad_output)
    return np.broadcast_to(upstream, rows)[..., None]


@dataclass(frozen=True)
class LossAndGradient:
    """The reduced loss and the gradient with respect to the first argument."""

    loss: Expected
    grad: Expected


def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    grad_output: ArrayLike | None = None,
) -> LossAndGradient:
    """Cross-entropy of softmax(logits), its gradient, and the scales of both."""
    z = _class_last(logits, axis)
    g, valid, share = _coefficients(targets, z.shape, axis, weight, ignore_index, label_smoothing)
    slope: Array = np.ones_like(z)
    z_size = np.zeros(z.shape[:-1], Exact)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if softcap is not None:
            cap = Exact(softcap)
            slope = np.where(z == -np.inf, Exact(1), 1 / np.cosh(z / cap) ** 2)  # passes as it is
            z = np.where(z == -np.inf, z, cap * np.tanh(z / cap))
            # tanh is rounded, so every finite capped logit carries an error of its own size
            z_size = np.where(np.isfinite(z), np.abs(z), 0).max(axis=-1, initial=0)
        rows = Rows(z)
        terms = times(g, rows.minus_log_p)
        main, main_scale = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
        main_scale = main_scale + z_size * np.abs(g).sum(axis=-1)
        square = z_loss * rows.lse**2 if z_loss else np.zeros(rows.lse.shape, Exact)
        square_scale = abs(z_loss) * (rows.lse_scale + z_size) ** 2 if z_loss else np.abs(square)

        pull, push = rows.p * others(g), g * rows.one_minus_p
        grad = pull - push
        exactly_one = (np.count_nonzero(g, axis=-1) == 1)[..., None] & (z_loss == 0)
        loose = rows.p * np.abs(g).sum(axis=-1, keepdims=True) + np.abs(g)
        grad_scale = np.where(exactly_one, np.abs(pull) + np.abs(push), loose)
        if z_loss:
            square_grad = 2 * z_loss * rows.lse[..., None] * rows.p
            square_grad_scale = 2 * abs(z_loss) * rows.lse_scale[..., None] * rows.p
        else:
            square_grad = square_grad_scale = np.zeros(grad.shape, Exact)

    by = square_by = Exact(1)
    if reduction == "mean":
        by = share.sum() if normalizer is None else Exact(normalizer)
        square_by = Exact(np.count_nonzero(valid)) if normalizer is None else Exact(normalizer)
    empty = by == 0
    near = 1 + z_size[..., None]
    scaled = {}
    for name, first, second, counted in (
        ("loss", main, square, valid),
        ("loss_scale", main_scale, square_scale, valid),
        ("grad", grad, square_grad, valid[..., None]),
        ("grad_scale", grad_scale * near, square_grad_scale * near, valid[..., None]),
    ):
        first, second = np.where(counted, first, 0), np.where(counted, second, 0)
        if name.startswith("loss") and reduction != "none":
            first, second = first.sum(), second.sum()
        share_of_second = _divide(second, np.abs(square_by)) if z_loss else Exact(0)
        scaled[name] = _divide(first, np.abs(by) if "scale" in name else by) + share_of_second
    if empty:  # nothing to take the mean of
        scaled["loss"] = np.full_like(scaled["loss"], np.nan)
    upstream = _upstream(grad_output, z.shape[:-1])
    for name, factor in (("grad", upstream), ("grad_scale", np.abs(upstream))):
        with np.errstate(invalid="ignore"):
            product = scaled[name] * factor * slope
        keep = valid[..., None] & ~empty
        scaled[name] = np.moveaxis(np.where(keep, product, 0), -1, axis)
    return LossAndGradient(
        Expected(np.asarray(scaled["loss"]), np.asarray(scaled["loss_scale"])),
        Expected(scaled["grad"], scaled["grad_scale"]),
    )


@dataclass(frozen=True)
class Stats:
    """The fields of `fastce.CrossEntropyStats`."""

    loss: Expected
    lse: Expected
    entropy: Expected
    predicted: NDArray[np.int64]
    total_weight: np.longdouble


def cross_entropy_stats(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Stats:
    """Per-row loss, log-sum-exp, entropy of the model and predicted class."""
    z = _class_last(logits, axis)
    rows = Rows(z)
    g, valid, share = _coefficients(targets, z.shape, axis, weight, ignore_index, 0.0)
    terms = times(g, rows.minus_log_p)
    entropy = times(rows.p, rows.minus_log_p).sum(axis=-1)

    def kept(value: Array, scale: Array) -> Expected:
        return Expected(np.where(valid, value, 0), np.where(valid, scale, 0))

    return Stats(
        kept(terms.sum(axis=-1), np.abs(terms).sum(axis=-1)),
        kept(rows.lse, rows.lse_scale),
        kept(entropy, entropy),
        np.where(valid, np.argmax(z, axis=-1), -1),
        share.sum(),
    )


def logsumexp(
    x: ArrayLike, *, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False
) -> Expected:
    """log sum exp(x) over `axis`; its error is measured against max(|m|, log S)."""
    z = exact(x)
    chosen = range(z.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = sorted(a % z.ndim for a in chosen)
    kept = [a for a in range(z.ndim) if a not in axes]
    shape = [z.shape[a] for a in kept]
    count = math.prod(z.shape[a] for a in axes)
    rows = Rows(z.transpose(*kept, *axes).reshape(*shape, count))
    if keepdims:
        shape = [1 if a in axes else z.shape[a] for a in range(z.ndim)]
    return Expected(rows.lse.reshape(shape), rows.lse_scale.reshape(shape))


def softmax(x: ArrayLike, *, axis: int = -1) -> Expected:
    """exp(x) / sum exp(x)."""
    p = np.moveaxis(Rows(_class_last(x, axis)).p, -1, axis)
    return Expected(p, p)


def log_softmax(x: ArrayLike, *, axis: int = -1) -> Expected:
    """x - logsumexp(x), from terms of one sign."""
    minus_log_p = np.moveaxis(Rows(_class_last(x, axis)).minus_log_p, -1, axis)
    return Expected(-minus_log_p, minus_log_p)


def nll_loss(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    grad_output: ArrayLike | None = None,
) -> LossAndGradient:
    """Minus the weighted log-probability of the targets."""
    lp = _class_last(log_probs, axis)
    g, valid, share = _coefficients(targets, lp.shape, axis, weight, ignore_index, 0.0)
    by = Exact(1)
    if reduction == "mean":
        by = share.sum() if normalizer is None else Exact(normalizer)
    terms = np.where(g == 0, Exact(0), -g * np.where(g == 0, Exact(0), lp))
    value, scale = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
    if reduction != "none":
        value, scale = value.sum(), scale.sum()
    grad = _divide(-g * _upstream(grad_output, lp.shape[:-1]), by)
    grad = np.moveaxis(np.where(valid[..., None] & (by != 0), grad, 0), -1, axis)
    return LossAndGradient(
        Expected(np.asarray(_divide(value, by)), np.asarray(_divide(scale, np.abs(by)))),
        Expected(grad, np.abs(grad)),
    )


def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: str = "mean",
    grad_output: ArrayLike | None = None,
) -> LossAndGradient:
    """w * (pos_weight * t * log(1 + exp(-x)) + (1 - t) * log(1 + exp(x)))."""
    x, t = exact(logits), exact(targets)
    w = exact(1.0 if weight is None else weight)
    positive = t * exact(1.0 if pos_weight is None else pos_weight)
    with np.errstate(over="ignore", under="ignore"):
        tail = np.log1p(np.exp(-np.abs(x)))
        sigmoid, mirrored = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    first = times(w * positive, np.maximum(-x, 0) + tail)
    second = times(w * (1 - t), np.maximum(x, 0) + tail)
    value, scale = first + second, np.abs(first) + np.abs(second)
    by = Exact(1)
    if reduction != "none":
        value, scale = value.sum(), scale.sum()
        by = Exact(x.size if reduction == "mean" else 1)
    upstream = _divide(exact(1.0 if grad_output is None else grad_output), by)
    up, down = w * (1 - t) * sigmoid * upstream, w * positive * mirrored * upstream
    return LossAndGradient(
        Expected(np.asarray(_divide(value, by)), np.asarray(_divide(scale, by))),
        Expected(up - down, np.abs(up) + np.abs(down)),
    )


def gradient_hessian(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    sample_weight: ArrayLike | None = None,
    hessian: str = "diag",
) -> tuple[Expected, Expected]:
    """Gradient of the sum of the row losses and the named diagonal that stands for its Hessian."""
    z = _class_last(logits, axis)
    rows = Rows(z)
    classes = z.shape[-1]
    hot = _one_hot(targets, classes, -1)[2]
    residual = rows.p * (1 - hot) - rows.one_minus_p * hot
    variance = rows.p * rows.one_minus_p
    diagonals = {
        "diag": variance,
        "xgboost": np.maximum(2 * variance, Exact(1e-16)),
        "lightgbm": variance * classes / max(classes - 1, 1),
        "abs_residual": np.abs(residual),
    }
    sw = exact(1.0 if sample_weight is None else sample_weight)
    sw = np.broadcast_to(sw, z.shape[:-1])[..., None]
    grad, hess = (np.moveaxis(sw * part, -1, axis) for part in (residual, diagonals[hessian]))
    return Expected(grad, np.abs(grad)), Expected(hess, np.abs(hess))


def hessian_vector_product(
    logits: ArrayLike, v: ArrayLike, *, axis: int = -1, grad_output: ArrayLike | None = None
) -> Expected:
    """(diag(p) - p p^T) v, times the upstream gradient of the row."""
    p = Rows(_class_last(logits, axis)).p
    vector = _class_last(v, axis)
    upstream = _upstream(grad_output, p.shape[:-1])
    product = p * (vector - (p * vector).sum(axis=-1, keepdims=True)) * upstream
    size = np.abs(vector) + (p * np.abs(vector)).sum(axis=-1, keepdims=True)
    scale = p * size * np.abs(upstream)
    return Expected(np.moveaxis(product, -1, axis), np.moveaxis(scale, -1, axis))
