"""`fastce.capi`: C functions with the bits of the NumPy functions, on threads of any kind."""

import ctypes
import re
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastce
from fastce import capi
from tests.checks import draw, draw_soft, draw_targets, draw_weight, same_bits

EXAMPLES = Path(__file__).parents[1] / "examples"


def filled(logits, labels, losses=None, grad=None, grad_output=None, weight=None, **options):
    """A call whose fields are these arrays', and the losses."""
    if losses is None:
        losses = np.empty(len(logits), logits.dtype)
    fields = dict(zip(("rows", "classes"), logits.shape, strict=True))
    places = {"logits": logits, "losses": losses, "grad": grad}
    places["targets" if labels.dtype == np.int64 else "probabilities"] = labels
    places |= {"grad_output": grad_output, "weight": weight}
    prefixes = {"logits": "", "probabilities": "probability_", "grad": "grad_"}
    for name, array in places.items():
        if array is not None:
            fields[name] = array.ctypes.data
            if name in prefixes:
                for axis, stride in zip(("row", "class"), array.strides, strict=True):
                    fields[f"{prefixes[name]}{axis}_stride"] = stride
    return capi.Call(**fields, **options), losses


def call(logits, labels, **given):
    """Status and losses, by the function that is made for these arguments."""
    filled_in, losses = filled(logits, labels, **given)
    kinds = {
        "grad": given.get("grad") is not None, "soft": labels.dtype != np.int64,
        "weight": given.get("weight") is not None, "softcap": "softcap" in given,
    }  # fmt: skip
    return capi.function(logits.dtype, **kinds)(filled_in), losses


