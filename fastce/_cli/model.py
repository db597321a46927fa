"""A softmax regression in a file, as ``fastce fit`` saves it and ``fastce predict`` reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .terminal import Failure

Array = np.ndarray[Any, Any]

_FORMAT = "fastce softmax regression 1"


@dataclass(frozen=True)
class Model:
    """Coefficients, and the names of what they are for where the data had some."""

    classes: Array
    coef: Array
    intercept: Array
    features: list[str] | None
    target: str | None


def save(file: IO[bytes], fitted: Any, features: list[str] | None, target: str | None) -> None:
    """Write a fitted `fastce.sklearn.SoftmaxRegression` and the names of its data as ``.npz``."""
    classes = fitted.classes_
    arrays = {"coef": fitted.coef_, "intercept": fitted.intercept_}
    # Text of a table comes as objects, which cannot be saved without pickle.
    arrays["classes"] = classes.astype(str) if classes.dtype == object else classes
    if features is not None:
        arrays["features"] = np.array(features, str)
    if target is not None:
        arrays["target"] = np.array(target)
    np.savez(file, allow_pickle=False, format=np.array(_FORMAT), l2=fitted.l2, **arrays)


def read(path: Path) -> Model:
    """Read a model and check that it is whole."""
    try:
        # Opened here, for of what is no archive NumPy leaves the file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            model = _checked({name: archive[name] for name in archive.files})
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from None
    except Exception:  # of damaged files anything may come: BadZipFile, KeyError, ...
        raise Failure(f"{path}: expected a model that fastce fit has saved") from None
    return model


def _checked(arrays: dict[str, Array]) -> Model:
    """Read the members of the archive; any exception says that they are not those of a model."""
    if str(arrays["format"]) != _FORMAT:
        raise ValueError
    classes, coef, intercept = (arrays[name] for name in ("classes", "coef", "intercept"))
    features = arrays.get("features", np.zeros(coef.shape[1], str))
    target = arrays.get("target", np.array(""))
    whole = (
        coef.ndim == 2
        and classes.shape == intercept.shape == coef.shape[:1]
        and features.shape == coef.shape[1:]
        and target.shape == ()
        and coef.dtype.kind == intercept.dtype.kind == "f"
        and classes.dtype.kind in "iubfU"
        and features.dtype.kind == target.dtype.kind == "U"
        and np.isfinite(coef).all()
        and np.isfinite(intercept).all()
    )
    if not whole:
        raise ValueError
    return Model(
        classes,
        coef,
        intercept,
        features.tolist() if "features" in arrays else None,
        str(target) if "target" in arrays else None,
    )
