"""``fastce fit``: softmax regression of a stored data set."""

import argparse
import json
import time
import warnings
from typing import IO, Any

import numpy as np

from . import model, output, table, terminal
from .terminal import Failure


def run(options: argparse.Namespace) -> int:
    """Fit, save the model and the picture of its curve, and report."""
    try:
        import matplotlib.figure  # noqa: F401 (last needed, but its absence should be known first)
        import sklearn  # noqa: F401
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise Failure(
            f"needs {package}: python -m pip install 'fastce[sklearn]' matplotlib"
        ) from None
    if options.target is None and options.data[0].suffix.lower() not in table.WITH_TARGET:
        raise Failure("--target: expected the name of what is to be learnt, got nothing")
    output.check({"--output": options.output, "--curve": options.curve}, options.data)
    with output.written(options.output) as model_file, output.written(options.curve) as curve_file:
        data = table.read(options.data, table.Wanted(options.target, learn=True))
        fitted, notes, seconds = _fitted(options, data)
        with output.writing(options.output, model_file):
            model.save(model_file, fitted, data.names, options.target)
        with output.writing(options.curve, curve_file):
            _draw(curve_file, fitted.loss_curve_)
    found = _found(fitted, data) | {"seconds": seconds}
    if options.json:
        print(json.dumps(found | {"warnings": notes}))
        return 0
    shown = {"loss": ".9g", "log_likelihood": ".9g", "accuracy": ".4%", "seconds": ".3g"}
    terminal.pairs([(k.replace("_", " "), format(v, shown.get(k, ""))) for k, v in found.items()])
    for note in notes:
        print(f"note: {note}")
    print(f"model written to {options.output}, curve to {options.curve}")
    return 0


def _fitted(options: argparse.Namespace, data: table.Table) -> tuple[Any, list[str], float]:
    """The model, what there is to be said about the fit, and how long it took."""
    from sklearn.exceptions import ConvergenceWarning

    from fastce.sklearn import SoftmaxRegression

    names = ("l2", "solver", "tol", "max_iter", "verbose")
    fitted = SoftmaxRegression(**{name: getattr(options, name) for name in names})
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            fitted.fit(data.x, data.y)
        except ValueError as error:
            raise Failure(f"{options.data[0]}: {str(error).splitlines()[0]}") from None
    seconds = time.perf_counter() - began
    notes = []
    for warning in told:
        if issubclass(warning.category, ConvergenceWarning):
            notes.append(str(warning.message))
        else:  # of somebody else's code, and not about the fit
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return fitted, notes, seconds


def _found(fitted: Any, data: table.Table) -> dict[str, Any]:
    assert data.y is not None
    rows, features = data.x.shape
    log_likelihood = fitted.log_likelihood(data.x, data.y)
    likeliest = data.y if data.y.ndim == 1 else np.argmax(data.y, axis=1)
    return {
        "rows": rows,
        "features": features,
        "classes": len(fitted.classes_),
        "loss": -log_likelihood / rows,
        "log_likelihood": log_likelihood,
        "accuracy": float(np.mean(fitted.predict(data.x) == likeliest)),
        "iterations": fitted.n_iter_,
    }


def _draw(file: IO[bytes], curve: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve, ".-")
    axes.set(title="The objective on its way down", xlabel="iteration", ylabel="nats per row")
    figure.savefig(file, format="png", dpi=100)
