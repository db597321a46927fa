"""Second derivatives of the cross-entropy: for gradient boosting and for Newton's method."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce._arguments import AnyArray


def gradient_hessian(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    sample_weight: npt.ArrayLike | None = None,
    hessian: Literal["diag", "xgboost", "lightgbm", "abs_residual"] = "diag",
) -> tuple[AnyArray, AnyArray]:
    """Gradient and diagonal Hessian of the summed cross-entropy, as boosting libraries take them."""
    from fastce.cpu import calls

    z = arguments.float_array("logits", logits)
    axis = arguments.class_axis("logits", z, axis)
    classes = z.shape[axis]
    rows = z.shape[:axis] + z.shape[axis + 1 :]
    hard = arguments.hard_targets(targets, z, axis)
    weight = arguments.row_weight("sample_weight", sample_weight, rows)
    curves = {
        "diag": calls.Curve(curved=1.0),
        "xgboost": calls.Curve(curved=2.0, floor=1e-16),
        "lightgbm": calls.Curve(curved=classes / max(classes - 1, 1)),
        "abs_residual": calls.Curve(straight=1.0, at_target=True),
    }
    if hessian not in curves:
        raise ValueError(f"hessian: expected one of {', '.join(curves)}, got {hessian!r}")
    mass = calls.check_targets(hard, classes, -1, None)
    if mass.bad_row < 0 and mass.count < hard.size:  # -1 stands for nothing here
        mass = mass._replace(bad_row=int(np.argmax(hard == -1)))
    if mass.bad_row >= 0:
        raise arguments.bad_target(targets, mass.bad_row, classes)
    grad, hess = np.empty_like(z, subok=False), np.empty_like(z, subok=False)
    calls.gradient_hessian(axis, z, hard, weight, curves[hessian], grad, hess)
    return grad, hess


def hessian_vector_product(
    logits: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    axis: int = -1,
    grad_output: npt.ArrayLike | None = None,
) -> Any:
    """Exact product of each row's Hessian, diag(p) - p p', with a vector."""
    from fastce.cpu import calls

    z = arguments.float_array("logits", logits)
    axis = arguments.class_axis("logits", z, axis)
    rows = z.shape[:axis] + z.shape[axis + 1 :]
    vector = arguments.same_shape("v", v, "logits", z)
    scale, upstream = arguments.upstream(grad_output, rows, "none")
    out = np.empty_like(z, subok=False)
    calls.hessian_vector_product(axis, z, vector, upstream, scale, out)
    return out
