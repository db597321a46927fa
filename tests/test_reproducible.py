"""Section 3: the same bits whatever the threads, the place of the row, the batch and the run."""

import numpy as np
import pytest

import fastce
from tests.checks import FLOATS, draw, draw_soft, draw_targets, draw_weight, same_bits

# short rows, rows in cache, few long rows (one may be split over threads), strided class axis
REGIMES = {
    "short": ((4099, 10), -1),
    "narrow": ((50_001, 3), -1),
    "long": ((67, 4097), -1),
    "few very long": ((3, 300_007), -1),
    "strided": ((5, 33, 301), 1),
    "outer": ((1000, 517), 0),
}
REDUCTIONS = ["none", "mean"]


@pytest.fixture(params=REGIMES)
def problem(request):
    shape, axis = REGIMES[request.param]
    rows = tuple(np.delete(shape, axis))
    targets = draw_targets(rows, shape[axis])
    targets.flat[:: max(2, targets.size // 5)] = -100
    return draw(shape, scale=2.0), targets, axis


def everything(logits, targets, axis, **options):
    """Every result of every reduction, by name."""
    results = {}
    for reduction in REDUCTIONS:
        both = fastce.cross_entropy_and_grad(
            logits, targets, axis=axis, reduction=reduction, **options
        )
        results[f"{reduction} loss with gradient"], results[f"{reduction} gradient"] = both
        results[f"{reduction} loss"] = fastce.cross_entropy(
            logits, targets, axis=axis, reduction=reduction, **options
        )
    stats = fastce.cross_entropy_stats(logits, targets, axis=axis)
    results |= {f"stats {name}": np.asarray(value) for name, value in stats._asdict().items()}
    results["lse"] = fastce.logsumexp(logits, axis=axis)
    results["softmax"] = fastce.softmax(logits, axis=axis)
    results["log_softmax"] = fastce.log_softmax(logits, axis=axis)
    return results


def assert_same(first, second):
    different = [name for name in first if not same_bits(first[name], second[name])]
    assert not different


def test_number_of_threads(problem):
    results = []
    for threads in (1, 2, 3):
        with fastce.num_threads(threads):
            results.append(everything(*problem))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("shape", [(50_001, 3), (67, 4097)])
def test_number_of_threads_and_the_order_of_the_sum(shape):
    """float64, where no final rounding hides a different order of additions."""
    logits, targets = draw(shape, np.float64), draw_targets(shape[:1], shape[1])
    losses = set()
    for threads in (1, 2, 3, 7):
        with fastce.num_threads(threads):
            for reduction in ("sum", "mean"):
                losses.add((reduction, fastce.cross_entropy(logits, targets, reduction=reduction)))
    assert len(losses) == 2


def test_run_to_run(problem):
    with fastce.num_threads(2):
        first = everything(*problem)
        for _ in range(3):
            assert_same(first, everything(*problem))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 4097])
def test_the_place_of_a_row_and_the_size_of_the_batch(dtype, classes):
    count = 41
    logits, targets = draw((count, classes), dtype, scale=3), draw_targets((count,), classes)

    def rows(z, y):
        return fastce.cross_entropy_and_grad(z, y, reduction="none")

    loss, grad = rows(logits, targets)
    order = np.random.default_rng(8).permutation(count)
    for index in (order, np.arange(count)[::-1], order[:7], order[:1], np.repeat(order, 30)):
        part_loss, part_grad = rows(logits[index], targets[index])
        assert same_bits(part_loss, loss[index])
        assert same_bits(part_grad, grad[index])


@pytest.mark.parametrize("inner", [1, 2, 7, 64, 301])
@pytest.mark.parametrize("classes", [33, 70])
def test_the_place_of_a_strided_row(inner, classes):
    """With the class axis in the middle, what lies beside a row does not change its bits.

    float64, where no final rounding hides a different order of additions.
    """
    logits = draw((4, classes, 301), np.float64, scale=3)
    targets = draw_targets((4, 301), classes)
    options = {"axis": 1, "reduction": "none"}
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, **options)
    part = np.ascontiguousarray(logits[1:, :, 301 - inner :])
    part_loss, part_grad = fastce.cross_entropy_and_grad(
        part, targets[1:, 301 - inner :], **options
    )
    assert same_bits(part_loss, loss[1:, 301 - inner :])
    assert same_bits(part_grad, grad[1:, :, 301 - inner :])


@pytest.mark.parametrize("classes", [10, 70, 1000])
@pytest.mark.parametrize("lying", ["C", "F", "transposed", "transposed F", "inner"])
def test_a_row_that_is_a_view_of_a_batch(lying, classes):
    """A row alone has the strides of its batch, whichever they are, and so its bits."""
    logits = draw((40, classes), np.float64, scale=3)
    axis = -1 if lying in ("C", "F") else 0 if "transposed" in lying else 1
    if lying.endswith("F"):
        logits = np.asfortranarray(logits)
    if axis == 0:
        logits = logits.T
    if axis == 1:
        logits = np.ascontiguousarray(logits.reshape(4, 10, classes).swapaxes(1, 2))
    targets = draw_targets(np.delete(logits.shape, axis), classes)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, axis=axis, reduction="none")
    stats = fastce.cross_entropy_stats(logits, targets, axis=axis)
    for index in np.ndindex(targets.shape):
        at = tuple(slice(i, i + 1) for i in index)
        inside = (*at[:axis], slice(None), *at[axis:]) if axis >= 0 else (*at, slice(None))
        of_row = {"axis": axis, "reduction": "none"}
        one_loss, one_grad = fastce.cross_entropy_and_grad(logits[inside], targets[at], **of_row)
        assert same_bits(one_loss, loss[at])
        assert same_bits(one_grad, grad[inside])
        entropy = fastce.cross_entropy_stats(logits[inside], targets[at], axis=axis).entropy
        assert same_bits(entropy, stats.entropy[at])
        assert same_bits(fastce.softmax(logits[inside], axis=axis),
                         fastce.softmax(logits, axis=axis)[inside])  # fmt: skip


