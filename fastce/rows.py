"""Functions of one row of logits for the user's own compiled code: any function under `numba.njit`.

What the functions of `fastce` do to whole arrays, these do to one row at a time, inside a loop that
makes the row, weighs it or uses it at once, so that no array of rows x classes need exist. They
make no array, take no lock and start no thread; they may be called from any number of threads, such
as those of `numba.prange`.

Rows are one-dimensional arrays of any stride: float64 or float32; uint16, read as the bits of
float16; int16, read as those of bfloat16 (numba has no 16-bit floats, so that an array of them
comes as ``array.view(numpy.uint16)`` or ``numpy.int16``). The arithmetic is that of `fastce`,
accuracy and edge cases included. Results are float64 and not yet rounded to the dtype of the
logits: rounded, they are those of the NumPy functions to the last bit.

Code compiled with ``cache=True`` is compiled again when the sources of fastce have changed.

Examples
--------
>>> import numba
>>> import numpy as np
>>> from fastce import rows
>>> @numba.njit
... def linear_loss(x, weight, targets):
...     logits = np.empty(weight.shape[0])
...     loss = 0.0
...     for i in range(x.shape[0]):
...         for c in range(weight.shape[0]):
...             logits[c] = np.dot(weight[c], x[i])
...         loss += rows.cross_entropy(logits, targets[i])
...     return loss / x.shape[0]
>>> x = np.array([[1.0, 0.0], [0.0, 1.0]])
>>> weight = np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
>>> print(f"{linear_loss(x, weight, np.array([0, 1])):.4f}")
0.2887
"""

import hashlib
import os
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.environment import Environment
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fastce.cpu import single
from fastce.cpu.jit import code_digest, device, public, source_digest
from fastce.cpu.memory import item_size

__all__ = ["cross_entropy", "cross_entropy_and_grad", "logsumexp", "merge", "partial"]

_DTYPES = "float64, float32, uint16 (float16) or int16 (bfloat16)"


# Caches of other people ---------------------------------------------------------------------------

# Where it is unknown what code this is, none that is cached is of today.
_DIGEST = hashlib.sha256(
    (code_digest("fastce.cpu", __name__) or os.urandom(32)) + (source_digest() or b"")
).hexdigest()