@pytest.mark.parametrize("shape", [(1, 1), (5, 10), (40, 63), (40, 64), (9, 1000), (3, 40000)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_bits_of_the_numpy_functions(dtype, shape):
    logits, targets = draw(shape, dtype), draw_targets(shape[:1], shape[1])
    targets[-1] = -100
    upstream = np.random.default_rng(3).normal(size=shape[0])
    for options in ({}, {"ignore_index": 0, "label_smoothing": 0.1, "z_loss": 0.01}):
        status, losses = call(logits, np.maximum(targets, 0), **options)
        want = fastce.cross_entropy(logits, np.maximum(targets, 0), reduction="none", **options)
        assert status == 0
        assert same_bits(losses, want)
    want, want_grad = fastce.cross_entropy_and_grad(
        logits, targets, reduction="none", grad_output=upstream
    )
    grad = np.empty_like(logits)
    status, losses = call(logits, targets, grad=grad, grad_output=upstream)
    assert status == 0
    assert same_bits(losses, want)
    assert same_bits(grad, want_grad)
    _, want_grad = fastce.cross_entropy_and_grad(logits, targets, reduction="sum")
    call(logits, targets, grad=logits)  # in place, without upstream gradient
    assert same_bits(logits, want_grad)


@pytest.mark.parametrize("shape", [(1, 1), (40, 63), (9, 1000)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind, softcap", [("class", 5.0), ("probabilities", None)])
def test_class_weights_caps_and_probabilities(shape, softcap, smoothing, kind):
    logits, weight = draw(shape, scale=9.0), draw(shape[1:], seed=7)
    labels = draw_targets(shape[:1], shape[1]) if kind == "class" else draw_soft(shape)
    if kind == "class":
        labels[0] = -100
    options = {"label_smoothing": smoothing, "weight": weight}
    if softcap is not None:
        options["softcap"] = softcap
    want, want_grad = fastce.cross_entropy_and_grad(logits, labels, reduction="none", **options)
    grad = np.empty_like(logits)
    status, losses = call(logits, labels, grad=grad, **options)
    assert status == 0
    assert same_bits(losses, want)
    assert same_bits(grad, want_grad)


def test_strides():
    wide, wide_soft = draw((20, 3, 70)), draw_soft((20, 3, 70))
    targets = draw_targets((20,), 70)
    weight = draw_weight(70)
    for logits in (wide[:, 1], wide[::-1, 1, ::-1], np.asfortranarray(wide[:, 1])):
        for labels in (targets, wide_soft[:, 2], np.asfortranarray(wide_soft[:, 1])):
            given = {} if labels is targets else {"weight": weight}  # as in the other tests
            grad = np.full((20, 3, 70), 7, np.float32)
            status, losses = call(logits, labels, grad=grad[:, 1], **given)
            want, want_grad = fastce.cross_entropy_and_grad(
                logits, labels, reduction="none", **given
            )
            assert status == 0
            np.testing.assert_allclose(losses, want, rtol=1e-6)
            np.testing.assert_allclose(grad[:, 1], want_grad, rtol=1e-5, atol=1e-7)
            assert (grad[:, ::2] == 7).all()


BAD_OPTIONS = {
    "smoothing": {"label_smoothing": 1.5},
    "NaN": {"label_smoothing": np.nan},
    "z_loss": {"z_loss": np.inf},
    "negative z_loss": {"z_loss": -np.inf},
    "a cap": {"softcap": 5.0},
    "negative cap": {"softcap": -5.0},
    "no rows": {"rows": -1},
    "no class": {"classes": 0},
    "weights": {"weight": np.ones(10, np.float32).ctypes.data},
    "probabilities": {"probabilities": np.ones(50, np.float32).ctypes.data},
    "no gradient": {"grad": None},
    "no logits": {"logits": None},
    "no targets": {"targets": None},
    "no losses": {"losses": None},
    "structure": {"size": 0},
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_write_nothing(case):
    """Out of range, or what the function was not made for, or lacking what it was."""
    logits, targets, grad = draw((5, 10)), draw_targets((5,), 10), np.full((5, 10), 7, np.float32)
    good, losses = filled(logits, targets, np.full(5, 7, np.float32), grad)
    for name, value in BAD_OPTIONS[case].items():
        setattr(good, name, value)
    assert capi.function("float32", grad=True)(good) == -1
    assert (grad == 7).all()
    assert (losses == 7).all()


def test_what_a_function_is_made_for_must_be_given():
    logits, targets = draw((5, 10)), draw_targets((5,), 10)
    weight = np.ones(10, np.float32)
    for kinds in ({"weight": True, "softcap": True}, {"soft": True, "weight": True}):
        function = capi.function("float32", **kinds, grad=True)
        grad = np.full((5, 10), 7, np.float32)
        for given in ({}, {"weight": weight}, {"softcap": 5.0}):
            assert function(filled(logits, targets, grad=grad, **given)[0]) == -1
        assert (grad == 7).all()


@pytest.mark.parametrize("softcap", [np.inf, -np.inf, np.nan, -5.0])
def test_a_cap_is_positive_and_finite(softcap):
    logits, grad = draw((5, 10)), np.full((5, 10), 7, np.float32)
    assert call(logits, draw_targets((5,), 10), grad=grad, softcap=softcap)[0] == -1
    assert (grad == 7).all()


def test_large_gradients_in_place_and_off_their_alignment():
    """So large that it would be written past the caches, were it anywhere else."""
    logits = draw((2100, 4100))
    targets = draw_targets((2100,), 4100)
    want = fastce.cross_entropy_and_grad(logits, targets, reduction="sum")[1]
    apart = np.empty(logits.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(logits.shape)
    for grad in (np.empty_like(logits), apart, logits):
        assert call(logits, targets, grad=grad)[0] == 0
        assert same_bits(grad.copy(), want)


def test_bad_targets_write_nothing():
    logits, targets, grad = draw((5, 10)), draw_targets((5,), 10), np.full((5, 10), 7, np.float32)
    losses = np.full(5, 7, np.float32)
    bad = targets.copy()
    bad[3] = 10
    assert call(logits, bad, grad=grad, losses=losses)[0] == 4
    bad[2] = -1
    assert call(logits, bad, grad=grad, losses=losses)[0] == 3
    assert call(logits[:0], targets, grad=grad, losses=losses)[0] == 0
    assert (grad == 7).all()
    assert (losses == 7).all()


def test_many_threads_at_once():
    logits, targets = draw((64, 200)), draw_targets((64,), 200)
    grads = np.empty((16, 64, 200), np.float32)
    with ThreadPoolExecutor(8) as pool:
        for status, _ in pool.map(lambda grad: call(logits, targets, grad=grad), grads):
            assert status == 0
    want = fastce.cross_entropy_and_grad(logits, targets, reduction="sum")[1]
    assert all(same_bits(grad, want) for grad in grads)


def test_unknown_dtypes():
    with pytest.raises(ValueError, match="dtype: expected float32 or float64, got float16"):
        capi.address("float16")


def test_the_header_declares_the_structure():
    """The same fields in the same order, of the same kinds."""
    text = re.sub(r"/\*.*?\*/", "", capi.header().read_text(), flags=re.DOTALL)
    structure = re.search(r"define FASTCE_CALL\(number\)(.*?)\n    }", text, re.DOTALL).group(1)
    declared = re.findall(r"([\w ]+?) (\*?)(\w+); *\\", structure)
    kinds = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
    assert [
        (name, ctypes.c_void_p if star else kinds[kind.strip()]) for kind, star, name in declared
    ] == capi.Call._fields_


def test_from_c(capfd):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler called cc")
    runpy.run_path(str(EXAMPLES / "capi.py"), run_name="__main__")
    assert capfd.readouterr().out.splitlines() == [
        "same losses: True",
        "same gradients, in place: True",
    ]
