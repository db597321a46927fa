"""A valid call of every public function that takes arrays, by parameter, for tests of all of them.

What a function is called with comes from its signature: parameters that have no entry here, or
functions that have none, fail in `tests/test_remembered.py`.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastce
from fastce import boosting, shards
from tests.checks import draw, draw_soft

ROWS = CLASSES = 6  # so that either axis may have the classes
FEATURES = 3

Z = draw((ROWS, CLASSES))
Y = np.roll(np.arange(CLASSES), 1)
PROBABILITIES = draw_soft((ROWS, CLASSES))
BY_CLASS = np.linspace(0.5, 1.5, CLASSES).astype(np.float32)
BY_ROW = np.linspace(-1.0, 1.0, ROWS)

# Arrays by the names of parameters, and what differs from family to family.
_LOGITS = {
    "logits": Z, "log_probs": -Z * Z, "targets": Y, "weight": BY_CLASS,
    "sample_weight": np.abs(BY_ROW), "grad_output": BY_ROW, "out": np.empty_like(Z), "v": Z[::-1],
    "x": Z,
}  # fmt: skip
_BINARY = _LOGITS | {
    "targets": PROBABILITIES, "weight": Z * Z, "pos_weight": BY_CLASS, "grad_output": Z,
}  # fmt: skip
_LINEAR = _LOGITS | {
    "out": None,
    "x": draw((ROWS, FEATURES)), "weight": draw((CLASSES, FEATURES), seed=1), "bias": BY_CLASS,
    "class_weight": BY_CLASS,
}  # fmt: skip
_TOTAL = shards.partial(Z, Y, class_offset=0, classes=CLASSES)
_SLICE = _LOGITS | {"class_offset": 0, "classes": CLASSES, "total": _TOTAL}

# Options that are numbers: two values each, which make a difference.
NUMBERS = {
    "axis": (-1, -2), "ignore_index": (0, 1), "label_smoothing": (0.125, 0.5),
    "z_loss": (0.125, 0.5), "softcap": (1.0, 0.25), "normalizer": (2.0, 8.0),
    "skip_below": (0.0, 0.875),
    "class_offset": (0, 1), "classes": (6, 5),
}  # fmt: skip
# Choices; and results of other functions.
OTHERS = {
    "keepdims", "reduction", "hessian", "accumulate", "entropy", "out", "total", "first", "others",
    "size_average", "reduce", "dtype", "in_place", "sample_weight", "where",
}  # fmt: skip


class Public(NamedTuple):
    """A public function, what it may be given, and what makes arrays of NumPy its arrays."""

    name: str
    function: Callable[..., Any]
    values: dict[str, Any]
    own: Callable[[str, Any], Any] = lambda name, value: value

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters."""
        return list(inspect.signature(self.function).parameters)

    @property
    def arrays(self) -> list[str]:
        """Those that are arrays."""
        return [p for p in self.parameters if isinstance(self.values.get(p), np.ndarray)]

    @property
    def required(self) -> dict[str, Any]:
        """A valid call: arguments by name."""
        parameters = inspect.signature(self.function).parameters
        required = {
            name for name in self.values
            if name in parameters
            and (parameters[name].default is inspect.Parameter.empty or name == "linear_weight")
        }  # fmt: skip
        return {name: self.given(name, self.values[name]) for name in required}

    def given(self, name: str, value: Any) -> Any:
        """A value as this function takes it."""
        return self.own(name, value) if isinstance(value, np.ndarray) else value

    def results(self, **given: Any) -> list[Any]:
        """Everything that a call of it returns, as arrays of NumPy; `out` is made anew."""
        return list(_flat(self.function(**{**self.required, **given})))


def _flat(result: Any) -> Iterator[Any]:
    if isinstance(result, shards.Partial):
        yield result.records
    elif isinstance(result, tuple):
        for part in result:
            yield from _flat(part)
    elif result is not None:
        yield np.asarray(result.compute() if hasattr(result, "compute") else result)


def _family(name: str) -> dict[str, Any]:
    if name.startswith("binary"):
        return _BINARY
    return _LINEAR if name.startswith("linear") else _LOGITS


def _core() -> Iterator[Public]:
    for name in fastce.__all__:
        function = getattr(fastce, name)
        if inspect.isfunction(function) and "threads" not in name:
            yield Public(f"fastce.{name}", function, _family(name))
    for name in ("partial", "finish", "grad"):
        yield Public(f"fastce.shards.{name}", getattr(shards, name), _SLICE)
    objective = boosting.softmax_objective("xgboost")
    boosted = {"first": Y, "second": Z, "sample_weight": np.abs(BY_ROW)}  # labels, scores
    yield Public("fastce.boosting.softmax_objective", objective, boosted)


def _dask() -> Iterator[Public]:
    da = importlib.import_module("dask.array")
    module = importlib.import_module("fastce.dask")

    def own(name: str, value: Any) -> Any:
        return da.from_array(value, (4, -1)) if name in ("logits", "log_probs", "x") else value

    for name in module.__all__:
        yield Public(f"fastce.dask.{name}", getattr(module, name), _family(name), own)


def _torch() -> Iterator[Public]:
    torch = importlib.import_module("torch")
    module = importlib.import_module("fastce.torch")
    logits = {"input": Z, "target": Y, "weight": BY_CLASS}
    linear = {
        "input": _LINEAR["x"], "linear_weight": _LINEAR["weight"], "target": Y,
        "linear_bias": BY_CLASS, "weight": BY_CLASS,
    }  # fmt: skip
    own = lambda name, value: torch.from_numpy(value.copy())  # noqa: E731
    yield Public("fastce.torch.cross_entropy", module.cross_entropy, logits, own)
    yield Public("fastce.torch.linear_cross_entropy", module.linear_cross_entropy, linear, own)


def _jax() -> Iterator[Public]:
    module = importlib.import_module("fastce.jax")
    integers = {"logits": Z, "targets": Y, "labels": Y, "where": Z > -1}
    for name in module.__all__:
        soft = name == "softmax_cross_entropy"
        values = integers | {"labels": PROBABILITIES} if soft else integers
        yield Public(f"fastce.jax.{name}", getattr(module, name), values)


# Functions, and the extra without which there are none.
_FRAMEWORKS = [(_core, None), (_dask, None), (_torch, "test-torch"), (_jax, "test-jax")]


def public_functions() -> list[Any]:
    """Every public function, as parameters of a test; one of a missing framework is left out."""
    found = []
    for functions, extra in _FRAMEWORKS:
        marks = [pytest.mark.needs(extra)] if extra else []
        try:
            found += [pytest.param(p, id=p.name, marks=marks) for p in functions()]
        except ModuleNotFoundError:
            if not extra:
                raise
            found.append(pytest.param(None, id=functions.__name__, marks=marks))
    return found
