"""SoftmaxRegression does not depend on units or offsets of the features, in any way in.

The likelihood of an estimate without a penalty is that of the standardised features, and a penalty
is that of the coefficients as they are. Offsets of a million spreads leave float64 ten digits of a
feature, float32 one or two: there the features that are left are what counts.
"""

import warnings

import dask.array as da
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special
from sklearn.exceptions import ConvergenceWarning

from fastce._fit import coordinates, objective, passes, stream
from fastce._fit.coordinates import Coordinates, Moments
from fastce.sklearn import SoftmaxRegression

ROWS = 600
MIXED = np.array([1e-9, 1e12, 1.0, 1e5])
# Factor and offset of the features.
UNITS = {
    "1e-9": (1e-9, 0.0),
    "1e12": (1e12, 0.0),
    "nanoseconds": (86400e9, 19882 * 86400e9),
    "far": (1.0, 1e6),
    "far and negative": (-1e-3, -1e3),
    "mixed": (MIXED, 0.0),
    "mixed and far": (MIXED, 1e6 * MIXED * np.array([1, -1, 0.5, 0])),
    "1e-35": (1e-35, 0.0),
    "1e37": (1e37, 0.0),
    "1e-150": (1e-150, 0.0),
    "1e200": (1e200, 1e204),
    "1e300": (1e300, 0.0),
}
SINGLE = ["1e-9", "1e12", "far", "far and negative", "mixed", "mixed and far", "1e-35", "1e37"]
WAYS = {
    "dense": lambda x: x,
    "csr": scipy.sparse.csr_array,
    "chunks": lambda x: da.from_array(x, chunks=(170, -1)),
    "sparse chunks": lambda x: da.from_array(x, chunks=(170, -1)).map_blocks(
        scipy.sparse.csr_array, meta=scipy.sparse.csr_array((0, 0), dtype=x.dtype)
    ),
}


def draw(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 4))
    y = np.argmax(x @ rng.standard_normal((4, 3)) + rng.gumbel(size=(rows, 3)), axis=1)
    return x, y


def standardised(x):
    """In extended precision, without fastce."""
    x = x.astype(np.longdouble)
    x = x - x.mean(axis=0)
    return np.asarray(x / abs(x).max(axis=0), float)


def maximum(x, y):
    """Probabilities of the estimate, by another method."""
    x1, h = np.column_stack([x, np.ones(len(x))]), np.eye(3)[y]

    def call(t):
        z = x1 @ t.reshape(3, -1).T
        g = (scipy.special.softmax(z, axis=1) - h).T @ x1
        return -np.sum(h * scipy.special.log_softmax(z, axis=1)), g.ravel()

    found = scipy.optimize.minimize(
        call, np.zeros(3 * x1.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-6}
    )
    return scipy.special.softmax(x1 @ found.x.reshape(3, -1).T, axis=1)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("unit", UNITS)
def test_the_maximum_is_that_of_the_standardised_features(unit, way, solver):
    x, y = draw()
    factor, offset = UNITS[unit]
    x = x * factor + offset
    model = SoftmaxRegression(0.0, solver=solver).fit(WAYS[way](x), y)
    np.testing.assert_allclose(model.predict_proba(x), maximum(standardised(x), y), atol=1e-5)
    assert model.n_iter_ < 20


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("unit", SINGLE)
def test_the_maximum_in_float32(unit, way, solver):
    x, y = draw()
    factor, offset = UNITS[unit]
    x = (x * factor + offset).astype(np.float32)
    model = SoftmaxRegression(0.0, solver=solver).fit(WAYS[way](x), y)
    np.testing.assert_allclose(model.predict_proba(x), maximum(standardised(x), y), atol=2e-4)
    plain = unit in ("1e-9", "1e12", "mixed")
    assert model.coef_.dtype == (np.float32 if plain else np.float64)


@pytest.mark.parametrize("kind", ["dense", "csr", "chunks", "float32", "diagonal", "csr diagonal"])
@pytest.mark.parametrize("unit", UNITS)
def test_a_stream_is_that_of_the_standardised_features(unit, kind, monkeypatch):
    if "diagonal" in kind:
        monkeypatch.setattr("fastce._fit.stream.CORRELATED", 0)
    if kind == "float32" and unit not in SINGLE:
        unit = "1e-9"
    x, y = draw()
    factor, offset = UNITS[unit]
    far = x * factor + offset
    if kind == "float32":
        far = far.astype(np.float32)
        x = standardised(far)

    def learn(x, sizes):
        model = SoftmaxRegression(0.0)
        for k, start in enumerate(np.cumsum([0, *sizes[:-1]])):
            part = slice(start, start + sizes[k])
            given = scipy.sparse.csr_array(x[part]) if "csr" in kind and x is far else x[part]
            model.partial_fit(given, y[part], classes=[0, 1, 2])
        return model

    sizes = [1, 99, 200, 300]  # the first batch has no spread
    if kind == "chunks":
        found = SoftmaxRegression(0.0).partial_fit(
            da.from_array(far, chunks=(tuple(sizes), 4)), y, classes=[0, 1, 2]
        )
    else:
        found = learn(far, sizes)
    want = learn(x, sizes)
    bound = 2e-5 if kind == "float32" else 1e-8
    np.testing.assert_allclose(found.predict_proba(far), want.predict_proba(x), atol=bound)
    np.testing.assert_allclose(found.loss_curve_, want.loss_curve_, atol=10 * bound)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
