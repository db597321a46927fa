"""Section 3: the same bits whatever mode of floating-point arithmetic the caller has set, which is
the same after the call: flushing to zero, taking subnormal numbers for zero, rounding otherwise."""

import platform

import numpy as np
import pytest

import fastce
from fastce import capi
from fastce.cpu import caller
from tests.checks import draw, draw_soft, draw_targets
from tests.public_calls import public_functions

X86 = platform.machine() in ("x86_64", "AMD64", "i686")
MODES = (
    {"flush": 0x9FC0, "down": 0x3F80, "up": 0x5F80, "to zero": 0x7F80}
    if X86
    else {"flush": 1 << 24, "down": 2 << 22, "up": 1 << 22, "to zero": 3 << 22}
)
CORE = [p for p in public_functions() if p.id.startswith("fastce.")]
CORE = [p for p in CORE if "dask" not in p.id and "torch" not in p.id and "jax" not in p.id]


class Mode:
    """A mode for a block; it must be the same at its end."""

    def __init__(self, name):
        self.mode = MODES[name]

    def __enter__(self):
        self.before = caller.mode()
        caller.set_mode(self.mode)

    def __exit__(self, *_):
        after = caller.mode()
        caller.set_mode(self.before)
        # the six flags of x86 tell what has happened since, as in Python's own arithmetic
        assert (after & ~0x3F if X86 else after) == self.mode


def test_these_modes_make_a_difference():
    """To arithmetic that nobody takes care of, here NumPy's."""
    tiny, third = np.array([2.0**-1070]), np.array([1.0, -1.0])
    found = {}
    for name in MODES:
        with Mode(name):
            found[name] = ((tiny * 4.0).tobytes(), (third / 3.0).tobytes())
    assert len(set(found.values())) == len(MODES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("public", CORE)
def test_every_function_computes_in_the_default_mode(public, mode):
    want = [a.tobytes() for a in public.results()]
    with Mode(mode):
        got = public.results()
    assert [a.tobytes() for a in got] == want


# Confident rows, whose losses and gradients are subnormal numbers, and others.
def _confident(shape, dtype):
    z = draw(shape, dtype, scale=3.0)
    z[::2, 0] += 95.0 if z.dtype == np.float32 else 730.0
    return z, np.zeros(shape[0], int)


SHAPES = {"few": (32, 10), "row": (5, 400), "many of few": (40000, 10), "many": (2000, 150)}
WAYS = {
    "plain": {},
    "none": {"reduction": "none"},
    "options": {"z_loss": 1e-3, "label_smoothing": 0.1, "normalizer": 3.0, "softcap": 200.0},
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_and_gradients_have_the_same_bits(dtype, shape, way, mode, threads):
    z, y = _confident(SHAPES[shape], dtype)
    want = fastce.cross_entropy_and_grad(z, y, **WAYS[way])
    fastce.set_num_threads(threads)
    for _ in range(3):
        with Mode(mode):
            got = (
                *fastce.cross_entropy_and_grad(z, y, **WAYS[way]),
                fastce.cross_entropy(z, y, **WAYS[way]),
            )
        for a, b in zip(got, (*want, want[0]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_helpers_are_born_in_a_mode_and_compute_in_the_default_one(mode, python):
    """A thread inherits the mode of the one that has started it."""
    python(f"""
import numpy as np, fastce
from fastce.cpu import caller
z = np.zeros((4000, 150), "f4"); z[:, 0] = 95.0; y = np.zeros(4000, int)
with fastce.num_threads(1):
    want = fastce.cross_entropy_and_grad(z, y, reduction="sum")
fastce.set_num_threads(4)
before = caller.mode()
caller.set_mode({MODES[mode]})
fastce.cross_entropy_and_grad(z, y)
caller.set_mode(before)
for _ in range(5):
    got = fastce.cross_entropy_and_grad(z, y, reduction="sum")
    assert got[0].tobytes() == want[0].tobytes() and np.array_equal(got[1], want[1])
assert 0 < want[1][0, 1] < 1e-38
""")


@pytest.mark.parametrize("mode", MODES)
def test_an_error_goes_back_to_the_mode_of_the_caller(mode):
    z = draw((200, 10))
    wrong = np.full(200, 10)
    for function in (fastce.cross_entropy, fastce.nll_loss, fastce.cross_entropy_stats):
        with Mode(mode), pytest.raises(IndexError):
            function(z, wrong)
    with Mode(mode), pytest.raises(ValueError, match="targets"):
        fastce.binary_cross_entropy(z, z[0])


def test_soft_targets_and_weights_too():
    z, h = draw((3000, 70), scale=20.0), draw_soft((3000, 70))
    weight = np.linspace(0.1, 1.0, 70)
    want = fastce.cross_entropy_and_grad(z, h, weight=weight, grad_output=1e-30)
    hard = fastce.cross_entropy(z, draw_targets((3000,), 70), weight=weight)
    for mode in MODES:
        with Mode(mode):
            got = fastce.cross_entropy_and_grad(z, h, weight=weight, grad_output=1e-30)
            again = fastce.cross_entropy(z, draw_targets((3000,), 70), weight=weight)
        assert got[0].tobytes() == want[0].tobytes()
        assert got[1].tobytes() == want[1].tobytes()
        assert again.tobytes() == hard.tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_c_functions_too(mode):
    z, y = _confident((40, 12), "float32")
    found = []
    for name in (None, mode):
        losses, grads = np.zeros(40, "f4"), np.zeros_like(z)
        call = capi.Call(
            logits=z.ctypes.data, rows=40, classes=12, row_stride=48, class_stride=4,
            targets=y.ctypes.data, losses=losses.ctypes.data, grad=grads.ctypes.data,
            grad_row_stride=48, grad_class_stride=4,
        )  # fmt: skip
        function = capi.function("float32", grad=True)
        if name is None:
            assert function(call) == 0
        else:
            with Mode(name):
                assert function(call) == 0
        found.append((losses.tobytes(), grads.tobytes()))
    assert found[0] == found[1]
