"""The errors that the comments beside the kernels' constants state."""

import functools

import mpmath
import numpy as np
import pytest
from numba import types

from fastce.cpu.constants import CONSTANTS, STEPS

FLOATS = {"float32": (types.float32, np.float32), "float64": (types.float64, np.float64)}


def coefficients(element, kind, name):
    return [mpmath.mpf(float(kind(c))) for c in CONSTANTS[element][name]]


def value(terms, x):
    return functools.reduce(lambda high, term: high * x + term, reversed(terms))


def worst(dtype, name, steps, true, approximate):
    terms = coefficients(*FLOATS[dtype], name)
    with mpmath.workdps(40):
        edge = mpmath.log(2) / (2 * steps)
        points = [r for r in mpmath.linspace(-edge, edge, 801) if r]
        return max(abs(approximate(r, value(terms, r)) / true(r) - 1) for r in points)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2.7e-8), ("float64", 3e-18)])
def test_exponential(dtype, bound):
    error = worst(dtype, "EXP", STEPS, mpmath.exp, lambda r, p: 1 + r * p)
    assert bound / 10 < error < bound


def test_exponential_less_one():
    error = worst("float64", "EXPM1", 1, mpmath.expm1, lambda r, p: r * p)
    assert 4e-18 < error < 4.2e-17


def test_arctangent():
    terms = coefficients(*FLOATS["float64"], "ATANH")
    with mpmath.workdps(40):
        points = mpmath.linspace(mpmath.mpf("0.01"), mpmath.tan(mpmath.pi / 8) ** 2, 400)
        error = max(
            abs((1 + s**2 * value(terms, s**2)) / (mpmath.atanh(s) / s) - 1) for s in points
        )
    assert error < 5e-18


@pytest.mark.parametrize(("dtype", "missed"), [("float32", 2.0**-53), ("float64", 2.0**-90)])
def test_parts_of_ln2(dtype, missed):
    """They sum to ln(2) / STEPS, or exceed it by what is stated."""
    element, kind = FLOATS[dtype]
    parts = coefficients(element, kind, "LN2_PARTS")
    with mpmath.workdps(60):
        excess = STEPS * mpmath.fsum(parts) - mpmath.log(2)
        assert abs(excess - mpmath.mpf(CONSTANTS[element]["LN2_EXCESS"])) < missed
