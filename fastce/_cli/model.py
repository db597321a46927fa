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
        with np.load(path, allow_pickle=False) as archive:
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
    model = Model(
        arrays["classes"],
        arrays["coef"],
        arrays["intercept"],
        arrays["features"].tolist() if "features" in arrays else None,
        str(arrays["target"]) if "target" in arrays else None,
    )
    classes, features = model.coef.shape
    whole = (
        model.classes.shape == model.intercept.shape == (classes,)
        and model.classes.dtype.kind in "iubfU"
        and model.coef.dtype.kind == model.intercept.dtype.kind == "f"
        and np.isfinite(model.coef).all() and np.isfinite(model.intercept).all()
        and (model.features is None or np.shape(model.features) == (features,))
    )  # fmt: skip
    if not whole:
        raise ValueError
    return model
