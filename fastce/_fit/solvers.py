"""Minimisation with SciPy's solvers, and when to stop."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fastce._fit.coordinates import Vector
from fastce._fit.objective import Objective

# Numbers of L-BFGS's memory, of two vectors each.
MEMORY = 20
# Iterations in a row that rounding alone may explain, after which there is no more to be had; and
# steps that a trust region may refuse in a row, each making it a quarter of its size.
STALLED, REFUSED = 3, 10
# Resolutions of the objective that the squared gradient may come to where rounding ends the way.
ROUNDED = 1e3


class Found(NamedTuple):
    """Where a solver has ended."""

    theta: Vector
    iterations: int
    curve: list[float]
    gradient: float
    reason: str

    @property
    def converged(self) -> bool:
        """Whether it ended where it should."""
        return self.reason in ("gradient", "rounding")


Report = Callable[[int, float, float], None]


def minimise(
    objective: Objective, start: Vector, solver: str, tol: float, max_iter: int, report: Report
) -> Found:
    """Minimise from `start` until the slope, as `objective` has it, is `tol` or less.

    It also ends where rounding hides any further progress: as it should where the slope is so
    small that a minimum in its distance would be hidden, too, else "stalled". `report` is told of
    every iteration: its number, the objective, the slope.
    """
    curve: list[float] = []
    v = objective.from_theta(start)

    def look(x: Vector) -> _State:
        objective.look(x)
        return _State(objective.theta, objective.value, objective.slope)

    state = look(v)
    curve.append(state.value)
    report(0, state.value, state.gradient)
    if state.gradient <= tol:
        return Found(start, 0, curve, state.gradient, "gradient")

    stalled = 0.0

    def callback(intermediate_result: Any) -> None:
        nonlocal state, stalled
        before, state = state, look(np.asarray(intermediate_result.x))
        if before.value - state.value > objective.noise * before.value:
            stalled = 0
        else:
            refused = np.array_equal(state.theta, before.theta)
            stalled += 1 / REFUSED if refused else 1 / STALLED
        curve.append(state.value)
        report(len(curve) - 1, state.value, state.gradient)
        if state.gradient <= tol or stalled > 1 - 1e-9:
            raise StopIteration

    with _calm_blas(objective.needs_blas):
        _solve(objective, v, solver, max_iter, callback)
    iterations = len(curve) - 1
    if state.gradient <= tol:
        reason = "gradient"
    else:
        rounded = state.gradient**2 <= ROUNDED * objective.noise * state.value
        stopped = "rounding" if rounded else "stalled"
        reason = "iterations" if iterations >= max_iter else stopped
    return Found(state.theta, iterations, curve, state.gradient, reason)


def _solve(
    objective: Objective, v: Vector, solver: str, max_iter: int, callback: Callable[[Any], None]
) -> None:
    from scipy.optimize import minimize

    if solver == "lbfgs":
        minimize(
            objective, v, jac=True, method="L-BFGS-B", callback=callback,
            options={
                "maxiter": max_iter, "maxfun": 20 * max_iter, "maxcor": MEMORY, "maxls": 20,
                "ftol": 0.0, "gtol": 0.0,
            },
        )  # fmt: skip
    else:
        minimize(
            objective, v, jac=True, hessp=objective.hessian_product, method="trust-ncg",
            callback=callback,
            options={"maxiter": max_iter, "gtol": 0.0, "initial_trust_radius": 10.0,
                     "max_trust_radius": 1e6},
        )  # fmt: skip


@contextlib.contextmanager
def _calm_blas(needed: bool) -> Iterator[None]:
    """Keep BLAS to one thread but for the products of the passes, if they need it.

    The solvers' own steps are short, and for each the threads of a BLAS are woken, spin and hold
    the processors that the passes need: digits by L-BFGS in 45 ms instead of 550.  NumPy's and
    SciPy's wheels bring a BLAS each, of which the passes need NumPy's.
    """
    from threadpoolctl import ThreadpoolController

    blas = ThreadpoolController().select(user_api="blas")
    if needed and len(blas.lib_controllers) > 1:
        blas = blas.select(
            filepath=[
                library.filepath
                for library in blas.lib_controllers
                if "scipy.libs" in library.filepath
            ]
        )
    elif needed:
        yield
        return
    with blas.limit(limits=1):
        yield


class _State(NamedTuple):
    theta: Vector
    value: float
    gradient: float
