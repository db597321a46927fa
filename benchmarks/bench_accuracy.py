"""Worst relative errors against the tests' oracle, for asv."""

import itertools

from benchmarks import accuracy
from tests import oracle
from tests.checks import FLOATS, relative_errors

MOST: int | None = None  # how many cases of the table of `benchmarks.accuracy` (None: all)


class Accuracy:
    params = ([dtype.name for dtype in FLOATS], ["loss", "gradient"])
    param_names = ("dtype", "of")
    timeout = 300.0

    def track_worst_relative_error(self, dtype: str, of: str) -> float:
        (logits_dtype,) = (d for d in FLOATS if d.name == dtype)
        worst = 0.0
        for _, logits, targets in itertools.islice(accuracy.cases(logits_dtype), MOST):
            want = oracle.cross_entropy(logits, targets, reduction="none")
            loss, gradient = accuracy.ours(logits, targets)
            pair = (loss, want.loss) if of == "loss" else (gradient, want.grad)
            worst = max(worst, float(relative_errors(*pair).max()))
        return worst

    track_worst_relative_error.unit = "relative error"  # type: ignore[attr-defined]
