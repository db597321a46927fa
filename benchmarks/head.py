"""The classifier head and the estimator against their targets.

    python -m benchmarks.head [--quick] [--json]

Contestants take turns in one run; ratios are medians of the ratios within a turn.  The floor of the
head is what it cannot do without: the three matrix products by the same BLAS, logits held whole;
for the loss alone one of them.  Estimators are timed at equal final loss: each with the loosest
tolerance of powers of ten with which it comes within a relative 1e-8 (float64) or 1e-5 (float32) of
the best minimum that any has found. Ways that take too long are given up, with their longest time.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import fastce
from benchmarks.cases import Array
from benchmarks.memory import extra, traced
from benchmarks.timing import Contestant, Times, alternately
from fastce._cli import terminal

# A way to fit is given up where one fit takes this many times as long as the fastest.
HOPELESS = 15
# Seconds between contestants: threads of BLAS spin for some 25 ms after their work.
PAUSE = 0.1


class Row(NamedTuple):
    """A line of the table; without a target it is neither met nor missed."""

    case: str
    measure: str
    value: float
    target: str
    met: bool | None


class Plan(NamedTuple):
    """Shapes of heads (rows, features, classes) and of fits, turns of each."""

    heads: tuple[tuple[int, int, int], ...]
    fits: tuple[tuple[int, int, int], ...]
    turns: tuple[int, ...]
    fit_turns: int
    tolerances: tuple[float, ...]


FULL = Plan(
    ((2048, 768, 32000), (8192, 512, 128256)),
    ((60000, 784, 10), (20000, 200, 1000)),
    turns=(10, 3), fit_turns=3, tolerances=tuple(10.0**-k for k in range(3, 9)),
)  # fmt: skip
QUICK = Plan(((512, 256, 4000),), ((2000, 64, 10),), (3,), 1, (1e-3, 1e-4, 1e-5, 1e-6))
TINY = Plan(((16, 8, 40),), ((60, 4, 3),), (1,), 1, (1e-2, 1e-4))


# The head -----------------------------------------------------------------------------------------


class Head:
    """Arrays of one head; `peaked` makes a model sure of a few classes, as a trained one is."""

    def __init__(self, shape: tuple[int, int, int], *, peaked: bool = False) -> None:
        rows, features, classes = shape
        rng = np.random.default_rng(0)
        self.weight = rng.standard_normal((classes, features), np.float32)
        self.weight *= np.float32(features**-0.5)
        # Frequencies of words: Zipf's law.
        ranks = np.arange(1, classes + 1)
        self.y, other = rng.choice(classes, (2, rows), p=1 / ranks / np.sum(1 / ranks))
        self.x = rng.standard_normal((rows, features), np.float32)
        if peaked:  # one or two candidates in each row, beside the frequency of each class
            for classes_, lead in ((self.y, 14), (other, 12)):
                size = (lead + np.log(ranks[classes_])).astype(np.float32)
                self.x += size[:, None] * self.weight[classes_]
            self.x[:, 0], self.weight[:, 0] = 1, -np.log(ranks)
        self.out = tuple(np.zeros_like(a) for a in (self.x, self.weight))

    @functools.cached_property
    def logits(self) -> Array:
        """Memory for all logits."""
        return np.zeros((len(self.x), len(self.weight)), np.float32)

    def product(self) -> None:
        """The floor of the loss."""
        np.matmul(self.x, self.weight.T, out=self.logits)

    def products(self) -> None:
        """The floor of loss and gradients."""
        self.product()
        np.matmul(self.logits, self.weight, out=self.out[0])
        np.matmul(self.logits.T, self.x, out=self.out[1])

    def loss(self) -> Any:
        """The loss alone."""
        return fastce.linear_cross_entropy(self.x, self.weight, self.y)

    def gradients(self, skip_below: float = 0.0) -> Any:
        """Loss and gradients."""
        return fastce.linear_cross_entropy_and_grad(
            self.x, self.weight, self.y, out=(*self.out, None), skip_below=skip_below
        )

    def torch_eager(self, function: str) -> Callable[[], Any] | None:
        """The same by torch: its plain functions, or its own linear_cross_entropy."""
        if importlib.util.find_spec("torch") is None:
            return None
        import torch

        torch.set_num_threads(fastce.get_num_threads())
        functional = torch.nn.functional
        if not hasattr(functional, "linear_cross_entropy"):
            return None
        x, w = (torch.from_numpy(a).requires_grad_() for a in (self.x, self.weight))
        y = torch.from_numpy(self.y)

        def call() -> None:
            x.grad = w.grad = None
            if function == "eager":
                loss = functional.cross_entropy(functional.linear(x, w), y)
            else:
                loss = functional.linear_cross_entropy(x, w, y)
            loss.backward()

        return call


def heads(shape: tuple[int, int, int], turns: int) -> Iterator[Row]:
    """Times and memory of one head."""
    head = Head(shape)
    name = "({0}, {1}) x ({2}, {1})".format(*shape)
    eager, own = head.torch_eager("eager"), head.torch_eager("linear_cross_entropy")
    contestants: dict[str, Contestant] = {
        "product": Contestant(head.product),
        "loss": Contestant(head.loss),
        "products": Contestant(head.products),
        "gradients": Contestant(head.gradients),
    }
    # torch needs more memory than there is for the largest, or than is polite.
    if np.prod(shape[::2]) < 1 << 28:
        contestants |= {
            key: Contestant(call)
            for key, call in (("eager", eager), ("own", own))
            if call is not None
        }
    found = alternately(contestants, turns=turns, seconds=0.0, pause=PAUSE)
    yield _ratio(name, "loss / one product", found, "loss", "product", 1.08)
    yield _ratio(name, "gradients / three products", found, "gradients", "products", 1.08)
    limit = max(64e6, 0.05 * head.logits.nbytes)
    for measure, call in (("loss", head.loss), ("gradients", head.gradients)):
        needed = extra(call)
        megabytes = max(needed.traced, needed.resident or 0) / 1e6
        yield Row(name, f"extra memory of {measure}, MB", megabytes, f"<= {limit / 1e6:.0f}",
                  megabytes <= limit / 1e6)  # fmt: skip
    if "eager" in found and eager is not None:
        yield _ratio(name, "gradients / torch eager", found, "gradients", "eager", 1.0)
        yield _ratio(name, "gradients / torch's own", found, "gradients", "own", 1.0)
        theirs = extra(eager).resident or 0
        ours = extra(head.gradients).resident or 0
        if theirs:
            yield Row(name, "memory / torch eager", ours / theirs, "<= 0.1", ours / theirs <= 0.1)


def peaked(shape: tuple[int, int, int], turns: int) -> Iterator[Row]:
    """What skipping saves and costs."""
    head = Head(shape, peaked=True)
    name = "({0}, {1}) x ({2}, {1}), trained".format(*shape)
    bounds = {"2**-24": 2.0**-24, "2**-12": 2.0**-12}
    contestants = {"products": Contestant(head.products), "plain": Contestant(head.gradients)}
    contestants |= {
        key: Contestant(functools.partial(head.gradients, bound)) for key, bound in bounds.items()
    }
    found = alternately(contestants, turns=turns, seconds=0.0, pause=PAUSE)
    yield _ratio(name, "gradients / three products", found, "plain", "products", None)
    exact = [a.copy() for a in head.gradients()[1][:2]]
    for key, bound in bounds.items():
        yield _ratio(name, f"skip_below={key} / three products", found, key, "products", None)
        skipped = head.gradients(bound)[1]
        error = max(
            float(abs(a - b).max() / abs(b).max()) for a, b in zip(skipped, exact, strict=False)
        )
        yield Row(name, f"skip_below={key}: error / largest gradient", error, "", None)


def _ratio(
    case: str, measure: str, found: dict[str, Times], ours: str, theirs: str, target: float | None
) -> Row:
    value = found[ours].over(found[theirs])
    if target is None:
        return Row(case, measure, value, "", None)
    return Row(case, measure, value, f"<= {target:g}", value <= target)


# The estimator ------------------------------------------------------------------------------------


def observations(shape: tuple[int, int, int], dtype: str) -> tuple[Array, Array]:
    """Correlated features of very different variance, and classes drawn from a softmax."""
    rows, features, classes = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, features), np.float32)
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0]
    x = x @ (basis * np.geomspace(1, 0.03, features)).astype(np.float32) @ basis.T.astype("f4")
    w = rng.standard_normal((classes, features)) * 4 / features**0.5
    y = np.argmax(x @ w.T + rng.gumbel(size=(rows, classes)), axis=1)
    return np.ascontiguousarray(x, dtype), y


def digits(dtype: str) -> tuple[Array, Array]:
    """scikit-learn's digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return np.ascontiguousarray(x / 16, dtype), y


