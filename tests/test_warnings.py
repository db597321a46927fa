"""No warning of NumPy leaks out of a call, so that where warnings are errors nothing is half done.

An infinity or NaN is a result like others, and section 4 says where there is one."""

import contextlib
import itertools
import warnings

import numpy as np
import pytest

from tests.public_calls import Z, public_functions

CORE = [p for p in public_functions() if p.id.count(".") == 1 or ".shards." in p.id]

LARGEST, SMALLEST = np.finfo(np.float64).max, 5e-324
SPECIAL = [0.0, LARGEST, -LARGEST, SMALLEST, np.inf, -np.inf, np.nan]
NUMBERS = {
    "normalizer": (1e-310, 1e300, 0.0, 1e-40), "softcap": (1e-309, 1e300),
    "z_loss": (1e300, -1e300, 1e-320), "label_smoothing": (1e-320, 1.0),
    "grad_output": (1e300, 1e-320, np.inf, np.nan, 10**30), "reduction": ("none", "sum"),
}  # fmt: skip
WEIGHTS = ("weight", "sample_weight", "bias", "class_weight", "pos_weight", "v")


def _options(public):
    yield {}
    for name in set(public.parameters) & set(NUMBERS):
        yield from ({name: value} for value in NUMBERS[name])
    for name in set(public.arrays) & set(WEIGHTS):
        for special in SPECIAL:
            yield {name: np.full(public.values[name].shape, special)}


def _logits(dtype):
    with np.errstate(over="ignore"):
        for special in SPECIAL:
            z = Z.astype(np.float64)
            z[0, 0] = z[1] = special
            yield z.astype(dtype)


@pytest.mark.parametrize("numpy_raises", [False, True], ids=["warnings raise", "NumPy raises"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("public", CORE)
def test_no_warning(public, dtype, numpy_raises):
    main = next(n for n in ("logits", "log_probs", "x", "total") if n in public.parameters)
    for logits, options in itertools.product(_logits(dtype), _options(public)):
        given = dict(options)
        if main != "total":
            given[main] = logits[:, : public.values[main].shape[1]]
        if dtype != "float32":
            given.pop("out", None)
        error = "raise" if numpy_raises else "warn"
        with warnings.catch_warnings(), np.errstate(all=error):
            warnings.simplefilter("error")
            with contextlib.suppress(TypeError, ValueError):  # what cannot be computed
                public.results(**given)