class _Sources:
    """Travels with the cached machine code of callers and tells whether it is still of today.

    Numba keeps, beside the code, the constants of the environments that the code names. Where those
    cannot be read because of an OSError it takes the file for missing and compiles again.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_sources, (_DIGEST,)


def _same_sources(digest: str) -> _Sources:
    if digest != _DIGEST:
        raise FileNotFoundError("machine code of other sources of fastce")
    return _Sources()


_environment = Environment(globals())
_environment.env_name = "_ZN08NumbaEnv6fastce4rowsE"
_environment.consts.append(_Sources())
Environment._memo[_environment.env_name] = _environment


# Arguments ----------------------------------------------------------------------------------------


def _row(name: str, row: types.Type, *, written: bool = False) -> None:
    """Check the type of a row."""
    if not isinstance(row, types.Array) or row.ndim != 1:
        raise TypingError(f"{name}: expected a one-dimensional array, got {row}")
    if row.dtype not in (types.float64, types.float32, types.uint16, types.int16):
        raise TypingError(f"{name}: expected {_DTYPES}, got {row.dtype}")
    if written and not row.mutable:
        raise TypingError(f"{name}: expected a writable array, got {row}")


def _is_none(ty: types.Type) -> bool:
    """Whether an argument is None, given or by default."""
    return ty is types.none or (isinstance(ty, types.Omitted) and ty.value is None)


def _nothing(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.get_dummy_value()


def _first_number(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """A pointer to the first number of an array, the first argument; the caller keeps it alive."""
    return context.make_array(sig.args[0])(context, builder, args[0]).data


@intrinsic
def _address(typingctx, logits):
    """A pointer to the first class of a row. Marks the code for `_Sources`."""
    _row("logits", logits)

    def codegen(context, builder, sig, args):
        context.declare_env_global(builder.module, _environment.env_name)
        return _first_number(context, builder, sig, args)

    return types.CPointer(logits.dtype)(logits), codegen


@intrinsic
def _out_address(typingctx, out, logits):
    """A pointer to where the gradient goes."""
    _row("out", out, written=True)
    if out.dtype != logits.dtype:
        raise TypingError(f"out: expected {logits.dtype} as logits have, got {out.dtype}")
    return types.CPointer(out.dtype)(out, logits), _first_number


@intrinsic
def _soft_address(typingctx, target):
    """A pointer to the probabilities that a target consists of; None for a class."""
    if isinstance(target, types.Integer):
        return types.none(target), _nothing
    if not isinstance(target, types.Array):
        raise TypingError(f"target: expected an integer or a one-dimensional array, got {target}")
    _row("target", target)
    return types.CPointer(target.dtype)(target), _first_number


@intrinsic
def _class(typingctx, target):
    """The class that a target is; None for probabilities."""
    if not isinstance(target, types.Integer):
        return types.none(target), _nothing

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[0], target, types.int64)

    return types.int64(target), codegen


@intrinsic
def _weight_address(typingctx, weight):
    """A pointer to the class weights; None stays None."""
    if _is_none(weight):
        return types.none(weight), _nothing
    if not isinstance(weight, types.Array) or weight.ndim != 1 or not weight.is_contig:
        raise TypingError(f"weight: expected a contiguous one-dimensional array, got {weight}")
    if weight.dtype not in (types.float64, types.float32):
        raise TypingError(f"weight: expected float64 or float32, got {weight.dtype}")
    return types.CPointer(weight.dtype)(weight), _first_number


@intrinsic
def _stride(typingctx, row):
    """Bytes from class to class; None where the type says that they lie side by side, or no row."""
    if not isinstance(row, types.Array) or row.is_contig:
        return types.none(row), _nothing

    def codegen(context, builder, sig, args):
        strides = context.make_array(row)(context, builder, args[0]).strides
        return builder.extract_value(strides, 0)

    return types.int64(row), codegen


@intrinsic
def _size(typingctx, row, classes):
    """Number of classes of an array; `classes` for what is none."""
    if not isinstance(row, types.Array):
        return types.int64(row, classes), lambda context, builder, sig, args: args[1]

    def codegen(context, builder, sig, args):
        return context.make_array(row)(context, builder, args[0]).nitems

    return types.int64(row, classes), codegen


@intrinsic
def _number(typingctx, value):
    """An option as float64; None stays None."""
    if _is_none(value):
        return types.none(value), _nothing
    if isinstance(value, types.Omitted):
        constant = ir.Constant(ir.DoubleType(), float(value.value))
        return types.float64(value), lambda context, builder, sig, args: constant

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[0], value, types.float64)

    return types.float64(value), codegen


@device
def _rowwise(function, row, count, step):
    """``function(row, count, step)``, with None for classes that lie side by side."""
    if step is None:
        return function(row, count, None)
    if step == item_size(row):
        return function(row, count, None)
    return function(row, count, step)


@intrinsic
def _step(typingctx, row, step):
    """Bytes from class to class of a pointer's row, also where they lie side by side."""
    if row is types.none:
        return row(row, step), _nothing
    if step is types.none:
        size = ir.Constant(ir.IntType(64), row.dtype.bitwidth // 8)
        return types.int64(row, step), lambda context, builder, sig, args: size
    return types.int64(row, step), lambda context, builder, sig, args: args[1]


@device
def _apart(row, step):
    """Whether classes do not lie side by side; None for the step says that they do."""
    return False if step is None else step != item_size(row)


@device
def _cross_entropy(row, count, step, out, out_step, y, soft, soft_step, *options):
    """`single.row_cross_entropy`, with None for classes that lie side by side."""
    if step is None and out_step is None and soft_step is None:  # known to the compiler
        return single.row_cross_entropy(row, count, None, out, None, y, soft, None, *options)
    if _apart(row, step) or _apart(out, out_step) or _apart(soft, soft_step):
        return single.row_cross_entropy(
            row, count, _step(row, step), out, _step(out, out_step),
            y, soft, _step(soft, soft_step), *options,
        )  # fmt: skip
    return single.row_cross_entropy(row, count, None, out, None, y, soft, None, *options)


@device
def _check(count, y, probabilities, weights, label_smoothing, softcap):
    if count == 0:
        raise ValueError("logits: expected at least one class, got none")
    if y is not None and (y < 0 or y >= count):
        raise IndexError("target: expected an integer in [0, C), C being the size of logits")
    if probabilities != count:
        raise ValueError("target: expected as many probabilities as logits has classes")
    if weights != count:
        raise ValueError("weight: expected as many numbers as logits has classes")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError("label_smoothing: expected a number in [0, 1]")
    if softcap is not None and not 0.0 < softcap < np.inf:
        raise ValueError("softcap: expected a positive, finite number")


# Functions ----------------------------------------------------------------------------------------


@public
def logsumexp(logits):
    """Logarithm of the sum of the exponentials of a row.

    Parameters
    ----------
    logits : one-dimensional array
        See the module; of any size, of none -inf.

    Returns
    -------
    float
        ``log(sum_c exp(z_c))``; edge cases as for `fastce.logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import rows
    >>> print(f"{rows.logsumexp(np.array([2.0, 1.0, 0.0])):.4f}")
    2.4076
    """
    if logits.size == 0:
        return -np.inf
    return _rowwise(single.row_logsumexp, _address(logits), logits.size, _stride(logits))


@public
def cross_entropy(logits, target, weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """Cross-entropy of a row of logits and its target: ``logsumexp(z) - z[target]``, in nats.

    Parameters
    ----------
    logits : one-dimensional array
        See the module.
    target : integer or one-dimensional array
        The class, in [0, C), or a probability for each class, of any of the dtypes of logits.
    weight : contiguous one-dimensional array of float64 or float32, optional
        Class weights, as for `fastce.cross_entropy`.
    label_smoothing, z_loss, softcap
        As for `fastce.cross_entropy`.

    Returns
    -------
    float
        The loss, times the weight; edge cases as for `fastce.cross_entropy`.

    Raises
    ------
    IndexError
        If the target is not a class. In a `numba.prange` numba turns it into a SystemError.
    ValueError
        If there is no class, sizes differ, or an option is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import rows
    >>> z = np.array([2.0, 1.0, 0.0])
    >>> print(f"{rows.cross_entropy(z, 0):.4f}")
    0.4076
    >>> print(f"{rows.cross_entropy(z, 0, weight=np.array([0.5, 1.0, 1.0])):.4f}")
    0.2038
    >>> print(f"{rows.cross_entropy(z, np.array([0.8, 0.2, 0.0])):.4f}")
    0.6076
    """
    smoothing, factor, cap = _number(label_smoothing), _number(z_loss), _number(softcap)
    y = _class(target)
    count = logits.size
    _check(count, y, _size(target, count), _size(weight, count), smoothing, cap)
    return _cross_entropy(
        _address(logits), count, _stride(logits), None, None,
        y, _soft_address(target), _stride(target), _weight_address(weight),
        smoothing, factor, cap, 1.0,
    )  # fmt: skip


@public
def cross_entropy_and_grad(
    logits, target, out, grad_output=1.0, weight=None, label_smoothing=0.0, z_loss=0.0,
    softcap=None,
):  # fmt: skip
    """Cross-entropy of a row, its gradient ``softmax(z) - onehot(target)`` going to `out`.

    Parameters
    ----------
    logits, target, weight, label_smoothing, z_loss, softcap
        As for `cross_entropy`.
    out : one-dimensional array
        Of the size and dtype of `logits`, of any stride: `logits` itself, or memory that does not
        overlap what is read.
    grad_output : float, default 1.0
        Upstream gradient, a factor of what is written: 1 / N for the mean over N rows.

    Returns
    -------
    float
        The loss, as from `cross_entropy`.

    Raises
    ------
    IndexError, ValueError
        As from `cross_entropy`, before anything is written; also if `out` has another size.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import rows
    >>> row = np.array([2.0, 1.0, 0.0])
    >>> loss = rows.cross_entropy_and_grad(row, 0, row)
    >>> print(f"{loss:.4f}", row.round(4))
    0.4076 [-0.3348  0.2447  0.09  ]
    """
    smoothing, factor, cap = _number(label_smoothing), _number(z_loss), _number(softcap)
    y = _class(target)
    count = logits.size
    _check(count, y, _size(target, count), _size(weight, count), smoothing, cap)
    if out.size != count:
        raise ValueError("out: expected as many classes as logits have")
    return _cross_entropy(
        _address(logits), count, _stride(logits), _out_address(out, logits), _stride(out),
        y, _soft_address(target), _stride(target), _weight_address(weight),
        smoothing, factor, cap, _number(grad_output),
    )  # fmt: skip


@public
def partial(logits):
    """What a part of a row adds to the whole: its maximum, and the rest of its exponentials.

    Parameters
    ----------
    logits : one-dimensional array
        Some classes of a row, see the module; there may be none.

    Returns
    -------
    m : float
        The maximum; NaN where a logit is NaN, -inf where there is no other logit.
    rest : float
        Sum of ``exp(z_c - m)`` over all classes but one where the maximum is: the whole row has
        ``logsumexp = m + log1p(rest)``, class c the loss ``(m - z_c) + log1p(rest)``, whose terms
        are never negative, and the probability ``exp(z_c - m) / (1 + rest)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import rows
    >>> rows.partial(np.array([0.0, 3.0, 3.0, -np.inf]))[0]
    3.0
    >>> print(f"{rows.partial(np.array([0.0, 3.0, 3.0, -np.inf]))[1]:.4f}")
    1.0498
    """
    if logits.size == 0:
        return -np.inf, 0.0
    return _rowwise(single.row_partial, _address(logits), logits.size, _stride(logits))


@public
def merge(one, other):
    """What two parts of a row amount to together.

    Parameters
    ----------
    one, other : tuple of two floats
        As from `partial` or `merge`. Their order does not matter, to the last bit; nor does that of
        several merges, beyond the rounding of float64.

    Returns
    -------
    m, rest : float
        As `partial` of the whole has them.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import rows
    >>> row = np.array([2.0, 1.0, 0.0])
    >>> m, rest = rows.merge(rows.partial(row[:2]), rows.partial(row[2:]))
    >>> print(f"{m + np.log1p(rest):.4f}")
    2.4076
    """
    return single.merged(one[0], one[1], other[0], other[1])