class Fit(NamedTuple):
    """One way to fit: a solver of one of the two, with one BLAS thread if asked for."""

    library: str
    solver: str
    threads: int | None = None

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.library} {self.solver}" + (", BLAS on one thread" if self.threads else "")

    def model(self, tol: float) -> Any:
        """A fresh estimator."""
        if self.library == "fastce":
            from fastce.sklearn import SoftmaxRegression

            return SoftmaxRegression(solver=self.solver, tol=tol, max_iter=10_000)  # type: ignore[arg-type]
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(solver=self.solver, tol=tol, max_iter=10_000)

    def run(self, x: Array, y: Array, tol: float) -> Any:
        """Fit once."""
        import threadpoolctl

        with warnings.catch_warnings(), threadpoolctl.threadpool_limits(self.threads, "blas"):
            warnings.simplefilter("ignore")
            return self.model(tol).fit(x, y)


def objective(model: Any, x: Array, y: Array) -> float:
    """What both minimise, in float64, by neither of them."""
    w = np.asarray(model.coef_, np.float64)
    total = 0.0
    for start in range(0, len(x), 4096):
        z = x[start : start + 4096].astype(np.float64) @ w.T + model.intercept_
        top = z.max(axis=1)
        lse = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
        total += float((lse - z[np.arange(len(z)), y[start : start + 4096]]).sum())
    return total + float(np.sum(w * w)) / 2


