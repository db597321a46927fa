"""Cross-entropy over MPI, the classes or the rows divided among processes.

Needs the extra ``fastce[mpi]``: mpi4py, and an MPI library from the same package index. Programs
are started as ``mpiexec -n 4 python program.py``; every rank makes the same calls in the same
order.

- Classes divided (tensor, vocabulary or output parallelism): `cross_entropy`,
  `cross_entropy_and_grad`, `cross_entropy_stats`, `linear_cross_entropy_and_grad`. Every rank has
  all rows and targets, and of the logits, or of the weights that make them, the classes from
  `class_offset` on.
- Rows divided (data parallelism): `data_parallel_cross_entropy_and_grad`, whose mean is that of
  all rows of all ranks.

For both at once see `total_weight`, which is what to give as `normalizer` to the first kind.

Where a rank finds something wrong with its arguments, all raise, the others naming the rank, and
nothing has been written: ranks agree on 24 bytes each before they exchange anything else. Results
are the same to the last bit on all ranks and, classes being divided, for whatever order an MPI
library reduces in (see `fastce.shards`).

Sent per row where classes are divided: one record of 64 bytes, 136 with label smoothing or
probabilities as targets, and 48 more for the entropy, whatever the dtype and the number of classes;
reduced in place by a single Allreduce with an operation of its own. An Allreduce of n bytes among P
ranks moves about 2 n (P - 1) / P bytes in and out of each.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce import losses, shards
from fastce._arguments import AnyArray, Reduction
from fastce._call import Call
from fastce._linear_slice import LinearSlice
from fastce._mode import in_default_mode
from fastce.losses import CrossEntropyStats

_RAISED = (TypeError, ValueError, IndexError, MemoryError)


def cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    class_offset: int,
    classes: int,
    comm: MPI.Intracomm | None = None,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Cross-entropy of logits whose classes are divided among the ranks.

    Parameters
    ----------
    logits, targets, class_offset, classes, axis, weight
        The slice of this rank, as in `fastce.shards.partial`.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that have a slice each; None means COMM_WORLD.
    ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As in `fastce.cross_entropy`, the same on every rank.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        The loss of all classes, on every rank.

    Raises
    ------
    TypeError, ValueError, IndexError
        On every rank, if one has bad arguments or another number of rows or other options than the
        others, or if the slices are not all classes.

    Examples
    --------
    On a single rank (see docs/distributed.md for more):

    >>> from fastce import mpi
    >>> print(f"{mpi.cross_entropy([[2.0, 1.0, 0.0]], [0], class_offset=0, classes=3):.4f}")
    0.4076
    """
    total, options = _reduced(
        logits, targets, comm, (z_loss, reduction, normalizer), class_offset=class_offset,
        classes=classes, axis=axis, weight=weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
    )  # fmt: skip
    return shards.finish(total, **_reducing(options)).loss


