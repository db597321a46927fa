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
    _check_feature_names,
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

import fastce
from fastce._arguments import any_array, refuse_mask
from fastce._fit import information, labels, progress, separation, solvers
from fastce._fit.coordinates import Vector
from fastce._fit.objective import Objective
from fastce._fit.stream import Stream
from fastce._fit.summary import Summary

__all__ = ["SoftmaxRegression", "Summary"]

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
        exceeds `tol`. The gradient is that with respect to coefficients of features brought to
        mean 0 and spread 1, and decorrelated (see the notes): units do not matter.
    max_iter : int, default 1000
        Most iterations; a ConvergenceWarning tells when they were not enough.
    class_weight : dict, "balanced" or None, default None
        Factors of the labels of each class, as scikit-learn has them: "balanced" makes the labels
        of all classes weigh the same, sample weights included.
    warm_start : bool, default False
        Whether `fit` starts from the estimate of the `fit` before.
    verbose : bool, default False
        Whether the standard error shows progress: objective, largest component of the gradient.

    Attributes
    ----------
    classes_ : numpy.ndarray of shape (C,)
        The classes, sorted; for soft labels 0 to C - 1.
    coef_ : numpy.ndarray of shape (C, D)
        W, of the dtype of X; float64 also where float32 would lose the digits of the logits, as
        features are far from 0 or very large or small.
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

    The solvers work in coordinates of their own: features less their means, divided by their
    spreads, then decorrelated by what a sample of the rows says of their second moments, so that
    the Hessian at W = 0 is the identity, by the bound of [1]_. It makes no difference to the
    optimum, and the penalty is that of the W of X; but neither units nor offsets of the features
    matter, and few iterations are needed. Features so far from 0, or of such units, that products
    with them as they are would lose digits are standardised in every pass, some rows at a time.

    If `l2` is 0 there may be no maximum: the classes may be separable, completely or in part [2]_.
    A ConvergenceWarning says so, and the estimate is where the gradient had become small. Whether
    they are is settled by the derivatives at the end [3]_ or by a linear program [4]_; of large
    data, by whether Newton's method goes on and on. Another ConvergenceWarning says if the solver
    could not go on although the gradient was not small.

    References
    ----------
    .. [1] D. Böhning, "Multinomial logistic regression algorithm", Annals of the Institute of
       Statistical Mathematics 44(1), 1992.
    .. [2] A. Albert and J. A. Anderson, "On the existence of maximum likelihood estimates in
       logistic regression models", Biometrika 71(1), 1984.
    .. [3] F. Bach, "Self-concordant analysis for logistic regression", Electronic Journal of
       Statistics 4, 2010, proposition 2.
    .. [4] K. Konis, "Linear programming algorithms for detecting separated data in binary logistic
       regression models", thesis, University of Oxford, 2007.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastce.sklearn import SoftmaxRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> model = SoftmaxRegression(l2=0.1).fit(X, y)
    >>> print(f"{model.score(X, y):.3f} {model.log_likelihood(X, y):.4f}")
    0.980 -8.6163

    The first class can be told from the others without fail, so that only these two have a
    maximum-likelihood estimate. How well the data determine it:

    >>> model = SoftmaxRegression(l2=0.0).fit(X[50:], y[50:])
    >>> print(model.summary(X[50:]))
    relative to class 1
    class  feature      estimate  std. error      z       p       95%  interval
    2      x0            -2.4653       2.394  -1.03   0.303   -7.1582    2.2275
    2      x1            -6.6809        4.48  -1.49   0.136   -15.461    2.0989
    2      x2             9.4294       4.737   1.99  0.0465   0.14474    18.714
    2      x3             18.286       9.743   1.88  0.0605  -0.80895    37.382
    2      (intercept)   -42.637       25.71  -1.66  0.0972   -93.023    7.7486

    Distributions as labels: those of a model lead back to that model.

    >>> first = SoftmaxRegression().fit(X, y)
    >>> again = SoftmaxRegression(l2=0.0, tol=1e-9).fit(X, first.predict_proba(X))
    >>> bool(abs(again.predict_proba(X) - first.predict_proba(X)).max() < 1e-6)
    True
    """

    _stream: Stream

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
        X : array_like or sparse array, of shape (N, D), or an array or data frame of dask
            Observations; float64 or float32, or converted to float64. What is of dask is passed
            over chunk by chunk, wherever its scheduler computes it, and is never held whole.
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
            If the arrays do not fit or are not finite, there are less than two classes, a
            parameter is outside its range, or float64 cannot hold what a feature's coefficient
            would be.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If `max_iter` was too small, rounding has ended the fit too early, or there is no
            maximum.
        """
        self._check_parameters()
        self.__dict__.pop("_stream", None)
        data = self._data(X, y, sample_weight, None, reset=True)
        labels.check_weight(data.total_weight)
        objective = Objective(data, self.l2, self.fit_intercept, curved=self.solver == "newton-cg")
        start = np.zeros(objective.shape)
        if self.warm_start and getattr(self, "coef_", start).shape == (data.classes, X.shape[1]):
            start = self._theta()
        with progress.shown(bool(self.verbose), self.max_iter) as report:
            found = solvers.minimise(objective, start, self.solver, self.tol, self.max_iter, report)
        self._keep(found.theta, data.x.dtype if objective.lies_well else np.float64)
        self.n_iter_, self.loss_curve_ = found.iterations, found.curve
        self._warn(found, data, objective)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "SoftmaxRegression":
        """Learn from one batch of a stream, by a Newton step with the information of all so far.

        Parameters
        ----------
        X, y, sample_weight : array_like
            As in `fit`; what is of dask is learnt from chunk by chunk.
        classes : array_like of shape (C,), optional
            All classes of the stream, in any order; needed in the first call, unless labels are
            distributions, and the same later. After `fit` another stream begins, of its classes.

        Returns
        -------
        SoftmaxRegression
            Itself. `loss_curve_` has the mean loss of each batch under the estimate before it.

        Raises
        ------
        ValueError
            As `fit` does; also if a batch has a class that is not among `classes`, these are
            missing in the first call or others later, or class weights are "balanced", which
            depends on what is still to come.

        Notes
        -----
        Means and spreads of the features are those of all rows so far: as in `fit`, neither units
        nor offsets matter.
        """
        self._check_parameters()
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"class_weight: expected a dict or None for a stream, got {self.class_weight!r}"
            )
        if _is_of_dask(X):
            from fastce._fit.chunks import batches

            names = getattr(X._meta, "columns", None)
            for part, its_labels, weight in batches(X, y, sample_weight):
                named = part if names is None else type(X._meta)(part, columns=names)
                self.partial_fit(named, its_labels, classes, weight)
            return self
        classes = self._classes_of_stream(y, classes)
        first = not hasattr(self, "_stream")
        data = self._data(X, y, sample_weight, classes, reset=not hasattr(self, "classes_"))
        labels.check_weight(data.total_weight)
        if first:
            theta = np.zeros((data.classes, data.x.shape[1] + self.fit_intercept))
            self.n_iter_, self.loss_curve_ = 0, []
            stream = Stream(theta, self.fit_intercept, self.l2)
        else:
            stream = self._stream
        self.loss_curve_.append(stream.update(data))
        self._stream = stream
        self.n_iter_ += 1
        plain = stream.moments.lie_well(data.x.dtype)
        self._keep(stream.theta, data.x.dtype if plain else np.float64)
        return self

    def _classes_of_stream(self, y: Any, classes: Any) -> Any:
        """The classes of a stream: those of its first call, or of the `fit` before."""
        known = getattr(self, "classes_", None)
        if classes is None:
            if known is None and not labels.are_soft(y):
                raise ValueError("classes: expected all classes of the stream at first, got None")
            return known
        found = np.unique(any_array("classes", classes))
        if known is not None and not np.array_equal(found, known):
            raise ValueError(f"classes: expected those of the first call, {known}, got {found}")
        labels.check_classes(found, "classes")
        return found

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
            As given to `fit`; class weights, if any, belong into the sample weights.
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
            If the data do not determine the coefficients: features that depend on each other, or
            are constant, or classes that are separable.
        """
        return self._known(X, sample_weight, reference)[1]

    def covariance(
        self, X: Any, sample_weight: Any = None, *, reference: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the covariance of the estimate, the inverse of the Fisher information at it.

        Parameters
        ----------
        X, sample_weight, reference
            As in `standard_errors`.

        Returns
        -------
        numpy.ndarray of shape ((C - 1) * P, (C - 1) * P)
            P is D + 1, or D without intercept. One class after another, without the reference: its
            weights, then its intercept, less those of the reference. The square roots of the
            diagonal are the `standard_errors` without the row of the reference.

        Raises
        ------
        ValueError, numpy.linalg.LinAlgError
            As `standard_errors` does; ValueError also where float64 cannot hold a variance.

        Examples
        --------
        Are the first two features of any use? A Wald test of both coefficients at once.

        >>> import numpy as np
        >>> import scipy.stats
        >>> from sklearn.datasets import load_iris
        >>> from fastce.sklearn import SoftmaxRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> X, y = X[50:], y[50:]
        >>> model = SoftmaxRegression(l2=0.0).fit(X, y)
        >>> both = (model.coef_[1] - model.coef_[0])[:2]
        >>> statistic = both @ np.linalg.solve(model.covariance(X)[:2, :2], both)
        >>> print(f"{statistic:.3f} {scipy.stats.chi2.sf(statistic, 2):.4f}")
        3.953 0.1386
        """
        found, errors = self._known(X, sample_weight, reference)
        held = np.diag(found)
        known = np.delete(errors, reference, axis=0).ravel() > 0
        if not np.isfinite(found).all() or np.any(known & (held < np.finfo(float).tiny)):
            raise ValueError(
                "X: expected features whose coefficients have variances that float64 holds, got "
                f"standard errors from {errors[errors > 0].min():.2g} to {errors.max():.2g}"
            )
        return found

    def summary(
        self, X: Any, sample_weight: Any = None, *, reference: int = 0, confidence: float = 0.95
    ) -> Summary:
        """Return estimates, standard errors, z, p and confidence intervals as a table.

        Parameters
        ----------
        X, sample_weight, reference
            As in `standard_errors`.
        confidence : float in (0, 1), default 0.95
            Level of the intervals.

        Returns
        -------
        Summary
            Prints as a table; has its columns as arrays of shape (C - 1, P), one row for each class
            but the reference: `estimate`, `standard_error`, `z`, `p`, `lower`, `upper`; also
            `classes`, `features`, and `to_frame()` for pandas. With `l2`, z and p are those of a
            posterior, no tests.

        Raises
        ------
        ValueError, numpy.linalg.LinAlgError
            As `standard_errors` does; ValueError also if `confidence` is outside its range.
        """
        if not (isinstance(confidence, numbers.Real) and 0 < confidence < 1):
            raise ValueError(f"confidence: expected a number in (0, 1), got {confidence!r}")
        errors = self._known(X, sample_weight, reference)[1]
        theta = self._theta()
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = np.array([f"x{k}" for k in range(self.coef_.shape[1])], object)
        if self.fit_intercept:
            names = np.append(names, "(intercept)")
        estimate, errors, classes = (
            np.delete(array, reference, axis=0)
            for array in (theta - theta[reference], errors, self.classes_)
        )
        return Summary.of(
            estimate, errors, classes, self.classes_[reference], names, float(confidence)
        )

    def _known(self, X: Any, sample_weight: Any, reference: int) -> tuple[Vector, Vector]:
        """Covariance and standard errors, differences to the class `reference`."""
        X, weight = self._observations(X, sample_weight)
        if not -len(self.classes_) <= reference < len(self.classes_):
            raise ValueError(
                f"reference: expected an index of {len(self.classes_)} classes, got {reference}"
            )
        return information.covariance(
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

    def _data(self, X: Any, y: Any, sample_weight: Any, classes: Any, *, reset: bool) -> Any:
        for name, value in (("X", X), ("y", y), ("sample_weight", sample_weight)):
            refuse_mask(name, value)
        if _is_of_dask(X):
            return self._chunked(X, y, sample_weight)
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
        classes = labels.classes(y) if classes is None else classes
        data = labels.data(X, y, sample_weight, classes, self.class_weight)
        self.classes_ = classes
        return data

    def _chunked(self, X: Any, y: Any, sample_weight: Any) -> Any:
        from fastce._fit.chunks import ChunkedData

        data = ChunkedData(X, y, sample_weight, self.class_weight)
        _check_feature_names(self, X._meta, reset=True)
        self.classes_, self.n_features_in_ = data.labels, data.x.shape[1]
        return data

    def _observations(self, X: Any, sample_weight: Any = None) -> tuple[Any, Any]:
        check_is_fitted(self)
        refuse_mask("X", X)
        refuse_mask("sample_weight", sample_weight)
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

    def _warn(self, found: solvers.Found, data: Any, objective: Objective) -> None:
        if found.reason == "iterations":
            _tell(
                f"max_iter: {found.iterations} iterations were not enough, the largest component "
                f"of the gradient is {found.gradient:.1e}, expected at most tol={self.tol:g}; "
                "allow more"
            )
        elif not found.converged:
            _tell(
                f"the solver ended after {found.iterations} iterations, where rounding hides any "
                f"further progress, but the largest component of the gradient is "
                f"{found.gradient:.1e}, expected at most tol={self.tol:g}; try the other solver"
            )
        weightless = np.flatnonzero(data.masses() == 0)
        if len(weightless) and self.fit_intercept:
            _tell(
                f"class {self.classes_[weightless[0]]} has no weight: the smaller its intercept, "
                "the likelier the observations, so that there is no maximum; leave it out"
            )
        if self.l2:
            return

        def newton(start: Vector, tol: float) -> Vector:
            curved = Objective(data, 0.0, self.fit_intercept, curved=True)
            return solvers.minimise(
                curved, start, "newton-cg", tol, self.max_iter, lambda *state: None
            ).theta

        kind = separation.find(data, objective, found.theta, newton)
        if kind == "complete":
            _tell(
                "the classes are separable: every observation is classified rightly, so that "
                "larger weights are always likelier and there is no maximum; choose l2 > 0"
            )
        elif kind == "partial":
            _tell(
                "the classes are separable in part (quasi-complete separation): of some "
                "observations, larger weights are always likelier, so that there is no maximum and "
                "some coefficients depend on tol; choose l2 > 0"
            )


def _is_of_dask(X: Any) -> bool:
    return type(X).__module__.startswith("dask.") or hasattr(X, "to_dask_array")


def _tell(message: str) -> None:
    warnings.warn(message, ConvergenceWarning, stacklevel=4)
