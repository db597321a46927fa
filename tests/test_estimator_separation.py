"""SoftmaxRegression says that there is no maximum of the likelihood, exactly where there is none.

Every case is known by its construction: a direction of the coefficients that makes some rows
likelier and none less, or rows that overlap.
"""

import warnings

import dask.array as da
import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from fastce._fit import labels, objective, separation
from fastce.sklearn import SoftmaxRegression

ROWS = 240
COMPLETE, PARTLY = "the classes are separable: every", "the classes are separable in part"


def draw():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 3))
    return x, np.argmax(x @ rng.standard_normal((3, 3)) + rng.gumbel(size=(ROWS, 3)), axis=1), rng


def overlapping():
    x, y, _ = draw()
    return x, y, None


def dependent():
    """All levels of a factor, a feature twice, a constant, and an intercept."""
    x, y, rng = draw()
    levels = rng.integers(0, 3, ROWS)[:, None] == np.arange(3)
    return np.column_stack([x, levels, x[:, 0], np.full(ROWS, 5.0)]), y, None


def level_of_one_class(rows):
    """A level that occurs in rows of one class alone."""
    x, y, _ = draw()
    level = np.zeros(ROWS)
    level[:rows], y[:rows] = 1, 1
    return np.column_stack([x, level]), y, None


def one_class_apart():
    """Linearly separable from the two others, which overlap."""
    return *load_iris(return_X_y=True), None


def overlap_in_a_point():
    """A threshold, at which both classes occur."""
    x, _, rng = draw()
    x[:, 0] = np.round(x[:, 0])
    return x, np.where(x[:, 0] == 0, rng.integers(0, 2, ROWS), x[:, 0] > 0).astype(int), None


def threshold():
    x, _, _ = draw()
    return x, (x @ [1.0, -2.0, 0.5] > 0.3).astype(int), None


def threshold_but_for_a_pair():
    x, y, _ = threshold()
    return np.r_[x, x[:1]], np.r_[y, 1 - y[:1]], None


def threshold_of_what_weighs():
    x, y, _ = threshold()
    y[:5] = 1 - y[:5]
    return x, y, (np.arange(ROWS) >= 5).astype(float)


def class_without_weight():
    x, y, _ = draw()
    return x, y, (y != 2).astype(float)


def soft(make, smoothing=0.0):
    """The same labels as distributions, in float32 where the features are."""

    def made():
        x, y, s = make()
        return x, (1 - smoothing) * np.eye(3)[y] + smoothing / 3, s

    return made


def half_known():
    """Labels of two classes each: a level whose rows exclude the third."""
    x, y, _ = draw()
    h = 0.9 * np.eye(3)[y] + 0.1 / 3
    level = np.zeros(ROWS)
    level[:4] = 1
    h[:4] = [0.5, 0.5, 0.0]
    return np.column_stack([x, level]), h, None


CASES = {
    "overlapping": (overlapping, None),
    "dependent": (dependent, None),
    "threshold but for a pair": (threshold_but_for_a_pair, None),
    "one-hot": (soft(overlapping), None),
    "smoothed level": (soft(lambda: level_of_one_class(3), 0.1), None),
    "level of one row": (lambda: level_of_one_class(1), PARTLY),
    "level of five rows": (lambda: level_of_one_class(5), PARTLY),
    "one-hot level": (soft(lambda: level_of_one_class(3)), PARTLY),
    "half known": (half_known, PARTLY),
    "one class apart": (one_class_apart, PARTLY),
    "overlap in a point": (overlap_in_a_point, PARTLY),
    "class without weight": (class_without_weight, "has no weight"),
    "threshold": (threshold, COMPLETE),
    "threshold of what weighs": (threshold_of_what_weighs, COMPLETE),
}


def told(learn):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        learn()
    assert {w.category for w in found} <= {ConvergenceWarning}
    return " ".join(str(w.message) for w in found)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("way", ["dense", "csr", "chunks", "float32", "far"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_told_exactly_where_there_is_no_maximum(case, way, solver):
    x, y, s = CASES[case][0]()
    if way == "float32":
        x, y = x.astype(np.float32), y.astype(np.float32) if y.ndim == 2 else y
    if way == "far":
        x = 1e-9 * (np.round(x * 2**20) / 2**20 + 2**20)  # exactly, before it is scaled
    given = {"csr": scipy.sparse.csr_array, "chunks": lambda a: da.from_array(a, (70, -1))}
    found = told(
        lambda: SoftmaxRegression(0.0, solver=solver).fit(given.get(way, np.array)(x), y, s)
    )
    want = CASES[case][1]
    assert (want in found) if want else found == ""
    assert told(lambda: SoftmaxRegression(1.0, solver=solver).fit(x, y, s)) == "" or (
        want == "has no weight"
    )


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-10])
@pytest.mark.parametrize("case", ["overlapping", "level of five rows", "overlap in a point"])
def test_whatever_the_tolerance(case, tol):
    x, y, s = CASES[case][0]()
    found = told(lambda: SoftmaxRegression(0.0, tol=tol).fit(x, y, s))
    assert (CASES[case][1] in found) if CASES[case][1] else found == ""


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("case", CASES)
def test_each_criterion_alone(case, solver, intercept, monkeypatch):
    """Where data are large there is the last one alone: whether Newton's method goes on."""
    make, want = CASES[case]
    x, y, s = make()
    classes = labels.classes(y)
    data = labels.data(x, y, s, classes, None)
    goal = objective.Objective(data, 0.0, intercept, curved=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SoftmaxRegression(0.0, solver=solver, fit_intercept=intercept).fit(x, y, s)
    theta = model._theta()
    separable = separation.program(data, goal)
    assert not intercept or separable is (want is not None)
    assert separation.has_maximum(data, goal, theta) is not separable
    monkeypatch.setattr(separation, "WORK", 0)
    assert not separation.has_maximum(data, goal, theta)
    monkeypatch.setattr(separation, "NUMBERS", 0)
    assert separation.program(data, goal) is None
    found = told(
        lambda: SoftmaxRegression(0.0, solver=solver, fit_intercept=intercept).fit(x, y, s)
    )
    assert ("separable" in found) is separable


def test_it_is_never_certain_of_what_is_not(monkeypatch):
    """Wherever the solver has come to, not only at its end."""
    for case, (make, want) in CASES.items():
        x, y, s = make()
        data = labels.data(x, y, s, labels.classes(y), None)
        goal = objective.Objective(data, 0.0, True, curved=True)
        for steps in range(1, 30, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SoftmaxRegression(0.0, tol=0.0, max_iter=steps).fit(x, y, s)
            if separation.has_maximum(data, goal, model._theta()):
                assert want is None, case


def test_an_end_for_want_of_iterations_says_why():
    x, y, s = level_of_one_class(5)
    found = told(lambda: SoftmaxRegression(0.0, tol=1e-9, max_iter=5).fit(x, y, s))
    assert "max_iter: 5 iterations were not enough" in found
    assert PARTLY in found


def test_the_maximum_of_the_others_is_what_remains():
    """Where a level decides, the likelihood is that of the other rows, as far as tol goes."""
    x, y, s = level_of_one_class(5)
    model = SoftmaxRegression(0.0, tol=1e-8)
    told(lambda: model.fit(x, y, s))
    rest = SoftmaxRegression(0.0, tol=1e-8).fit(x[5:, :3], y[5:])
    assert model.log_likelihood(x, y) == pytest.approx(rest.log_likelihood(x[5:, :3], y[5:]), 1e-6)
