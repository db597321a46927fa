"""`fastce.capi`: C functions with the bits of the NumPy functions, on threads of any kind."""

import re
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastce
from fastce import capi
from tests.checks import draw, draw_targets, same_bits

EXAMPLES = Path(__file__).parents[1] / "examples"
OPTIONS = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}


def call(logits, targets, grad=None, grad_output=None, losses=None, **options):
    """Status and losses; gradients go to `grad`."""
    if losses is None:
        losses = np.empty(len(logits), logits.dtype)
    kind = {4: "f32", 8: "f64"}[logits.itemsize]
    arguments = [
        logits.ctypes.data, *logits.shape, *logits.strides, targets.ctypes.data,
        *(OPTIONS | options).values(), losses.ctypes.data,
    ]  # fmt: skip
    name = f"fastce_cross_entropy_{kind}"
    if grad is not None:
        name = f"fastce_cross_entropy_and_grad_{kind}"
        upstream = None if grad_output is None else grad_output.ctypes.data
        arguments += [upstream, grad.ctypes.data, *grad.strides]
    return capi.function(name)(*arguments), losses


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
    status, losses = call(logits, targets, grad, upstream)
    assert status == 0
    assert same_bits(losses, want)
    assert same_bits(grad, want_grad)
    _, want_grad = fastce.cross_entropy_and_grad(logits, targets, reduction="sum")
    call(logits, targets, logits)  # in place, without upstream gradient
    assert same_bits(logits, want_grad)


def test_strides():
    wide = draw((20, 3, 70))
    targets = draw_targets((20,), 70)
    for logits in (wide[:, 1], wide[::-1, 1, ::-1], np.asfortranarray(wide[:, 1])):
        grad = np.full((20, 3, 70), 7, np.float32)
        status, losses = call(logits, targets, grad[:, 1])
        want, want_grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
        assert status == 0
        np.testing.assert_allclose(losses, want, rtol=1e-6)
        np.testing.assert_allclose(grad[:, 1], want_grad, rtol=1e-5)
        assert (grad[:, ::2] == 7).all()


def test_bad_arguments_write_nothing():
    logits, targets, grad = draw((5, 10)), draw_targets((5,), 10), np.full((5, 10), 7, np.float32)
    losses = np.full(5, 7, np.float32)
    bad = targets.copy()
    bad[3] = 10
    assert call(logits, bad, grad, losses=losses)[0] == 4
    bad[2] = -1
    assert call(logits, bad, grad, losses=losses)[0] == 3
    for option in ({"label_smoothing": 1.5}, {"label_smoothing": np.nan}, {"z_loss": np.inf}):
        assert call(logits, targets, grad, losses=losses, **option)[0] == -1
    assert call(logits[:, :0], targets, grad, losses=losses)[0] == -1
    assert call(logits[:0], targets, grad, losses=losses)[0] == 0
    assert (grad == 7).all()
    assert (losses == 7).all()


def test_many_threads_at_once():
    logits, targets = draw((64, 200)), draw_targets((64,), 200)
    grads = np.empty((16, 64, 200), np.float32)
    with ThreadPoolExecutor(8) as pool:
        for status, _ in pool.map(lambda grad: call(logits, targets, grad), grads):
            assert status == 0
    want = fastce.cross_entropy_and_grad(logits, targets, reduction="sum")[1]
    assert all(same_bits(grad, want) for grad in grads)


def test_unknown_names():
    with pytest.raises(ValueError, match="name: expected one of fastce_cross_entropy_f32"):
        capi.address("fastce_softmax_f32")


def test_the_header_declares_what_there_is():
    """As many arguments of the same kinds as the compiled functions take."""
    text = re.sub(r"/\*.*?\*/", "", capi.header().read_text(), flags=re.DOTALL)
    declared = dict(re.findall(r"typedef int64_t \(\*(\w+)_t\)\((.*?)\);", text, re.DOTALL))
    assert set(declared) == set(capi.names)
    letters = {"int64_t": "l", "double": "d"}
    for name, parameters in declared.items():
        kinds = ["P" if "*" in p else letters[p.split()[0]] for p in parameters.split(",")]
        compiled = [
            ty._type_ if ty._type_ in "ld" else "P" for ty in capi.function(name)._argtypes_
        ]
        assert kinds == compiled


def test_from_c(capfd):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler called cc")
    runpy.run_path(str(EXAMPLES / "capi.py"), run_name="__main__")
    assert capfd.readouterr().out.splitlines() == [
        "same losses: True",
        "same gradients, in place: True",
    ]
