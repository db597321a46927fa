"""``fastce demo``: maximum likelihood on real digits, and on data whose truth is known.

Notation: x is an observation, W a matrix with one row per class, z = W x the logits and
p(y | x) = softmax(z)[y].  The estimate maximises the product of p(y_i | x_i), which is to say it
minimises the mean cross-entropy.  The digits are fitted by `fastce.sklearn`; for the known truth
`fastce` supplies the loss and its gradient, and SciPy the steps.
"""

import argparse
import decimal
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastce

from .terminal import Failure, pairs, table

Array = np.ndarray[Any, Any]

_SIZES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
_SIZES_QUICK = (100, 1000, 10_000)
_REPEATS = 10  # data sets per size: the curves are means, or chance would hide their slopes


def run(options: argparse.Namespace) -> int:
    """Show everything and return 0, or 1 if a check failed."""
    try:
        import matplotlib.figure  # noqa: F401 (last needed, but its absence should be known first)
        import scipy.optimize  # noqa: F401
        import sklearn.linear_model  # noqa: F401
        import threadpoolctl  # which scikit-learn needs as well
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise Failure(
            f"needs {package}: python -m pip install scikit-learn scipy matplotlib rich"
        ) from None
    if not options.output.parent.is_dir():
        raise Failure(f"--output: expected a folder that exists, got {options.output.parent}")
    # The matrices are small: threads of BLAS save nothing, and where another program is busy they
    # wait for each other, ten times as long as the product takes.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        checks = [
            _digits(),
            _speed(rows=256 if options.quick else 1024, classes=8000 if options.quick else 32_000),
            _known_truth(_SIZES_QUICK if options.quick else _SIZES, options.output),
        ]
    return 0 if all(checks) else 1


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _verdict(passed: bool) -> str:
    return "yes" if passed else "NO"


def _fit(x: Array, y: Array, classes: int) -> tuple[Array, float]:
    """Minimise the mean cross-entropy; return W and that minimum."""
    from scipy.optimize import minimize

    logits = np.empty((len(x), classes))

    def objective(theta: Array) -> tuple[float, Array]:
        w = theta.reshape(classes, -1)
        np.matmul(x, w.T, out=logits)
        loss, gradient = fastce.cross_entropy_and_grad(logits, y, out=logits)
        return float(loss), (gradient.T @ x).ravel()

    found = minimize(
        objective,
        np.zeros(classes * x.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 1e-8},
    )
    return found.x.reshape(classes, -1), float(found.fun)


