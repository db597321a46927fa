"""Section 2 and 5: loss and gradient of every option, dtype and shape regime equal the formulas."""

import numpy as np
import pytest

import fastce
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    same_bits,
)

# short rows | a few vectors | rows that fit a cache level | several blocks | a vocabulary
CLASSES = [1, 2, 10, 33, 65, 1000, 4097, 50257]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def check(logits, targets, **options):
    """Loss alone, loss with gradient, and the oracle agree; returns the gradient."""
    want = oracle.cross_entropy(logits, targets, **options)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, **options)
    options.pop("grad_output", None)
    alone = fastce.cross_entropy(logits, targets, **options)
    assert_loss(loss, want.loss, logits.dtype)
    assert_gradient(grad, want.grad, logits.dtype)
    assert same_bits(alone, loss)
    return grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", [0, 1, 3, "many"])
def test_every_dtype_in_every_shape_regime(dtype, classes, rows):
    rows = min(500, max(9, 100_000 // classes)) if rows == "many" else rows
    check(draw((rows, classes), dtype, scale=1.5), draw_targets((rows,), classes), reduction="none")


def _hard(rows, classes, dtype, ignored=False, weighted=False, **options):
    targets = draw_targets(rows, classes)
    if ignored:
        targets[np.random.default_rng(5).random(rows) < 0.3] = -100
    if weighted:
        options["weight"] = draw_weight(classes, dtype)
    return targets, options


def _soft(rows, classes, dtype, weighted=False, **options):
    if weighted:
        options["weight"] = draw_weight(classes, dtype)
    return draw_soft((*rows, classes), dtype), options


OPTIONS = {
    "weight": lambda *a: _hard(*a, weighted=True),
    "ignore_index": lambda *a: _hard(*a, ignored=True),
    "another ignore_index": lambda *a: _hard(*a, ignore_index=1),
    "smoothing": lambda *a: _hard(*a, label_smoothing=0.1),
    "smoothing one": lambda *a: _hard(*a, label_smoothing=1.0),
    "smoothing, weight, ignored": lambda *a: _hard(
        *a, ignored=True, weighted=True, label_smoothing=0.25
    ),
    "z-loss": lambda *a: _hard(*a, z_loss=0.125),
    "z-loss, weight, ignored": lambda *a: _hard(*a, ignored=True, weighted=True, z_loss=1e-4),
    "softcap": lambda *a: _hard(*a, softcap=5.0),
    "normalizer": lambda *a: _hard(*a, ignored=True, weighted=True, normalizer=7.5),
    "everything": lambda *a: _hard(
        *a, ignored=True, weighted=True, label_smoothing=0.1, z_loss=1e-3, softcap=30.0
    ),
    "soft": _soft,
    "soft, weight": lambda *a: _soft(*a, weighted=True),
    "soft, smoothing": lambda *a: _soft(*a, label_smoothing=0.1),
    "soft, everything": lambda *a: _soft(
        *a, weighted=True, label_smoothing=0.1, z_loss=1e-3, softcap=30.0
    ),
}
# Every kernel is compiled for each dtype, layout and presence of an array: the tables below pair
# each option with each of these at least once, and not all with all.


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rows, classes", [((300,), 3), ((2,), 50257), ((5,), 1000), ((3, 4), 130)])
def test_every_option_in_every_shape_regime(option, rows, classes):
    targets, options = OPTIONS[option](rows, classes, np.float32)
    options.pop("normalizer", None)
    check(draw((*rows, classes), scale=1.5), targets, reduction="none", **options)


@pytest.mark.parametrize("classes", [512, 545, 1600])
@pytest.mark.parametrize(
    "option", ["smoothing", "smoothing one", "smoothing, weight, ignored", "soft", "soft, weight"]
)
@pytest.mark.parametrize("shape", ["rising", "falling", "steps of 60", "begins with -inf"])
def test_labels_of_rows_of_several_blocks(classes, option, shape):
    """Gaps are measured from the maximum so far, block by block."""
    logits = np.sort(draw((6, classes), scale=3.0))
    if shape == "falling":
        logits = logits[:, ::-1].copy()
    if shape == "steps of 60":
        logits += 60.0 * np.floor(np.arange(classes, dtype=np.float32) / 300)
    targets, options = OPTIONS[option]((6,), classes, np.float32)
    if shape == "begins with -inf":  # four rows give these classes nothing if their labels can
        logits[:, :530] = -np.inf
        logits[4:, 540:] = -np.inf
        if "soft" in option:
            targets[:4, :530] = 0.0
        elif "weight" in option:
            options["weight"][:530] = 0.0
            targets[:] = classes - 1
    check(logits, targets, reduction="none", **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_option_with_every_reduction(option, reduction):
    rows, classes = (40,), 13
    logits = draw((*rows, classes), np.float64, scale=1.5)
    targets, options = OPTIONS[option](rows, classes, np.float64)
    if reduction == "sum":
        options.pop("normalizer", None)
    check(logits, targets, reduction=reduction, **options)
    check(logits, targets, reduction=reduction, grad_output=-2.5, **options)


@pytest.mark.parametrize("option", ["everything", "smoothing, weight, ignored", "soft"])
@pytest.mark.parametrize("classes", [13, 70])
@pytest.mark.parametrize("upstream", [3.0, draw((40,), seed=9)], ids=["number", "per row"])
def test_upstream_gradient_of_unreduced_losses(option, classes, upstream):
    targets, options = OPTIONS[option]((40,), classes, np.float32)
    logits = draw((40, classes), scale=1.5)
    check(logits, targets, reduction="none", grad_output=upstream, **options)


@pytest.mark.parametrize(
    "dtype, option",
    [(FLOATS[0], "everything"), (FLOATS[2], "everything"), (FLOATS[3], "soft, everything")],
)
@pytest.mark.parametrize("classes", [10, 1000])
def test_options_in_other_dtypes(dtype, option, classes):
    targets, options = OPTIONS[option]((30,), classes, dtype)
    check(draw((30, classes), dtype, scale=1.5), targets, **options)


@pytest.mark.parametrize(
    "option", ["weight", "smoothing", "everything", "soft", "soft, everything"]
)
def test_options_with_a_strided_class_axis(option):
    rows, classes = (3, 37), 11
    targets, options = OPTIONS[option](rows, classes, np.float32)
    if np.asarray(targets).dtype.kind == "f":
        targets = np.moveaxis(targets, -1, 1)
    logits = draw((3, classes, 37), scale=1.5)
    check(logits, targets, axis=1, reduction="none", **options)


def test_kinds_of_results():
    """A reduced loss is a NumPy scalar, an unreduced one an array."""
    for dtype in FLOATS:
        logits, targets = draw((4, 3), dtype), np.array([0, 1, 2, 0])
        for reduction in ("mean", "sum"):
            loss = fastce.cross_entropy(logits, targets, reduction=reduction)
            assert type(loss) is (np.float64 if dtype == np.float64 else np.float32)
        assert type(fastce.cross_entropy(logits, targets, reduction="none")) is np.ndarray


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_every_integer_dtype_of_targets(dtype, axis):
    logits, targets = draw((6, 6)), draw_targets((6,), 6, dtype)
    grad = check(logits, targets, axis=axis, ignore_index=2)
    want = fastce.cross_entropy_and_grad(
        logits, targets.astype(np.int64), axis=axis, ignore_index=2
    )
    assert same_bits(grad, want[1])


@pytest.mark.parametrize("targets_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_soft_targets_of_every_float_dtype(dtype, targets_dtype):
    # computed in the dtype of the logits, so the distribution must be exact in both
    targets = draw_soft((8, 6), targets_dtype).astype(np.float32).astype(targets_dtype)
    check(draw((8, 6), dtype), targets, reduction="none")


@pytest.mark.parametrize(
    ("shape", "axis"), [((7,), -1), ((7,), 0), ((2, 3, 4, 5), 2), ((2, 3, 4, 5), -4)]
)
def test_any_number_of_dimensions(shape, axis):
    rows = list(shape)
    classes = rows.pop(axis)
    check(draw(shape), draw_targets(tuple(rows), classes), axis=axis, reduction="none")


def test_lists_and_scalars_are_accepted():
    loss, grad = fastce.cross_entropy_and_grad([1.0, 2.0, 0.5], 1)
    want = oracle.cross_entropy([1.0, 2.0, 0.5], 1)
    assert_loss(loss, want.loss, np.float64)
    assert_gradient(grad, want.grad, np.float64)
    assert fastce.cross_entropy([[0.0, 0.0]], [1]) == np.log(2.0)


def test_sum_of_many_rows_is_accumulated_in_float64():
    logits = np.zeros((200_000, 2), np.float16)
    logits[:, 0] = 8
    loss = fastce.cross_entropy(logits, np.ones(len(logits), np.int8), reduction="sum")
    assert_loss(
        loss, oracle.cross_entropy(logits, np.ones(200_000, int), reduction="sum").loss, "f2"
    )


def test_normalizer_makes_parts_add_up_to_the_whole():
    logits, targets, weight = (
        draw((60, 9), np.float64),
        draw_targets((60,), 9),
        draw_weight(9, "f8"),
    )
    targets[::7] = -100
    total = weight[targets[targets >= 0]].sum()
    whole, whole_grad = fastce.cross_entropy_and_grad(logits, targets, weight=weight)
    parts = [
        fastce.cross_entropy_and_grad(logits[s], targets[s], weight=weight, normalizer=total)
        for s in (slice(0, 11), slice(11, 12), slice(12, 60))
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-15)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), whole_grad, rtol=1e-14)