def _peak(queue: Any, fit: Fit, data: tuple[Any, ...], tol: float) -> None:
    x, y = observations(*data) if len(data) > 1 else digits(*data)
    fit.run(x[:100], y[:100], 1e-2)
    queue.put(traced(functools.partial(fit.run, x, y, tol)))


def peak(fit: Fit, data: tuple[Any, ...], tol: float) -> int:
    """Memory of a fit at its peak, beyond the data, in a process of its own.

    As NumPy allocates it: what the process has may not grow, for the allocator keeps what an
    earlier call has used.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, fit, data, tol))
    process.start()
    result: int = queue.get()
    process.join()
    return result


def fits(data: tuple[Any, ...], plan: Plan, target: float) -> Iterator[Row]:
    """Times at equal loss, and memory."""
    x, y = observations(*data) if len(data) > 1 else digits(*data)
    dtype, classes = str(x.dtype), int(y.max()) + 1
    name = f"({x.shape[0]}, {x.shape[1]}) to {classes}, {dtype}"
    ways = [Fit("fastce", "lbfgs"), Fit("fastce", "newton-cg")]
    ways += [Fit("sklearn", s, t) for s in ("lbfgs", "newton-cg") for t in (None, 1)]
    if classes * x.shape[1] <= 10_000:  # whose Hessian is held whole
        ways += [Fit("sklearn", "newton-cholesky", t) for t in (None, 1)]
    if classes > 100:  # minutes: BLAS with one thread has no chance, and Newton's products little
        ways = [w for w in ways if not w.threads and w.solver == "lbfgs"] + ways[1:2]
    loss: dict[tuple[Fit, float], float] = {}
    seconds: dict[tuple[Fit, float], float] = {}
    for way in ways:
        for tol in plan.tolerances:
            began = time.perf_counter()
            model = way.run(x, y, tol)
            seconds[way, tol] = time.perf_counter() - began
            loss[way, tol] = objective(model, x, y)
            print(name, way.name, tol, f"{loss[way, tol]:.9f} {seconds[way, tol]:.2f} s",
                  file=sys.stderr)  # fmt: skip
            near = loss[way, tol] <= min(loss.values()) * (1 + _within(dtype) / 10)
            slow = seconds[way, tol] > HOPELESS * min(seconds.values())
            if (near and tol <= 1e-6) or slow:
                break
    best = min(loss.values())
    reached = {
        way: max((t for w, t in loss if w == way and loss[w, t] <= best * (1 + _within(dtype))),
                 default=None)
        for way in ways
    }  # fmt: skip
    contestants = {
        way: Contestant(functools.partial(way.run, x, y, tol))
        for way, tol in reached.items()
        if tol is not None and seconds[way, tol] < 20
    }
    found = {way: t.minimum for way, t in alternately(
        contestants, turns=plan.fit_turns, seconds=0.0, pause=PAUSE).items()}  # fmt: skip
    for way, tol in reached.items():
        given_up = "" if tol else " (given up)"
        if way not in found:  # slow ones have the time of their trial, or of the longest
            found[way] = seconds[way, tol] if tol else max(
                s for (w, _), s in seconds.items() if w == way)  # fmt: skip
        yield Row(name, f"{way.name}, s{given_up}", found[way], "", None)
    own = [w for w in found if w.library == "fastce" and reached[w]]
    if not own:  # tolerances as loose as those of a smoke test
        return
    ours = min(own, key=found.__getitem__)
    for solver in ("lbfgs", "newton-cg", "newton-cholesky"):
        same = [w for w in found if w.library == "sklearn" and w.solver == solver]
        if same:
            best = min(same, key=found.__getitem__)
            value = found[best] / found[ours]
            measure = f"sklearn {solver} / fastce {ours.solver}"
            measure += "" if reached[best] else ", at least"
            yield Row(name, measure, value, f">= {target:g}", value >= target)
    if plan is FULL and len(data) > 1:
        # No step needs more than another, so that a few will do.
        needed = {way: peak(way, data, 0.1) for way in (ways[0], Fit("sklearn", "lbfgs"))}
        ratio = needed[ways[0]] / needed[Fit("sklearn", "lbfgs")]
        yield Row(name, "peak memory / sklearn lbfgs", ratio, "<= 0.5", ratio <= 0.5)


def _within(dtype: str) -> float:
    return 1e-8 if dtype == "float64" else 1e-5


def run(plan: Plan, parts: tuple[str, ...] = ("head", "skip", "fit")) -> Iterator[Row]:
    """Everything."""
    if "skip" in parts:
        yield from peaked(plan.heads[0], plan.turns[0])
    if "head" in parts:
        for shape, turns in zip(plan.heads, plan.turns, strict=True):
            yield from heads(shape, turns)
    if "fit" in parts:
        for dtype in ("float32", "float64"):
            yield from fits((dtype,), plan, 1.0)
            for shape in plan.fits:
                yield from fits((shape, dtype), plan, 3.0)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, within a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--parts", nargs="+", default=("head", "skip", "fit"))
    options = parser.parse_args()
    rows = []
    for row in run(QUICK if options.quick else FULL, tuple(options.parts)):
        print(*row, file=sys.stderr)
        rows.append(row)
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    verdicts = {None: "", True: "yes", False: "NO"}
    terminal.table(
        ("case", "measure", "value", "target", "met"),
        [(r.case, r.measure, f"{r.value:.3g}", r.target, verdicts[r.met]) for r in rows],
    )


if __name__ == "__main__":
    main()
