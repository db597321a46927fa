"""Cross-entropy of logits or log-probabilities with integer or soft labels, and its gradient."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce import cpu
from fastce._arguments import AnyArray, Reduction
from fastce._call import Call, inverse
from fastce._devices import on_device
from fastce._mode import in_default_mode
from fastce._small import small_loss, small_loss_and_grad


class CrossEntropyStats(NamedTuple):
    """What `cross_entropy_stats` returns: arrays shaped like the rows, and one number.

    Attributes
    ----------
    loss : numpy.ndarray
        Loss of each row in nats, times the weight of its class; 0 where ignored. float64 for
        float64 logits, else float32.
    lse : numpy.ndarray
        logsumexp of each row; 0 where ignored. Typed like `loss`.
    entropy : numpy.ndarray
        Entropy of each row's softmax in nats, the model's own uncertainty; 0 where ignored. Typed
        like `loss`.
    predicted : numpy.ndarray of int64
        First class with the largest logit; -1 where ignored, without meaning where a logit is NaN.
    total_weight : float
        What ``reduction="mean"`` divides by: the weights of the targets of all rows not ignored
        (without `weight`, their number); with soft targets the number of rows.

    See Also
    --------
    cross_entropy_stats : Computes them.
    """

    loss: AnyArray
    lse: AnyArray
    entropy: AnyArray
    predicted: npt.NDArray[np.int64]
    total_weight: float


def _flat(array: AnyArray | None) -> AnyArray | None:
    return None if array is None else array.reshape(-1)


def _cross_entropy(
    call: Call, upstream: arguments.Upstream = (1.0, None), out: AnyArray | None = None
) -> Any:
    scalar, per_row = upstream
    weight, count = call.divisors()
    if not weight:
        count = 0.0  # nothing counts, so that z-loss has no gradient either
    totals = cpu.calls.cross_entropy(
        call.axis, call.logits, call.hard, call.soft, call.weight, call.options,
        upstream=per_row, nll_scale=scalar * inverse(weight), z_scale=scalar * inverse(count),
        losses=_flat(call.losses), out=out,
    )  # fmt: skip
    return call.loss(*totals)


@in_default_mode
def _loss(
    logits: npt.ArrayLike, targets: npt.ArrayLike, axis: int, weight: npt.ArrayLike | None,
    options: arguments.Options,
) -> Any:  # fmt: skip
    return _cross_entropy(Call("logits", logits, targets, axis, weight, options))


@in_default_mode
def _loss_and_grad(
    logits: npt.ArrayLike, targets: npt.ArrayLike, axis: int, weight: npt.ArrayLike | None,
    options: arguments.Options, grad_output: npt.ArrayLike | None, out: AnyArray | None,
) -> tuple[Any, AnyArray]:  # fmt: skip
    call = Call("logits", logits, targets, axis, weight, options)
    upstream = arguments.upstream(grad_output, call.rows, options.reduction)
    grad = outputs.gradient(
        out, call.logits, targets=targets, weight=weight, grad_output=grad_output
    )
    return _cross_entropy(call, upstream, grad), grad


def cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Cross-entropy between labels and the softmax of logits: the negative log likelihood.

    For a row z of C logits with the class y::

        loss = logsumexp(z) - z[y]

    in nats. With every option, h being the distribution of the label (1 at y and 0 elsewhere, or
    the soft target), w the class weights, e the label smoothing, i the rows that are not ignored::

        z      = softcap * tanh(logits / softcap)           (without softcap: the logits)
        u_c    = w_c * ((1 - e) * h_c + e / C)
        nll    = sum_c u_c * (logsumexp(z) - z_c)
        "none" = nll + z_loss * logsumexp(z)**2             for each row
        "sum"  = sum_i nll_i + z_loss * sum_i logsumexp(z_i)**2
        "mean" = sum_i nll_i / sum_i w[y_i] + z_loss * sum_i logsumexp(z_i)**2 / sum_i 1

    Parameters
    ----------
    logits : array_like of float64, float32, float16 or bfloat16
        Unnormalised log-probabilities, of any number of dimensions and any strides; nothing is
        copied. What runs along the class axis is a row. bfloat16 is the type of ml_dtypes.
    targets : array_like
        Either integers of any signed or unsigned dtype in [0, C), shaped like `logits` without the
        class axis; or floats (any of the dtypes of `logits`) shaped like `logits`, read as
        probabilities. These need not sum to one and are not checked.
    axis : int, default -1
        The class axis.
    weight : array_like of shape (C,), optional
        w, one factor per class, any finite numbers; computed with in the precision of the loss.
        None means 1. It scales what the labels lay on a class, hence also the smoothing, and not
        the z-loss.
    ignore_index : int, default -100
        Rows with this integer target count for nothing: loss 0, gradient exactly 0, whatever their
        logits are. It may be a class. With soft targets a negative number has no effect, and no
        other one is allowed.
    label_smoothing : float in [0, 1], default 0.0
        e, the share of each label that is spread evenly over all C classes, its own included.
    z_loss : float, default 0.0
        Factor of logsumexp(z)**2, which keeps the normaliser of the softmax near one. Any finite
        number.
    softcap : float, optional
        Bound on the size of the logits, positive and finite; applied before everything else. +inf
        becomes `softcap`, -inf stays -inf, so that masked classes stay masked.
    reduction : {"mean", "sum", "none"}, default "mean"
        Which of the formulas above. With soft targets "mean" divides by the number of rows also
        where there are weights.
    normalizer : float, optional
        What "mean" divides by instead, the terms of `z_loss` as well. Finite and at least 0. Parts
        of a batch that are given the count or weight of the whole add up to the whole.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        The loss in nats: float64 for float64 logits, else float32. For "none" an array shaped like
        `logits` without the class axis.

    Raises
    ------
    TypeError
        If an argument has the wrong type: logits that are not floats, targets that are booleans, or
        floats where the shape asks for integers.
    ValueError
        If shapes do not fit, there is no class, `axis` is out of range (numpy.exceptions.AxisError,
        an IndexError too), or an option lies outside the range given above; if `normalizer` comes
        with a `reduction` other than "mean", or `ignore_index` >= 0 with soft targets.
    IndexError
        If an integer target is neither in [0, C) nor `ignore_index`; the message names the first.

    See Also
    --------
    cross_entropy_and_grad : The gradient as well, at little more than the cost of writing it.
    cross_entropy_stats : Log-sum-exp, entropy and prediction of each row as well.
    nll_loss : The same where log-probabilities are given.
    binary_cross_entropy : The same for independent yes-or-no labels.

    Notes
    -----
    Edge cases:

    - A NaN or +inf logit, or a row that is all -inf, makes the loss of that row NaN, of no other.
    - -inf at another class than the target is a class of probability 0. At the target the loss is
      +inf, unless the label or the weight there is 0: 0 * inf counts as 0.
    - With `label_smoothing`, -inf at any class of non-zero weight makes the loss +inf.
    - "mean" is NaN where its divisor is 0: without rows, with every row ignored, with weights of
      the targets that sum to 0, with a `normalizer` of 0. "sum" over nothing is 0.
    - A single class has loss 0. Negative weights do what the formula says.

    Method: a row with the maximum m is known by m and rest, the sum of exp(z_c - m) over all
    classes but one where the maximum is. The loss is (m - z[y]) + log1p(rest), whose terms are
    never negative, so that nothing cancels where the model is confident [1]_. Both come from one
    pass over memory [2]_. The exponentials are scaled by a power of two near exp(m), which is
    chosen anew only where the maximum rises and so costs no digits; they are a polynomial after
    reduction modulo log(2) [3]_.

    Accuracy: the relative error of a row's loss is at most 3e-7 in float32 and 2e-15 in float64
    where no logit leads by 10 or more, 4e-6 and 1e-13 anywhere, for losses down to the smallest
    normal number and at any common offset of the logits. 16-bit logits are computed with in
    float32. Sums over rows are taken in float64 in a fixed order: every bit is the same on any
    number of threads.

    Memory: no array of the size of the logits is made. Integer targets other than contiguous int64
    are converted, 8 bytes per row.

    Label smoothing is from [4]_, the z-loss from [5]_, the cap from [6]_.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA Journal of Numerical Analysis 41(4), 2021.
    .. [2] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax",
       arXiv:1805.02867, 2018.
    .. [3] J.-M. Muller et al., "Handbook of Floating-Point Arithmetic", 2nd ed., Birkhäuser, 2018.
    .. [4] C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR,
       2016.
    .. [5] A. Chowdhery et al., "PaLM: scaling language modeling with Pathways",
       arXiv:2204.02311, 2022.
    .. [6] Gemma Team, "Gemma 2: improving open language models at a practical size",
       arXiv:2408.00118, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    >>> targets = np.array([0, 1, 2])
    >>> print(fastce.cross_entropy(logits, targets, reduction="none").round(4))
    [0.4076 0.1698 1.0986]
    >>> print(f"{fastce.cross_entropy(logits, targets):.4f}")
    0.5587

    The mean is the weighted one, over the rows that are not ignored:

    >>> weight = np.array([1.0, 5.0, 1.0])
    >>> print(f"{fastce.cross_entropy(logits, np.array([0, 1, -100]), weight=weight):.4f}")
    0.2095

    Probabilities as targets, here those that smoothing makes of the classes:

    >>> soft = 0.9 * np.eye(3) + 0.1 / 3
    >>> print(f"{fastce.cross_entropy(logits, soft):.4f}")
    0.6476
    >>> print(f"{fastce.cross_entropy(logits, targets, label_smoothing=0.1):.4f}")
    0.6476

    A batch in two parts:

    >>> parts = [fastce.cross_entropy(logits[k], targets[k], normalizer=3) for k in ([0], [1, 2])]
    >>> print(f"{sum(parts):.4f}")
    0.5587

    A confident model keeps its loss:

    >>> print(f"{fastce.cross_entropy(np.array([[0.0, 40.0]]), [1]):.4e}")
    4.2484e-18
    """
    if on_device(logits):
        from fastce import cuda

        return cuda.cross_entropy(
            logits, targets, axis=axis, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
            normalizer=normalizer,
        )  # fmt: skip
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    loss = small_loss(logits, targets, axis, weight, options)
    if loss is not None:
        return loss
    return _loss(logits, targets, axis, weight, options)


