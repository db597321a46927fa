"""The fuzzer finds what is wrong, and says how to see it again.  CI runs it for a minute."""

import numpy as np
import pytest

import fastce
from tests import fuzz

CASES = range(0, 400 * fuzz.CASES_A_KIND, fuzz.CASES_A_KIND)  # the first of each kind


def cases(call, count=1):
    """Numbers of cases of a call under seed 1, kernels of float32 without options only."""
    found = []
    for first in CASES:
        kind = fuzz.Draw(1, first // fuzz.CASES_A_KIND)
        if kind.one(fuzz.CALLS) is call and kind.one(fuzz.FLOATS) == np.float32:
            found.append(first)
    return [first + k for first in found[:1] for k in range(count)]


def test_calls_are_right():
    for call in (fuzz.cross_entropy, fuzz.softmax, fuzz.stats):
        for number in cases(call, 10):
            assert fuzz.tried(1, number) is None


def test_a_case_is_the_same_again():
    number = cases(fuzz.cross_entropy)[0]
    kinds = [fuzz.Draw(1, number // fuzz.CASES_A_KIND, number).shape() for _ in range(2)]
    assert kinds[0] == kinds[1]


def _slightly_off(function, logits, targets, **options):
    return function(logits, targets, **options) * np.float32(1 + 1e-5)


def _beside(function, logits, targets, *, out=None, **options):
    found = function(logits, targets, out=out, **options)
    if out is not None:
        last = out.__array_interface__["data"][0] + out.strides[-1] * out.shape[-1]
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * 1).from_address(last))[0] ^= 1
    return found


def _into_the_targets(function, logits, targets, **options):
    found = function(logits, targets, **options)
    if targets.flags.writeable and targets.size:
        targets[...] = 0
    return found


def _by_threads(function, logits, targets, **options):
    found = function(logits, targets, **options)
    return found * (1 + np.float32(1e-7) * (fastce.get_num_threads() > 1))


@pytest.mark.parametrize(
    "name, fault, said",
    [
        ("cross_entropy", _slightly_off, "relative error"),
        ("cross_entropy_and_grad", _beside, "beside out"),
        ("cross_entropy", _into_the_targets, "was written to"),
        ("cross_entropy", _by_threads, "other bits on"),
    ],
)
def test_planted_faults_are_found(name, fault, said, monkeypatch):
    right = getattr(fastce, name)
    monkeypatch.setattr(fastce, name, lambda *args, **options: fault(right, *args, **options))
    found = [fuzz.tried(1, number) for number in cases(fuzz.cross_entropy, 12)]
    assert any(said in (what or "") for what in found), found


def test_a_result_instead_of_an_error_is_found(monkeypatch):
    monkeypatch.setattr(fastce, "cross_entropy_and_grad", lambda *arguments, **options: None)
    number = next(
        first for first in CASES
        if fuzz.Draw(1, first // fuzz.CASES_A_KIND).one(fuzz.CALLS) is fuzz.wrong
    )  # fmt: skip
    assert "DID NOT RAISE" in (fuzz.tried(1, number) or "")