def cross_entropy_and_grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    class_offset: int,
    classes: int,
    comm: MPI.Intracomm | None = None,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Cross-entropy of logits whose classes are divided, and the gradient of this rank's slice.

    Parameters
    ----------
    logits, targets, class_offset, classes, comm, axis, weight
        As in `cross_entropy`.
    ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As in `cross_entropy`.
    grad_output, out
        As in `fastce.cross_entropy_and_grad`; the former is the same on every rank.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `cross_entropy`.
    grad : numpy.ndarray
        Shaped and typed like the rank's `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Notes
    -----
    Reads the logits twice and writes the gradient once; sends what `cross_entropy` does.
    """
    part: Any = {"class_offset": class_offset, "axis": axis, "weight": weight}

    def check(own: shards.Partial, options: arguments.Options) -> None:
        shards.GradientCall(
            logits, targets, own, **part, **_reducing(options), grad_output=grad_output, out=out
        )

    total, options = _reduced(
        logits, targets, comm, (z_loss, reduction, normalizer), check, classes=classes,
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, **part,
    )  # fmt: skip
    reducing = _reducing(options)
    loss = shards.finish(total, **reducing).loss
    return loss, shards.grad(
        logits, targets, total, **part, **reducing, grad_output=grad_output, out=out
    )


def cross_entropy_stats(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    class_offset: int,
    classes: int,
    comm: MPI.Intracomm | None = None,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> CrossEntropyStats:
    """Loss, log-sum-exp, entropy and prediction of each row of logits whose classes are divided.

    Parameters
    ----------
    logits, targets, class_offset, classes, comm, axis, weight, ignore_index
        As in `cross_entropy`.

    Returns
    -------
    CrossEntropyStats
        As from `fastce.cross_entropy_stats` of all classes, on every rank.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Examples
    --------
    >>> from fastce import mpi
    >>> stats = mpi.cross_entropy_stats([[2.0, 1.0, 0.0]], [0], class_offset=0, classes=3)
    >>> print(f"{stats.entropy[0]:.4f}", stats.predicted)
    0.8324 [0]
    """
    total, _ = _reduced(
        logits, targets, comm, (0.0, "none", None), class_offset=class_offset, classes=classes,
        axis=axis, weight=weight, ignore_index=ignore_index, entropy=True,
    )  # fmt: skip
    result = shards.finish(total, reduction="none")
    assert result.entropy is not None
    return CrossEntropyStats(
        result.loss, result.lse, result.entropy, result.predicted, result.total_weight
    )


@in_default_mode
def linear_cross_entropy_and_grad(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    class_offset: int,
    classes: int,
    comm: MPI.Intracomm | None = None,
    bias: npt.ArrayLike | None = None,
    class_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
) -> tuple[Any, tuple[AnyArray, AnyArray, AnyArray | None]]:
    """Cross-entropy of a linear layer whose classes are divided, and its gradients.

    Parameters
    ----------
    x : array_like, of shape (N, D)
        Observations, the same on every rank.
    weight, bias, class_weight : array_like, of shape (K, D), (K,) and (K,)
        What belongs to the K classes of this rank; otherwise as in `fastce.linear_cross_entropy`.
    targets, class_offset, classes, comm
        As in `cross_entropy`.
    ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer, grad_output
        As in `cross_entropy_and_grad`.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        The loss of all classes, on every rank.
    (dx, dweight, dbias) : tuple of numpy.ndarray
        dx is that of all classes, the same on every rank; dweight and dbias are those of the rank's
        own classes. dbias is None without `bias`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Notes
    -----
    Beside the records of `cross_entropy`, dx is summed over the ranks in place: N * D numbers of
    the dtype that is computed with. Logits are held for as many rows as fit in 64 MiB; where these
    are not all, they are computed twice.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    error, total = None, None
    try:
        options = arguments.options(
            ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        )
        layer = LinearSlice(x, weight, bias, targets, class_weight, class_offset)
        upstream = arguments.upstream(grad_output, (len(layer.x),), options.reduction)
        total = layer.partial(arguments.integer("classes", classes), options)
    except _RAISED as found:
        error = found
    _agree(comm, error, total and (total.terms, layer.x.shape, _reducing(options)))
    assert total is not None
    _merge_all(comm, total)
    result = shards.finish(total, **_reducing(options))
    dx, dweight, dbias = layer.gradients(total, shards.weighed(total).scales(options), upstream)
    comm.Allreduce(MPI.IN_PLACE, dx)
    return result.loss, layer.as_given(dx, dweight, dbias)