def _places(shape):
    """Arrays of a shape that lie in memory in every way."""
    twice = tuple(2 * size for size in shape)
    yield np.empty(shape)
    yield np.asfortranarray(np.empty(shape))
    yield np.empty(twice)[tuple(slice(0, size, 2) for size in twice)]
    yield np.empty(twice)[tuple(slice(0, size) for size in shape)]
    yield np.moveaxis(np.empty((shape[-1], *shape[:-1])), 0, -1)


@pytest.mark.parametrize(
    "shape, axis",
    [((7, 11, 130), -1), ((7, 11, 13), -1), ((5, 13, 40, 7), 1), ((5, 130, 3, 7), 1),
     ((3, 4, 5, 6, 70), -1)],
)  # fmt: skip
def test_where_the_gradient_goes(shape, axis):
    """float64, where no final rounding hides a different order of additions."""
    logits, soft = draw(shape, np.float64, scale=3), draw_soft(shape, np.float64)
    targets = draw_targets(np.delete(shape, axis), shape[axis])
    for z in (logits, np.asfortranarray(logits), np.repeat(logits, 2, axis=0)[::2]):
        for labels in (targets, soft):
            want = fastce.cross_entropy(z, labels, axis=axis)
            first = fastce.cross_entropy_and_grad(z, labels, axis=axis)[1]
            for out in _places(shape):
                loss, grad = fastce.cross_entropy_and_grad(z, labels, axis=axis, out=out)
                assert same_bits(loss, want)
                assert same_bits(grad, first)
        want, first = fastce.binary_cross_entropy(z, soft), None
        for out in _places(shape):
            loss, grad = fastce.binary_cross_entropy_and_grad(z, soft, out=out)
            assert same_bits(loss, want)
            first = grad.copy() if first is None else first
            assert same_bits(grad, first)


def test_neighbours_do_not_matter():
    """A row of NaN, of infinities or of huge numbers leaves the bits of all other rows alone."""
    for shape in ((64, 10), (5, 3000)):
        logits, targets = draw(shape), draw_targets(shape[:1], shape[1])
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
        for poison in (np.nan, np.inf, -np.inf, 3e38, 0.0):
            changed = logits.copy()
            changed[2] = poison
            got_loss, got_grad = fastce.cross_entropy_and_grad(changed, targets, reduction="none")
            keep = np.arange(len(logits)) != 2
            assert same_bits(got_loss[keep], loss[keep])
            assert same_bits(got_grad[keep], grad[keep])


@pytest.mark.parametrize(
    "options",
    [
        {"weight": draw_weight(33), "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0},
        {"label_smoothing": 0.1},
        {"weight": draw_weight(33)},
    ],
    ids=["all", "smoothing", "weight"],
)
def test_options_are_reproducible_too(options):
    logits, hard, soft = draw((3001, 33)), draw_targets((3001,), 33), draw_soft((3001, 33))
    order = np.random.default_rng(8).permutation(3001)
    for targets in (hard, soft):
        by_threads = []
        for threads in (1, 2):
            with fastce.num_threads(threads):
                by_threads.append(everything(logits, targets, -1, **options))
        assert_same(*by_threads)
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none", **options)
        permuted = fastce.cross_entropy_and_grad(
            logits[order], targets[order], reduction="none", **options
        )
        assert same_bits(permuted[0], loss[order])
        assert same_bits(permuted[1], grad[order])


def test_other_functions_with_any_number_of_threads():
    logits, v = draw((30_011, 17), np.float64), draw((30_011, 17), np.float64, seed=2)
    targets, labels = draw_targets((30_011,), 17), (draw((30_011, 17), seed=3) > 0).astype("f8")
    results = []
    for threads in (1, 2):
        with fastce.num_threads(threads):
            results.append(
                [
                    *fastce.nll_loss_and_grad(logits, targets),
                    *fastce.binary_cross_entropy_and_grad(logits, labels),
                    *fastce.gradient_hessian(logits, targets),
                    fastce.hessian_vector_product(logits, v),
                    fastce.logsumexp(logits, axis=None),
                    fastce.logsumexp(logits, axis=0),
                ]
            )
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_process_to_process(python):
    program = """
import numpy as np, fastce, hashlib
z = np.random.default_rng(0).normal(size=(3000, 101)).astype("f4")
loss, grad = fastce.cross_entropy_and_grad(z, np.arange(3000) % 101)
print(hashlib.sha256(loss.tobytes() + grad.tobytes()).hexdigest())
"""
    digests = {python(program, FASTCE_NUM_THREADS=n).stdout for n in ("1", "2", "2")}
    assert len(digests) == 1
