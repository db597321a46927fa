"""Second derivatives of the cross-entropy: for gradient boosting and for Newton's method."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import cpu
from fastce._arguments import AnyArray
from fastce._mode import in_default_mode


@in_default_mode
def gradient_hessian(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    sample_weight: npt.ArrayLike | None = None,
    hessian: Literal["diag", "xgboost", "lightgbm", "abs_residual"] = "diag",
) -> tuple[AnyArray, AnyArray]:
    """Gradient and diagonal Hessian of the summed cross-entropy, as boosting libraries take them.

    For a row with p = softmax(logits), one-hot label y and weight s::

        grad = s * (p - y)
        hess = s * p * (1 - p)                              "diag": the exact diagonal
               s * max(2 * p * (1 - p), 1e-16)              "xgboost"
               s * C / (C - 1) * p * (1 - p)                "lightgbm"
               s * |p - y|                                  "abs_residual"

    Parameters
    ----------
    logits : array_like of float64, float32, float16 or bfloat16
        Of any number of dimensions and any strides.
    targets : array_like of integers
        Classes in [0, C), shaped like `logits` without the class axis. No value is ignored.
    axis : int, default -1
        The class axis.
    sample_weight : array_like, optional
        s, one factor per row, shaped like `targets`. None means 1.
    hessian : {"diag", "xgboost", "lightgbm", "abs_residual"}, default "diag"
        Which formula. The diagonal leaves out how the classes act on each other, so that a Newton
        step in all of them at once may overshoot. Twice the diagonal bounds the whole Hessian (by
        Gershgorin's theorem): XGBoost's choice for long [2]_. C / (C - 1) times the diagonal gives
        the exact step for two logits that sum to zero: LightGBM's choice, after Friedman [1]_. The
        absolute residual does not vanish where the model is confident and wrong, and bounds the
        value of a leaf by one: XGBoost's later choice (its pull request 12537).

    Returns
    -------
    grad : numpy.ndarray
        Shaped and typed like `logits`.
    hess : numpy.ndarray
        Likewise.

    Raises
    ------
    TypeError
        If logits are not floats, targets not integers, or weights not numbers.
    ValueError
        If shapes do not fit, there is no class, `axis` is out of range, or `hessian` is unknown.
    IndexError
        If a target is outside [0, C); the message names the first.

    See Also
    --------
    cross_entropy_and_grad : The loss and its gradient, with every option.
    hessian_vector_product : The exact Hessian, not only its diagonal.

    Notes
    -----
    A class at -inf has gradient and curvature 0 (beside the floor of "xgboost", and unless it is
    the target). A row with NaN or +inf, or all -inf, is NaN. The floor is applied before the weight
    and rounds to 0 in float16.

    Where one class has most of the probability, 1 - p is computed as rest / (1 + rest), with rest
    as in `cross_entropy`, so that neither the gradient nor the curvature of a confident row is
    lost.

    References
    ----------
    .. [1] J. H. Friedman, "Greedy function approximation: a gradient boosting machine", Annals of
       Statistics 29(5), 2001.
    .. [2] T. Chen and C. Guestrin, "XGBoost: a scalable tree boosting system", KDD, 2016.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> grad, hess = fastce.gradient_hessian(logits, [0, 2])
    >>> print(grad.round(4))
    [[-0.3348  0.2447  0.09  ]
     [ 0.042   0.8438 -0.8858]]
    >>> print(hess.round(4))
    [[0.2227 0.1848 0.0819]
     [0.0402 0.1318 0.1012]]
    >>> print(fastce.gradient_hessian(logits, [0, 2], hessian="abs_residual")[1].round(4))
    [[0.3348 0.2447 0.09  ]
     [0.042  0.8438 0.8858]]
    """
    z = arguments.float_array("logits", logits)
    axis = arguments.class_axis("logits", z.shape, axis)
    classes = z.shape[axis]
    rows = z.shape[:axis] + z.shape[axis + 1 :]
    given = arguments.hard_targets(targets, z, axis)
    weight = arguments.row_weight("sample_weight", sample_weight, rows)
    curves = {
        "diag": cpu.calls.Curve(curved=1.0),
        "xgboost": cpu.calls.Curve(curved=2.0, floor=1e-16),
        "lightgbm": cpu.calls.Curve(curved=classes / max(classes - 1, 1)),
        "abs_residual": cpu.calls.Curve(straight=1.0, at_target=True),
    }
    if not isinstance(hessian, str) or hessian not in curves:
        raise ValueError(f"hessian: expected one of {', '.join(curves)}, got {hessian!r}")
    # Nothing is to be ignored: a class in that place is as good as none.
    hard, bad_row, *_ = cpu.calls.check_targets(given, classes, 0, None)
    if bad_row >= 0:
        raise arguments.bad_target(hard[bad_row], bad_row, rows, classes, ignorable=False)
    grad, hess = np.empty_like(z, subok=False), np.empty_like(z, subok=False)
    cpu.calls.gradient_hessian(axis, z, hard, weight, curves[hessian], grad, hess)
    return grad, hess


@in_default_mode
def hessian_vector_product(
    logits: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    axis: int = -1,
    grad_output: npt.ArrayLike | None = None,
) -> Any:
    """Exact product of the Hessian of each row's cross-entropy with a vector.

    For a row with p = softmax(logits) and upstream gradient g::

        H v = g * (diag(p) - p p^T) v = g * p * (v - sum_c p_c v_c)

    The Hessian of the loss does not depend on the label, and rows do not act on each other.

    Parameters
    ----------
    logits : array_like of float64, float32, float16 or bfloat16
        Of any number of dimensions and any strides.
    v : array_like
        One vector per row: shaped like `logits`, of any of their dtypes.
    axis : int, default -1
        The class axis.
    grad_output : float or array_like, optional
        g, the factor of every row's loss, or one factor per row (shaped like `logits` without the
        class axis): 1 / N for the mean over N rows. None means 1, the Hessian of the sum.

    Returns
    -------
    numpy.ndarray
        Shaped and typed like `logits`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, there is no class, or `axis` is out of range.

    See Also
    --------
    cross_entropy_and_grad : The loss and its first derivative.
    gradient_hessian : The diagonal of the Hessian, for boosting.

    Notes
    -----
    For logits X W of a linear model, the Hessian with respect to W times V is X^T times this
    function at v = X V: what truncated Newton and conjugate gradients need, never forming a Hessian
    [1]_. It is positive semidefinite, and zero on vectors that are the same in every class.

    v is taken relative to its value at the largest logit, so that nothing cancels in confident
    rows. A class at -inf gives exactly 0 if v is finite there. A row with NaN or +inf, or all -inf,
    is NaN.

    References
    ----------
    .. [1] B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1),
       1994.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> v = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    >>> product = fastce.hessian_vector_product(logits, v)
    >>> print(product.round(4))
    [[ 0.2227 -0.1628 -0.0599]
     [-0.045  -0.0609  0.106 ]]

    It is the derivative of the gradient along v:

    >>> def gradient(z):
    ...     return fastce.cross_entropy_and_grad(z, [0, 1], reduction="sum")[1]
    >>> step = 1e-6
    >>> difference = (gradient(logits + step * v) - gradient(logits - step * v)) / (2 * step)
    >>> bool(np.allclose(difference, product, atol=1e-8))
    True
    """
    z = arguments.float_array("logits", logits)
    axis = arguments.class_axis("logits", z.shape, axis)
    rows = z.shape[:axis] + z.shape[axis + 1 :]
    vector = arguments.same_shape("v", v, "logits", z)
    scale, upstream = arguments.upstream(grad_output, rows, "none")
    out = np.empty_like(z, subok=False)
    cpu.calls.hessian_vector_product(axis, z, vector, upstream, scale, out)
    return out
