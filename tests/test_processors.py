"""The same kernels for other x86-64 processors than this one: compiled anew in fresh processes."""

import hashlib
import platform

import pytest

import fastce
from tests.checks import FLOATS, draw, draw_soft, draw_targets

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="names x86-64 processors"
)

AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt,+sse3,+ssse3,+sse4.1,"
    "+sse4.2,-avx512f",
}
PLAIN = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}

DIGESTS = """
from tests.test_processors import digests
print(digests())
"""

ORACLE = """
from tests import oracle
from tests.checks import FLOATS, assert_gradient, assert_loss, draw, draw_targets
import fastce
for dtype in FLOATS:
    for classes in (3, 70, 1000):
        z, y = draw((40, classes), dtype, scale=3.0), draw_targets((40,), classes)
        want = oracle.cross_entropy(z, y, reduction="none")
        loss, grad = fastce.cross_entropy_and_grad(z, y, reduction="none")
        assert_loss(loss, want.loss, z.dtype)
        assert_gradient(grad, want.grad, z.dtype)
"""

HALVES = """
import numpy as np
import fastce
every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 1)
# logsumexp of one number is that number in float32: what has been read
read = fastce.logsumexp(every)
assert np.array_equal(read, every[:, 0].astype(np.float32), equal_nan=True)
# the gradient of a constant row is 1 / classes times the upstream gradient: what is written
rng = np.random.default_rng(0)
g = np.exp2(rng.uniform(-30, 20, 20000)).astype(np.float32)
ties = (np.arange(2048) + 0.5) * 2.0**-24
g = np.concatenate([g, ties, np.array([65519.0, 65520.0, 6e4, 0.0]), -g]).astype(np.float32)
z = np.zeros((g.size, 2), np.float16)
_, grad = fastce.cross_entropy_and_grad(
    z, np.zeros(g.size, int), reduction="none", grad_output=2.0 * g.astype(np.float64)
)
with np.errstate(over="ignore"):
    assert np.array_equal(grad[:, 1], g.astype(np.float16))
"""


def digests():
    """Of losses and gradients of every kernel family, by dtype."""
    found = []
    for dtype in FLOATS:
        digest = hashlib.sha256()
        for classes in (3, 70, 1000):
            z, y = draw((40, classes), dtype, scale=3.0), draw_targets((40,), classes)
            for labels in (y, draw_soft(z.shape, dtype)):
                loss, grad = fastce.cross_entropy_and_grad(z, labels, reduction="none")
                digest.update(loss.tobytes() + grad.tobytes())
        found.append(digest.hexdigest()[:16])
    return found


def _fuses():
    from fastce.cpu.constants import FUSED

    return FUSED


@pytest.mark.skipif(not _fuses(), reason="this processor rounds a multiply-add twice")
def test_avx2_gives_the_bits_of_this_processor(python):
    assert python(DIGESTS, **AVX2).stdout.strip() == str(digests())


@pytest.mark.parametrize("processor", [AVX2, PLAIN], ids=["AVX2", "plain x86-64"])
def test_accuracy(python, processor):
    python(ORACLE, **processor)


@pytest.mark.parametrize("processor", [{}, PLAIN], ids=["this one", "plain x86-64"])
def test_float16_is_converted_as_numpy_does(python, processor):
    python(HALVES, **processor)
