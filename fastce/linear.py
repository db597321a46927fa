"""The classifier head: cross-entropy of the logits x W^T + b, which are never held whole."""

import math
from typing import Any

import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce._arguments import AnyArray, Reduction
from fastce._call import inverse
from fastce._head import Head, Products
from fastce._mode import in_default_mode

Gradients = tuple[AnyArray, AnyArray, AnyArray | None]


@in_default_mode
def linear_cross_entropy(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    bias: npt.ArrayLike | None = None,
    class_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Cross-entropy of a linear layer, without its logits ever being held whole.

    With N rows of D features and C classes::

        logits = x @ weight.T + bias
        loss   = cross_entropy(logits, targets, weight=class_weight, ...)

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, of shape (N, D)
        Observations, or the hidden states of a network; of any strides.
    weight : array_like, of shape (C, D)
        W, one row per class; of any of the dtypes of `x`, as `bias` is.
    targets : array_like
        Integers of shape (N,), or probabilities of shape (N, C), as in `cross_entropy`.
    bias : array_like, of shape (C,), optional
        b; -inf takes a class out. None means 0.
    class_weight : array_like, of shape (C,), optional
        The `weight` of `cross_entropy`: one factor per class.
    ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As in `cross_entropy`.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        The loss in nats: float64 if `x` or `weight` is, else float32. For "none" an array of shape
        (N,).

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does; ValueError also if the shapes of `x`, `weight` and `bias` do not
        belong together.

    See Also
    --------
    linear_cross_entropy_and_grad : The gradients as well.
    cross_entropy : Of given logits; every option and edge case.

    Notes
    -----
    Logits are computed for some 2000 rows and as many classes at a time as fit in 55 MB, or for
    more rows where all classes fit, and their loss is taken where they lie. The BLAS is that of
    NumPy. Ignored rows are left out of the products and cost
    nothing. Products of 16-bit arrays are taken in float32, blocks of `weight` being widened as
    they are needed.

    The losses are summed in float64 in the order of the rows, in pieces that depend on shapes and
    dtypes alone: the result has the same bits whatever `set_num_threads` says. It is only as
    accurate as the logits are, whose rounding errors in the product grow with D.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> x = np.array([[1.0, 2.0], [0.5, -1.0]])
    >>> weight = np.array([[0.2, 0.1], [0.0, -0.3], [0.5, 0.5]])
    >>> print(f"{fastce.linear_cross_entropy(x, weight, [2, 0]):.6f}")
    0.757918
    >>> print(f"{fastce.cross_entropy(x @ weight.T, [2, 0]):.6f}")
    0.757918
    """
    head = Head.checked(
        x, weight, targets, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap,
        reduction, normalizer,
    )  # fmt: skip
    return _reduced(head, head.total())


@in_default_mode
def linear_cross_entropy_and_grad(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    bias: npt.ArrayLike | None = None,
    class_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: tuple[AnyArray | None, AnyArray | None, AnyArray | None] | None = None,
    accumulate: bool = False,
    skip_below: float = 0.0,
) -> tuple[Any, Gradients]:
    """Cross-entropy of a linear layer and its gradients, without the logits being held whole.

    With G the gradient of the loss with respect to the logits, from `cross_entropy_and_grad`::

        dx = G @ weight        dweight = G.T @ x        dbias = G.sum(axis=0)

    Parameters
    ----------
    x, weight, targets, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap
        As in `linear_cross_entropy`.
    reduction, normalizer
        As in `linear_cross_entropy`.
    grad_output : float or array_like, optional
        Upstream gradient, as in `cross_entropy_and_grad`.
    out : tuple of three numpy.ndarray, optional
        Where dx, dweight and dbias go: shaped and typed like `x`, `weight` and `bias`, writable,
        apart from each other and from all that is read. None in a place, or instead of the tuple,
        makes a new array; without `bias` the third is None.
    accumulate : bool, default False
        Whether to add to what `out`, then given whole, holds. Accumulated in 16 bits, gradients are
        rounded once per call.
    skip_below : float in [0, 1), default 0.0
        Leave out of the products the classes in whose columns of G no number exceeds `skip_below`
        times the largest factor of a loss (for the plain mean over N rows: skip_below / N). In a
        trained model, where few classes get probability, these are most. See the notes for a bound
        of the error.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `linear_cross_entropy`; to the last bit where that takes all classes at a time.
    (dx, dweight, dbias) : tuple of numpy.ndarray
        The gradients, or what is in `out`; dbias is None without `bias`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `linear_cross_entropy` and `cross_entropy_and_grad` do, before anything is written.
        ValueError also if `accumulate` comes without arrays to add to, or `skip_below` is outside
        [0, 1).

    See Also
    --------
    linear_cross_entropy : The loss alone; conventions, memory, reproducibility.

    Notes
    -----
    G is computed in place of the logits of some rows at a time, and enters the two products before
    the next rows take its place. dweight is added up chunk by chunk in the dtype of the
    computation: 16-bit gradients need a float32 array of their shape besides.

    Rows that are ignored have dx exactly 0, or unchanged if accumulated.

    With `skip_below` = s, chosen apart for each chunk of rows, what is left out of the gradients of
    the mean is at most s / N * sum_c |weight_cd| in every dx_nd, and at most s / N * sum_n |x_nd|
    in every dweight_cd; nothing is left out of the loss or of dbias. With s = 2**-24, half a unit
    in the last place of a float32 probability of 1, and W of entries about w, this is below
    6e-8 C w / N. It saves up to the time of two of the three products; the idea is that of [1]_,
    where tiles of G are skipped, which need classes sorted by frequency; columns do not.

    References
    ----------
    .. [1] E. Wijmans, B. Huval, A. Hertzberg, V. Koltun and P. Krähenbühl, "Cut your losses in
       large-vocabulary language models", ICLR, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> x = np.array([[1.0, 2.0], [0.5, -1.0]])
    >>> weight = np.array([[0.2, 0.1], [0.0, -0.3], [0.5, 0.5]])
    >>> bias = np.zeros(3)
    >>> loss, (dx, dw, db) = fastce.linear_cross_entropy_and_grad(x, weight, [2, 0], bias=bias)
    >>> print(f"{loss:.6f}")
    0.757918
    >>> print(dw.round(4))
    [[-0.0557  0.5689]
     [ 0.1499 -0.1316]
     [-0.0942 -0.4373]]

    A batch in parts, added up where a training loop keeps its gradients:

    >>> dw[...], db[...] = 0, 0
    >>> for k in ([0], [1]):
    ...     part = fastce.linear_cross_entropy_and_grad(
    ...         x[k], weight, np.array([2, 0])[k], bias=bias, normalizer=2,
    ...         out=(np.zeros((1, 2)), dw, db), accumulate=True)
    >>> print(dw.round(4)[0])
    [-0.0557  0.5689]
    """
    head = Head.checked(
        x, weight, targets, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap,
        reduction, normalizer,
    )  # fmt: skip
    scalar, per_row = arguments.upstream(grad_output, head.call.rows, reduction)
    scale = scalar * inverse(head.call.divisors()[0])
    largest = abs(scale) if per_row is None else float(abs(per_row).max(initial=0.0))
    negligible = arguments.skip_below(skip_below) * largest
    read = {"targets": targets, "class_weight": class_weight, "grad_output": grad_output}
    gradients = _outputs(head, bias, out, accumulate, read)
    products = Products(head, *gradients, accumulate=accumulate, negligible=negligible)
    total = head.total(scale if per_row is None else per_row, products)
    products.finish()
    return _reduced(head, total), gradients


def _reduced(head: Head, total: float) -> Any:
    if head.call.losses is not None:
        return head.call.losses
    divisor = head.call.divisors()[0]
    return arguments.scalar(total / divisor if divisor else math.nan, head.call.dtype)


def _outputs(
    head: Head, bias: npt.ArrayLike | None, out: Any, accumulate: bool,
    read: dict[str, npt.ArrayLike | None],
) -> Gradients:  # fmt: skip
    """Where the three gradients go, apart from all that is read."""
    names = ("x", "weight", "bias")
    like = (head.x, head.weight, None if bias is None else arguments.float_array("bias", bias))
    if out is None:
        out = (None, None, None)
    elif not isinstance(out, tuple | list) or len(out) != len(names):
        raise ValueError(f"out: expected (dx, dweight, dbias), got {out!r:.60}")
    if bias is None and out[2] is not None:
        raise ValueError("out: expected None for dbias where there is no bias, got an array")
    read |= zip(names, like, strict=True)
    found: list[AnyArray | None] = []
    for name, array, given in zip(names, like, out, strict=True):
        if accumulate and given is None and array is not None:
            raise ValueError(f"out: expected d{name} to accumulate into, got None")
        try:
            found.append(None if array is None else outputs.gradient(given, array, name, **read))
        except (TypeError, ValueError) as error:
            raise type(error)(f"out: d{name}{str(error).removeprefix('out')}") from None
        read[f"d{name}"] = found[-1]
    dx, dweight, dbias = found
    assert dx is not None
    assert dweight is not None
    return dx, dweight, dbias