def total_weight(
    targets: npt.ArrayLike,
    *,
    classes: int,
    comm: MPI.Intracomm | None = None,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> float:
    """What "mean" divides by where rows are divided among ranks: the weight of all their targets.

    Given as `normalizer` to `cross_entropy_and_grad` on a grid of ranks, rows divided along one
    axis and classes along the other, it makes the sum of the losses along the first the mean.

    Parameters
    ----------
    targets : array_like
        Integers, those of the rank's rows.
    classes : int
        C, the number of all classes.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that the rows are divided among; None means COMM_WORLD.
    weight : array_like of shape (C,), optional
        Class weights, of all classes.
    ignore_index : int, default -100
        Rows with this target do not count.

    Raises
    ------
    TypeError, ValueError, IndexError
        On every rank, if one has bad arguments.

    Examples
    --------
    >>> from fastce import mpi
    >>> mpi.total_weight([0, 2, -100], classes=3, weight=[1.0, 1.0, 0.5])
    1.5
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    error, local = None, 0.0
    try:
        classes = arguments.integer("classes", classes)
        ignore_index = arguments.integer("ignore_index", ignore_index)
        local = shards.target_sums(targets, classes, weight, ignore_index).weight
    except _RAISED as found:
        error = found
    return _agree(comm, error, (classes, ignore_index), local)[0]


@in_default_mode
def data_parallel_cross_entropy_and_grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    comm: MPI.Intracomm | None = None,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    grad_output: float | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Mean cross-entropy over the rows of all ranks, and its gradient for this rank's rows.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index, label_smoothing, z_loss, softcap, out
        As in `fastce.cross_entropy_and_grad`: all classes of the rank's own rows, of which there
        may be none.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that the rows are divided among; None means COMM_WORLD.
    grad_output : float, optional
        Upstream gradient.

    Returns
    -------
    loss : numpy.float64 or numpy.float32
        The mean over the rows of all ranks, on every rank.
    grad : numpy.ndarray
        Its gradient with respect to this rank's logits, divided by what the mean divides by: what
        follows from it, for shared weights say, is to be summed over the ranks, not averaged.

    Raises
    ------
    TypeError, ValueError, IndexError
        On every rank, if one has bad arguments or other options than the others.

    Notes
    -----
    Two Allreduce, of 40 and of 8 bytes.

    Examples
    --------
    >>> from fastce import mpi
    >>> loss, grad = mpi.data_parallel_cross_entropy_and_grad([[2.0, 1.0, 0.0]], [0])
    >>> print(f"{loss:.4f}")
    0.4076
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    error, sums = None, (0.0, 0.0)
    try:
        options = arguments.options(ignore_index, label_smoothing, z_loss, softcap, "mean", None)
        call = Call("logits", logits, targets, axis, weight, options)
        upstream = arguments.upstream(grad_output, call.rows, "mean")
        grad = outputs.gradient(out, call.logits, targets=targets, weight=weight)
        sums = float(call.total_weight), float(call.count)
        dtype, call.dtype = call.dtype, np.float64  # parts of the loss are not rounded
    except _RAISED as found:
        error = found
    what = None if error else (options, call.classes, np.dtype(dtype).name, upstream[0])
    call_weight, count = _agree(comm, error, what, *sums)
    call.total_weight, call.count = call_weight, count
    loss = np.array(losses._cross_entropy(call, upstream, grad))
    comm.Allreduce(MPI.IN_PLACE, loss)
    return arguments.scalar(float(loss), dtype), grad


def _reduced(
    logits: npt.ArrayLike, targets: npt.ArrayLike, comm: MPI.Intracomm | None,
    reduced: tuple[Any, ...],
    check: Callable[[shards.Partial, arguments.Options], None] | None = None, **given: Any,
) -> tuple[shards.Partial, arguments.Options]:  # fmt: skip
    """The partial of all classes, on every rank, and how their losses are reduced."""
    comm = MPI.COMM_WORLD if comm is None else comm
    error, total = None, None
    try:
        options = arguments.options(-100, 0.0, reduced[0], None, *reduced[1:])
        own = shards.partial(logits, targets, **given)
        if check is not None:
            check(own, options)
        total = own
    except _RAISED as found:
        error = found
    _agree(comm, error, total and (total.terms, total.rows, _reducing(options)))
    assert total is not None
    _merge_all(comm, total)
    return total, options


def _reducing(options: arguments.Options) -> dict[str, Any]:
    """What `shards.finish` and `shards.grad` take of the options, as plain numbers."""
    given = options._asdict()
    return {name: given[name] for name in ("z_loss", "reduction", "normalizer")}


def _merge_all(comm: MPI.Intracomm, total: shards.Partial) -> None:
    """Merge the partials of all ranks in place."""
    kind = _record_type(total.records.shape[1])
    comm.Allreduce(MPI.IN_PLACE, [total.records, kind], op=_merging(total.terms.dtype))


@functools.cache
def _record_type(size: int) -> MPI.Datatype:
    """A record as one element, so that no library divides it."""
    return MPI.DOUBLE.Create_contiguous(size).Commit()


@functools.cache
def _merging(dtype: np.dtype[Any]) -> MPI.Op:
    """`fastce.shards.merge_records` as a reduction."""

    def function(others: Any, records: Any, kind: MPI.Datatype) -> None:
        shape = (-1, kind.Get_size() // 8)
        into, given = (np.frombuffer(m, np.float64).reshape(shape) for m in (records, others))
        shards.merge_records(into, given, dtype)

    return MPI.Op.Create(function, commute=True)


def _agree(comm: MPI.Intracomm, error: Exception | None, what: Any, *numbers: float) -> list[float]:
    """Raise on every rank if one has an error or they differ in `what`; else sum the numbers."""
    digest = zlib.crc32(repr(what).encode()) & 0xFFFFF  # sums of squares stay exact
    sums = np.array([error is not None, digest, digest**2, *numbers], float)
    comm.Allreduce(MPI.IN_PLACE, sums)
    if sums[0]:
        found = comm.allgather(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        rank, (kind, message) = next((k, e) for k, e in enumerate(found) if e is not None)
        raise kind(f"rank {rank}: {message}")
    if comm.size * int(sums[2]) != int(sums[1]) ** 2:
        every = comm.allgather(repr(what))
        rank = next(k for k, other in enumerate(every) if other != every[0])
        raise ValueError(
            f"comm: expected the same on every rank, got {every[0]} on rank 0 and {every[rank]} "
            f"on rank {rank}"
        )
    return [float(number) for number in sums[3:]]
