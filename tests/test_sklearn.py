"""SoftmaxRegression: the optimum, whatever the way to it, and what scikit-learn expects."""

import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastce
from fastce._fit import information, objective, passes
from fastce._fit.passes import Data, FewClasses, Products
from fastce.sklearn import SoftmaxRegression
from tests.checks import same_bits

SOLVERS = ["lbfgs", "newton-cg"]


@parametrize_with_checks([SoftmaxRegression(solver=solver) for solver in SOLVERS])
@pytest.mark.filterwarnings("ignore")
def test_what_scikit_learn_expects(estimator, check):
    check(estimator)


def draw(n=300, d=7, c=4, dtype=np.float64, seed=0):
    """Observations and classes drawn from a softmax regression."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * np.geomspace(1, 3, d) + 0.5
    w = rng.standard_normal((c, d)) / 2
    return x.astype(dtype), np.argmax(x @ w.T + rng.gumbel(size=(n, c)), axis=1)


def objective_of(theta, x, h, s, l2):
    """The formula, in NumPy and SciPy; theta has the intercept last."""
    z = np.asarray(x @ theta[:, :-1].T, float) + theta[:, -1]
    loss = -np.sum(s[:, None] * h * scipy.special.log_softmax(z, axis=1))
    return loss + l2 / 2 * np.sum(theta[:, :-1] ** 2)


def optimum(x, h, s, l2):
    """The minimum found by another method, without any of fastce."""
    x1 = np.column_stack([x, np.ones(len(x))])

    def call(t):
        theta = t.reshape(h.shape[1], -1)
        p = scipy.special.softmax(x1 @ theta.T, axis=1)
        g = (s[:, None] * (p * h.sum(axis=1, keepdims=True) - h)).T @ x1
        g[:, :-1] += l2 * theta[:, :-1]
        return objective_of(theta, x, h, s, l2), g.ravel()

    start = np.zeros(h.shape[1] * x1.shape[1])
    found = scipy.optimize.minimize(call, start, jac=True, method="BFGS", options={"gtol": 1e-7})
    return found.fun, found.x.reshape(h.shape[1], -1)


def theta_of(model):
    return np.column_stack([model.coef_, model.intercept_]).astype(float)


# The optimum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["hard", "soft", "unnormalised"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("few", [True, False], ids=["kernel", "products"])
def test_the_optimum_is_that_of_the_formula(solver, kind, weighted, few, monkeypatch):
    monkeypatch.setattr(passes, "FEW", 32 if few else 0)
    monkeypatch.setattr(passes, "MEMORY", 4 * 8 * 77)  # several chunks of rows
    x, y = draw()
    h, labels, s = np.eye(4)[y], y, np.ones(len(x))
    rng = np.random.default_rng(3)
    if kind != "hard":
        labels = h = rng.dirichlet(np.ones(4), len(x)) * (1 if kind == "soft" else rng.random())
    if kind == "unnormalised":
        labels = h = h * rng.random((len(x), 1))
    if weighted:
        s = rng.random(len(x)) * (rng.random(len(x)) < 0.8)
    model = SoftmaxRegression(0.5, solver=solver, tol=1e-10)
    model.fit(x, labels, s if weighted else None)
    want, _ = optimum(x, h, s, 0.5)
    assert objective_of(theta_of(model), x, h, s, 0.5) == pytest.approx(want, rel=1e-10)
    total = (s[:, None] * h).sum() if kind == "unnormalised" else s.sum()
    assert model.loss_curve_[-1] == pytest.approx(want / total, rel=1e-9)
    assert model.loss_curve_ == sorted(model.loss_curve_, reverse=True)
    assert len(model.loss_curve_) == model.n_iter_ + 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", ["dense", "csr", "fortran", "mapped"])
def test_every_kind_of_array_gives_the_same_estimate(solver, dtype, kind, tmp_path):
    x, y = draw(dtype=dtype)
    want = SoftmaxRegression(tol=1e-9).fit(x.astype(float), y)
    if kind == "mapped":
        np.save(tmp_path / "x.npy", x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    x = {"csr": scipy.sparse.csr_array, "fortran": np.asfortranarray}.get(kind, lambda a: a)(x)
    model = SoftmaxRegression(solver=solver, tol=1e-9 if dtype == np.float64 else 1e-5).fit(x, y)
    assert model.coef_.dtype == model.intercept_.dtype == dtype
    assert model.predict_proba(x).dtype == dtype
    bound = 1e-7 if dtype == np.float64 else 2e-3
    np.testing.assert_allclose(model.coef_, want.coef_, atol=bound)
    np.testing.assert_allclose(model.intercept_, want.intercept_, atol=bound)


def test_a_mapped_array_is_not_copied(tmp_path):
    x = np.random.default_rng(0).standard_normal((40_000, 100), np.float32)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = SoftmaxRegression(max_iter=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(mapped, y)
        tracemalloc.start()
        try:
            model.fit(mapped, y)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < x.nbytes / 2


def test_same_bits_on_any_number_of_threads():
    x, y = draw(5000, 30, 10)
    found = []
    for n in (1, 2, 4):
        with fastce.num_threads(n):
            found.append(SoftmaxRegression().fit(x, y).coef_)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_as_logistic_regression_on_digits(solver):
    x, y = load_digits(return_X_y=True)
    x = x / 16
    model = SoftmaxRegression(solver=solver, tol=1e-9).fit(x, y)
    peer = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=2e-5)
    assert model.score(x, y) == peer.score(x, y)
    assert model.n_iter_ < 120


@pytest.mark.parametrize("class_weight", ["balanced", {0: 2.0, 2: 0.5}])
def test_class_weights_are_those_of_scikit_learn(class_weight):
    x, y = draw()
    model = SoftmaxRegression(class_weight=class_weight, tol=1e-10).fit(x, y)
    peer = LogisticRegression(class_weight=class_weight, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-5)
    soft = SoftmaxRegression(class_weight=class_weight, tol=1e-10)
    if class_weight == "balanced":
        np.testing.assert_allclose(soft.fit(x, np.eye(4)[y]).coef_, peer.coef_, atol=1e-5)


def test_without_intercept():
    x, y = draw()
    model = SoftmaxRegression(fit_intercept=False, tol=1e-10).fit(x, y)
    peer = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-5)
    assert not model.intercept_.any()


# The passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "n, d, c", [(1, 1, 2), (31, 5, 3), (33, 64, 4), (500, 100, 10), (64, 3, 32)]
)
@pytest.mark.parametrize("soft", [False, True])
def test_the_kernel_computes_what_the_products_do(dtype, n, d, c, soft):
    rng = np.random.default_rng(n)
    x, s = rng.standard_normal((n, d)).astype(dtype), rng.random(n)
    y = rng.integers(0, c, n)
    h = (rng.dirichlet(np.ones(c), n) * rng.random((n, 1))).astype(dtype)
    data = Data(x, None if soft else y, h if soft else None, s, c)
    model = rng.standard_normal((c, d)), rng.standard_normal(c)
    to = rng.standard_normal((c, d)), rng.standard_normal(c)
    few, many = FewClasses(data, curved=True), Products(data)
    unit = 50 * np.finfo(dtype).eps * n
    for got, want in (
        (few.gradient(*model), many.gradient(*model)),
        (few.curvature(*model, to), many.curvature(*model, to)),
        (few.curvature(*to, model), many.curvature(*to, model)),
    ):
        np.testing.assert_allclose(got.loss, want.loss, rtol=unit)
        np.testing.assert_allclose(got.weight, want.weight, atol=unit)
        np.testing.assert_allclose(got.bias, want.bias, atol=unit)


def test_the_kernel_keeps_small_losses():
    x = np.array([[40.0], [-45.0]])
    data = Data(x, np.array([0, 1]), None, None, 2)
    found = FewClasses(data, curved=False).gradient(np.array([[1.0], [0.0]]), np.zeros(2))
    exactly = {"rel": 1e-14, "abs": 0}
    assert found.loss == pytest.approx(np.exp(-40.0) + np.exp(-45.0), **exactly)
    assert found.weight[0, 0] == pytest.approx(-40 * np.exp(-40) - 45 * np.exp(-45), **exactly)


@pytest.mark.parametrize("bias", [[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]])
def test_the_kernel_leaves_out_one_of_equal_maxima(bias):
    """Where the coefficients are zero, all classes have the same logit."""
    bias, y = np.array(bias), np.arange(40) % 4
    data = Data(np.ones((40, 3)), y, None, None, 4)
    found = FewClasses(data, curved=False).gradient(np.zeros((4, 3)), bias)
    p = np.exp(bias) / np.exp(bias).sum()
    assert found.loss == pytest.approx(-10 * np.log(p).sum(), rel=1e-14)
    np.testing.assert_allclose(found.bias, 40 * p - 10, atol=1e-13)


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_gradient_and_hessian_in_the_solvers_coordinates(correlated, sparse, monkeypatch):
    monkeypatch.setattr(objective, "CORRELATED", 2048 if correlated else 0)
    x, y = draw(60, 5, 3)
    x[:, 4] = 0  # a feature that tells nothing
    data = Data(scipy.sparse.csr_array(x) if sparse else x, y, None, np.full(60, 0.5), 3)
    found = objective.Objective(data, 0.7, True, curved=True)
    rng = np.random.default_rng(1)
    v, to = rng.standard_normal((2, found.shape[0] * found.shape[1]))
    theta = found.to_theta(v)
    np.testing.assert_allclose(found.from_theta(theta), v, rtol=1e-6, atol=1e-7)
    value, gradient = found(v)
    want = objective_of(theta, x, np.eye(3)[y], np.full(60, 0.5), 0.7) / 30
    assert value == pytest.approx(want, rel=1e-12)
    step = 1e-5
    up, down = found(v + step * to), found(v - step * to)
    slope = (up[0] - down[0]) / (2 * step)
    assert np.dot(gradient, to) == pytest.approx(slope, rel=1e-6)
    product = found.hessian_product(v, to)
    np.testing.assert_allclose(
        product, (up[1] - down[1]) / (2 * step), rtol=1e-4, atol=1e-6 * abs(product).max()
    )


def test_the_hessian_starts_as_the_identity():
    x, y = draw(400, 6, 5)
    found = objective.Objective(Data(x, y, None, None, 5), 0.0, True, curved=True)
    start = np.zeros(found.shape[0] * found.shape[1])
    to = np.random.default_rng(0).standard_normal(found.shape)
    to -= to.mean(axis=0)
    np.testing.assert_allclose(
        found.hessian_product(start, to.ravel()), to.ravel(), atol=0.02 * abs(to).max()
    )


# Standard errors ----------------------------------------------------------------------------------


def test_standard_errors_on_iris_are_the_published_ones():
    """Versicolor against virginica: the coefficients and errors of R's glm and of statsmodels."""
    x, y = load_iris(return_X_y=True)
    model = SoftmaxRegression(0.0, tol=1e-10).fit(x[50:], y[50:])
    estimate = theta_of(model)[1] - theta_of(model)[0]
    np.testing.assert_allclose(estimate, [-2.465, -6.681, 9.429, 18.286, -42.638], atol=6e-4)
    errors = model.standard_errors(x[50:])
    np.testing.assert_allclose(errors[1], [2.394, 4.480, 4.737, 9.743, 25.708], atol=6e-4)
    assert not errors[0].any()


