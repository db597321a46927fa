"""The short way of small plain calls: the results of the long way, to the last bit."""

import numpy as np
import pytest

import fastce
from fastce import _small, losses
from tests.checks import draw, draw_targets, same_bits

# An axis that is no plain int is left to the long way.
LONG = {"axis": np.int64(-1)}

SHAPES = [(32, 10), (1, 1), (3, 2), (33, 63), (5, 64), (7, 1000), (1, 50257), (13000, 10)]


def arrays(shape, dtype, kind):
    """Logits and targets, some of them special."""
    z, y = draw(shape, dtype), draw_targets(shape[:1], shape[1])
    if kind == "special":
        z[::3] *= 1e30 if dtype == np.float32 else 1e300
        z[1::4, ::2] = -np.inf
        z[2::7, 0] = np.nan
    if kind in ("ignored", "special"):
        y[::2] = -100
    if kind == "all ignored":
        y[:] = -100
    return z, y


@pytest.mark.parametrize("kind", ["plain", "ignored", "all ignored", "special"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_the_long_way(shape, dtype, reduction, kind, monkeypatch):
    z, y = arrays(shape, dtype, kind)
    given = {"reduction": reduction}
    want, want_grad = fastce.cross_entropy_and_grad(z, y, **given, **LONG)
    # Now the long way is blocked.
    monkeypatch.setattr(losses, "Call", None)
    assert same_bits(fastce.cross_entropy(z, y, **given), want)
    for out in (None, np.full_like(z, 7), z):
        loss, grad = fastce.cross_entropy_and_grad(z, y, **given, out=out)
        assert type(loss) is type(want)
        assert same_bits(loss, want)
        assert same_bits(grad, want_grad)
        assert out is None or grad is out


def test_labels_to_ignore_may_be_classes(monkeypatch):
    z, y = arrays((40, 5), np.float64, "plain")
    want = fastce.cross_entropy(z, y, ignore_index=3, **LONG)
    monkeypatch.setattr(losses, "Call", None)
    assert same_bits(fastce.cross_entropy(z, y, ignore_index=3), want)


def read_only(array):
    array.flags.writeable = False
    return array


Z, Y = arrays((6, 4), np.float64, "plain")
MEMORY = np.zeros(64)
OTHERS = {
    "a list": lambda: ((Z.tolist(), Y), {}),
    "labels of 32 bits": lambda: ((Z, Y.astype(np.int32)), {}),
    "read-only": lambda: ((read_only(Z.copy()), read_only(Y.copy())), {}),
    "not side by side": lambda: ((np.repeat(Z, 2, axis=1)[:, ::2], np.repeat(Y, 2)[::2]), {}),
    "the other order of bytes": lambda: ((Z.astype(">f8"), Y.astype(">i8")), {}),
    "a subclass": lambda: ((Z.view(np.recarray), Y), {}),
    "column order": lambda: ((np.asfortranarray(Z), Y), {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_plain_goes_the_long_way(kind):
    given, options = OTHERS[kind]()
    want, want_grad = fastce.cross_entropy_and_grad(Z, Y, **LONG)
    loss, grad = fastce.cross_entropy_and_grad(*given, **options)
    assert same_bits(loss, want)
    np.testing.assert_array_equal(grad, want_grad)
    assert same_bits(fastce.cross_entropy(*given, **options), want)


OPTIONS = [
    {"weight": np.arange(1.0, 5.0)}, {"normalizer": 7.0}, {"label_smoothing": 0.2},
    {"z_loss": 0.1}, {"softcap": 3.0}, {"reduction": "none"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_go_the_long_way(options):
    want, want_grad = fastce.cross_entropy_and_grad(Z, Y, **options, **LONG)
    loss, grad = fastce.cross_entropy_and_grad(Z, Y, **options)
    assert not np.array_equal(loss, fastce.cross_entropy(Z, Y))
    assert same_bits(loss, want)
    assert same_bits(grad, want_grad)
    assert same_bits(fastce.cross_entropy(Z, Y, **options), want)


@pytest.mark.parametrize("shape", [(13108, 10), (0, 10)])
def test_large_and_empty_calls_go_the_long_way(shape, monkeypatch):
    z, y = np.zeros(shape, np.float32), np.zeros(shape[0], np.int64)
    monkeypatch.setattr(_small, "_loss", None)
    assert fastce.cross_entropy_and_grad(z, y)[1].shape == shape


ERRORS = {
    "a bad target": (IndexError, lambda: (Z, Y + 4, np.zeros_like(Z))),
    "a shifted view of the logits": (
        ValueError, lambda: (MEMORY[:24].reshape(6, 4), Y, MEMORY[1:25].reshape(6, 4)),
    ),
    "the memory of the targets": (
        ValueError, lambda: (Z, MEMORY[:6].view(np.int64), MEMORY[5:29].reshape(6, 4)),
    ),
    "another dtype": (ValueError, lambda: (Z, Y, np.zeros((6, 4), np.float32))),
    "another shape": (ValueError, lambda: (Z, Y, np.zeros((4, 6)))),
    "read-only": (ValueError, lambda: (Z, Y, read_only(np.zeros_like(Z)))),
    "a list": (TypeError, lambda: (Z, Y, Z.tolist())),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_those_of_the_long_way_and_nothing_is_written(kind):
    error, make = ERRORS[kind]
    messages = []
    for more in ({}, LONG):
        z, y, out = make()
        before = MEMORY.copy(), np.array(out)
        with pytest.raises(error) as caught:
            fastce.cross_entropy_and_grad(z, y, out=out, **more)
        messages.append(str(caught.value))
        assert same_bits(MEMORY, before[0])
        np.testing.assert_array_equal(out, before[1])
    assert messages[0] == messages[1]


def test_targets_that_lie_apart_are_not_covered_by_the_gradient():
    rows = 100
    z, y = arrays((rows, 4), np.float64, "plain")
    memory = np.zeros(8 * rows)
    apart = memory.view(np.int64)[::8]
    apart[:] = y
    before = memory.copy()
    with pytest.raises(ValueError, match="apart from targets"):
        fastce.cross_entropy_and_grad(z, apart, out=memory[rows : 5 * rows].reshape(rows, 4))
    assert same_bits(memory, before)


def test_adjacent_memory_is_no_overlap(monkeypatch):
    """The gradient right behind what is read, and right before it."""
    memory = np.zeros(6 + 24 + 24)
    want = fastce.cross_entropy_and_grad(Z, Y, **LONG)[1]
    monkeypatch.setattr(losses, "Call", None)
    for order in ((0, 6, 30), (48, 24, 0), (24, 30, 0)):
        y, z, out = (memory[k : k + n] for k, n in zip(order, (6, 24, 24), strict=True))
        y.view(np.int64)[:] = Y
        z[:] = Z.ravel()
        fastce.cross_entropy_and_grad(z.reshape(6, 4), y.view(np.int64), out=out.reshape(6, 4))
        assert same_bits(out.reshape(6, 4), want)
