"""Softmax regression as a scikit-learn classifier. Needs the extra ``fastce[sklearn]``."""

import numbers
import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

import fastce
from fastce._fit import information, labels, progress, solvers
from fastce._fit.objective import Objective
from fastce._fit.passes import Data
from fastce._fit.stream import Stream

_FLOATS = [np.float64, np.float32]


class SoftmaxRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Multinomial logistic regression by maximum likelihood, with or without a penalty.

    For observations x_i with weights s_i and labels h_i (one-hot, or distributions), and the logits
    z_i = W x_i + b, what is minimised is::

        sum_i s_i * cross_entropy(z_i, h_i) + l2 / 2 * sum_cd W_cd**2

    Parameters
    ----------
    l2 : float, default 1.0
        Weight of the penalty. 0 is maximum likelihood; 1 / C is what LogisticRegression of
        scikit-learn minimises with C, for three classes or more.
    fit_intercept : bool, default True
        Whether there is a b, which is not penalised.
    solver : {"lbfgs", "newton-cg"}, default "lbfgs"
        "lbfgs" is SciPy's L-BFGS-B, "newton-cg" its trust-region Newton method with exact products
        with the Hessian; the optimum is the same. The second takes few steps to the last digits,
        at the cost of several passes over X each.
    tol : float, default 1e-6
        Ends where no component of the gradient of the objective, divided by the sum of the weights,
        exceeds `tol`.
    max_iter : int, default 1000
        Most iterations; a ConvergenceWarning tells when they were not enough.
    class_weight : dict, "balanced" or None, default None
        Factors of the labels of each class, as scikit-learn has them.
    warm_start : bool, default False
        Whether `fit` starts from the estimate of the `fit` before.
    verbose : bool, default False
        Whether the standard error shows progress: objective, largest component of the gradient.

    Attributes
    ----------
    classes_ : numpy.ndarray of shape (C,)
        The classes, sorted; for soft labels 0 to C - 1.
    coef_ : numpy.ndarray of shape (C, D)
        W, of the dtype of X.
    intercept_ : numpy.ndarray of shape (C,)
        b; zeros without.
    n_iter_ : int
        Iterations of the solver.
    loss_curve_ : list of float
        The objective divided by the sum of the weights: at the start, after every iteration.
        After `partial_fit` the mean loss of each batch before learning from it.
    n_features_in_ : int
        D.

    See Also
    --------
    fastce.linear_cross_entropy : The loss, with all options.

    Notes
    -----
    X may be a dense array, memory-mapped or not, or a sparse one; float32 is computed with in
    float32, and nothing of the size of X is made, unless its dtype or order must be changed. Every
    pass over X is in blocks of rows. For few classes (up to 32) a block goes through both products
    while it is in the cache, so that X is read once.

    The solvers work in coordinates where the Hessian at W = 0 is the identity: of the bound of
    [1]_, features are decorrelated by what a sample of the rows says of their second moments. It
    makes no difference to the optimum, and a large one to the number of iterations.

    If `l2` is 0 and the classes can be separated, there is no maximum: a ConvergenceWarning says
    so, and the estimate is where the gradient had become small.

    References
    ----------
    .. [1] D. Böhning, "Multinomial logistic regression algorithm", Annals of the Institute of
       Statistical Mathematics 44(1), 1992.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastce.sklearn import SoftmaxRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> model = SoftmaxRegression(l2=0.0).fit(X, y)
    >>> print(f"{model.score(X, y):.3f} {model.log_likelihood(X, y):.4f}")
    0.987 -5.9493

    How well the data determine what tells the third class from the second:

    >>> (model.coef_[2] - model.coef_[1]).round(2)
    array([-2.47, -6.68,  9.43, 18.29])
    >>> model.standard_errors(X, reference=1)[2].round(2)
    array([ 2.39,  4.48,  4.74,  9.74, 25.71])

    Distributions as labels: those of a model lead back to that model.

    >>> first = SoftmaxRegression().fit(X, y)
    >>> again = SoftmaxRegression(l2=0.0, tol=1e-9).fit(X, first.predict_proba(X))
    >>> bool(abs(again.predict_proba(X) - first.predict_proba(X)).max() < 1e-6)
    True
    """

    def __init__(
        self,
        l2: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: Literal["lbfgs", "newton-cg"] = "lbfgs",
        tol: float = 1e-6,
        max_iter: int = 1000,
        class_weight: Any = None,
        warm_start: bool = False,
        verbose: bool = False,
    ) -> None:
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxRegression":
        """Estimate W and b.

        Parameters
        ----------
        X : array_like or sparse array, of shape (N, D)
            Observations; float64 or float32, or converted to float64.
        y : array_like of shape (N,), or of floats of shape (N, C)
            Classes of any kind, or label distributions.
        sample_weight : array_like of shape (N,), optional
            s; None means 1.

        Returns
        -------
        SoftmaxRegression
            Itself.

        Raises
        ------
        ValueError
            If the arrays do not fit or are not finite, there are less than two classes, or a
            parameter is outside its range.
        """
        self._check_parameters()
        data = self._data(X, y, sample_weight, None, reset=True)
        objective = Objective(data, self.l2, self.fit_intercept, curved=self.solver == "newton-cg")
        start = np.zeros(objective.shape)
        if self.warm_start and getattr(self, "coef_", start).shape == (data.classes, X.shape[1]):
            start = self._theta()
        with progress.shown(bool(self.verbose), self.max_iter) as report:
            found = solvers.minimise(objective, start, self.solver, self.tol, self.max_iter, report)
        self._keep(found.theta, data.x.dtype)
        self.n_iter_, self.loss_curve_ = found.iterations, found.curve
        self._warn(found, data)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "SoftmaxRegression":
        """Learn from one batch of a stream, by a Newton step with the information of all so far.

        Parameters
        ----------
        X, y, sample_weight : array_like
            As in `fit`.
        classes : array_like of shape (C,), optional
            All classes of the stream; needed in the first call, unless labels are distributions.

        Returns
        -------
        SoftmaxRegression
            Itself. `loss_curve_` has the mean loss of each batch under the estimate before it.

        Raises
        ------
        ValueError
            As `fit` does; also if a batch has a class that is not among `classes`.
        """
        self._check_parameters()
        first = not hasattr(self, "_stream")
        data = self._data(X, y, sample_weight, classes if first else self.classes_, reset=first)
        if first:
            theta = np.zeros((data.classes, X.shape[1] + self.fit_intercept))
            self._stream = Stream(theta, self.fit_intercept, self.l2)
            self.n_iter_, self.loss_curve_ = 0, []
        self.loss_curve_.append(self._stream.update(data))
        self.n_iter_ += 1
        self._keep(self._stream.theta, data.x.dtype)
        return self

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the most probable class of each observation."""
        logits = self._logits(X)
        return np.asarray(self.classes_[np.argmax(logits, axis=1)])

    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return the probability of every class, shape (N, C)."""
        return fastce.softmax(self._logits(X))

    def predict_log_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return the log-probability of every class, exact where the probability is 0 or 1."""
        return fastce.log_softmax(self._logits(X))

    def decision_function(self, X: Any) -> npt.NDArray[Any]:
        """Return the logits, shape (N, C); with two classes their difference, shape (N,)."""
        logits = self._logits(X)
        return np.asarray(logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits)

    def log_likelihood(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the log of the probability of all labels, without the penalty.

        Parameters
        ----------
        X, y, sample_weight : array_like
            As in `fit`.
        """
        logits = self._logits(X)
        hard, soft = labels.encoded(y, self.classes_)
        targets: Any = soft if hard is None else hard
        check_consistent_length(logits, targets)
        losses = fastce.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        losses = losses.astype(np.float64)
        check_consistent_length(losses, sample_weight)
        return -float(losses.sum() if sample_weight is None else np.dot(losses, sample_weight))

    def standard_errors(
        self, X: Any, sample_weight: Any = None, *, reference: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the standard errors of the estimate, from the Fisher information at it.

        The softmax does not feel what is added to the weights of all classes: what the data
        determine are differences, here to the class `reference`.

        Parameters
        ----------
        X, sample_weight : array_like
            As given to `fit`.
        reference : int, default 0
            Index into `classes_`.

        Returns
        -------
        numpy.ndarray of shape (C, D + 1), or (C, D) without intercept
            Standard errors of W_c - W_reference and, last, b_c - b_reference; zeros for the
            reference. With `l2`, those of the posterior that it is the prior of.

        Raises
        ------
        ValueError
            If there are more than 10000 free coefficients, or `reference` is not a class.
        numpy.linalg.LinAlgError
            If the data do not determine the coefficients: features that depend on each other.
        """
        X, weight = self._observations(X, sample_weight)
        if not -len(self.classes_) <= reference < len(self.classes_):
            raise ValueError(
                f"reference: expected an index of {len(self.classes_)} classes, got {reference}"
            )
        return information.standard_errors(
            X, self._theta(), self.fit_intercept, weight, self.l2, reference % len(self.classes_)
        )

    def _check_parameters(self) -> None:
        ranges: dict[str, tuple[Any, float]] = {
            "l2": (numbers.Real, 0), "tol": (numbers.Real, 0), "max_iter": (numbers.Integral, 1),
        }  # fmt: skip
        for name, (kind, least) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not least <= value < np.inf:
                raise ValueError(f"{name}: expected a number, at least {least}, got {value!r}")
        if self.solver not in ("newton-cg", "lbfgs"):
            raise ValueError(f"solver: expected 'newton-cg' or 'lbfgs', got {self.solver!r}")

    def _data(self, X: Any, y: Any, sample_weight: Any, classes: Any, *, reset: bool) -> Data:
        options = {"accept_sparse": "csr", "dtype": _FLOATS, "order": "C", "reset": reset}
        if labels.are_soft(y):
            X = validate_data(self, X, **options)
            y = check_array(y, dtype=_FLOATS, input_name="y")
            check_consistent_length(X, y)
        else:
            X, y = validate_data(self, X, y, **options)
            check_classification_targets(y)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, X, dtype=np.float64, ensure_non_negative=True
            )
        self.classes_ = labels.classes(y) if classes is None else np.sort(np.asarray(classes))
        return labels.data(X, y, sample_weight, self.classes_, self.class_weight)

    def _observations(self, X: Any, sample_weight: Any = None) -> tuple[Any, Any]:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=_FLOATS, reset=False)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        return X, sample_weight

    def _logits(self, X: Any) -> npt.NDArray[Any]:
        X, _ = self._observations(X)
        return np.asarray(X @ self.coef_.T + self.intercept_)

    def _theta(self) -> npt.NDArray[np.float64]:
        if self.fit_intercept:
            return np.column_stack([self.coef_, self.intercept_]).astype(np.float64)
        return self.coef_.astype(np.float64)

    def _keep(self, theta: npt.NDArray[np.float64], dtype: Any) -> None:
        weight = theta[:, :-1] if self.fit_intercept else theta
        bias = theta[:, -1] if self.fit_intercept else np.zeros(len(theta))
        self.coef_, self.intercept_ = weight.astype(dtype), bias.astype(dtype)

    def _warn(self, found: solvers.Found, data: Data) -> None:
        if not found.converged:
            warnings.warn(
                f"max_iter: {found.iterations} iterations were not enough, the largest component "
                f"of the gradient is {found.gradient:.1e}, expected at most tol={self.tol:g}; "
                "scale the features, or allow more",
                ConvergenceWarning, stacklevel=3,
            )  # fmt: skip
        if not self.l2 and data.hard is not None:
            z = data.x @ self.coef_.T + self.intercept_
            if np.array_equal(np.argmax(z, axis=1), data.hard):
                warnings.warn(
                    "the classes are separable: every observation is classified rightly, so that "
                    "larger weights are always likelier and there is no maximum; choose l2 > 0",
                    ConvergenceWarning, stacklevel=3,
                )  # fmt: skip