@pytest.mark.parametrize("l2", [0.0, 2.0])
def test_standard_errors_are_those_of_the_hessian(l2):
    """Against second differences of the objective, one class fixed, or profiled if penalised."""
    x, y = draw(200, 3, 3)
    s = np.random.default_rng(0).random(200) + 0.5
    model = SoftmaxRegression(l2, tol=1e-11).fit(x, y, s)
    h = np.eye(3)[y]
    theta = theta_of(model)
    free = theta[[0, 2]] - theta[1]

    def reduced(t):
        full = np.insert(t.reshape(2, 4), 1, 0, axis=0)
        full = full - np.append(full[:, :-1].mean(axis=0), 0.0)  # the common part that costs least
        return objective_of(full, x, h, s, l2)

    step, size = 1e-4, free.size
    hessian = np.empty((size, size))
    unit = np.eye(size) * step
    for i in range(size):
        for j in range(size):
            hessian[i, j] = sum(
                a * b * reduced(free.ravel() + a * unit[i] + b * unit[j])
                for a in (-1, 1) for b in (-1, 1)
            ) / (4 * step**2)  # fmt: skip
    want = np.sqrt(np.diag(np.linalg.inv(hessian))).reshape(2, 4)
    errors = model.standard_errors(x, s, reference=1)
    np.testing.assert_allclose(errors[[0, 2]], want, rtol=1e-4)
    np.testing.assert_allclose(
        model.standard_errors(scipy.sparse.csr_array(x), s, reference=-2), errors, rtol=1e-12
    )


