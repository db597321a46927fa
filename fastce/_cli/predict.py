"""``fastce predict``: classes of the rows of a data set, or their probabilities, by a model."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from typing import IO, Any, TextIO

import numpy as np

import fastce

from . import model, npy, output, table
from .model import Model
from .npy import Array
from .terminal import Failure


def run(options: argparse.Namespace) -> int:
    """Predict, and print or write what is predicted."""
    fitted = model.read(options.model)
    if options.output is None:
        blocks = _predicted(fitted, _features(options, fitted), options.probabilities)
        if options.probabilities:
            _write_csv(sys.stdout, fitted, blocks)
        else:
            for labels in blocks:
                sys.stdout.writelines(f"{label}\n" for label in labels.tolist())
        return 0
    output.check({"--output": options.output}, [options.model, *options.data])
    with output.written(options.output) as file:
        x = _features(options, fitted)
        blocks = _predicted(fitted, x, options.probabilities)
        if options.output.suffix.lower() == ".csv":
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            _write_csv(text, fitted, blocks)
            text.detach()
        else:
            _write_npy(file, x.shape[0], blocks)
    if not output.is_stdout(options.output):  # what reads that expects nothing more
        print(f"{x.shape[0]} predictions written to {options.output}")
    return 0


def _features(options: argparse.Namespace, fitted: Model) -> Any:
    wanted = table.Wanted(fitted.target, False, fitted.features)
    x = table.read(options.data, wanted).x
    if x.shape[1] != fitted.coef.shape[1]:
        raise Failure(
            f"{options.data[0]}: expected {fitted.coef.shape[1]} features, as the model has, "
            f"got {x.shape[1]}"
        )
    return x


def _predicted(fitted: Model, x: Any, probabilities: bool) -> Iterator[Array]:
    """What is predicted of each row, of some rows at a time."""
    step = max(1, npy.PIECE_BYTES // fitted.coef[:, :1].nbytes)
    for start in range(0, x.shape[0], step):
        logits = np.asarray(x[start : start + step] @ fitted.coef.T + fitted.intercept)
        yield fastce.softmax(logits) if probabilities else fitted.classes[logits.argmax(axis=1)]


def _write_csv(file: TextIO, fitted: Model, blocks: Iterator[Array]) -> None:
    """Write a line of names and one for each row."""
    lines = csv.writer(file, lineterminator="\n")
    for number, block in enumerate(blocks):
        if not number:
            lines.writerow(
                fitted.classes.tolist() if block.ndim > 1 else [fitted.target or "class"]
            )
        lines.writerows(block.reshape(len(block), -1).tolist())


def _write_npy(file: IO[bytes], rows: int, blocks: Iterator[Array]) -> None:
    for number, block in enumerate(blocks):
        if not number:
            npy.write_header(file, block.dtype, (rows, *block.shape[1:]))
        file.write(block.tobytes())
