"""Covariance and summary of SoftmaxRegression: published numbers, other programs, other units."""

import numpy as np
import pandas
import pytest
import scipy.sparse
import scipy.stats
from sklearn.datasets import load_iris

from fastce.sklearn import SoftmaxRegression

IRIS = [
    # R: summary(glm(Species ~ ., binomial, iris[51:150, ])), estimate, std. error, z, p
    [-2.465, 2.394, -1.030, 0.3032],
    [-6.681, 4.480, -1.491, 0.1359],
    [9.429, 4.737, 1.991, 0.0465],
    [18.286, 9.743, 1.877, 0.0605],
    [-42.638, 25.708, -1.659, 0.0972],
]


def draw(rows=400, classes=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 3)) * [1, 2, 0.5] + [0, 1, -1]
    z = x @ rng.standard_normal((3, classes)) / 2 + rng.gumbel(size=(rows, classes))
    return x, np.argmax(z, axis=1), rng.integers(1, 4, rows) / 2


def test_the_summary_of_iris_is_that_of_r():
    x, y = load_iris(return_X_y=True)
    names = load_iris().target_names
    model = SoftmaxRegression(0.0, solver="newton-cg", tol=1e-10).fit(x[50:], names[y[50:]])
    found = model.summary(x[50:])
    table = np.stack([getattr(found, c)[0] for c in ("estimate", "standard_error", "z", "p")], 1)
    np.testing.assert_allclose(table, IRIS, atol=6e-4)
    assert found.reference == "versicolor"
    assert found.classes.tolist() == ["virginica"]
    assert found.features.tolist() == ["x0", "x1", "x2", "x3", "(intercept)"]
    other = model.summary(x[50:], reference=-1)
    assert other.classes.tolist() == ["versicolor"]
    np.testing.assert_allclose(other.estimate, -found.estimate)
    np.testing.assert_allclose(other.standard_error, found.standard_error, rtol=1e-9)


