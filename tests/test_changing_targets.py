"""Section 4: nothing crashes the interpreter, not even targets that somebody else fills meanwhile.

Kernels go where a target sends them, so they must go by what has been checked.
"""

import subprocess
import sys

import numpy as np
import pytest

import fastce
from fastce import cpu, shards

PROGRAM = """
import sys, threading, time
import numpy as np
import fastce
from fastce import capi, shards

def in_c(logits, targets):
    losses, grad = np.empty(len(logits), logits.dtype), np.empty_like(logits)
    row, size = logits.strides
    call = capi.Call(
        rows=len(logits), classes=logits.shape[1], logits=logits.ctypes.data, row_stride=row,
        class_stride=size, targets=targets.ctypes.data, losses=losses.ctypes.data,
        grad=grad.ctypes.data, grad_row_stride=row, grad_class_stride=size,
    )
    capi.function(logits.dtype, grad=True)(call)

def of_slices(logits, targets):
    classes = logits.shape[1]
    total = shards.partial(logits, targets, class_offset=0, classes=classes)
    shards.grad(logits, targets, total, class_offset=0)

CALLS = {
    "loss": fastce.cross_entropy, "gradient": fastce.cross_entropy_and_grad,
    "stats": fastce.cross_entropy_stats, "curvature": fastce.gradient_hessian,
    "slices": of_slices, "C": in_c,
}
call, (rows, classes) = CALLS[sys.argv[1]], map(int, sys.argv[2].split("x"))
fastce.set_num_threads(1)
logits = np.zeros((rows, classes), np.float32)
targets = np.full(rows, 5)
bad = np.full(rows, 5)
bad[::7] = 10**11
good = targets.copy()
call(logits, targets)
done = False

def change():
    while not done:
        for _ in range(64):
            np.copyto(targets, bad)
            np.copyto(targets, good)
        time.sleep(0)

thread = threading.Thread(target=change)
thread.start()
end = time.monotonic() + 1.0
while time.monotonic() < end:
    try:
        call(logits, targets)
    except IndexError:
        pass
done = True
thread.join()
print("alive")
"""


@pytest.mark.parametrize(
    "call, shape",
    [
        ("loss", "512x10"), ("gradient", "20000x10"), ("gradient", "20000x70"),
        ("stats", "20000x10"), ("curvature", "20000x10"), ("slices", "20000x10"), ("C", "20000x10"),
    ],
)  # fmt: skip
def test_another_thread_writes_to_the_targets(call, shape):
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, call, shape], capture_output=True, text=True, timeout=120
    )
    assert (child.returncode, child.stdout) == (0, "alive\n"), child.stderr


LOGITS = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
TARGETS = np.arange(300) % 70


@pytest.mark.parametrize(
    "name, function",
    [
        ("cross_entropy", lambda z, y: fastce.cross_entropy_and_grad(z, y, label_smoothing=0.1)),
        ("cross_entropy", lambda z, y: fastce.cross_entropy_stats(z, y)),
        ("gradient_hessian", lambda z, y: fastce.gradient_hessian(z, y)),
    ],
    ids=["gradient", "stats", "curvature"],
)
def test_a_call_goes_by_what_was_checked(name, function, monkeypatch):
    """Where targets change between the check and the kernel, every result is that of the check."""
    want = function(LOGITS, TARGETS)
    targets = TARGETS.copy()
    kernels = getattr(cpu.calls, name)

    def later(*args, **options):
        targets[:] = 10**11
        return kernels(*args, **options)

    monkeypatch.setattr(cpu.calls, name, later)
    for got, right in zip(function(LOGITS, targets), want, strict=True):
        assert np.array_equal(got, right)
    assert targets[0] == 10**11


def test_what_is_done_later_goes_by_its_own_check():
    """The gradient of slices is a call of its own: it checks its targets anew."""
    targets = TARGETS.copy()
    total = shards.partial(LOGITS, targets, class_offset=0, classes=70)
    targets[7] = 70
    with pytest.raises(IndexError, match=r"got 70 at index \(7,\)"):
        shards.grad(LOGITS, targets, total, class_offset=0)
