"""What test_mpi runs under mpiexec: every rank checks its results against those of one process."""

import numpy as np
import pytest
from mpi4py import MPI

import fastce
from fastce import _linear_slice, mpi
from tests.checks import draw, draw_soft, draw_targets, draw_weight

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
ROWS, CLASSES = 37, 23


def own(count, parts=SIZE, number=RANK):
    """The slice of a rank; sizes differ, and there are fewer rows than ranks in places."""
    return slice(count * number // parts, count * (number + 1) // parts)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def assert_same_everywhere(*arrays, comm=COMM):
    found = comm.allgather([np.asarray(a).tobytes() for a in arrays])
    assert all(other == found[0] for other in found)


OPTIONS = [
    {},
    {"label_smoothing": 0.1, "ignore_index": 3, "z_loss": 0.01, "weight": draw_weight(CLASSES)},
    {"reduction": "sum"},
    {"reduction": "none", "grad_output": draw((ROWS,), seed=4)},
    {"normalizer": 11.0},
]


def classes_divided():
    part = own(CLASSES)
    logits = draw((ROWS, CLASSES), scale=3.0)
    for options in OPTIONS:
        for soft in (False, True)[: 2 if "reduction" not in options else 1]:
            targets = draw_soft((ROWS, CLASSES)) if soft else draw_targets((ROWS,), CLASSES)
            given = dict(options)
            if soft and "ignore_index" in given:
                del given["ignore_index"]
            loss, grad = fastce.cross_entropy_and_grad(logits, targets, **given)
            if "weight" in given:
                given["weight"] = given["weight"][part]
            given |= {"class_offset": part.start, "classes": CLASSES}
            mine = logits[:, part].copy()
            labels = np.ascontiguousarray(targets[:, part]) if soft else targets
            got, found = mpi.cross_entropy_and_grad(mine, labels, **given, out=mine)
            assert found is mine
            assert_close(got, loss)
            assert_close(found, grad[:, part])
            assert_same_everywhere(got)
            given.pop("grad_output", None)
            again = mpi.cross_entropy(logits[:, part], labels, **given)
            assert np.asarray(again).tobytes() == np.asarray(got).tobytes()


def stats_of_divided_classes():
    part = own(CLASSES)
    logits, targets = draw((ROWS, CLASSES), scale=5.0), draw_targets((ROWS,), CLASSES)
    targets[3] = -100
    weight = draw_weight(CLASSES)
    want = fastce.cross_entropy_stats(logits, targets, weight=weight)
    got = mpi.cross_entropy_stats(
        logits[:, part], targets, class_offset=part.start, classes=CLASSES, weight=weight[part]
    )
    for mine, whole in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-6)
    assert_same_everywhere(*got)


def order_of_ranks_changes_no_bit():
    logits, targets = draw((ROWS, CLASSES), np.float64, scale=9.0), draw_targets((ROWS,), CLASSES)
    part = own(CLASSES)
    seen = set()
    for key in (RANK, -RANK, RANK * 3 % 7):
        comm = COMM.Split(0, key)
        loss = mpi.cross_entropy(
            logits[:, part], targets, class_offset=part.start, classes=CLASSES, comm=comm,
            reduction="none", label_smoothing=0.1,
        )  # fmt: skip
        seen.add(loss.tobytes())
        comm.Free()
    assert len(seen) == 1


def linear_layer_divided():
    part = own(CLASSES)
    x, weight, bias = draw((ROWS, 5)), draw((CLASSES, 5), seed=1), draw((CLASSES,), seed=2)
    targets = draw_targets((ROWS,), CLASSES)
    for memory in (_linear_slice.MEMORY, 4 * 10 * (part.stop - part.start)):
        _linear_slice.MEMORY = memory  # all rows at a time, or ten
        for options in ({}, {"z_loss": 0.1, "class_weight": draw_weight(CLASSES)}, OPTIONS[3]):
            want = fastce.linear_cross_entropy_and_grad(x, weight, targets, bias=bias, **options)
            given = dict(options)
            if "class_weight" in given:
                given["class_weight"] = given["class_weight"][part]
            loss, (dx, dweight, dbias) = mpi.linear_cross_entropy_and_grad(
                x, weight[part], targets, bias=bias[part], class_offset=part.start,
                classes=CLASSES, **given,
            )  # fmt: skip
            assert_close(loss, want[0])
            for got, whole in ((dx, want[1][0]), (dweight, want[1][1][part])):
                np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(dbias, want[1][2][part], rtol=1e-4, atol=1e-6)
            assert_same_everywhere(loss, dx)
    _linear_slice.MEMORY = 64 << 20


