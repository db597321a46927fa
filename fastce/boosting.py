"""Softmax objectives for XGBoost and LightGBM: gradient and Hessian in each library's convention.

The trees are those of the libraries' own objectives within rounding. What is gained is the freedom
to choose the Hessian, and gradients that do not vanish where the model is confident. Neither
library is imported.
"""

from typing import Any, Literal

import numpy as np

from fastce import _arguments as arguments
from fastce._arguments import AnyArray
from fastce.curvature import gradient_hessian

__all__ = ["SoftmaxObjective", "softmax_objective"]

_LIBRARIES = ("xgboost", "lightgbm")
Hessian = Literal["diag", "xgboost", "lightgbm", "abs_residual"]


class SoftmaxObjective:
    """A softmax objective, as `softmax_objective` makes it; it can be pickled.

    Called with ``(scores, data)`` by `xgboost.train` and `lightgbm.train`, with ``(labels, scores,
    sample_weight)`` by the estimators of either; it returns gradient and Hessian, shaped like the
    scores.
    """

    def __init__(self, library: str, hessian: Hessian) -> None:
        self.library = library
        self.hessian = hessian

    def __repr__(self) -> str:
        return f"softmax_objective({self.library!r}, hessian={self.hessian!r})"

    def __call__(
        self, first: Any, second: Any, sample_weight: Any = None
    ) -> tuple[AnyArray, AnyArray]:
        """Gradient and Hessian of the weighted loss of every row."""
        if hasattr(second, "get_label"):  # a DMatrix or a Dataset
            scores, labels, sample_weight = first, second.get_label(), second.get_weight()
        else:
            labels, scores = first, second
        scores = arguments.any_array("scores", scores)
        if scores.ndim != 2:
            raise ValueError(
                f"scores: expected shape (rows, classes), got {scores.shape}; is num_class set?"
            )
        if sample_weight is not None and not np.size(sample_weight):  # XGBoost's way of None
            sample_weight = None
        return gradient_hessian(
            scores, _integers(labels), sample_weight=sample_weight, hessian=self.hessian
        )


def _integers(labels: Any) -> AnyArray:
    """Labels, which both libraries keep as floats, as integers."""
    labels = arguments.any_array("labels", labels)
    integers: AnyArray
    with np.errstate(invalid="ignore"):
        integers = labels.astype(np.int64)
    wrong = integers != labels
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"labels: expected integers, got {labels[at]} at index ({at},)")
    return integers


def softmax_objective(
    library: Literal["xgboost", "lightgbm"], *, hessian: Hessian | None = None
) -> SoftmaxObjective:
    """A softmax cross-entropy objective for gradient boosting.

    With p the softmax of a row's scores, y its label, s its weight and C classes::

        gradient = s * (p - onehot(y))
        Hessian  = s * max(2 p (1 - p), 1e-16)        XGBoost ("multi:softprob", up to 3.2)
                   s * C / (C - 1) * p (1 - p)        LightGBM ("multiclass")

    Parameters
    ----------
    library : {"xgboost", "lightgbm"}
        Whose convention the Hessian follows.
    hessian : {"diag", "xgboost", "lightgbm", "abs_residual"}, optional
        Another formula, see `fastce.gradient_hessian`.

    Returns
    -------
    SoftmaxObjective
        For ``xgboost.train(params, data, obj=...)`` with ``num_class`` in params, for
        ``lightgbm.train`` as ``params["objective"]`` with ``num_class``, or for `XGBClassifier` and
        `LGBMClassifier` as ``objective``. Sample weights are those of the data.

    Raises
    ------
    ValueError
        If there is no such library or Hessian; when called, if labels are not integers or scores
        not a matrix.
    IndexError
        When called, if a label is not a class.

    Notes
    -----
    A custom objective starts from scores of 0 in LightGBM, whose own starts from the logarithms of
    the classes' frequencies unless ``boost_from_average=False``; in XGBoost from ``base_score``,
    which its own objective estimates unless it is given. Predictions of a model with a custom
    objective are scores in LightGBM: `fastce.softmax` makes them probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.boosting import softmax_objective
    >>> objective = softmax_objective("lightgbm")
    >>> scores = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> grad, hess = objective(np.array([0.0, 1.0]), scores, np.array([1.0, 2.0]))
    >>> print(grad.round(4))
    [[-0.3348  0.2447  0.09  ]
     [ 0.084  -0.3124  0.2284]]
    >>> print(hess.round(4))
    [[0.334  0.2773 0.1229]
     [0.1207 0.3954 0.3035]]
    """
    if library not in _LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(_LIBRARIES)}, got {library!r}")
    chosen = library if hessian is None else hessian
    gradient_hessian(np.zeros((0, 1)), np.zeros(0, int), hessian=chosen)  # raises if unknown
    return SoftmaxObjective(library, chosen)