def test_what_a_stream_knows_moves_with_its_coordinates(diagonal, intercept, monkeypatch):
    """Nothing is learnt, and nothing forgotten, when means and spreads become others."""
    if diagonal:
        monkeypatch.setattr(stream, "CORRELATED", 0)
    x, y = draw(50)
    theta = np.random.default_rng(1).standard_normal((3, 4 + intercept))
    drifted = Moments.of(x, None).merged(Moments.of(5 * x + 20, None))
    found = stream.Stream(theta * 0, intercept, 0.0)
    found.update(passes.Data(x, y, None, None, 3))
    before, curvature = found.theta, np.linspace(0.1, 1, 50)
    information = type(found._information)
    found._information = moved = information(4)
    zero = np.zeros(4)
    moved.add(found._coordinates.design(x)[:, :4], zero, curvature)
    found._move(drifted)
    found._move(drifted.merged(Moments.of(9 * x - 30, None)))
    np.testing.assert_allclose(found.theta, before, rtol=1e-12)
    want = information(4)
    want.add(found._coordinates.design(x)[:, :4], zero, curvature)
    gradient, prior = np.eye(4 + intercept), np.full(4 + intercept, 1e-3)
    np.testing.assert_allclose(
        moved.solve(gradient, prior), want.solve(gradient, prior), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("l2", [1e-6, 1.0, 1e20])
@pytest.mark.parametrize("unit", ["1e-9", "1e12", "nanoseconds", "far", "mixed and far"])
def test_a_penalty_is_that_of_the_coefficients_as_they_are(unit, l2, solver):
    """Which is one of l2 / spread^2 for each of those of the standardised features."""
    x, y = draw()
    factor, offset = UNITS[unit]
    x = x * factor + offset
    model = SoftmaxRegression(l2, solver=solver, tol=1e-9).fit(x, y)
    s, h = standardised(x), np.eye(3)[y]
    # what W s + b is in terms of the coefficients of x, by least squares of two points
    scale = np.ptp(x, axis=0) / np.ptp(s, axis=0)
    x1 = np.column_stack([s, np.ones(len(x))])

    def call(t):
        theta = t.reshape(3, -1)
        z = x1 @ theta.T
        penalised = theta[:, :-1] / scale
        g = (scipy.special.softmax(z, axis=1) - h).T @ x1
        g[:, :-1] += l2 * penalised / scale
        value = -np.sum(h * scipy.special.log_softmax(z, axis=1)) + l2 / 2 * np.sum(penalised**2)
        return value, g.ravel() / size, theta

    # coordinates in which the penalty alone has curvature 1 at most
    size = np.append(np.sqrt(1 + l2 / scale**2), 1.0)
    size = np.tile(size, 3)
    found = scipy.optimize.minimize(
        lambda t: call(t / size)[:2], np.zeros(15), jac=True, method="BFGS", options={"gtol": 1e-6}
    )
    z = x1 @ (found.x / size).reshape(3, -1).T
    np.testing.assert_allclose(model.predict_proba(x), scipy.special.softmax(z, axis=1), atol=2e-6)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("far", [0.0, 1e3, 1e5])
def test_ones_own_column_of_ones_is_an_intercept(solver, far):
    x, y = draw()
    x1 = np.column_stack([np.full(len(x), 7.0), x + far])
    model = SoftmaxRegression(0.0, solver=solver, fit_intercept=False).fit(x1, y)
    np.testing.assert_allclose(model.predict_proba(x1), maximum(x, y), atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("constant", [0.1, -1e6, 1.7e18])
@pytest.mark.parametrize("l2", [0.0, 1.0])
def test_a_constant_feature_has_no_coefficient(constant, l2, way):
    x, y = draw()
    with_it = np.column_stack([x, np.full(len(x), constant)])
    found = SoftmaxRegression(l2).fit(WAYS[way](with_it), y)
    want = SoftmaxRegression(l2).fit(WAYS[way](x), y)
    assert abs(found.coef_[:, 4] * constant).max() < 1e-6
    np.testing.assert_allclose(found.coef_[:, :4], want.coef_, atol=1e-6)


def test_a_warm_start_is_the_end_of_the_fit_before():
    x, y = draw()
    x = x * MIXED + 1e6 * MIXED
    model = SoftmaxRegression(0.0, warm_start=True).fit(x, y)
    assert model.fit(x, y).n_iter_ == 0


@pytest.mark.parametrize("dtype, value", [("f8", 1.7e308), ("f8", 1e-305)])
def test_what_float64_cannot_hold_is_told(dtype, value):
    x, y = draw()
    x[:, 2] = np.where(x[:, 2] > 0, value, 0)
    for learn in (
        lambda m: m.fit(x.astype(dtype), y),
        lambda m: m.partial_fit(x.astype(dtype), y, classes=[0, 1, 2]),
        lambda m: m.fit(da.from_array(x.astype(dtype), chunks=(100, 4)), y),
    ):
        with pytest.raises(ValueError, match=r"X: expected features that vary by .* in feature 2"):
            learn(SoftmaxRegression(0.0))


def test_a_solver_that_cannot_go_on_says_so(monkeypatch):
    """Where rounding ends the way far from the maximum: here, as it is said to be gross."""
    x, y = draw()
    real = objective.Objective.__init__

    def rounded(self, *args, **given):
        real(self, *args, **given)
        self.noise = 0.02

    monkeypatch.setattr(objective.Objective, "__init__", rounded)
    monkeypatch.setattr("fastce._fit.solvers.ROUNDED", 1e-9)
    with pytest.warns(ConvergenceWarning, match="rounding hides any further progress"):
        SoftmaxRegression(1.0).fit(x, y)
    monkeypatch.setattr("fastce._fit.solvers.ROUNDED", 1e9)
    SoftmaxRegression(1.0).fit(x, y)


def test_far_features_are_not_copied_whole(monkeypatch):
    """In blocks, whose size has a bound."""
    asked = []
    real = coordinates.Standardised.__getitem__

    def counted(self, rows):
        found = real(self, rows)
        asked.append(found.size)
        return found

    monkeypatch.setattr(coordinates.Standardised, "__getitem__", counted)
    monkeypatch.setattr(passes, "MEMORY", 8 * 7 * 100)
    x, y = draw()
    SoftmaxRegression(0.0).fit(x + 1e6, y)
    assert asked
    assert max(asked) <= 4 * 100


# Moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_moments_in_blocks_and_merged(unit, weighted, sparse, monkeypatch):
    monkeypatch.setattr(coordinates, "BLOCK", 40)
    x, _ = draw(97)
    factor, offset = UNITS[unit]
    x = x * factor + offset
    x[np.random.default_rng(1).random(x.shape) < 0.3] = 0
    x[:, 3] = x[:, 3].max()  # constant
    s = np.random.default_rng(2).integers(0, 3, 97) / 4 if weighted else None
    given = scipy.sparse.csr_array(x) if sparse else x
    parts = [
        Moments.of(given[part], None if s is None else s[part])
        for part in (slice(0, 30), slice(30, 30), slice(30, 97))
    ]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    exact, weight = x.astype(np.longdouble), np.ones(97) if s is None else s
    mean = weight @ exact / weight.sum()
    spread = np.sqrt(weight @ (exact - mean) ** 2 / weight.sum())
    for found in (merged, Moments.of(given, s)):
        assert found.weight == weight.sum()
        size = np.hypot(mean, spread)
        assert np.all(abs(found.mean - mean) <= 1e-14 * size)
        assert np.all(abs(found.spread - spread) <= 1e-12 * size)
        assert found.spread[3] == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_without_weight_have_no_moments(sparse):
    x = np.array([[1e300, 5.0], [1.0, 7.3], [2.0, 7.3], [4.0, 7.3]])
    given = scipy.sparse.csr_array(x) if sparse else x
    found, want = (
        Moments.of(given, np.array([0.0, 0.1, 0.2, 0.3])),
        Moments.of(given[1:], np.array([0.1, 0.2, 0.3])),
    )
    assert found.spread[1] == 0
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_of_stored_twice():
    twice = scipy.sparse.csr_array(([1.0, 2.0, 5.0], [0, 0, 0], [0, 2, 3]), shape=(2, 1))
    found = Moments.of(twice, None)
    assert (found.mean[0], found.spread[0]) == (4.0, 1.0)


def test_coordinates_and_back():
    x, _ = draw(50)
    x = x * MIXED + 1e3 * MIXED
    for intercept in (True, False):
        there = Coordinates.of(Moments.of(x, None), intercept)
        theta = np.random.default_rng(0).standard_normal((3, 4 + intercept))
        theta[:, :4] /= MIXED
        phi = there.from_theta(theta)
        np.testing.assert_allclose(there.to_theta(phi), theta, rtol=1e-9)
        z = there.design(x) @ phi.T
        want = x @ theta[:, :4].T + (theta[:, 4] if intercept else 0)
        np.testing.assert_allclose(z, want, rtol=1e-9)


def test_no_warning_of_numpy_escapes():
    x, y = draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftmaxRegression(0.0).fit(x * 1e300, y)
        SoftmaxRegression(0.0).fit(x * 1e-290, y)
