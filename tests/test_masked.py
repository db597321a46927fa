"""Section 4: a masked array in any argument of any public function is a TypeError that names it.

Its mask would be dropped silently, and what its owner has called invalid would count."""

import dask.array as da
import numpy as np
import pytest

import fastce
import fastce.dask
from fastce import shards
from fastce.sklearn import SoftmaxRegression
from tests.public_calls import NUMBERS, public_functions

# Tensors of torch know no masks.
FUNCTIONS = [param for param in public_functions() if not param.id.startswith("fastce.torch")]


class Masked(np.ma.MaskedArray):
    """What other libraries derive from masked arrays."""


def masked(array, kind=np.ma.MaskedArray, mask=True):
    """A copy of an array as a masked one."""
    found = kind(array.copy(), np.zeros(array.shape, bool))
    found.mask.flat[0] = mask
    return found


# What the messages of an objective call its arguments, which come in the order of either library.
TOLD = {"first": "labels", "second": "scores"}


@pytest.mark.parametrize("kind", [np.ma.MaskedArray, Masked])
@pytest.mark.parametrize("mask", [True, False], ids=["one masked", "none masked"])
@pytest.mark.parametrize("public", FUNCTIONS)
def test_a_masked_array_is_refused(public, mask, kind):
    for name in public.arrays:
        array = masked(public.values[name], kind, mask)
        before = array.data.tobytes()
        with pytest.raises(TypeError, match=f"^{TOLD.get(name, name)}: expected an array without"):
            public.results(**{name: public.given(name, array)})
        assert array.data.tobytes() == before, name


@pytest.mark.parametrize("place", range(3))
def test_gradients_of_a_linear_layer_do_not_go_to_a_masked_array(place):
    x, weight, bias = np.ones((6, 3)), np.ones((6, 3)), np.ones(6)
    out = [np.zeros_like(a) for a in (x, weight, bias)]
    out[place] = masked(out[place])
    with pytest.raises(TypeError, match=r"^out: .* without a mask"):
        fastce.linear_cross_entropy_and_grad(x, weight, np.arange(6), bias=bias, out=tuple(out))
    assert not any(a.any() for a in out)


def test_records_that_are_masked_are_not_merged():
    records = shards.partial(np.ones((2, 1)), [0, 1], class_offset=0, classes=2).records
    for name, given in (
        ("records", (masked(records), records)),
        ("others", (records, masked(records))),
    ):
        with pytest.raises(TypeError, match=f"^{name}: "):
            shards.merge_records(*given, np.float64)


def test_a_chunk_that_turns_out_to_be_masked_is_refused():
    z = da.ones((4, 3), chunks=2).map_blocks(masked, dtype=float, meta=np.empty((0, 0)))
    for function in (fastce.dask.softmax, fastce.dask.logsumexp):
        with pytest.raises(TypeError, match=r"x: .* without a mask"):
            function(z).compute(scheduler="synchronous")
    y = da.ones(4, dtype=int, chunks=2)
    with pytest.raises(TypeError, match=r"logits: .* without a mask"):
        fastce.dask.cross_entropy(z, y).compute(scheduler="synchronous")


@pytest.mark.parametrize("public", FUNCTIONS)
def test_a_masked_number_is_refused(public):
    for option in sorted(set(public.parameters) & set(NUMBERS)):
        with pytest.raises(TypeError, match=f"^{option}: "):
            public.results(**{option: np.ma.array(NUMBERS[option][0])})


@pytest.mark.parametrize("name", ["X", "y", "sample_weight"])
@pytest.mark.parametrize("dask", [False, True])
def test_the_estimator_refuses_masks(name, dask):
    x, y, weight = np.eye(6)[:, :3], np.arange(6) % 2, np.ones(6)
    given = {"X": x, "y": y, "sample_weight": weight}
    given[name] = masked(given[name])
    if dask:
        given = {key: da.from_array(value, chunks=3, asarray=False) for key, value in given.items()}
    with pytest.raises(TypeError, match=f"^{name}: .* without a mask"):
        SoftmaxRegression().fit(**given)
    if name == "y" or dask:
        return
    model = SoftmaxRegression().fit(x, y)
    for method in (model.summary, model.standard_errors, model.covariance):
        with pytest.raises(TypeError, match=f"^{name}: .* without a mask"):
            method(given["X"], given["sample_weight"])
    if name == "X":
        with pytest.raises(TypeError, match=r"^X: .* without a mask"):
            model.predict_proba(given["X"])
    with pytest.raises(TypeError, match=r"^classes: .* without a mask"):
        SoftmaxRegression().partial_fit(x, y, masked(np.arange(2)))
