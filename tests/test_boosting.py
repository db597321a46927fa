"""`fastce.boosting`: the trees of XGBoost's and LightGBM's own objectives, and bad input named."""

import pickle

import lightgbm
import numpy as np
import pytest
import xgboost

import fastce
from fastce.boosting import softmax_objective

ROUNDS = 8
XGBOOST = {
    "num_class": 5, "max_depth": 3, "eta": 0.3, "base_score": 0.5, "nthread": 1,
    "tree_method": "hist", "objective": "multi:softprob", "min_child_weight": 20.0,
}  # fmt: skip
LIGHTGBM = {
    "num_class": 5, "num_leaves": 15, "min_data_in_leaf": 50, "learning_rate": 0.2,
    "boost_from_average": False,
    "num_threads": 1, "verbose": -1, "deterministic": True, "force_row_wise": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data_set():
    """Features without ties and nodes of many rows, so that rounding decides no split."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 4000)
    x = rng.normal(size=(4000, 8)) + rng.normal(size=(5, 8))[y]
    return x, y, rng.integers(1, 4, 4000) / 2


def xgboost_model(data_set, objective=None, *, weighted=False):
    x, y, weight = data_set
    data = xgboost.DMatrix(x, y, weight=weight if weighted else None)
    return xgboost.train(XGBOOST, data, ROUNDS, obj=objective), data


def lightgbm_model(data_set, objective="multiclass", *, weighted=False):
    x, y, weight = data_set
    data = lightgbm.Dataset(x, y, weight=weight if weighted else None)
    return lightgbm.train(LIGHTGBM | {"objective": objective}, data, ROUNDS)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_trees_of_xgboost(data_set, weighted):
    ours, data = xgboost_model(data_set, softmax_objective("xgboost"), weighted=weighted)
    theirs, _ = xgboost_model(data_set, weighted=weighted)
    columns = ["Tree", "Node", "Feature", "Split"]
    assert ours.trees_to_dataframe()[columns].equals(theirs.trees_to_dataframe()[columns])
    np.testing.assert_allclose(
        ours.predict(data, output_margin=True), theirs.predict(data, output_margin=True),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_the_trees_of_lightgbm(data_set, weighted):
    ours = lightgbm_model(data_set, softmax_objective("lightgbm"), weighted=weighted)
    theirs = lightgbm_model(data_set, weighted=weighted)
    columns = ["tree_index", "node_index", "split_feature", "threshold"]
    assert ours.trees_to_dataframe()[columns].equals(theirs.trees_to_dataframe()[columns])
    np.testing.assert_allclose(
        ours.predict(data_set[0], raw_score=True), theirs.predict(data_set[0], raw_score=True),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_estimators(data_set):
    x, y, weight = data_set
    small = {"n_estimators": 3, "max_depth": 3, "n_jobs": 1}
    for weights in (None, weight):
        ours = xgboost.XGBClassifier(
            **small, objective=softmax_objective("xgboost"), base_score=0.5
        )
        theirs = xgboost.XGBClassifier(**small, objective="multi:softprob", base_score=0.5)
        ours, theirs = (m.fit(x, y, sample_weight=weights) for m in (ours, theirs))
        np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
        options = small | {"verbose": -1, "boost_from_average": False}
        ours = lightgbm.LGBMClassifier(**options, objective=softmax_objective("lightgbm"))
        theirs = lightgbm.LGBMClassifier(**options, objective="multiclass")
        ours, theirs = (m.fit(x, y, sample_weight=weights) for m in (ours, theirs))
        np.testing.assert_allclose(
            fastce.softmax(ours.predict(x, raw_score=True)), theirs.predict_proba(x), rtol=1e-4
        )


def test_another_hessian(data_set):
    _, y, weight = data_set
    scores = np.random.default_rng(1).normal(size=(len(y), 5))
    objective = softmax_objective("xgboost", hessian="abs_residual")
    assert repr(objective) == "softmax_objective('xgboost', hessian='abs_residual')"
    got = pickle.loads(pickle.dumps(objective))(y.astype(np.float32), scores, weight)
    want = fastce.gradient_hessian(scores, y, sample_weight=weight, hessian="abs_residual")
    np.testing.assert_array_equal(got, want)
    model, data = xgboost_model(data_set, objective)
    assert np.mean(np.argmax(model.predict(data), 1) == y) > 0.8


BAD = {
    "one score": (np.zeros(3), np.zeros(3), ValueError, "scores: expected shape"),
    "label": (np.array([0, 1, 2]), np.zeros((3, 2)), IndexError, "targets: expected integers in"),
    "fraction": (np.array([0, 0.5, 1]), np.zeros((3, 2)), ValueError, r"got 0.5 at index \(1,\)"),
    "NaN": (np.array([np.nan]), np.zeros((1, 2)), ValueError, "labels: expected integers, got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case):
    labels, scores, error, message = BAD[case]
    with pytest.raises(error, match=message):
        softmax_objective("lightgbm")(labels, scores)


def test_bad_arguments():
    with pytest.raises(ValueError, match="library: expected one of xgboost, lightgbm, got 'cat'"):
        softmax_objective("cat")
    with pytest.raises(ValueError, match="hessian: expected one of"):
        softmax_objective("xgboost", hessian="exact")