@pytest.mark.needs("peers")
def test_the_estimate_of_statsmodels():
    """MNLogit: the same optimum, log likelihood and standard errors."""
    import statsmodels.api as api

    x, y = draw(c=3)
    model = SoftmaxRegression(l2=0.0, solver="newton-cg", tol=1e-10).fit(x, y)
    theirs = api.MNLogit(y, api.add_constant(x)).fit(disp=0, method="newton", maxiter=100)
    ours = np.column_stack([model.intercept_, model.coef_])
    np.testing.assert_allclose(ours[1:] - ours[0], theirs.params.T, atol=2e-8)  # where it stops
    np.testing.assert_allclose(model.log_likelihood(x, y), theirs.llf, rtol=1e-13)
    errors = np.roll(model.standard_errors(x, reference=0), 1, axis=1)  # their constant is first
    np.testing.assert_allclose(errors[1:], theirs.bse.T, rtol=1e-7)


def test_standard_errors_say_what_they_cannot(monkeypatch):
    x, y = draw()
    model = SoftmaxRegression(0.0).fit(x, y)
    with pytest.raises(ValueError, match="reference: expected an index of 4 classes, got 4"):
        model.standard_errors(x, reference=4)
    monkeypatch.setattr(information, "MOST", 10)
    with pytest.raises(ValueError, match=r"expected at most 10 free coefficients .*got 24"):
        model.standard_errors(x)