def _digits() -> bool:
    """Classify handwritten digits, and check that scikit-learn finds the same optimum."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split

    from fastce.sklearn import SoftmaxRegression

    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels / 16  # 0 to 16 in the file
    x, x_test, y, y_test = train_test_split(
        pixels, digits, test_size=0.25, stratify=digits, random_state=0
    )
    _heading(f"Handwritten digits: {len(x)} to learn from, {len(x_test)} to test, 10 classes")

    model = SoftmaxRegression(tol=1e-8).fit(x, y)
    for iteration, objective in enumerate(model.loss_curve_):
        if str(iteration).rstrip("0") in ("1", "2", "5"):
            print(f"  iteration {iteration:4}  penalised loss per observation {objective:.6f}")
    minimum = model.loss_curve_[-1]
    print(f"  minimum         penalised loss per observation {minimum:.6f}\n")

    rows = []
    for name, some_x, some_y in (("train", x, y), ("test", x_test, y_test)):
        stats = fastce.cross_entropy_stats(model.decision_function(some_x), some_y)
        nll = float(stats.loss.mean())
        accuracy = float(np.mean(stats.predicted == some_y))
        rows.append((name, f"{nll:.6f}", f"{math.exp(nll):.4f}", f"{accuracy:.2%}"))
    table(("", "NLL per digit", "perplexity", "accuracy"), rows)

    peer = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(x, y)
    theirs = log_loss(y, peer.predict_proba(x)) + np.sum(peer.coef_**2) / len(x) / 2
    difference = abs(minimum - theirs) / theirs
    same = bool(difference < 1e-9)
    print(
        f"\nLogisticRegression of scikit-learn reaches {theirs:.6f}: relative difference "
        f"{difference:.1e}, largest difference of a weight "
        f"{np.abs(peer.coef_ - model.coef_).max():.1e}."
    )
    print(f"The same optimum: {_verdict(same)}")
    return same


def _speed(rows: int, classes: int) -> bool:
    """Time loss and gradient against NumPy and against moving the same bytes."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, classes), dtype=np.float32)
    targets = rng.integers(0, classes, rows)
    ours, theirs, copied = (np.zeros_like(logits) for _ in range(3))
    threads = fastce.get_num_threads()
    _heading(
        f"Speed: loss and gradient of {rows} x {classes} float32 "
        f"({logits.nbytes / 1e6:.0f} MB), threads: {threads}"
    )

    def in_numpy() -> float:
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=theirs)
        at_target = theirs[np.arange(rows), targets]
        np.exp(theirs, out=theirs)
        total = theirs.sum(axis=1, keepdims=True)
        loss = float(np.mean(np.log(total[:, 0]) - at_target))
        np.multiply(theirs, 1 / (rows * total), out=theirs)
        theirs[np.arange(rows), targets] -= 1 / rows
        return loss

    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(logits, threads), np.array_split(copied, threads)

        def copy() -> None:
            list(pool.map(np.copyto, parts[1], parts[0]))

        def in_fastce() -> float:
            return float(fastce.cross_entropy_and_grad(logits, targets, out=ours)[0])

        best = dict.fromkeys(("copy", "fastce", "NumPy"), math.inf)
        for turn in range(20):
            # In turns, so that what else the machine does hits all alike.
            for name, work in (("copy", copy), ("fastce", in_fastce), ("NumPy", in_numpy)):
                if name == "NumPy" and turn % 5:  # some 50 times slower: fewer are enough
                    continue
                began = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - began)

    moved = 2 * logits.nbytes
    labels = {
        "copy": "memory limit: copying the logits",
        "fastce": "fastce.cross_entropy_and_grad",
        "NumPy": "NumPy, in place",
    }
    table(
        ("", "ms", "GB/s", "times the limit"),
        [
            (
                labels[name],
                f"{seconds * 1e3:.2f}",
                f"{moved / seconds / 1e9:.1f}",
                f"{seconds / best['copy']:.2f}",
            )
            for name, seconds in best.items()
        ],
    )
    same = bool(
        np.allclose(in_fastce(), in_numpy(), rtol=1e-5)
        and np.allclose(ours, theirs, rtol=1e-4, atol=1e-7 / rows)
    )
    print(
        f"\n{best['NumPy'] / best['fastce']:.0f} times as fast as NumPy; the same numbers: "
        f"{_verdict(same)}"
    )
    return same


class _Study(NamedTuple):
    """What was found with data sets of one size; means over the repeats."""

    size: int
    log_of_product: float  # of the first data set, as is minus_sum
    minus_sum: float
    own_loss: float
    true_loss: float
    error: float