def rows_divided():
    for rows in (ROWS, 3):  # three rows: more ranks than rows
        logits, targets = draw((rows, CLASSES)), draw_targets((rows,), CLASSES)
        targets[1] = -100
        part = own(rows)
        options = {"weight": draw_weight(CLASSES), "z_loss": 0.1, "label_smoothing": 0.1}
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, **options)
        mine = logits[part].copy()
        got, found = mpi.data_parallel_cross_entropy_and_grad(
            mine, targets[part], **options, out=mine
        )
        assert_close(got, loss)
        assert_close(found, grad[part])
        assert_same_everywhere(got)


def rows_and_classes_divided():
    if SIZE != 4:
        return
    along, across = COMM.Split(RANK // 2, RANK), COMM.Split(RANK % 2, RANK)
    rows, part = own(ROWS, 2, RANK // 2), own(CLASSES, 2, RANK % 2)
    logits, targets = draw((ROWS, CLASSES)), draw_targets((ROWS,), CLASSES)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets)
    weight = mpi.total_weight(targets[rows], classes=CLASSES, comm=across)
    got, found = mpi.cross_entropy_and_grad(
        logits[rows, part], targets[rows], class_offset=part.start, classes=CLASSES, comm=along,
        normalizer=weight,
    )  # fmt: skip
    assert_close(across.allreduce(got), loss)
    assert_close(found, grad[rows, part])


def bad_input_raises_everywhere(bad):
    """Bad on one rank; each call is the mistake of that rank, or what the others do meanwhile."""
    part = own(CLASSES)
    mine = bad == RANK
    logits, targets = draw((ROWS, CLASSES))[:, part].copy(), draw_targets((ROWS,), CLASSES)
    before = logits.copy()
    wide = draw((ROWS, 3), seed=9)
    own_weight = np.ones((part.stop - part.start, 3))
    given = {"class_offset": part.start, "classes": CLASSES}
    beyond = np.where(np.arange(ROWS) == 5, CLASSES, targets) if mine else targets
    frozen = np.empty_like(logits)
    frozen.flags.writeable = not mine
    fewer = slice(0, ROWS - mine)

    def grad(z=logits, y=targets, **changed):
        return mpi.cross_entropy_and_grad(z, y, **{"out": logits, **given, **changed})

    def rows_divided(y):
        return mpi.data_parallel_cross_entropy_and_grad(wide, y)

    def linear(y):
        return mpi.linear_cross_entropy_and_grad(wide, own_weight, y, **given)

    def weigh(count):
        return mpi.total_weight(targets, classes=CLASSES, weight=np.ones(count))

    calls = [
        (IndexError, f"got {CLASSES} at index", lambda: grad(y=beyond)),
        (
            TypeError,
            "targets: expected int",
            lambda: grad(y=targets.astype(float if mine else int)),
        ),
        (ValueError, "read-only", lambda: grad(out=frozen)),
        (ValueError, "label_smoothing: expected", lambda: grad(label_smoothing=2.0 * mine)),
        (ValueError, "class_offset", lambda: grad(class_offset=CLASSES if mine else part.start)),
        (TypeError, "grad_output", lambda: grad(grad_output="x" if mine else 1.0)),
        (ValueError, "z_loss", lambda: grad(z_loss=np.inf if mine else 0.0)),
        (IndexError, "targets", lambda: rows_divided(targets % (24 if mine else 3))),
        (IndexError, "targets", lambda: linear(beyond)),
        (ValueError, "weight: expected", lambda: weigh(2 if mine else CLASSES)),
        (ValueError, f"of all {CLASSES + 1} classes", lambda: grad(classes=CLASSES + 1)),
    ]
    if SIZE > 1:
        differ = "same on every rank"
        calls += [
            (ValueError, differ, lambda: grad(logits[fewer], targets[fewer], out=None)),
            (ValueError, differ, lambda: grad(label_smoothing=0.1 * mine)),
            (ValueError, differ, lambda: grad(z_loss=0.1 * mine)),
            (ValueError, differ, lambda: grad(reduction="sum" if mine else "mean")),
            (ValueError, differ, lambda: grad(logits.astype("f8" if mine else "f4"), out=None)),
        ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()
        assert np.array_equal(logits, before)
    loss, _ = grad(out=None)
    assert_close(loss, fastce.cross_entropy(draw((ROWS, CLASSES)), targets))


if __name__ == "__main__":
    classes_divided()
    stats_of_divided_classes()
    order_of_ranks_changes_no_bit()
    linear_layer_divided()
    rows_divided()
    rows_and_classes_divided()
    for bad in {0, SIZE - 1}:
        bad_input_raises_everywhere(bad)
    if COMM.gather(True) is not None:
        print(f"{SIZE} ranks: all well")