@pytest.mark.parametrize("reference", [0, 1, 2, -1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_covariance_is_the_inverse_of_the_information(sparse, intercept, weighted, reference):
    """By its formula, of all rows at once, in the coordinates of X."""
    x, y, s = draw()
    s = s if weighted else None
    model = SoftmaxRegression(0.0, tol=1e-10, fit_intercept=intercept).fit(x, y, s)
    p = np.delete(model.predict_proba(x), reference, axis=1)
    x1 = np.column_stack([x, np.ones(len(x))]) if intercept else x
    blocks = (np.eye(2) * p[:, :, None] - p[:, :, None] * p[:, None]) * (
        1 if s is None else s[:, None, None]
    )
    information = np.einsum("nab,nf,ng->afbg", blocks, x1, x1).reshape(2 * (2 * x1.shape[1],))
    given = scipy.sparse.csr_array(x) if sparse else x
    found = model.covariance(given, s, reference=reference)
    np.testing.assert_allclose(found, np.linalg.inv(information), rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(found, found.T)
    errors = model.standard_errors(given, s, reference=reference)
    np.testing.assert_allclose(
        np.delete(errors, reference, axis=0).ravel() ** 2, np.diag(found), rtol=1e-12
    )
    table = model.summary(given, s, reference=reference, confidence=0.9)
    theta = np.column_stack([model.coef_, model.intercept_]) if intercept else model.coef_
    want = np.delete(theta - theta[reference], reference, axis=0)
    np.testing.assert_allclose(table.estimate, want, rtol=1e-12)
    np.testing.assert_allclose(table.p, 2 * scipy.stats.norm.sf(abs(table.z)), rtol=1e-9)
    lower, upper = scipy.stats.norm.interval(0.9, want, table.standard_error)
    np.testing.assert_allclose([table.lower, table.upper], [lower, upper], rtol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "csr", "float32"])
@pytest.mark.parametrize(
    "factor, offset",
    [(1e-9, 0.0), (1e12, 0.0), (1.0, 1e6), ([1e-9, 1e12, 1e3], [1e-3, 1e18, 0]), (1e150, 0.0)],
)
def test_standard_errors_have_the_units_of_the_estimates(factor, offset, kind):
    x, y, s = draw()
    far = x * factor + offset
    if kind == "float32":
        if np.max(factor) > 1e30:
            return
        far = far.astype(np.float32)
        x = (far.astype(float) - offset) / factor
    given = scipy.sparse.csr_array(far) if kind == "csr" else far
    near = SoftmaxRegression(0.0, tol=1e-9).fit(x, y, s)
    model = SoftmaxRegression(0.0, tol=1e-9 if kind != "float32" else 1e-6).fit(given, y, s)
    want, found = near.summary(x, s), model.summary(given, s)
    bound = 1e-6 if kind != "float32" else 2e-3
    for name in ("z", "p"):
        np.testing.assert_allclose(
            getattr(found, name)[:, :3], getattr(want, name)[:, :3], rtol=bound, atol=bound
        )
    np.testing.assert_allclose(
        found.standard_error[:, :3] * factor, want.standard_error[:, :3], rtol=bound
    )
    units = np.tile(np.append(np.ones(3) * factor, np.nan), 2)
    whole = model.covariance(given, s) * units * units[:, None]
    np.testing.assert_allclose(
        whole[:3, 4:7],
        near.covariance(x, s)[:3, 4:7],
        atol=bound * abs(near.covariance(x, s)).max(),
    )


def test_a_penalty_makes_it_certain_and_errors_say_what_they_cannot():
    x, y, _ = draw()
    twice = np.column_stack([x, x[:, 0]])
    for wrong, message in (
        (twice, "features that depend on each other"),
        (np.column_stack([x, np.full(len(x), 3.0)]), "a constant, feature 3"),
    ):
        model = SoftmaxRegression(0.0).fit(wrong, y)
        for ask in (model.covariance, model.standard_errors, model.summary):
            with pytest.raises(np.linalg.LinAlgError, match=message):
                ask(wrong)
        sure = SoftmaxRegression(1.0).fit(wrong, y)
        assert (np.delete(sure.standard_errors(wrong), 0, axis=0) > 0).all()
    model = SoftmaxRegression(0.0).fit(x * 1e200, y)
    assert (model.standard_errors(x * 1e200)[1:, :3] > 0).all()
    with pytest.raises(ValueError, match="variances that float64 holds"):
        model.covariance(x * 1e200)
    for confidence in (0.0, 1.0, "0.9", np.nan):
        with pytest.raises(ValueError, match=r"confidence: expected a number in \(0, 1\)"):
            model.summary(x, confidence=confidence)
    with pytest.raises(ValueError, match="reference: expected an index of 3 classes, got -4"):
        model.summary(x, reference=-4)


@pytest.mark.parametrize("seed", range(8))
def test_dependence_is_found_behind_its_rounding(seed):
    """Sums of features that rounding makes ever so slightly independent."""
    x, y, _ = draw()
    y, mixture = y % 2, np.random.default_rng(seed).standard_normal((3, 1))
    dependent = np.column_stack([x, x @ mixture])
    model = SoftmaxRegression(0.0).fit(dependent, y)
    with pytest.raises(np.linalg.LinAlgError, match="features that depend on each other"):
        model.standard_errors(dependent)


def test_the_table_prints_and_is_a_frame():
    x, y, _ = draw()
    frame = pandas.DataFrame(x, columns=["age", "income", "size"])
    model = SoftmaxRegression(0.0).fit(frame, np.array(["a", "b", "c"])[y])
    found = model.summary(frame, reference=1)
    lines = str(found).splitlines()
    assert lines[0] == "relative to class b"
    assert lines[1].split()[:3] == ["class", "feature", "estimate"]
    assert [line.split()[:2] for line in lines[2:]] == [
        [c, f] for c in "ac" for f in ("age", "income", "size", "(intercept)")
    ]
    assert float(lines[2].split()[2]) == pytest.approx(found.estimate[0, 0], rel=1e-4)
    table = found.to_frame()
    assert table.loc[("c", "income"), "z"] == found.z[1, 1]
    assert list(table) == ["estimate", "standard_error", "z", "p", "lower", "upper"]


@pytest.mark.needs("peers")
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_the_stored_results_of_statsmodels(solver):
    """Party identification in 1996, of Stata, which statsmodels checked against R's nnet."""
    import statsmodels.api as api
    from statsmodels.discrete.tests.results import results_discrete as results

    data = api.datasets.anes96.load()
    x, y = np.asarray(data.exog, float), np.asarray(data.endog)
    want = results.Anes.mnlogit_basezero
    want = want() if callable(want) else want
    model = SoftmaxRegression(0.0, solver=solver, tol=1e-9).fit(x, y)
    found = model.summary(x)
    np.testing.assert_allclose(found.estimate, want.params.T, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, want.bse.T, rtol=1e-5)
    np.testing.assert_allclose(found.z, want.z.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.p, want.pvalues.T, atol=1e-3)
    limits = np.moveaxis(np.asarray(want.conf_int).reshape(6, 6, 2), 2, 0)
    np.testing.assert_allclose([found.lower, found.upper], limits, rtol=1e-3, atol=1e-4)
    assert model.log_likelihood(x, y) == pytest.approx(want.llf, rel=1e-8)


@pytest.mark.needs("peers")
@pytest.mark.parametrize("reference", [0, 2])
def test_the_covariance_of_statsmodels(reference):
    import statsmodels.api as api

    x, y, _ = draw(classes=4)
    model = SoftmaxRegression(0.0, solver="newton-cg", tol=1e-11).fit(x, y)
    order = np.insert(np.delete(np.arange(4), reference), 0, reference)
    theirs = api.MNLogit(np.argsort(order)[y], np.column_stack([x, np.ones(len(x))])).fit(
        disp=0, method="newton", maxiter=100
    )
    found = model.summary(x, reference=reference, confidence=0.99)
    np.testing.assert_allclose(
        model.covariance(x, reference=reference), np.asarray(theirs.cov_params()), rtol=1e-6,
        atol=1e-9,
    )  # fmt: skip
    limits = np.moveaxis(np.asarray(theirs.conf_int(0.01)).reshape(3, 4, 2), 2, 0)
    np.testing.assert_allclose([found.lower, found.upper], limits, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.p, np.asarray(theirs.pvalues).T, rtol=1e-6)
