"""``fastce fit`` and ``fastce predict``: softmax regression of a stored data set."""

import argparse
import json
import secrets
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import table, terminal
from .terminal import Failure

_MODEL = "fastce softmax regression 1"
_NEEDS = "python -m pip install 'fastce[sklearn]' matplotlib"


def run(options: argparse.Namespace) -> int:
    """Fit or predict, as the command says."""
    try:
        import sklearn  # noqa: F401

        if options.command == "fit":
            import matplotlib.figure  # noqa: F401 (last needed, but its absence should be known)
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise Failure(f"needs {package}: {_NEEDS}") from None
    return _fit(options) if options.command == "fit" else _predict(options)


def _fit(options: argparse.Namespace) -> int:
    from sklearn.exceptions import ConvergenceWarning

    from fastce.sklearn import SoftmaxRegression

    outputs = {"--output": options.output, "--curve": options.curve}
    taken: list[Path] = []
    for name, path in outputs.items():
        if not path.parent.is_dir():
            raise Failure(f"{name}: expected a folder that exists, got {path.parent}")
        if path.is_dir() or path in [*options.data, *taken]:
            raise Failure(f"{name}: expected a file of its own, got {path}")
        taken.append(path)
    paired = options.data[0].suffix.lower() in (".npy", ".svmlight", ".svm", ".libsvm")
    if options.target is None and not paired:
        raise Failure("--target: expected the name of what is to be learnt, got nothing")
    data = table.read(options.data, table.Wanted(options.target, learn=True))
    model = SoftmaxRegression(
        l2=options.l2, solver=options.solver, tol=options.tol, max_iter=options.max_iter,
        verbose=options.verbose,
    )  # fmt: skip
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            model.fit(data.x, data.y)
        except ValueError as error:
            raise Failure(f"{options.data[0]}: {str(error).splitlines()[0]}") from None
    seconds = time.perf_counter() - began
    _save(options, model, data.names)
    log_likelihood = model.log_likelihood(data.x, data.y)
    assert data.y is not None
    likeliest = data.y if data.y.ndim == 1 else np.argmax(data.y, axis=1)
    found: dict[str, Any] = {
        "rows": data.x.shape[0],
        "features": data.x.shape[1],
        "classes": len(model.classes_),
        "loss": -log_likelihood / data.x.shape[0],
        "log_likelihood": log_likelihood,
        "accuracy": float(np.mean(model.predict(data.x) == likeliest)),
        "iterations": model.n_iter_,
        "seconds": seconds,
    }
    notes = []
    for warning in told:
        if issubclass(warning.category, ConvergenceWarning):
            notes.append(str(warning.message))
        else:  # of somebody else's code, and not about the fit
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if options.json:
        print(json.dumps(found | {"warnings": notes}))
        return 0
    shown = {
        "loss": ".9g", "log_likelihood": ".9g", "accuracy": ".4%", "seconds": ".3g",
    }  # fmt: skip
    terminal.pairs([(k.replace("_", " "), format(v, shown.get(k, ""))) for k, v in found.items()])
    for note in notes:
        print(f"note: {note}")
    print(f"model written to {options.output}, curve to {options.curve}")
    return 0


def _save(options: argparse.Namespace, model: Any, names: list[str] | None) -> None:
    """Write the model and the picture of its curve, both or none."""

    def write_model(file: IO[bytes]) -> None:
        arrays = {"classes": model.classes_, "coef": model.coef_, "intercept": model.intercept_}
        if names is not None:
            arrays["features"] = np.array(names, str)
        if options.target is not None:
            arrays["target"] = np.array(options.target)
        np.savez(file, allow_pickle=False, format=np.array(_MODEL), l2=model.l2, **arrays)

    def write_curve(file: IO[bytes]) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(model.loss_curve_, ".-")
        axes.set(title="The objective on its way down", xlabel="iteration", ylabel="nats per row")
        figure.savefig(file, format="png", dpi=100)

    _write({options.output: write_model, options.curve: write_curve})


def _write(files: dict[Path, Callable[[IO[bytes]], None]]) -> None:
    """Write files that appear under their names when all are complete, or not at all."""
    written: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            try:
                with temporary.open("xb") as file:
                    written[path] = temporary
                    write(file)
            except OSError as error:
                raise Failure(f"{path}: {error.strerror}") from None
        for path, temporary in written.items():
            temporary.replace(path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _predict(options: argparse.Namespace) -> int:
    model = _Model.read(options.model)
    data = table.read(options.data, table.Wanted(model.target, False, model.features))
    if data.x.shape[1] != model.coef.shape[1]:
        raise Failure(
            f"{options.data[0]}: expected {model.coef.shape[1]} features, as the model has, "
            f"got {data.x.shape[1]}"
        )
    import fastce

    logits = np.asarray(data.x @ model.coef.T + model.intercept)
    if options.output is None:
        for label in model.classes[np.argmax(logits, axis=1)].tolist():
            print(label)
        return 0
    result = fastce.softmax(logits) if options.proba else model.classes[np.argmax(logits, axis=1)]
    if options.output in options.data or options.output == options.model:
        raise Failure(f"--output: expected a file of its own, got {options.output}")
    if not options.output.parent.is_dir():
        raise Failure(f"--output: expected a folder that exists, got {options.output.parent}")
    _write({options.output: lambda file: np.save(file, result, allow_pickle=False)})
    print(f"{len(result)} predictions written to {options.output}")
    return 0


class _Model:
    """A model as `fit` has saved it."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.classes, self.coef, self.intercept = (
            arrays[name] for name in ("classes", "coef", "intercept")
        )
        self.features = arrays["features"].tolist() if "features" in arrays else None
        self.target = str(arrays["target"]) if "target" in arrays else None

    @classmethod
    def read(cls, path: Path) -> "_Model":
        """Read and check a model."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            if str(arrays["format"]) != _MODEL:
                raise ValueError
            model = cls(arrays)
            shapes = (len(model.classes), model.coef.shape[1])
            if model.coef.shape != shapes or model.intercept.shape != shapes[:1]:
                raise ValueError
        except FileNotFoundError as error:
            raise Failure(f"{path}: {error.strerror}") from None
        except Exception:  # of damaged files anything may come: BadZipFile, KeyError, ...
            raise Failure(f"{path}: expected a model that fastce fit has saved") from None
        return model
