"""Cross-entropy where the classes are divided among arrays, processes or machines.

Each holder of a slice of the classes looks at its logits once and makes a `partial`, 64 bytes per
row (136 with label smoothing or probabilities as targets, 48 more for the entropy). `merge` makes
one of several, in any order, to the same bits; what is merged from all slices tells the loss
(`finish`) and lets every holder write the gradient of its own slice (`grad`). How partials travel
is left to the caller: `fastce.mpi` and `fastce.dask` do it, and `Partial.records` is a plain array
for everything else.

For a row z, the slices A of its classes, m_A = max of z in A::

    rest_A = sum of exp(z_c - m_A) over A without one class where the maximum is
    m      = max of m_A
    rest   = sum_A (exp(m_A - m) * (rest_A + 1)) - 1         without the subtraction: as a sum
    loss   = (m - z_y) + log1p(rest)

Arrays on a CUDA device go to `fastce.cuda.shards`, with shorter records that merge in an order.
On the CPU the sums that merge are kept as integers, multiples of fixed powers of two [1]_, which
makes merging exact, hence associative and commutative.

References
----------
.. [1] J. Demmel and H. D. Nguyen, "Parallel reproducible summation", IEEE Transactions on Computers
   64(7), 2015.

Examples
--------
>>> import numpy as np
>>> import fastce
>>> from fastce import shards
>>> logits = np.array([[2.0, 1.0, 0.0, 4.0], [0.0, 3.0, 1.0, 2.0]])
>>> targets = np.array([0, 1])
>>> left, right = logits[:, :2], logits[:, 2:]
>>> total = shards.merge(
...     shards.partial(left, targets, class_offset=0, classes=4),
...     shards.partial(right, targets, class_offset=2, classes=4))
>>> print(f"{shards.finish(total).loss:.6f} {fastce.cross_entropy(logits, targets):.6f}")
1.312686 1.312686
>>> print(shards.grad(right, targets, total, class_offset=2).round(4))
[[0.0076 0.4155]
 [0.0436 0.1184]]
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce._arguments import AnyArray, Reduction
from fastce._call import Call, inverse
from fastce._devices import on_device
from fastce._mode import in_default_mode
from fastce.cpu import calls
from fastce.cpu import shards as kernels
from fastce.cpu.layout import blocks, writable
from fastce.cpu.threads import launch

Records = npt.NDArray[np.float64]


class Terms(NamedTuple):
    """What all slices of one loss have in common."""

    classes: int
    dtype: np.dtype[Any]
    hard: bool
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    entropy: bool

    @property
    def labelled(self) -> bool:
        """Whether the labels lay something on every class."""
        return not self.hard or self.label_smoothing > 0.0

    @property
    def record_size(self) -> int:
        """Numbers per row."""
        size = kernels.PLAIN + kernels.LABELS if self.labelled else kernels.PLAIN
        return size + kernels.ENTROPY if self.entropy else size


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """What some of the classes know of each row: made by `partial` and `merge`.

    Attributes
    ----------
    records : numpy.ndarray of float64, of shape (N + 1, K)
        One record of K numbers per row (8; 17 with labels on all classes; 6 more for the entropy),
        in row order, and a last one that counts classes: all that is sent and merged. The first
        number is the maximum of the logits; what the others are is no promise.
    rows : tuple of int
        Shape of the rows: that of the logits without the class axis.
    terms : Terms
        What all slices have in common: number of classes, dtype of the loss, options.
    """

    records: Records
    rows: tuple[int, ...]
    terms: Terms

    @property
    def covered(self) -> int:
        """How many classes have been looked at; `finish` and `grad` want all of them."""
        return int(self.records[-1, kernels.LOGIT])

    def select(self, rows: slice) -> "Partial":
        """The partial of some rows, which have one axis."""
        count = range(*rows.indices(len(self.records) - 1))
        records = np.concatenate([self.records[:-1][rows], self.records[-1:]])
        return Partial(records, (len(count),), self.terms)


class ShardedLoss(NamedTuple):
    """What `finish` returns.

    Attributes
    ----------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `fastce.cross_entropy`; on a CUDA device arrays there, like all that follows.
    lse : numpy.ndarray
        logsumexp of each row; 0 where ignored. Typed like the loss.
    predicted : numpy.ndarray of int64
        First class with the largest logit; -1 where ignored. None on a CUDA device.
    total_weight : float
        What "mean" divides by, without `normalizer`.
    entropy : numpy.ndarray or None
        Entropy of the softmax of each row in nats; 0 where ignored. Typed like the loss. None if
        the partials were made without ``entropy=True``.
    """

    loss: Any
    lse: Any
    predicted: Any
    total_weight: Any
    entropy: Any


class _Slice:
    """The checked logits and labels of a slice of the classes."""

    def __init__(
        self, logits: npt.ArrayLike, targets: npt.ArrayLike, axis: int,
        weight: npt.ArrayLike | None, class_offset: int, classes: int, ignore_index: int,
    ) -> None:  # fmt: skip
        self.logits = z = arguments.float_array("logits", logits)
        labels = arguments.any_array("targets", targets)
        fit = arguments.signature(
            "logits", z.dtype, z.shape, axis, labels.dtype, labels.shape, ignore_index
        )
        self.axis, self.rows, self.count, self.dtype = fit.axis, fit.rows, fit.row_count, fit.dtype
        self.size = fit.classes
        self.offset = first_class(class_offset, self.size, classes)
        self.weight = arguments.class_weight("weight", weight, self.size, z.dtype)
        self.hard: npt.NDArray[np.int64] | None = None
        self.soft: AnyArray | None = None
        if not fit.hard:
            self.soft = arguments.float_array("targets", labels)
            return
        self.hard, bad_row, *_ = calls.check_targets(
            arguments.hard_labels(labels, classes, ignore_index), classes, ignore_index, None
        )
        if bad_row >= 0:
            raise arguments.bad_target(self.hard[bad_row], bad_row, labels.shape, classes)

    def label_terms(self, terms: Terms) -> tuple[float, float, AnyArray | None]:
        """Share of the labels that is kept, share for each class, the weights of what is spread."""
        spread = terms.label_smoothing / terms.classes
        everywhere = self.soft is not None or spread > 0.0
        return 1.0 - terms.label_smoothing, spread, self.weight if everywhere else None


def first_class(class_offset: int, size: int, classes: int) -> int:
    """Check the place of a slice among all classes."""
    offset = arguments.integer("class_offset", class_offset)
    if not 0 <= offset <= classes - size:
        raise ValueError(
            f"class_offset: expected a slice of {size} classes to lie in [0, {classes}), "
            f"got {offset}"
        )
    return offset


def check_total(total: Any, rows: tuple[int, ...], dtype: np.dtype[Any], hard: bool) -> None:
    """Refuse a partial of other rows, dtype or kind of labels."""
    terms = total.terms
    if (rows, dtype, hard) != (total.rows, terms.dtype, terms.hard):
        raise ValueError(
            f"total: expected rows {rows}, {dtype} and {'integer' if hard else 'soft'} targets, "
            f"got {total.rows}, {terms.dtype} and {'integer' if terms.hard else 'soft'} targets"
        )


def check_covered(total: Any) -> None:
    """Refuse what is not all classes."""
    if total.covered != total.terms.classes:
        raise ValueError(
            f"total: expected partials of all {total.terms.classes} classes merged, "
            f"got {total.covered} of them"
        )


def check_alike(first: Any, others: Iterable[Any]) -> None:
    """Refuse partials of other rows or options, and of more classes than there can be."""
    covered = first.covered
    for other in others:
        for name in ("rows", "terms"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"partials: expected the same {name}, got {getattr(first, name)} and "
                    f"{getattr(other, name)}"
                )
        covered += other.covered
    if covered > first.terms.classes:
        raise ValueError(
            f"partials: expected slices without common classes, got {covered} of "
            f"{first.terms.classes} classes"
        )


class GradientCall:
    """One checked call of `grad`; `total` may still lack classes."""

    def __init__(
        self, logits: npt.ArrayLike, targets: npt.ArrayLike, total: Partial, class_offset: int,
        axis: int, weight: npt.ArrayLike | None, z_loss: float, reduction: Reduction,
        normalizer: float | None, grad_output: npt.ArrayLike | None, out: AnyArray | None,
    ) -> None:  # fmt: skip
        terms = total.terms
        self.options = arguments.options(
            terms.ignore_index, terms.label_smoothing, z_loss, terms.softcap, reduction, normalizer
        )
        self.part = part = _Slice(
            logits, targets, axis, weight, class_offset, terms.classes, terms.ignore_index
        )
        check_total(total, part.rows, np.dtype(part.dtype), part.hard is not None)
        self.upstream = arguments.upstream(grad_output, part.rows, reduction)
        self.out = outputs.gradient(
            out, part.logits, targets=targets, weight=weight, grad_output=grad_output,
            total=total.records,
        )  # fmt: skip


@in_default_mode
def partial(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    class_offset: int,
    classes: int,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Partial:
    """Summarise a slice of the classes, one short record per row, in one read of its logits.

    Parameters
    ----------
    logits : array_like of float64, float32, float16 or bfloat16
        Logits of the classes from `class_offset` on, any number of dimensions, any strides.
    targets : array_like
        Integers in [0, classes) shaped like `logits` without the class axis, the same for every
        slice: most lie in another one. Or probabilities shaped like `logits`, those of the slice.
    class_offset : int
        The first class of the slice.
    classes : int
        C, the number of classes of all slices.
    axis : int, default -1
        The class axis.
    weight : array_like, optional
        Weights of the classes of the slice.
    ignore_index, label_smoothing, softcap
        As in `fastce.cross_entropy`; the same for every slice.
    entropy : bool, default False
        Whether `finish` is to tell the entropy of each row as well; the same for every slice. It
        costs a second look at each row, in the cache, and 48 bytes more in its record.

    Returns
    -------
    Partial
        To be merged with those of the other slices.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `fastce.cross_entropy` does; ValueError also if the slice reaches beyond the classes.

    See Also
    --------
    merge, finish, grad : What comes next; options of the reduction are given there.

    Notes
    -----
    Accuracy and edge cases are those of `fastce.cross_entropy`: neither depends on how the classes
    are divided. A slice that is all -inf is one of classes without probability.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import shards
    >>> part = shards.partial(np.zeros((2, 3)), [0, 7], class_offset=5, classes=10)
    >>> part.records.shape, part.covered
    ((3, 8), 3)
    """
    if on_device(logits):
        if entropy:
            raise NotImplementedError("entropy: expected False for arrays on a device, got True")
        return _on_device().partial(  # type: ignore[no-any-return]
            logits, targets, class_offset=class_offset, classes=classes, axis=axis, weight=weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
    classes = arguments.integer("classes", classes)
    options = arguments.options(ignore_index, label_smoothing, 0.0, softcap, "none", None)
    part = _Slice(logits, targets, axis, weight, class_offset, classes, options.ignore_index)
    terms = Terms(
        classes, np.dtype(part.dtype), part.hard is not None, options.ignore_index,
        options.label_smoothing, options.softcap, bool(entropy),
    )  # fmt: skip
    keep, spread, spread_weight = part.label_terms(terms)
    records = _without_rows(part.count, part.size, terms)
    for first, (z_base, soft_base), layout in blocks(part.axis, part.logits, part.soft):
        rows = slice(first, first + layout.outer * layout.inner)
        args = (
            z_base, _some(part.hard, rows), soft_base, part.weight, spread_weight, records[rows],
            terms.entropy or None, part.offset, terms.ignore_index, keep, spread, terms.softcap,
            *layout[:5], *layout.strides[0], *layout.strides[1],
        )  # fmt: skip
        kernel = kernels.partial_columns if layout.columns else kernels.partial_rows
        launch(kernel, args, layout.parallel, layout.parts)
    return Partial(records, part.rows, terms)


def _without_rows(count: int, classes: int, terms: Terms) -> Records:
    """Records of `count` rows still to be written, and the one that counts classes."""
    records = np.empty((count + 1, terms.record_size))
    records[-1] = 0.0
    _, *sums = kernels.places(terms.record_size)
    records[-1, [kernels.MAXIMUM, kernels.REST, *filter(None, sums)]] = -np.inf
    records[-1, kernels.LOGIT] = classes
    return records


def merge(first: Partial, *others: Partial) -> Partial:
    """Make one partial of several, of slices that have no class in common.

    Every bit of the result is the same in whatever order, and however grouped, they are merged.

    Parameters
    ----------
    first, *others : Partial
        Partials of the same rows, from calls with the same options.

    Returns
    -------
    Partial
        What `partial` would return for all their classes, or its equivalent.

    Raises
    ------
    ValueError
        If rows, dtypes or options differ, or there are more classes than there can be.

    See Also
    --------
    merge_records : The same in place, for reductions in other libraries.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import shards
    >>> z = np.array([[1.0, 2.0, 3.0]])
    >>> a, b, c = (
    ...     shards.partial(z[:, k : k + 1], [2], class_offset=k, classes=3) for k in range(3))
    >>> one = shards.merge(a, b, c)
    >>> other = shards.merge(c, shards.merge(b, a))
    >>> one.records.tobytes() == other.records.tobytes()
    True
    """
    if on_device(first.records):
        return _on_device().merge(first, *others)  # type: ignore[no-any-return]
    check_alike(first, others)
    total = Partial(first.records.copy(), first.rows, first.terms)
    for other in others:
        merge_records(total.records, other.records, first.terms.dtype)
    return total


def merge_records(records: Records, others: Records, dtype: npt.DTypeLike) -> None:
    """Merge `others` into `records`, row by row: the reduction that `merge` does, in place.

    Parameters
    ----------
    records : numpy.ndarray of float64
        `Partial.records`, all or some rows; contiguous, and written to.
    others : numpy.ndarray of float64
        Records of the same rows.
    dtype : dtype
        That of the loss, `Partial.terms.dtype`.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import shards
    >>> a, b = (shards.partial([[z]], [0], class_offset=k, classes=2)
    ...         for k, z in enumerate([1.0, 5.0]))
    >>> shards.merge_records(a.records, b.records, np.float64)
    >>> float(a.records[0, 0])
    5.0
    """
    arguments.refuse_mask("records", records)
    arguments.refuse_mask("others", others)
    if records.shape != others.shape:
        raise ValueError(f"others: expected shape {records.shape}, got {others.shape}")
    kernels.merge(records, writable(others), np.dtype(dtype).type(0))


@in_default_mode
def finish(
    total: Partial,
    *,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> ShardedLoss:
    """Loss, log-sum-exp and prediction of each row, from the partials of all slices merged.

    With partials that were made with ``entropy=True`` the entropy too.

    Parameters
    ----------
    total : Partial
        Merged from slices that make up all classes.
    z_loss, reduction, normalizer
        As in `fastce.cross_entropy`.

    Returns
    -------
    ShardedLoss
        Of `loss`, `lse`, `predicted`, `total_weight` and `entropy`.

    Raises
    ------
    TypeError, ValueError
        If an option is outside its range, or classes are missing in `total`.

    Notes
    -----
    The entropy is as accurate as the loss; for float64 logits beyond 1e9, 1e-14. As for the loss,
    the order in which slices are merged changes no bit of it.

    Examples
    --------
    >>> from fastce import shards
    >>> total = shards.partial([[0.0, 40.0]], [1], class_offset=0, classes=2)
    >>> print(f"{shards.finish(total).loss:.4e}")
    4.2484e-18
    >>> total = shards.partial([[0.0, 40.0]], [1], class_offset=0, classes=2, entropy=True)
    >>> print(f"{shards.finish(total).entropy[0]:.4e}")
    1.7418e-16
    """
    if on_device(total.records):
        return _on_device().finish(  # type: ignore[no-any-return]
            total, z_loss=z_loss, reduction=reduction, normalizer=normalizer
        )
    terms = total.terms
    options = arguments.options(
        terms.ignore_index, terms.label_smoothing, z_loss, terms.softcap, reduction, normalizer
    )
    sums, losses, lse, predicted, entropy = _finished(total, options.z_loss)
    loss = losses if reduction == "none" else sums.loss(options, terms.dtype)
    return ShardedLoss(loss, lse, predicted, sums.weight, entropy)


class Sums(NamedTuple):
    """What rows add up to; those of all rows are the sums over parts of them."""

    nll: float
    z: float
    weight: float
    rows: float

    def divisors(self, options: arguments.Options) -> tuple[float, float]:
        """What the losses and the z-loss terms are divided by."""
        if options.reduction != "mean":
            return 1.0, 1.0
        if options.normalizer is not None:
            return options.normalizer, options.normalizer
        return self.weight, self.rows

    def scales(self, options: arguments.Options) -> tuple[float, float]:
        """Upstream gradient and z-loss with which the sum has the gradient of the reduced loss."""
        weight, rows = self.divisors(options)
        return inverse(weight), options.z_loss * weight * inverse(rows)

    def loss(self, options: arguments.Options, dtype: np.dtype[Any]) -> Any:
        """The reduced loss."""
        weight, count = self.divisors(options)
        value = self.nll / weight + (self.z / count if self.z else 0.0) if weight else math.nan
        return arguments.scalar(value, dtype.type)


@in_default_mode
def row_sums(total: Partial, z_loss: float = 0.0) -> Sums:
    """Sum losses, z-loss terms and weights over the rows, as "mean" is made of them."""
    return _finished(total, z_loss)[0]


def target_sums(
    targets: npt.ArrayLike, classes: int, weight: npt.ArrayLike | None, ignore_index: int
) -> Sums:
    """Weights and number of targets alone, without losses; the weights are those of all classes."""
    labels = arguments.any_array("targets", targets)
    logits = np.broadcast_to(np.float64(0), (*labels.shape, classes))  # for its shape alone
    options = arguments.options(ignore_index, 0.0, 0.0, None, "sum", None)
    call = Call("classes", logits, labels, -1, weight, options)
    return Sums(0.0, 0.0, float(call.total_weight), float(call.count))


def _finished(
    total: Partial, z_loss: float
) -> tuple[Sums, AnyArray, AnyArray, npt.NDArray[np.int64], AnyArray | None]:
    """Sums over rows, and loss, log-sum-exp, prediction and entropy of each."""
    terms = total.terms
    sums = weighed(total)
    losses, lse = np.empty(total.rows, terms.dtype), np.empty(total.rows, terms.dtype)
    predicted = np.empty(total.rows, np.int64)
    entropy = np.empty(total.rows, terms.dtype) if terms.entropy else None
    nll, z = kernels.finish(
        total.records[:-1], terms.dtype.type(0), 1.0 - terms.label_smoothing, z_loss,
        losses.reshape(-1), lse.reshape(-1), predicted.reshape(-1),
        None if entropy is None else entropy.reshape(-1),
    )  # fmt: skip
    return sums._replace(nll=nll, z=z), losses, lse, predicted, entropy


def weighed(total: Partial) -> Sums:
    """Weights and number of rows; refuses what is not all classes."""
    check_covered(total)
    count, weight = kernels.totals(total.records[:-1])
    return Sums(0.0, 0.0, weight if total.terms.hard else float(count), float(count))


@in_default_mode
def grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    total: Partial,
    *,
    class_offset: int,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> AnyArray:
    """Gradient with respect to the logits of a slice, in one read and one write.

    Parameters
    ----------
    logits, targets, class_offset, axis, weight
        The slice, as given to `partial`; its other options come with `total`.
    total : Partial
        Merged from slices that make up all classes.
    z_loss, reduction, normalizer
        As given to `finish`.
    grad_output, out
        As in `fastce.cross_entropy_and_grad`; ``out=logits`` computes in place.

    Returns
    -------
    numpy.ndarray
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `partial` and `fastce.cross_entropy_and_grad` do, before anything is written; ValueError
        also if `total` is of other rows, labels or dtype, or classes are missing in it.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import shards
    >>> z = np.array([[0.0, 1.0, 2.0]])
    >>> parts = [shards.partial(z[:, s], [2], class_offset=s.start, classes=3)
    ...          for s in (slice(0, 1), slice(1, 3))]
    >>> shards.grad(z[:, 1:], [2], shards.merge(*parts), class_offset=1).round(4)
    array([[ 0.2447, -0.3348]])
    """
    if on_device(logits):
        return _on_device().grad(  # type: ignore[no-any-return]
            logits, targets, total, class_offset=class_offset, axis=axis, weight=weight,
            z_loss=z_loss, reduction=reduction, normalizer=normalizer, grad_output=grad_output,
            out=out,
        )  # fmt: skip
    call = GradientCall(
        logits, targets, total, class_offset, axis, weight, z_loss, reduction, normalizer,
        grad_output, out,
    )  # fmt: skip
    part, terms, options, out = call.part, total.terms, call.options, call.out
    scalar, per_row = call.upstream
    weights, count = weighed(total).divisors(options)
    scales = scalar * inverse(weights), scalar * inverse(count if weights else 0.0)
    keep, spread, spread_weight = part.label_terms(terms)
    streaming = calls._streaming(out, part.logits, part.axis)
    for first, (z_base, soft_base, out_base), layout in blocks(
        part.axis, part.logits, part.soft, out
    ):
        rows = slice(first, first + layout.outer * layout.inner)
        strides = layout.strides
        args = (
            z_base, _some(part.hard, rows), soft_base, spread_weight, _some(per_row, rows),
            total.records[rows], out_base, *scales, streaming, part.offset,
            keep, spread, options.z_loss, terms.softcap,
            *layout[:5], *strides[0], *strides[1], *strides[2],
        )  # fmt: skip
        kernel = kernels.gradient_columns if layout.columns else kernels.gradient_rows
        launch(kernel, args, layout.parallel, layout.parts)
    return out


def _some(array: AnyArray | None, rows: slice) -> AnyArray | None:
    """Some rows of a per-row array, as kernels take it."""
    return None if array is None else writable(array[rows])


def _on_device() -> Any:
    """The same functions for arrays on a CUDA device."""
    from fastce.cuda import shards

    return shards