# What it says of its work -------------------------------------------------------------------------


def test_too_few_iterations_are_told():
    x, y = draw()
    with pytest.warns(ConvergenceWarning, match="max_iter: 2 iterations were not enough"):
        model = SoftmaxRegression(max_iter=2).fit(x, y)
    assert model.n_iter_ == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_classes_are_told(solver):
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.warns(ConvergenceWarning, match="the classes are separable"):
        SoftmaxRegression(0.0, solver=solver).fit(x, [0, 0, 1, 1])
    SoftmaxRegression(1.0, solver=solver).fit(x, [0, 0, 1, 1])
    SoftmaxRegression(0.0, solver=solver).fit(x, [0, 1, 0, 1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_ends_where_rounding_does(solver):
    x, y = draw(2000, 10, 5, np.float32)
    model = SoftmaxRegression(solver=solver, tol=0.0).fit(x, y)
    best = SoftmaxRegression(tol=1e-10).fit(x.astype(float), y)
    assert model.loss_curve_[-1] == pytest.approx(best.loss_curve_[-1], rel=1e-6)
    assert model.n_iter_ < 60


def test_progress_goes_to_the_standard_error(capsys):
    x, y = draw()
    model = SoftmaxRegression(verbose=True).fit(x, y)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("iteration    0  objective 1.386294361  gradient")
    assert lines[-1].startswith(
        f"iteration {model.n_iter_:4}  objective {model.loss_curve_[-1]:.9f}"
    )
    SoftmaxRegression().fit(x, y)
    assert capsys.readouterr() == ("", "")


def test_a_bar_where_somebody_looks(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    x, y = draw()
    SoftmaxRegression(verbose=True).fit(x, y)
    assert "objective" in capsys.readouterr().err


def test_warm_start_goes_on():
    x, y = draw()
    model = SoftmaxRegression(warm_start=True).fit(x, y)
    first = model.coef_
    model.fit(x, y)
    assert model.n_iter_ == 0
    assert same_bits(model.coef_, first)
    model.fit(x, y % 3)  # another number of classes starts anew
    assert model.coef_.shape == (3, 7)


# Likelihood, probabilities ------------------------------------------------------------------------


def test_likelihood_and_probabilities():
    x, y = draw()
    names = np.array(["ash", "beech", "cedar", "date"])[y]
    model = SoftmaxRegression().fit(x, names)
    p = model.predict_proba(x)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(x)), p, rtol=1e-12)
    want = np.log(p[np.arange(len(y)), y])
    assert model.log_likelihood(x, names) == pytest.approx(want.sum(), rel=1e-12)
    s = np.arange(len(y)) / 100
    assert model.log_likelihood(x, names, s) == pytest.approx(want @ s, rel=1e-12)
    assert model.log_likelihood(x, np.eye(4)[y]) == pytest.approx(want.sum(), rel=1e-12)
    assert model.decision_function(x).shape == p.shape
    assert (model.classes_[p.argmax(axis=1)] == model.predict(x)).all()


def test_works_with_the_tools_of_scikit_learn():
    x, y = draw()
    pipeline = make_pipeline(StandardScaler(), SoftmaxRegression())
    search = GridSearchCV(pipeline, {"softmaxregression__l2": [0.1, 10.0]}, cv=3).fit(x, y)
    assert search.best_score_ > 0.5
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.5
    model = pickle.loads(pickle.dumps(SoftmaxRegression().fit(x, y)))
    assert same_bits(model.predict_proba(x), clone(model).fit(x, y).predict_proba(x))


# Streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "csr", "soft", "scales alone"])
def test_a_stream_comes_near_to_the_fit_of_all(kind, monkeypatch):
    if kind == "scales alone":
        monkeypatch.setattr("fastce._fit.stream.CORRELATED", 0)
    x, y = draw(20_000, 5, 3)
    whole = SoftmaxRegression().fit(x, y)
    model = SoftmaxRegression()
    labels = np.eye(3)[y] if kind == "soft" else y
    for start in range(0, len(x), 200):
        part = x[start : start + 200]
        part = scipy.sparse.csr_array(part) if kind == "csr" else part
        model.partial_fit(
            part, labels[start : start + 200], classes=None if kind == "soft" else [0, 1, 2]
        )
    assert len(model.loss_curve_) == 100
    excess = whole.log_likelihood(x, y) - model.log_likelihood(x, y)
    # in nats, of 20000 rows; the estimate itself is some 6 from the truth
    assert excess < (20 if kind != "scales alone" else 250)
    assert np.mean(model.loss_curve_[-20:]) < np.mean(model.loss_curve_[:3])


def test_a_stream_keeps_its_classes():
    x, y = draw()
    model = SoftmaxRegression().partial_fit(x[:5], y[:5], classes=[3, 2, 1, 0])
    assert model.classes_.tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"y: expected classes of classes_, got .*7.* at index \(0,\)"
    ):
        model.partial_fit(x[:1], [7])
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(x[:, :2], y)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"l2": -1.0}, "l2: expected a number, at least 0, got -1.0"),
        ({"l2": "1"}, "l2: expected a number"),
        ({"tol": np.nan}, "tol: expected a number, at least 0, got nan"),
        ({"max_iter": 0}, "max_iter: expected a number, at least 1, got 0"),
        ({"solver": "sgd"}, "solver: expected 'newton-cg' or 'lbfgs', got 'sgd'"),
        ({"class_weight": {9: 1.0}}, "class_weight: expected classes of y, got 9"),
        ({"class_weight": 3}, "class_weight: expected a dict, 'balanced' or None, got 3"),
    ],
)
def test_bad_parameters(parameters, message):
    x, y = draw()
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression(**parameters).fit(x, y)


def test_bad_labels():
    x, y = draw()
    model = SoftmaxRegression()
    with pytest.raises(ValueError, match="y: expected at least 2 classes, got 1 class"):
        model.fit(x, np.zeros(len(x), int))
    with pytest.raises(ValueError, match=r"y: expected probabilities, at least 0, got -1\.0"):
        model.fit(x, -np.eye(4)[y])
    with pytest.raises(ValueError, match="expected a weight above 0"):
        model.fit(x, np.zeros((len(x), 4)))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(x, np.eye(4)[y][:5])
    with pytest.warns(DataConversionWarning):
        model.fit(x, y[:, None])
    with pytest.raises(ValueError, match="y: expected 4 columns, one per class, got 3"):
        model.log_likelihood(x, np.eye(3)[y % 3])
