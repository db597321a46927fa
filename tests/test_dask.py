"""`fastce.dask` and `SoftmaxRegression` on dask arrays: the same results, no chunk held whole."""

import os
import signal
import threading
import time

import dask
import dask.array as da
import numpy as np
import pytest
from dask.callbacks import Callback
from distributed import Client, LocalCluster

import fastce
import fastce.dask
from fastce.sklearn import SoftmaxRegression
from tests.checks import draw, draw_soft, draw_targets, draw_weight

SHAPE = (60, 40)
CHUNKS = {
    "one": (60, 40), "rows": (17, 40), "classes": (60, 13), "both": ((10, 1, 49), (7, 30, 3)),
    "many": (3, 2),
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum", "grad_output": 2.0},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 7.0},
    "everything": {
        "weight": draw_weight(40), "label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": 3,
    },
}  # fmt: skip


def assert_same(found, want):
    loss, grad = dask.compute(*found, scheduler="sync")
    np.testing.assert_allclose(loss, want[0], rtol=2e-6)
    np.testing.assert_allclose(grad, want[1], rtol=2e-5, atol=1e-9)
    assert loss.dtype == want[0].dtype
    assert grad.dtype == want[1].dtype


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_chunks_make_the_whole(chunks, name, soft):
    logits, options = draw(SHAPE, scale=3.0), dict(OPTIONS[name])
    targets = draw_soft(SHAPE) if soft else draw_targets((60,), 40)
    if soft:
        options.pop("ignore_index", None)
    z = da.from_array(logits, chunks=CHUNKS[chunks])
    want = fastce.cross_entropy_and_grad(logits, targets, **options)
    found = fastce.dask.cross_entropy_and_grad(z, targets, **options)
    assert found[1].chunks == z.chunks
    assert_same(found, want)
    options.pop("grad_output", None)
    alone = fastce.dask.cross_entropy(z, da.from_array(targets, chunks=7), **options)
    np.testing.assert_allclose(alone.compute(scheduler="sync"), want[0], rtol=2e-6)


@pytest.mark.parametrize("axis, chunks", [(0, 2), (1, (3, 2, 4)), (-1, (2, 5, 3))])
def test_any_class_axis(axis, chunks):
    logits = draw((6, 5, 9))
    targets = draw_targets(tuple(np.delete(logits.shape, axis)), logits.shape[axis])
    want = fastce.cross_entropy_and_grad(logits, targets, axis=axis)
    z = da.from_array(logits, chunks=chunks)
    assert_same(fastce.dask.cross_entropy_and_grad(z, targets, axis=axis), want)


def test_a_single_row():
    logits = draw((9,))
    want = fastce.cross_entropy_and_grad(logits, 4)
    assert_same(fastce.dask.cross_entropy_and_grad(da.from_array(logits, chunks=4), 4), want)


class _Results(Callback):
    """The largest result of any task."""

    def __init__(self):
        self.largest = 0
        super().__init__(posttask=self._look)

    def _look(self, key, result, dsk, state, worker):
        records = getattr(result, "records", None)
        for array in (result, records):
            if isinstance(array, np.ndarray):
                self.largest = max(self.largest, array.nbytes)


@pytest.mark.parametrize(
    "name", ["cross_entropy_and_grad", "cross_entropy_stats", "nll_loss_and_grad", "softmax"]
)
def test_nothing_is_computed_early_and_nothing_joined(name):
    made = []

    def make(block_info=None):
        made.append(1)
        where = block_info[None]["array-location"]
        return draw(tuple(b - a for a, b in where), seed=where[0][0] + where[1][0])

    # so many classes that a row of chunks, or a column of them, would be larger than all else
    z = da.map_blocks(make, chunks=((8,) * 6, (500,) * 8), dtype=np.float32, meta=np.empty((0, 0)))
    targets = () if name == "softmax" else (draw_targets((48,), 4000),)
    found = getattr(fastce.dask, name)(z, *targets)
    assert not made
    with _Results() as results:
        found = found if isinstance(found, tuple) else (found,)
        dask.compute(*(da.absolute(array).max() for array in found), scheduler="sync")
    assert results.largest <= 8 * 500 * 4
    assert len(made) == 48  # each chunk once, although its gradient needs it as well