def cross_entropy_and_grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Cross-entropy and its gradient with respect to the logits, in one go.

    For the plain mean over N rows, y being the one-hot labels::

        grad = (softmax(logits) - y) / N

    With every option, in the words of `cross_entropy`, p = softmax(z), g the upstream gradient, W
    and n what its nll and its z-loss are divided by::

        grad = g * (((sum_c u_c) * p - u) / W + 2 * z_loss * logsumexp(z) * p / n)
                 * (1 - tanh(logits / softcap)**2)          (without softcap: 1)

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index, label_smoothing, z_loss, softcap
        As in `cross_entropy`.
    reduction, normalizer
        As in `cross_entropy`. They say what W and n are: for "mean" its two denominators or the
        `normalizer`, else 1.
    grad_output : float or array_like, optional
        g, the gradient of what comes after with respect to the loss. None means 1: the gradient is
        that of the reduced loss, and for "none" of the sum. With "none" it may also be an array,
        one number per row.
    out : numpy.ndarray, optional
        Where the gradient goes: of the shape and dtype of `logits`, any strides, writable.
        ``out=logits`` computes in place. Otherwise it must not overlap what is read. None makes a
        new array laid out like `logits`; its first touch may well take longer than the computation.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `cross_entropy`, to the last bit.
    grad : numpy.ndarray
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does, before anything is written. ValueError also if `out` does not fit,
        is read-only or overlaps, or if `grad_output` is neither a number nor, for "none", one
        number per row; TypeError if `out` is not an array or `grad_output` not of numbers.

    See Also
    --------
    cross_entropy : The loss alone; every option and edge case.
    hessian_vector_product : The second derivative, times a vector.
    gradient_hessian : Gradient and diagonal second derivative of each row.

    Notes
    -----
    Edge cases, beside those of `cross_entropy`:

    - The gradient of an ignored row is exactly 0, and so is that of a class at -inf that is not the
      target. At a target of -inf, where the loss is +inf, it is p - y, finite.
    - A row whose loss is NaN has NaN as its gradient, unless it is ignored.
    - Where W is 0, so that the loss is NaN, the gradient of the nll is exactly 0.
    - A row of soft targets h without options has the gradient ((sum h) p - h) / N.

    Accuracy: every component that is a normal number has a relative error of at most 1e-5 in
    float32 and 1e-13 in float64. Where the target is the maximum, the gradient is -rest / (1 +
    rest), not the difference p - 1. 16-bit gradients are computed in float32, that difference
    included, and rounded once.

    Memory: the gradient alone is written, once; the row is read again while it is in the cache.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> targets = np.array([0, 1])
    >>> loss, grad = fastce.cross_entropy_and_grad(logits, targets)
    >>> print(f"{loss:.4f}")
    0.2887
    >>> print(grad.round(4))
    [[-0.1674  0.1224  0.045 ]
     [ 0.021  -0.0781  0.0571]]

    An upstream gradient for each row:

    >>> loss, grad = fastce.cross_entropy_and_grad(
    ...     logits, targets, reduction="none", grad_output=[1.0, -2.0])
    >>> print(loss.round(4))
    [0.4076 0.1698]
    >>> print(grad.round(4))
    [[-0.3348  0.2447  0.09  ]
     [-0.084   0.3124 -0.2284]]

    In place, for a model so sure that p - 1 would be 0:

    >>> logits = np.array([[0.0, 40.0]])
    >>> loss, grad = fastce.cross_entropy_and_grad(logits, [1], out=logits)
    >>> grad is logits
    True
    >>> print(", ".join(f"{g:.4e}" for g in grad[0]))
    4.2484e-18, -4.2484e-18
    """
    if on_device(logits):
        from fastce import cuda

        return cuda.cross_entropy_and_grad(
            logits, targets, axis=axis, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
            normalizer=normalizer, grad_output=grad_output, out=out,
        )  # fmt: skip
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    if grad_output is None:
        small = small_loss_and_grad(logits, targets, axis, weight, options, out)
        if small is not None:
            return small
    return _loss_and_grad(logits, targets, axis, weight, options, grad_output, out)


@in_default_mode
def cross_entropy_stats(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> CrossEntropyStats:
    """Loss, log-sum-exp, entropy and prediction of every row, in one call.

    For a row z with p = softmax(z) and the class y, or the soft target h::

        loss      = w[y] * (logsumexp(z) - z[y])            or sum_c w_c h_c (logsumexp(z) - z_c)
        lse       = logsumexp(z)
        entropy   = -sum_c p_c log(p_c)                     with 0 log(0) = 0
        predicted = first class where z is largest

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index
        As in `cross_entropy`.

    Returns
    -------
    CrossEntropyStats
        A named tuple of the arrays `loss`, `lse`, `entropy` and `predicted`, shaped like `logits`
        without the class axis, and the float `total_weight`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    See Also
    --------
    cross_entropy : The loss alone; every option and edge case.
    CrossEntropyStats : The fields and their dtypes.

    Notes
    -----
    ``stats.loss.sum() / stats.total_weight`` is the "mean" of `cross_entropy`. Losses and
    `total_weight` of parts of the data, each summed, give the mean over all of it.

    The entropy is the mean of m - z_c under p, plus log1p(rest), with m and rest as in
    `cross_entropy`: no term is negative, and a confident row keeps its small entropy. Where the
    loss is NaN because of a NaN or +inf logit or of a row that is all -inf, so is the entropy; the
    log-sum-exp is that of `logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    >>> targets = np.array([0, 2, -100])
    >>> stats = fastce.cross_entropy_stats(logits, targets)
    >>> for name in ("loss", "lse", "entropy"):
    ...     print(f"{name:8}", getattr(stats, name).round(4))
    loss     [0.4076 2.1698 0.    ]
    lse      [2.4076 3.1698 0.    ]
    entropy  [0.8324 0.5243 0.    ]
    >>> print(stats.predicted, stats.total_weight)
    [ 0  1 -1] 2.0

    Perplexity and accuracy of the rows that count:

    >>> print(f"{np.exp(stats.loss.sum() / stats.total_weight):.4f}")
    3.6282
    >>> print(np.mean(stats.predicted[:2] == targets[:2]))
    0.5
    """
    if on_device(logits):
        from fastce import cuda

        return cuda.cross_entropy_stats(
            logits, targets, axis=axis, weight=weight, ignore_index=ignore_index
        )
    options = arguments.options(ignore_index, 0.0, 0.0, None, "none", None)
    call = Call("logits", logits, targets, axis, weight, options)
    assert call.losses is not None
    lse, entropy = np.empty(call.rows, call.dtype), np.empty(call.rows, call.dtype)
    predicted = np.empty(call.rows, np.int64)
    cpu.calls.cross_entropy(
        call.axis, call.logits, call.hard, call.soft, call.weight, call.options,
        losses=call.losses.reshape(-1),
        statistics=(lse.reshape(-1), entropy.reshape(-1), predicted.reshape(-1)),
    )  # fmt: skip
    return CrossEntropyStats(call.losses, lse, entropy, predicted, float(call.total_weight))
