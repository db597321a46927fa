"""From what users call labels and weights to what the passes take."""

from typing import Any

import numpy as np

from fastce._fit.passes import Array, Data, masses


def are_soft(y: Any) -> bool:
    """Whether these are distributions: floats with a column for each of two classes or more."""
    y = np.asarray(y)
    return bool(y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind == "f")


def classes(y: Array) -> Array:
    """The classes that labels are of, two at least."""
    found = np.arange(y.shape[1]) if are_soft(y) else np.unique(y)
    check_classes(found)
    return found


def check_classes(found: Array, name: str = "y") -> None:
    """Refuse a single class, or none."""
    if len(found) < 2:
        got = f"1 class, {found[0]!r}" if len(found) else "none"
        raise ValueError(f"{name}: expected at least 2 classes, got {got}")


def encoded(y: Any, classes: Array) -> tuple[Array | None, Array | None]:
    """Labels as indices into `classes`, or as they are if they are distributions."""
    if are_soft(y):
        y = np.asarray(y)
        if y.shape[1] != len(classes):
            raise ValueError(f"y: expected {len(classes)} columns, one per class, got {y.shape[1]}")
        return None, y
    y = np.asarray(y)
    index = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
    wrong = classes[index] != y
    if np.any(wrong):
        first = int(np.argmax(wrong))
        raise ValueError(f"y: expected classes of classes_, got {y[first]!r} at index ({first},)")
    return index.astype(np.int64), None


def data(x: Any, y: Any, weight: Array | None, classes: Array, class_weight: Any) -> Data:
    """Everything checked and in the form of the passes.

    Class weights are factors of the labels; how much a row's labels come to becomes its weight, so
    that labels are distributions.
    """
    hard, soft = encoded(y, classes)
    factors = _factors(class_weight, classes, hard, soft, weight)
    mass = None
    if soft is not None:
        if soft.size and soft.min() < 0:
            raise ValueError(f"y: expected probabilities, at least 0, got {soft.min()}")
        soft = soft.astype(x.dtype) if factors is None else (soft * factors).astype(x.dtype)
        mass = soft.sum(axis=1, dtype=np.float64)
        soft /= np.where(mass > 0, mass, 1)[:, None].astype(x.dtype)
    elif factors is not None:
        assert hard is not None
        mass = factors[hard]
    if mass is not None:
        weight = mass if weight is None else weight * mass
    return Data(x, hard, soft, weight, len(classes))


def check_weight(total: float) -> None:
    """Refuse data that weigh nothing."""
    if not total > 0:
        raise ValueError("y, sample_weight: expected a weight above 0, got none")


def balanced(counts: Array) -> Array:
    """Factors that make all classes weigh the same, and all together what they do."""
    return np.asarray(counts.sum() / (len(counts) * np.maximum(counts, 1e-300)))


def _factors(
    class_weight: Any, classes: Array, hard: Array | None, soft: Array | None, weight: Array | None
) -> Array | None:
    if class_weight is None:
        return None
    if isinstance(class_weight, str) and class_weight == "balanced":
        return balanced(masses(hard, soft, weight, len(classes)))
    if not isinstance(class_weight, dict):
        raise ValueError(f"class_weight: expected a dict, 'balanced' or None, got {class_weight!r}")
    known = classes.tolist()
    for label in class_weight:
        if label not in known:
            raise ValueError(f"class_weight: expected classes of y, got {label!r}")
    return np.array([class_weight.get(c, 1.0) for c in known], float)
