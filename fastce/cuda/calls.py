"""From checked arguments to launches: which kernel, with which addresses, on which stream."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba.cuda import config

from fastce._arguments import Options
from fastce.cuda import plan
from fastce.cuda.arrays import Array, float_array, in_row_order, new
from fastce.cuda.formats import CODES
from fastce.cuda.kernels import OfRecords, Sum
from fastce.cuda.layout import row_blocks

if config.ENABLE_CUDASIM:
    from fastce.cuda import simulated_driver as driver
else:
    from fastce.cuda import driver  # type: ignore[no-redef]

_DIVISORS = 4  # numbers at the beginning of the scratch memory
_SUM_SHARED = 24 * plan.SUM_THREADS
_INT64 = 1 << 63
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127  # powers of two among the normal numbers of float32
_MOST_CLASSES = (1 << 31) - 1  # positions in a row are 32-bit
_MOST_SHAPES = 4096
# Shapes of targets and the numbers that notes name them with; a program may have any number.
_shapes: dict[tuple[int, ...], int] = {}
_numbers = itertools.count()


class Divisors(NamedTuple):
    """What sums are divided by, and their inverses: on the device, or known already."""

    scales: int = 0
    weight: float = 1.0
    rows: float = 1.0  # the z-loss


class Results(NamedTuple):
    """Arrays with a number per row, where they are wanted."""

    losses: Array | None = None
    z_terms: Array | None = None
    lse: Array | None = None
    entropy: Array | None = None
    predicted: Array | None = None


class Slice(NamedTuple):
    """Of rows of which only some classes are at hand: records, the first class, all classes."""

    records: Array
    class_offset: int
    classes: int


class Factor(NamedTuple):
    """A number, times an array spread over the elements if there is one."""

    number: float = 1.0
    array: Array | None = None


def device(ordinal: int) -> Any:
    """The device of a number."""
    return driver.device(ordinal)


def begin(name: str, value: Any) -> Array:
    """The array that a call is about, after a look for errors of earlier calls on its device."""
    array = float_array(name, value)
    raise_noted(array.device)
    return array


def address(array: Array | None) -> int:
    """Where an array is; 0 for none."""
    return 0 if array is None else array.address


def raise_noted(ordinal: int) -> None:
    """Raise the error of a bad target that a kernel has noted; does not wait."""
    note = driver.device(ordinal).note
    if not note[0]:
        return
    _, row, value, classes, number = note
    note[0] = 0
    if row < 0:
        raise IndexError(
            f"targets: expected integers in [0, {classes}) or ignore_index wherever a part of the "
            "logits is, got something else elsewhere"
        )
    shape = next((shape for shape, known in _shapes.items() if known == number), (row + 1,))
    index = []
    for size in reversed(shape):
        row, i = divmod(row, size)
        index.append(i)
    raise IndexError(
        f"targets: expected integers in [0, {classes}) or ignore_index, got {value} at index "
        f"{tuple(reversed(index)) if shape else '()'}"
    )


def synchronize(ordinal: int) -> None:
    """Wait for a device and raise what has been noted."""
    driver.device(ordinal).synchronize()
    raise_noted(ordinal)


def compute_weight(weight: Array | None, like: Array, dtype: str) -> Array | None:
    """Weights, side by side if they have one axis, in the dtype that is computed with."""
    if weight is None or (weight.dtype.name == dtype and weight.contiguous):
        return weight
    if weight.ndim != 1:
        weight = in_row_order("weight", weight)
    count, step = (
        math.prod(weight.shape),
        weight.strides[0] if weight.ndim == 1 else weight.itemsize,
    )
    made = new(like, weight.shape, dtype)
    if count:
        _device(like).launch(
            Sum("weight", dtype == "float64"), -(-count // plan.SUM_THREADS), 0, like.stream,
            (weight.address, step, CODES[weight.dtype.name], count, made.address),
        )  # fmt: skip
    return made


def scratch(like: Array, rows: int) -> Array:
    """Memory for the divisors and the records of the sums of a call."""
    return new(like, (_DIVISORS + 3 * plan.shares(rows)[1],), "float64")


def weigh_targets(
    targets: Array | None, count: int, classes: int, options: Options, weight: Array | None,
    memory: Array, total: Array | None,
) -> None:  # fmt: skip
    """Leave the divisors of the mean in `memory`, their own weight in `total`; note a bad target.

    Without targets every row counts.
    """
    device, double = _device(memory), weight is not None and weight.itemsize == 8
    share, parts = plan.shares(count)
    number = _shape_number(targets.shape) if targets else 0
    integers = (
        address(targets), CODES[targets.dtype.name] if targets else 0, count, classes,
        _int64(options.ignore_index), address(weight), share, parts,
        memory.address + 8 * _DIVISORS, memory.address, address(total), device.note_address, number,
    )  # fmt: skip
    floats = (-1.0 if options.normalizer is None else options.normalizer,)
    _sum(device, "targets", double, parts, memory.stream, integers, floats)


def rows(
    task: str, axis: int, z: Array, *, out: Array | None = None, targets: Array | None = None,
    soft: Array | None = None, weight: Array | None = None, options: Options | None = None,
    upstream: Array | None = None, scales: int = 0, nll_scale: float = 1.0, z_scale: float = 1.0,
    results: Results | None = None, part: Slice | None = None,
    launch: Callable[..., None] | None = None,
) -> None:  # fmt: skip
    """Launch what computes `task` for every row, by `launch` if not as the device does."""
    options, results = options or Options(), results or Results()
    device, classes = _device(z), z.shape[axis]
    if classes > _MOST_CLASSES:
        raise ValueError(f"logits: expected at most {_MOST_CLASSES} classes, got {classes}")
    spread = options.label_smoothing / (classes if part is None else part.classes)
    present = [a for a in (z, out, soft) if a is not None]
    upstream_step = 0 if upstream is None or not upstream.shape else upstream.itemsize
    for block in row_blocks(axis, z.shape, [a.strides for a in present]):
        located = zip(map(id, present), zip(block.offsets, block.strides, strict=True), strict=True)
        places = dict(located)
        where = [_place(a, places) for a in (z, out, soft)]
        first = block.first
        row = classes * z.itemsize
        packed = block.inner == 1 and all(
            p[0] % 16 == 0 and (p[1] == row or block.rows == 1) for p in where[:2] if p[0]
        )
        chosen = device.possible(
            z.dtype.name, task, block.rows, classes, packed=packed,
            side_by_side=classes == 1 or all(p[3] == z.itemsize for p in where[:2] if p[0]),
            spread=soft is not None or options.label_smoothing > 0,
            soft=soft.dtype.name if soft else "", capped=options.softcap is not None,
        )  # fmt: skip
        integers = (
            *where[0], *where[1], block.rows, block.inner, classes,
            _row(targets, first), CODES[targets.dtype.name] if targets else 0,
            _int64(options.ignore_index), *where[2], address(weight),
            address(upstream) + first * upstream_step, upstream_step,
            CODES[upstream.dtype.name] if upstream else 0, scales,
            *(_row(result, first) for result in results), *_of_slice(part, first), chosen.parts,
        )  # fmt: skip
        floats = (
            1.0 - options.label_smoothing, spread, options.z_loss, _cap(options.softcap, z),
            nll_scale, z_scale,
        )  # fmt: skip
        (launch or device.launch)(
            chosen.kernel, chosen.grid, chosen.shared, z.stream, integers, floats, chosen.cluster
        )  # fmt: skip


def reduce(
    losses: Array, z_terms: Array | None, divisors: Divisors, memory: Array, dtype: str
) -> Any:
    """The reduced loss, an array without axes of the caller's library.

    `losses` are of its dtype, or float64 sums of them.
    """
    device, count = _device(losses), math.prod(losses.shape)
    share, parts = plan.shares(count)
    loss = new(losses, (), dtype)
    integers = (
        losses.address, address(z_terms), count, share, parts, memory.address + 8 * _DIVISORS,
        divisors.scales, loss.address,
    )  # fmt: skip
    divide = (divisors.weight, divisors.rows)
    name = "losses" if losses.dtype.name == dtype else "parts"
    _sum(device, name, dtype == "float64", parts, losses.stream, integers, divide)
    return loss.result


def of_records(
    name: str, like: Array, blocks: int, integers: tuple[int, ...], floats: tuple[float, ...] = (),
    *, labelled: bool = False, double: bool = False,
) -> None:  # fmt: skip
    """Launch a kernel of `records`."""
    kernel = OfRecords(name, labelled, double)
    _device(like).launch(kernel, blocks, _SUM_SHARED, like.stream, integers, floats)


def elements(
    task: str, z: Array, labels: Array, *, weight: Factor, positive: Factor, upstream: Factor,
    out: Array | None, losses: Array | None, dtype: str,
) -> Array:  # fmt: skip
    """Launch what computes `task` for every element; sums of parts, unless `losses` are kept."""
    device = _device(z)
    arrays = (z, labels, weight.array, positive.array, upstream.array, out, losses)
    # Axes in the order in which the logits lie; one more, of size one, in the place of classes.
    axes = sorted(range(z.ndim), key=lambda k: -abs(z.strides[k]))
    shape = tuple(z.shape[k] for k in axes)
    present = [a for a in arrays if a is not None]
    strides = [(*(a.strides[k] for k in axes), 0) for a in present]
    share = plan.ELEMENT_THREADS * plan.CHUNKS * (16 // z.itemsize)
    blocks = list(row_blocks(z.ndim, (*shape, 1), strides))
    sums = new(z, (sum(-(-block.rows // share) for block in blocks),), "float64")
    part = 0
    for block in blocks:
        inner = block.rows if block.inner == 1 else block.inner
        steps = [(o, o if block.inner == 1 else i) for o, i, _ in block.strides]
        each = zip(present, block.offsets, steps, strict=True)
        places = {id(a): (a.address + offset, *step) for a, offset, step in each}
        where = [places.get(id(a), (0, 0, 0)) for a in arrays]

        def flat(a: Array | None, place: tuple[int, int, int], inner: int = inner) -> bool:
            return a is None or (
                place[2] == a.itemsize and place[1] in (place[2], inner * place[2])
            )

        alike = labels.dtype.name == z.dtype.name
        vectors = flat(z, where[0]) and flat(labels, where[1]) and flat(out, where[5])
        aligned = [where[0][0], where[1][0] if alike else 0, where[5][0]]
        variant = plan.Elements(
            z.dtype.name, task, labels.dtype.name,
            vectors=vectors and not any(place % 16 for place in aligned),
            plain=all(a is None for a in (weight.array, positive.array, upstream.array, losses)),
        )  # fmt: skip
        to = 0 if losses else sums.address + 8 * part
        integers = (*itertools.chain(*where), block.rows, inner, to)
        grid = -(-block.rows // share)
        device.launch(
            variant, grid, plan.SCRATCH, z.stream, integers,
            (weight.number, positive.number, upstream.number),
        )  # fmt: skip
        part += grid
    return sums


def _shape_number(shape: tuple[int, ...]) -> int:
    if shape not in _shapes:
        if len(_shapes) == _MOST_SHAPES:
            _shapes.clear()
        _shapes[shape] = next(_numbers)
    return _shapes[shape]


def _sum(
    device: Any, name: str, double: bool, parts: int, stream: int,
    integers: tuple[int, ...], floats: tuple[float, ...],
) -> None:  # fmt: skip
    """Add up in parts, and these in a second step if there are several."""
    device.launch(Sum(name, double, False), parts, _SUM_SHARED, stream, integers, floats)
    if parts > 1:
        device.launch(Sum(name, double, True), 1, _SUM_SHARED, stream, integers, floats)


def _device(array: Array) -> Any:
    return device(array.device)


def _of_slice(part: Slice | None, first: int) -> tuple[int, int, int]:
    if part is None:
        return 0, 0, 0
    records, class_offset, classes = part
    return records.address + first * records.strides[0], class_offset, classes


def _row(array: Array | None, first: int) -> int:
    return 0 if array is None else array.address + first * array.itemsize


def _place(array: Array | None, places: dict[int, Any]) -> tuple[int, int, int, int]:
    if array is None:
        return 0, 0, 0, 0
    offset, strides = places[id(array)]
    return (array.address + offset, *strides)


def _cap(softcap: float | None, z: Array) -> float:
    """The cap as kernels of these logits can compute with it: float32 has neither 1e-300 nor 1e300.

    Capped at its smallest normal number instead, logits are as good as equal as well.
    """
    if softcap is None:
        return 1.0
    return softcap if z.itemsize == 8 else min(max(softcap, _SMALLEST), _LARGEST)


def _int64(value: int) -> int:
    return min(max(value, -_INT64), _INT64 - 1)
