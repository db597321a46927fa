"""What SoftmaxRegression takes: weights, classes of a stream, chunks and data frames of dask."""

import dask.array as da
import numpy as np
import pandas
import pytest
import scipy.sparse
from sklearn.linear_model import SGDClassifier

from fastce.sklearn import SoftmaxRegression
from tests.checks import same_bits


def draw(rows=200):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 3))
    y = np.argmax(x @ rng.standard_normal((3, 4)) + rng.gumbel(size=(rows, 4)), axis=1)
    return x, y, rng.integers(0, 5, rows)


# A weight is a number of rows ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dense", "csr", "chunks"])
@pytest.mark.parametrize("kind", ["hard", "names", "one-hot"])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 2: 0.5}])
@pytest.mark.parametrize("l2", [0.0, 1.0])
def test_a_weighted_row_is_so_many_rows(l2, class_weight, kind, way):
    x, y, s = draw()
    if kind == "names":
        y = np.array(["a", "b", "c", "d"])[y]
        if isinstance(class_weight, dict):
            class_weight = {"a": 3.0, "c": 0.5}
    if kind == "one-hot":
        y = np.eye(4)[y]
    wrap = {
        "dense": lambda a: a,
        "csr": lambda a: scipy.sparse.csr_array(a) if a.shape[1:] == (3,) else a,
        "chunks": lambda a: da.from_array(a, chunks=(37, *a.shape[1:])),
    }[way]

    def fit(x, y, s=None):
        model = SoftmaxRegression(l2, class_weight=class_weight, tol=1e-9)
        return model.fit(wrap(x), wrap(y), s)

    weighted, repeated = fit(x, y, s), fit(np.repeat(x, s, axis=0), np.repeat(y, s, axis=0))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-6)
    np.testing.assert_allclose(weighted.intercept_, repeated.intercept_, atol=1e-6)


# The classes of a stream --------------------------------------------------------------------------