def test_every_bit_is_the_same_in_any_schedule():
    z = da.from_array(draw((200, 300), scale=5.0), chunks=(31, 70))
    loss, grad = fastce.dask.cross_entropy_and_grad(z, draw_targets((200,), 300))
    results = {
        tuple(a.tobytes() for a in dask.compute(loss, grad, scheduler=scheduler))
        for scheduler in ("sync", "threads", "threads")
    }
    assert len(results) == 1


Z = da.zeros((6, 10), chunks=(2, 5))
BAD = [
    (lambda: fastce.dask.cross_entropy(np.zeros((6, 10)), np.zeros(6, int)), TypeError, "dask"),
    (lambda: fastce.dask.cross_entropy(Z, np.zeros(5, int)), ValueError, "targets: expected shape"),
    (lambda: fastce.dask.cross_entropy(Z, np.zeros(6)), TypeError, "targets: expected integers"),
    (lambda: fastce.dask.cross_entropy(Z.astype(int), np.zeros(6, int)), TypeError, "logits"),
    (
        lambda: fastce.dask.cross_entropy(Z, np.zeros(6, int), weight=np.ones(5)),
        ValueError,
        r"weight: expected shape \(10,\)",
    ),
    (lambda: fastce.dask.cross_entropy(Z, np.zeros(6, int), softcap=-1), ValueError, "softcap"),
    (
        lambda: fastce.dask.cross_entropy(Z[da.zeros(6, chunks=2) == 0], np.zeros(6, int)),
        ValueError,
        "chunks of known sizes",
    ),
    (
        lambda: fastce.dask.cross_entropy_and_grad(
            Z, np.zeros(6, int), reduction="none", grad_output=np.ones(5)
        ),
        ValueError,
        "grad_output",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_named_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_bad_target_is_named_with_its_chunk():
    loss, grad = fastce.dask.cross_entropy_and_grad(Z, np.array([0, 1, 2, 10, 4, 5]))
    for result in (loss, grad):
        with pytest.raises(IndexError, match=r"got 10 at index \(1,\), in the chunk .* at \(2,"):
            result.compute(scheduler="sync")


# SoftmaxRegression --------------------------------------------------------------------------------


def observations(rows=400, features=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features))
    y = np.argmax(
        x @ rng.standard_normal((features, classes)) + rng.gumbel(size=(rows, classes)), 1
    )
    return x, y, rng.integers(0, 3, rows).astype(float)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("kind", ["plain", "weights", "balanced", "names", "soft", "no intercept"])
def test_chunks_have_the_same_estimate(solver, kind):
    x, y, s = observations()
    given = {"tol": 1e-9, "solver": solver, "fit_intercept": kind != "no intercept"}
    weight = s if kind == "weights" else None
    if kind == "balanced":
        given["class_weight"] = "balanced"
    if kind == "names":
        y = np.array(["no", "yes", "perhaps", "never"])[y]
    if kind == "soft":
        y = draw_soft((400, 4), np.float64)
    whole = SoftmaxRegression(**given).fit(x, y, weight)
    chunked = SoftmaxRegression(**given).fit(
        da.from_array(x, chunks=(90, 4)), da.from_array(y, chunks=50),
        None if weight is None else da.from_array(weight, chunks=33),
    )  # fmt: skip
    np.testing.assert_allclose(chunked.coef_, whole.coef_, atol=1e-7)
    np.testing.assert_allclose(chunked.intercept_, whole.intercept_, atol=1e-7)
    np.testing.assert_array_equal(chunked.classes_, whole.classes_)
    assert chunked.n_features_in_ == 6
    np.testing.assert_array_equal(chunked.predict(x), whole.predict(x))


def test_integers_and_float32_in_chunks():
    x, y, _ = observations()
    counts = np.round(x * 3).astype(int)
    found = SoftmaxRegression(tol=1e-8).fit(da.from_array(counts, chunks=150), y)
    np.testing.assert_allclose(found.coef_, SoftmaxRegression(tol=1e-8).fit(counts, y).coef_,
                               atol=1e-6)  # fmt: skip
    assert found.coef_.dtype == np.float64
    single = SoftmaxRegression().fit(da.from_array(x.astype(np.float32), chunks=150), y)
    assert single.coef_.dtype == np.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (np.where(x > 3, np.nan, x), y, None), "X contains NaN"),
        (lambda x, y: (x, y[:-1], None), "y: expected 400 rows"),
        (lambda x, y: (x, y * 0, None), "expected at least 2 classes"),
        (lambda x, y: (x, y, np.zeros(400)), "expected a weight above 0"),
        (lambda x, y: (x, y, -np.ones(400)), "sample_weight: expected at least 0"),
        (lambda x, y: (x, None, None), "y: expected an array"),
    ],
)
def test_bad_data_in_a_chunk_are_named(change, message):
    x, y, s = change(*observations()[:2])
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression().fit(da.from_array(x, chunks=60), y, s)


