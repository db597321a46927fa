"""What is measured: shapes, dtypes and options, their data, and the calls made with them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastce
from benchmarks.limits import Move
from benchmarks.timing import Contestant

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits of some shape and dtype, the class axis, and one of OPTIONS."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    option: str = "plain"

    @property
    def name(self) -> str:
        """As tables and asv show it."""
        parts = [" x ".join(map(str, self.shape))]
        parts += [f"axis {self.axis}"] if self.axis != -1 else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [self.option] if self.option != "plain" else []
        return ", ".join(parts)

    @property
    def size(self) -> int:
        """Bytes of the logits."""
        return math.prod(self.shape) * (2 if "16" in self.dtype else int(self.dtype[-2:]) // 8)

    def plain(self) -> "Case":
        """The same without the option."""
        return dataclasses.replace(self, option="plain")


class Problem(NamedTuple):
    """Arguments of the losses: logits, targets, options."""

    logits: Array
    targets: Array
    options: dict[str, Any]


def _weight(problem: Problem, rng: np.random.Generator) -> Problem:
    weight = rng.random(problem.logits.shape[-1]).astype(problem.logits.dtype)
    return problem._replace(options={"weight": weight})


def _soft(problem: Problem, rng: np.random.Generator) -> Problem:
    labels = np.asarray(rng.standard_exponential(problem.logits.shape, np.float32))
    labels /= labels.sum(axis=-1, keepdims=True)
    return problem._replace(targets=labels.astype(problem.logits.dtype))


def _confident(problem: Problem, rng: np.random.Generator) -> Problem:
    problem.logits[np.arange(len(problem.targets)), problem.targets] += 40
    return problem


def _masked(problem: Problem, rng: np.random.Generator) -> Problem:
    masked = rng.random(problem.logits.shape[-1]) < 0.5
    problem.logits[:, masked] = -np.inf
    problem.targets[:] = np.flatnonzero(~masked)[0]
    return problem


def _ignored(problem: Problem, rng: np.random.Generator) -> Problem:
    problem.targets[::2] = -100
    return problem


# What an option makes of a plain problem of rows by classes.
OPTIONS: dict[str, Callable[[Problem, np.random.Generator], Problem]] = {
    "plain": lambda problem, rng: problem,
    "soft targets": _soft,
    "weights": _weight,
    "label smoothing": lambda problem, rng: problem._replace(options={"label_smoothing": 0.1}),
    "z-loss": lambda problem, rng: problem._replace(options={"z_loss": 1e-4}),
    "soft cap": lambda problem, rng: problem._replace(options={"softcap": 30.0}),
    "confident rows": _confident,
    "half the classes -inf": _masked,
    "half the rows ignored": _ignored,
}

# The first few are what a quick run measures.
_SHAPES = [(1024, 32000), (4096, 1000), (65536, 10), (256, 128256), (8, 1048576), (1, 50257)]
_LARGE = Case((1024, 32000))
_ALL = [
    *(Case(shape) for shape in [*_SHAPES, (32, 10)]),
    *(Case(_LARGE.shape, dtype=dtype) for dtype in ("float64", "float16", "bfloat16")),
    *(Case(shape, axis=1) for shape in ((8, 21, 512, 512), (2, 1000, 64, 64))),
    *(Case(_LARGE.shape, option=option) for option in OPTIONS if option != "plain"),
]
# By name: asv's parameters and the report's tables are lists of names.
CASES = {case.name: case for case in _ALL}
OPTIONED = [name for name, case in CASES.items() if case.option != "plain"]
DTYPES = [name for name, case in CASES.items() if case.dtype != "float32"]
SHAPES = [name for name in CASES if name not in (*OPTIONED, *DTYPES)]
LATENCY = [name for name in SHAPES if CASES[name].size < 1e6]
LARGE = [name for name in SHAPES if name not in LATENCY]


class Data:
    """The arrays of a case; results and copies are made where a work asks for them."""

    def __init__(self, case: Case) -> None:
        if case.dtype == "bfloat16":
            import ml_dtypes  # noqa: F401 (teaches NumPy the name)
        rng = np.random.default_rng(0)
        logits = rng.standard_normal(case.shape, np.float32).astype(case.dtype, copy=False)
        axis = case.axis % logits.ndim
        rows = logits.shape[:axis] + logits.shape[axis + 1 :]
        targets = rng.integers(0, logits.shape[axis], rows)
        problem = OPTIONS[case.option](Problem(logits, targets, {}), rng)
        self.axis = case.axis
        self.logits, self.targets, self.options = problem
        # Kept out of the call where it is the default, as a caller would.
        self.along = {} if case.axis == -1 else {"axis": case.axis}
        soft = self.targets.dtype.kind != "i"
        self.option_bytes = self.targets.nbytes if soft else 0

    @functools.cached_property
    def out(self) -> Array:
        """Memory for a gradient, touched before."""
        return np.ones_like(self.logits)

    @functools.cached_property
    def scratch(self) -> Array:
        """Logits to be overwritten."""
        return self.logits.copy()


@functools.lru_cache(maxsize=2)  # a case and its plain one; more would fill the memory
def data(case: Case) -> Data:
    """The arrays of a case, made once."""
    return Data(case)


def _losses(function: Callable[..., Any], **extra: Any) -> Callable[[Data], Contestant]:
    return lambda d: Contestant(
        functools.partial(
            function, d.logits, d.targets, **d.along, **d.options,
            **{name: value(d) for name, value in extra.items()},
        )
    )  # fmt: skip


def _mapping(function: Callable[..., Any], *second: str, out: bool) -> Callable[[Data], Contestant]:
    return lambda d: Contestant(
        functools.partial(
            function, d.logits, *(getattr(d, name) for name in second), **d.along,
            **({"out": d.out} if out else {}),
        )
    )  # fmt: skip


def _in_place(d: Data) -> Contestant:
    options = d.along | d.options | {"out": d.scratch}
    call = functools.partial(fastce.cross_entropy_and_grad, d.scratch, d.targets, **options)
    return Contestant(call, functools.partial(np.copyto, d.scratch, d.logits))


class Work(NamedTuple):
    """A call of fastce, and the move of the logits' bytes that it can at best keep up with."""

    move: Move | None
    contestant: Callable[[Data], Contestant]


WORKS = {
    "loss": Work("read", _losses(fastce.cross_entropy)),
    "loss and gradient": Work("copy", _losses(fastce.cross_entropy_and_grad, out=lambda d: d.out)),
    "in place": Work("update", _in_place),
    "fresh gradient": Work("fresh", _losses(fastce.cross_entropy_and_grad)),
    "statistics": Work("read", _losses(fastce.cross_entropy_stats)),
    "logsumexp": Work("read", _mapping(fastce.logsumexp, out=False)),
    "softmax": Work("copy", _mapping(fastce.softmax, out=True)),
    "log_softmax": Work("copy", _mapping(fastce.log_softmax, out=True)),
    "nll_loss": Work(None, _losses(fastce.nll_loss)),
    "gradient and Hessian": Work(None, _losses(fastce.gradient_hessian)),
    "Hessian-vector product": Work(
        None, _mapping(fastce.hessian_vector_product, "scratch", out=False)
    ),
    "binary loss and gradient": Work(
        None,
        lambda d: Contestant(
            functools.partial(fastce.binary_cross_entropy_and_grad, d.logits, d.scratch, out=d.out)
        ),
    ),
}
LOSSES = ["loss", "loss and gradient", "in place", "fresh gradient"]
SOFTMAX = ["logsumexp", "softmax", "log_softmax"]