def _known_truth(sizes: tuple[int, ...], picture: Path) -> bool:
    """Estimate a W that is known, from more and more data."""
    classes, features = 4, 5
    rng = np.random.default_rng(0)
    # softmax does not feel a vector added to every row of W: compare what it does feel.
    truth = _centred(rng.standard_normal((classes, features)))
    # The loss under the truth needs no labels: p(. | x) itself is the target, a soft one.
    x_new = rng.standard_normal((100_000, features))
    p_new = fastce.softmax(x_new @ truth.T)
    entropy = float(fastce.cross_entropy(x_new @ truth.T, p_new))

    _heading(
        f"Known truth: x ~ N(0, I) in {features} dimensions, y ~ Cat(softmax(W x)), "
        f"{classes} classes"
    )
    studies = []
    for size in sizes:
        found = []
        for _ in range(_REPEATS):
            x = rng.standard_normal((size, features))
            y = np.argmax(x @ truth.T + rng.gumbel(size=(size, classes)), axis=1)
            w, own_loss = _fit(x, y, classes)
            true_loss = float(fastce.cross_entropy(x_new @ w.T, p_new))
            error = np.linalg.norm(_centred(w) - truth) / np.linalg.norm(truth)
            logits = x @ w.T
            found.append((own_loss, true_loss, error))
        studies.append(
            _Study(size, *_likelihood(logits, y), *np.array(found).mean(axis=0).tolist())
        )

    print(
        "The likelihood of a data set is a product of probabilities, and cross-entropy its log:\n"
    )
    table(
        ("N", "ln of the product of p(y|x)", "minus summed cross-entropy", "relative difference"),
        [
            (
                f"{s.size}",
                f"{s.log_of_product:.9f}",
                f"{s.minus_sum:.9f}",
                f"{abs(s.log_of_product / s.minus_sum - 1):.0e}",
            )
            for s in studies
        ],
    )
    # Wilks: 2 N times the excess is chi-squared, with as many degrees as W has free numbers.
    freedom = (classes - 1) * features
    print(
        f"\nThe estimate approaches W, and its loss the conditional entropy H(y|x) = {entropy:.6f}"
        f"\n(means of {_REPEATS} data sets; theory for large N: excess = {freedom} / 2N):\n"
    )
    table(
        ("N", "|W_N - W| / |W|", "loss on its data", "loss under the truth", "excess", "theory"),
        [
            (
                f"{s.size}",
                f"{s.error:.4f}",
                f"{s.own_loss:.6f}",
                f"{s.true_loss:.6f}",
                f"{s.true_loss - entropy:.6f}",
                f"{freedom / 2 / s.size:.6f}",
            )
            for s in studies
        ],
    )
    _draw(studies, entropy, picture)
    identical = all(math.isclose(s.log_of_product, s.minus_sum, rel_tol=1e-12) for s in studies)
    ratio = (studies[-1].true_loss - entropy) / (freedom / 2 / studies[-1].size)
    approaches = 0.5 < ratio < 2 and studies[-1].error < studies[0].error / 5
    print()
    pairs(
        [
            ("The log of the product is minus the summed cross-entropy:", _verdict(identical)),
            ("The estimate approaches W as theory says:", _verdict(approaches)),
        ]
    )
    print(f"Both curves are drawn in {picture}")
    return identical and approaches


def _centred(w: Array) -> Array:
    return np.asarray(w - w.mean(axis=0))


def _likelihood(logits: Array, y: Array) -> tuple[float, float]:
    """Log of the product of the p(y_i | x_i), and minus the sum of the losses.

    The product of a thousand probabilities is below the smallest float64, so it is formed in
    decimal arithmetic, which has exponents enough.
    """
    p = fastce.softmax(logits)[np.arange(len(y)), y]
    product = math.prod(map(decimal.Decimal, p.tolist()), start=decimal.Decimal(1))
    return float(product.ln()), -float(fastce.cross_entropy(logits, y, reduction="sum"))


def _draw(studies: list[_Study], entropy: float, picture: Path) -> None:
    from matplotlib.figure import Figure

    sizes = np.array([s.size for s in studies])
    errors = np.array([s.error for s in studies])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(sizes, errors, "o-", label=r"$\|\hat W_N - W\| \,/\, \|W\|$")
    left.loglog(sizes, errors[-1] * np.sqrt(sizes[-1] / sizes), "k:", label=r"slope $N^{-1/2}$")
    left.set(title="The estimate approaches the truth", xlabel="observations N")
    right.semilogx(sizes, [s.true_loss for s in studies], "o-", label="loss under the truth")
    right.semilogx(sizes, [s.own_loss for s in studies], "s-", label="loss on its own data")
    right.axhline(entropy, color="k", linestyle=":", label="conditional entropy H(y|x)")
    right.set(title="Its loss approaches the entropy", xlabel="observations N", ylabel="nats")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=100)
