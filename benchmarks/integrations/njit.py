"""`fastce.rows` in a loop of one's own against two steps by way of an array of logits.

    python -m benchmarks.integrations.njit [--quick]

Contestants take turns in one run; ratios are medians within a turn. What one row costs is beside
what the NumPy function takes for the same rows at once, on one thread, and the C function.
"""

from functools import partial

import numba
import numpy as np

import fastce
import fastce.capi
from benchmarks.timing import Contestant, alternately, asked_for_quick
from examples.njit_loop import documents, fused_loss, two_step_loss
from fastce import rows

CASES = [(20000, 20, 100), (20000, 20, 1000), (5000, 20, 10000)]
ROWS = [10, 50, 64, 1000, 32000]


@numba.njit(nogil=True)
def with_grad(logits, targets, out):
    """Loss and gradient of every row, one thread."""
    loss = 0.0
    for i in range(targets.size):
        loss += rows.cross_entropy_and_grad(logits[i], targets[i], out[i])
    return loss


def main() -> None:
    quick = asked_for_quick()
    turns, seconds, most = (1, 0.0, 20_000) if quick else (9, 0.05, 2_000_000)
    print("rows x classes     fused ms   two steps ms   two steps / fused")
    for count, words, classes in [(100, 20, 100)] if quick else CASES:
        features, targets = documents(count, words, 5000, classes)
        weight = np.random.default_rng(1).standard_normal((5000, classes), np.float32)
        arguments = (weight, features, targets)
        assert np.isclose(fused_loss(*arguments), two_step_loss(*arguments), rtol=1e-6)
        times = alternately(
            {f: Contestant(partial(f, *arguments)) for f in (fused_loss, two_step_loss)},
            turns=turns, seconds=seconds,
        )  # fmt: skip
        fused, steps = times[fused_loss], times[two_step_loss]
        print(
            f"{count:6} x {classes:<8}{1e3 * fused.minimum:11.2f}{1e3 * steps.minimum:15.2f}"
            f"{steps.over(fused):20.2f}"
        )
    print("\nns per row, loss and gradient")
    print("classes      rows   C function   fastce on the array   rows / array   C / array")
    function = fastce.capi.function("float32", grad=True)
    for classes in ROWS:
        count = max(1, most // classes)
        logits = np.random.default_rng(1).standard_normal((count, classes), np.float32)
        targets, out = np.arange(count) % classes, np.empty_like(logits)
        losses = np.empty(count, np.float32)
        call = fastce.capi.Call(
            logits=logits.ctypes.data, rows=count, classes=classes, row_stride=4 * classes,
            class_stride=4, targets=targets.ctypes.data, losses=losses.ctypes.data,
            grad=out.ctypes.data, grad_row_stride=4 * classes, grad_class_stride=4,
        )  # fmt: skip
        with fastce.num_threads(1):
            times = alternately(
                {
                    "rows": Contestant(partial(with_grad, logits, targets, out)),
                    "C": Contestant(partial(function, call)),
                    "array": Contestant(
                        partial(fastce.cross_entropy_and_grad, logits, targets, out=out)
                    ),
                },
                turns=turns, seconds=seconds,
            )  # fmt: skip
        mine, c, array = (times[name] for name in ("rows", "C", "array"))
        print(
            f"{classes:7}{1e9 * mine.minimum / count:10.1f}{1e9 * c.minimum / count:13.1f}"
            f"{1e9 * array.minimum / count:22.1f}{mine.over(array):15.2f}{c.over(array):12.2f}"
        )


if __name__ == "__main__":
    main()