CALLS = {
    # calls of partial_fit, as labels and classes; whether the last is refused
    "none at first": ([([0, 1], None)], True),
    "one": ([([0, 0], [0])], True),
    "unsorted, repeated": ([([0, 1], [2, 0, 1, 1])], False),
    "the same later": ([([0, 1], [0, 1, 2]), ([1, 2], [2, 1, 0])], False),
    "none later": ([([0, 1], [0, 1, 2]), ([1, 2], None)], False),
    "others later": ([([0, 1], [0, 1, 2]), ([1, 1], [0, 1])], True),
    "more later": ([([0, 1], [0, 1, 2]), ([1, 1], [0, 1, 2, 3])], True),
    "an unknown label": ([([0, 1], [0, 1, 2]), ([1, 3], None)], True),
    "names": ([(["a", "b"], ["c", "a", "b"]), (["c", "c"], None)], False),
    "other names": ([(["a", "b"], ["c", "a", "b"]), (["c", "c"], ["a", "c"])], True),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_rules_for_classes_are_those_of_scikit_learn(case):
    calls, refused = CALLS[case]
    x = np.array([[0.0, 1.0], [1.0, 0.5]])

    def follow(model):
        for y, classes in calls[:-1]:
            model.partial_fit(x, y, classes=classes)
        y, classes = calls[-1]
        return model.partial_fit(x, y, classes=classes)

    if not refused:
        found, peer = follow(SoftmaxRegression()), follow(SGDClassifier())
        np.testing.assert_array_equal(found.classes_, peer.classes_)
        return
    if case != "one":  # which scikit-learn lets pass until there is nothing to tell apart
        with pytest.raises(ValueError, match=r"."):
            follow(SGDClassifier())
    with pytest.raises(ValueError, match=r"^(y|classes): expected"):
        follow(SoftmaxRegression())


def test_a_refused_batch_leaves_a_stream_as_it_was():
    x, y, _ = draw()
    model = SoftmaxRegression()
    with pytest.raises(ValueError, match="y: expected 3 columns"):
        model.partial_fit(x, np.eye(4)[y], classes=[0, 1, 2])
    model.partial_fit(x, y, classes=range(4))
    before = model.coef_.copy()
    for wrong in (np.full(len(y), 9), np.eye(3)[y % 3]):
        with pytest.raises(ValueError, match="y: expected"):
            model.partial_fit(x, wrong)
    with pytest.raises(ValueError, match="X: expected features that vary"):
        model.partial_fit(np.where(x > 1, 1.7e308, x), y)
    assert same_bits(model.coef_, before)
    model.partial_fit(x, y)
    want = SoftmaxRegression().partial_fit(x, y, classes=range(4)).partial_fit(x, y)
    assert same_bits(model.coef_, want.coef_)


def test_a_fit_ends_a_stream():
    x, y, _ = draw()
    model = SoftmaxRegression().partial_fit(x[:, :2], y % 3, classes=[0, 1, 2])
    model.fit(x, y)
    model.partial_fit(x, y)
    assert same_bits(model.coef_, SoftmaxRegression().partial_fit(x, y, classes=range(4)).coef_)
    assert model.n_iter_ == 1
    with pytest.raises(ValueError, match="classes: expected those of the first call"):
        SoftmaxRegression().fit(x, y).partial_fit(x, y, classes=[0, 1])


def test_a_stream_has_no_balance():
    x, y, _ = draw()
    with pytest.raises(ValueError, match="class_weight: expected a dict or None for a stream"):
        SoftmaxRegression(class_weight="balanced").partial_fit(x, y, classes=range(4))
    weighted = SoftmaxRegression(class_weight={1: 2.0}).partial_fit(x, y, classes=range(4))
    want = SoftmaxRegression().partial_fit(x, y, range(4), np.where(y == 1, 2.0, 1.0))
    np.testing.assert_allclose(weighted.coef_, want.coef_, rtol=1e-12)


# Chunks and frames --------------------------------------------------------------------------------

CHUNKS = {
    "first": (0, 0, 120, 80), "between": (50, 0, 150), "last": (200, 0), "one row": (1, 0, 199),
}  # fmt: skip


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("far", [0.0, 1e6])
@pytest.mark.parametrize("empty", CHUNKS)
def test_empty_chunks_have_nothing_to_say(empty, far, solver):
    x, y, s = draw()
    x += far
    chunks = CHUNKS[empty]
    given = {"tol": 1e-9, "solver": solver, "class_weight": "balanced"}
    found = SoftmaxRegression(**given).fit(da.from_array(x, chunks=(chunks, 3)), y, s)
    want = SoftmaxRegression(**given).fit(x, y, s)
    np.testing.assert_allclose(found.coef_, want.coef_, atol=1e-7)
    stream = SoftmaxRegression().partial_fit(da.from_array(x, chunks=(chunks, 3)), y, range(4), s)
    peer = SoftmaxRegression()
    for part in np.split(np.arange(200), np.cumsum(chunks)[:-1]):
        if len(part):
            peer.partial_fit(x[part], y[part], range(4), s[part])
    np.testing.assert_allclose(stream.coef_, peer.coef_, rtol=1e-12)


def test_what_chunks_cannot_be():
    x, y, _ = draw()
    for learn in (SoftmaxRegression().fit, SoftmaxRegression().partial_fit):
        chunked = da.from_array(x, chunks=50)
        with pytest.raises(ValueError, match="X: expected chunks of known sizes"):
            learn(chunked[chunked[:, 0] > 0], y)
        with pytest.raises(ValueError, match="y: expected an array"):
            learn(chunked, None)
        with pytest.raises(ValueError, match="X: expected two dimensions"):
            learn(chunked[:, 0], y)
    with pytest.raises(ValueError, match="X: expected at least one row"):
        SoftmaxRegression().fit(da.from_array(x, chunks=50)[:0], y[:0])


class Frame:
    """What data frames of dask are for arrays of it."""

    def __init__(self, values, rows, meta):
        self._values, self._rows, self._meta = values, rows, meta

    def to_dask_array(self, lengths=None):
        assert lengths is True
        chunks = (self._rows, *self._values.shape[1:])
        return da.from_array(self._values, chunks=chunks)


def test_frames_are_arrays_with_names():
    x, y, s = draw()
    names = np.array(["ash", "beech", "cedar", "date"], object)[y]
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    model = SoftmaxRegression(0.0, tol=1e-9).fit(
        Frame(x, 60, frame[:0]), Frame(names, 60, None), Frame(s, 60, None)
    )
    want = SoftmaxRegression(0.0, tol=1e-9).fit(frame, names, s)
    np.testing.assert_allclose(model.coef_, want.coef_, atol=1e-7)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert model.classes_.tolist() == want.classes_.tolist()
    assert model.score(frame, names) == want.score(frame, names)
    model.fit(da.from_array(x, chunks=60), names)
    assert not hasattr(model, "feature_names_in_")


@pytest.mark.needs("peers")
def test_frames_of_dask():
    import dask.dataframe as frames

    x, y, s = draw()
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    frame["stamp"] = pandas.date_range("2024-01-01", periods=200, freq="h").astype("int64")
    frame["y"], frame["s"] = np.array(["ash", "beech", "cedar", "date"])[y], s
    features = ["a", "b", "c", "stamp"]
    chunked = frames.from_pandas(frame, npartitions=3)
    want = SoftmaxRegression(0.0, tol=1e-9).fit(frame[features], frame["y"], frame["s"])
    kept = chunked[chunked["a"] > -99]  # whose lengths are not known
    for given in (chunked, kept):
        model = SoftmaxRegression(0.0, tol=1e-9).fit(given[features], given["y"], given["s"])
        np.testing.assert_allclose(model.coef_, want.coef_, atol=1e-6)
        assert model.feature_names_in_.tolist() == features
    stream = SoftmaxRegression(0.0).partial_fit(
        chunked[features], chunked["y"], ["ash", "beech", "cedar", "date"]
    )
    assert stream.score(frame[features], frame["y"]) > 0.4
    with pytest.raises(ValueError, match="could not convert string to float"):
        SoftmaxRegression().fit(chunked[["a", "y"]], chunked["y"])