def test_separable_chunks_are_told():
    x = np.r_[np.zeros((20, 1)), np.ones((20, 1))]
    with pytest.warns(UserWarning, match="separable"):
        SoftmaxRegression(l2=0.0).fit(da.from_array(x, chunks=7), x[:, 0].astype(int))


# A cluster that loses a worker --------------------------------------------------------------------


def _slow(block):
    time.sleep(0.03)
    return block


def _kill_one(client, seconds):
    """Kill one of the workers after some time, as the kernel would for want of memory."""
    victim = next(iter(client.run(os.getpid).values()))
    timer = threading.Timer(seconds, os.kill, (victim, signal.SIGKILL))
    timer.start()
    return timer


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_worker_loses_nothing():
    logits, targets = draw((400, 300), scale=4.0), draw_targets((400,), 300)
    x, y, _ = observations(2000)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "60s"}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True
        ) as cluster,
        Client(cluster) as client,
    ):
        z = da.from_array(logits, chunks=(50, 75)).map_blocks(_slow)
        lazy = (
            *fastce.dask.cross_entropy_and_grad(z, targets), fastce.dask.softmax(z),
            fastce.dask.cross_entropy_stats(z, targets).entropy,
            fastce.dask.nll_loss(z, targets), fastce.dask.binary_cross_entropy(z, z),
            *fastce.dask.linear_cross_entropy_and_grad(
                z.rechunk({1: -1}), da.from_array(logits[:90], chunks=(40, 300)), targets % 90
            )[1][:2],
        )  # fmt: skip
        before = dask.compute(*lazy)
        workers = set(client.scheduler_info()["workers"])
        timer = _kill_one(client, 0.2)
        after = dask.compute(*lazy)
        timer.join()
        assert [a.tobytes() for a in after] == [b.tobytes() for b in before]
        np.testing.assert_allclose(after[0], fastce.cross_entropy(logits, targets), rtol=1e-6)

        client.wait_for_workers(2)
        assert set(client.scheduler_info()["workers"]) != workers
        chunked = da.from_array(x, chunks=(500, 6)).map_blocks(_slow)
        timer = _kill_one(client, 0.5)
        found = SoftmaxRegression(tol=1e-9, solver="newton-cg").fit(chunked, y)
        timer.join()
        whole = SoftmaxRegression(tol=1e-9, solver="newton-cg").fit(x, y)
        np.testing.assert_allclose(found.coef_, whole.coef_, atol=1e-8)
