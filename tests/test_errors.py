"""Section 4: a wrong argument raises the promised type, nothing is written, and the message says
what was expected, what came and where."""

import re

import numpy as np
import pytest

import fastce
from tests.checks import draw, same_bits

Z = draw((4, 10))
Y = np.array([0, 3, 9, 1])
H = np.full((4, 10), 0.1, np.float32)
V = draw((4, 10), seed=3)
W = np.ones(10, np.float32)
READ_ONLY = np.zeros((4, 10), np.float32)
READ_ONLY.flags.writeable = False


def replaced(index, value, dtype=np.int64):
    targets = Y.astype(dtype)
    targets[index] = value
    return targets


# arguments, options, the type of the error, the argument it names, what it must say
LOSS_ERRORS = [
    # targets
    ([Z, replaced(3, 12)], {}, IndexError, "targets", ["[0, 10)", "12", "(3,)"]),
    ([Z, replaced(2, 10)], {}, IndexError, "targets", ["[0, 10)", "10", "(2,)"]),
    ([Z, replaced(1, -1)], {}, IndexError, "targets", ["[0, 10)", "-1", "(1,)"]),
    ([Z, replaced(slice(2, 4), -7)], {}, IndexError, "targets", ["[0, 10)", "-7", "(2,)"]),
    ([Z, replaced(1, 255, np.uint8)], {}, IndexError, "targets", ["[0, 10)", "255", "(1,)"]),
    ([Z, replaced(1, -128, np.int8)], {}, IndexError, "targets", ["[0, 10)", "-128", "(1,)"]),
    ([Z, replaced(0, 2**63, np.uint64)], {},
     IndexError, "targets", ["9223372036854775808", "(0,)"]),
    ([Z, replaced(0, 2**64 - 100, np.uint64)], {}, IndexError, "targets", ["18446744073709551516"]),
    ([Z, replaced([1, 3], [12, 2**64 - 1], np.uint64)], {},
     IndexError, "targets", ["[0, 10)", "12", "(1,)"]),
    ([Z, replaced(0, -100)], {"ignore_index": 5}, IndexError, "targets", ["-100", "(0,)"]),
    ([Z[None], replaced(3, 99)[None]], {}, IndexError, "targets", ["99", "(0, 3)"]),
    ([Z.T, replaced(3, 12)], {"axis": 0}, IndexError, "targets", ["[0, 10)", "12", "(3,)"]),
    ([Z, Y[:3]], {}, ValueError, "targets", ["(4,)", "(3,)"]),
    ([Z, Y[:, None]], {}, ValueError, "targets", ["(4,)", "(4, 1)"]),
    ([Z, 3], {}, ValueError, "targets", ["(4,)", "()"]),
    ([Z, H[:3]], {}, ValueError, "targets", ["(4, 10)", "(3, 10)"]),
    ([Z, Y.astype(bool)], {}, TypeError, "targets", ["bool"]),
    ([Z, Y.astype(np.float32)], {}, (TypeError, ValueError), "targets", ["float32|(4,)"]),
    ([Z, Y.astype(complex)], {}, TypeError, "targets", ["complex128"]),
    ([Z, Y.astype(str)], {}, TypeError, "targets", ["<U|str"]),
    ([Z, Y.astype(object)], {}, TypeError, "targets", ["object"]),
    # logits
    ([Z.astype(int), Y], {}, TypeError, "logits", ["int64"]),
    ([Z > 0, Y], {}, TypeError, "logits", ["bool"]),
    ([Z.astype(complex), Y], {}, TypeError, "logits", ["complex128"]),
    ([Z.astype(object), Y], {}, TypeError, "logits", ["object"]),
    ([Z.astype(np.longdouble), Y], {}, TypeError, "logits", ["longdouble|float128"]),
    ([np.float32(1), 0], {}, ValueError, "logits", ["single number"]),
    ([Z, Y], {"axis": 2}, (ValueError, IndexError), "axis", ["2"]),
    ([Z, Y], {"axis": -3}, (ValueError, IndexError), "axis", ["-3"]),
    ([Z, Y], {"axis": 1.0}, TypeError, "axis", ["float|1.0"]),
    # weight
    ([Z, Y], {"weight": W[:9]}, ValueError, "weight", ["(10,)", "(9,)"]),
    ([Z, Y], {"weight": np.ones((4, 10))}, ValueError, "weight", ["(10,)", "(4, 10)"]),
    ([Z, Y], {"weight": W.astype(complex)}, TypeError, "weight", ["complex128"]),
    ([Z, Y], {"weight": ["a"] * 10}, TypeError, "weight", ["<U|str"]),
    # numbers
    ([Z, Y], {"label_smoothing": -0.1}, ValueError, "label_smoothing", ["[0, 1]", "-0.1"]),
    ([Z, Y], {"label_smoothing": 1.5}, ValueError, "label_smoothing", ["[0, 1]", "1.5"]),
    ([Z, Y], {"label_smoothing": np.nan}, ValueError, "label_smoothing", ["[0, 1]", "nan"]),
    ([Z, Y], {"label_smoothing": "much"}, TypeError, "label_smoothing", ["much|str"]),
    ([Z, Y], {"label_smoothing": "0.1"}, TypeError, "label_smoothing", ["number", "0.1"]),
    ([Z, Y], {"softcap": 0.0}, ValueError, "softcap", ["0"]),
    ([Z, Y], {"softcap": -3.0}, ValueError, "softcap", ["-3"]),
    ([Z, Y], {"softcap": np.nan}, ValueError, "softcap", ["nan"]),
    ([Z, Y], {"z_loss": np.nan}, ValueError, "z_loss", ["nan"]),
    ([Z, Y], {"z_loss": -np.inf}, ValueError, "z_loss", ["inf"]),
    ([Z, Y], {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer", ["mean", "sum"]),
    ([Z, Y], {"normalizer": 2.0, "reduction": "none"}, ValueError, "normalizer", ["mean", "none"]),
    ([Z, Y], {"reduction": "average"}, ValueError, "reduction", ["mean", "sum", "none", "average"]),
    ([Z, Y], {"reduction": None}, (ValueError, TypeError), "reduction", ["None"]),
    ([Z, Y], {"ignore_index": 1.5}, TypeError, "ignore_index", ["1.5|float"]),
    ([Z, H], {"ignore_index": 0}, ValueError, "ignore_index", ["0"]),
]  # fmt: skip

GRADIENT_ERRORS = [
    ([Z, Y], {"grad_output": np.ones(4)}, ValueError, "grad_output", ["(4,)"]),
    ([Z, Y], {"grad_output": np.ones(3), "reduction": "none"},
     ValueError, "grad_output", ["(4,)", "(3,)"]),
    ([Z, Y], {"grad_output": "one"}, TypeError, "grad_output", ["<U|str"]),
    ([Z, Y], {"out": np.empty((4, 9), "f4")}, ValueError, "out", ["(4, 10)", "(4, 9)"]),
    ([Z, Y], {"out": np.empty((4, 10), "f8")},
     (ValueError, TypeError), "out", ["float32", "float64"]),
    ([Z, Y], {"out": READ_ONLY}, ValueError, "out", ["writ|read-only"]),
    ([Z, Y], {"out": [[0.0] * 10] * 4}, TypeError, "out", ["list"]),
]  # fmt: skip


def says(error, name, words):
    """The message names the argument first, and holds every word (or one of its alternatives)."""
    message = str(error.value)
    assert message.startswith(f"{name}: "), message
    assert "expected" in message, message
    assert re.search(r"\bgot\b", message), message
    for word in words:
        assert any(part in message for part in word.split("|")), (word, message)


@pytest.mark.parametrize(("arguments", "options", "kind", "name", "words"), LOSS_ERRORS)
def test_cross_entropy(arguments, options, kind, name, words):
    with pytest.raises(kind) as error:
        fastce.cross_entropy(*arguments, **options)
    says(error, name, words)
    logits = np.asarray(arguments[0])
    out = None
    if logits.dtype == np.float32 and logits.ndim:
        out = np.full(logits.shape, 7, np.float32)
    with pytest.raises(kind) as error:
        fastce.cross_entropy_and_grad(*arguments, **options, out=out)
    says(error, name, words)
    assert out is None or np.all(out == 7)


@pytest.mark.parametrize(("arguments", "options", "kind", "name", "words"), GRADIENT_ERRORS)
def test_cross_entropy_and_grad(arguments, options, kind, name, words):
    before = Z.copy()
    with pytest.raises(kind) as error:
        fastce.cross_entropy_and_grad(*arguments, **options)
    says(error, name, words)
    assert same_bits(Z, before)


def test_a_bad_target_leaves_logits_alone_in_place():
    logits = Z.copy()
    with pytest.raises(IndexError):
        fastce.cross_entropy_and_grad(logits, replaced(3, 12), out=logits)
    assert same_bits(logits, Z)


def test_the_first_of_many_bad_targets_is_named():
    logits, targets = np.zeros((50_000, 4), np.float32), np.zeros(50_000, np.int32)
    targets[[40_001, 31_234, 49_999]] = 4, 5, 6
    with pytest.raises(IndexError, match=r"in \[0, 4\).* got 5 at index \(31234,\)"):
        fastce.cross_entropy(logits, targets)


OVERLAPS = {
    "shifted by a row": lambda base: (base[:-1], base[1:]),
    "shifted by one entry": lambda base: (
        base.reshape(-1)[:-10].reshape(-1, 10), base.reshape(-1)[1:-9].reshape(-1, 10)
    ),
    "reversed": lambda base: (base, base[::-1]),
    "transposed": lambda base: (base[:10], base[:10].T),
    "with itself": lambda base: (Z, np.lib.stride_tricks.as_strided(base, Z.shape, (0, 4))),
    "with itself, windows": lambda base: (
        Z, np.lib.stride_tricks.sliding_window_view(base.reshape(-1)[:13], 10, writeable=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_overlapping_out(overlap):
    base = draw((12, 10))
    before = base.copy()
    logits, out = OVERLAPS[overlap](base)
    with pytest.raises(ValueError, match="out: ") as error:
        fastce.cross_entropy_and_grad(logits, np.zeros(len(logits), int), out=out)
    says(error, "out", ["overlap|place of its own"])
    assert same_bits(base, before)


@pytest.mark.parametrize(
    "what",
    ["targets", "integer targets", "weight", "weight of another dtype", "grad_output",
     "grad_output of another dtype"],
)  # fmt: skip
def test_out_overlapping_what_else_is_read(what):
    out = np.full((4, 10), 0.25)
    read = {
        "targets": out,
        "integer targets": out.view(np.int32)[:4, 0],  # which kernels get converted
        "weight": out.reshape(-1)[5:15],
        "weight of another dtype": out.view(np.float32)[0, :10],
        "grad_output": out.reshape(-1)[3:7],
        "grad_output of another dtype": out.view(np.float32)[0, :4],
    }[what]
    name = what.removeprefix("integer ").removesuffix(" of another dtype")
    arguments = {"targets": Y, "reduction": "none"} | {name: read}
    with pytest.raises(ValueError, match="overlap") as error:
        fastce.cross_entropy_and_grad(Z.astype("f8"), out=out, **arguments)
    says(error, "out", [name])
    assert np.all(out == 0.25)


# the functions beside cross-entropy: one line for every check of theirs
OTHER_ERRORS = [
    (fastce.logsumexp, [Z], {"axis": 2}, (ValueError, IndexError), "axis", ["2"]),
    (fastce.logsumexp, [Z], {"axis": (0, 0)}, ValueError, "axis", ["(0, 0)"]),
    (fastce.logsumexp, [Z.astype(complex)], {}, TypeError, "x", ["complex128"]),
    (fastce.logsumexp, [Z.astype(object)], {}, TypeError, "x", ["object"]),
    (fastce.softmax, [Z.astype(complex)], {}, TypeError, "x", ["complex128"]),
    (fastce.softmax, [Z], {"axis": 5}, (ValueError, IndexError), "axis", ["5"]),
    (fastce.softmax, [Z], {"out": np.empty((4, 9), "f4")},
     ValueError, "out", ["(4, 10)", "(4, 9)"]),
    (fastce.softmax, [Z], {"out": READ_ONLY}, ValueError, "out", ["writ|read-only"]),
    (fastce.log_softmax, [Z], {"out": np.empty((4, 10))},
     (ValueError, TypeError), "out", ["float64"]),
    (fastce.log_softmax, [Z[:, ::-1]], {"out": Z[:, :]}, ValueError, "out", ["overlap"]),
    (fastce.nll_loss, [Z, replaced(3, 12)], {}, IndexError, "targets", ["[0, 10)", "12", "(3,)"]),
    (fastce.nll_loss, [Z, Y[:2]], {}, ValueError, "targets", ["(4,)", "(2,)"]),
    (fastce.nll_loss, [Z.astype(int), Y], {}, TypeError, "log_probs", ["int64"]),
    (fastce.nll_loss, [Z, Y], {"weight": W[1:]}, ValueError, "weight", ["(10,)", "(9,)"]),
    (fastce.nll_loss, [Z, Y], {"reduction": "x"}, ValueError, "reduction", ["mean", "x"]),
    (fastce.nll_loss_and_grad, [Z, replaced(0, -2)], {}, IndexError, "targets", ["-2", "(0,)"]),
    (fastce.nll_loss_and_grad, [Z, Y], {"out": READ_ONLY}, ValueError, "out", ["writ|read-only"]),
    (fastce.binary_cross_entropy, [Z, H[:, :3]], {}, ValueError, "targets", ["(4, 10)", "(4, 3)"]),
    (fastce.binary_cross_entropy, [Z.astype(int), H], {}, TypeError, "logits", ["int64"]),
    (fastce.binary_cross_entropy, [Z, H], {"weight": W[:3]},
     ValueError, "weight", ["(4, 10)", "(3,)"]),
    (fastce.binary_cross_entropy, [Z, H], {"pos_weight": W[:3]},
     ValueError, "pos_weight", ["(3,)"]),
    (fastce.binary_cross_entropy, [Z, H], {"reduction": 3},
     (ValueError, TypeError), "reduction", ["3"]),
    (fastce.binary_cross_entropy_and_grad, [Z, H], {"out": READ_ONLY}, ValueError, "out", ["writ"]),
    (fastce.binary_cross_entropy_and_grad, [Z, H], {"out": H.T}, ValueError, "out", ["(10, 4)"]),
    (fastce.cross_entropy_stats, [Z, replaced(2, 77)], {}, IndexError, "targets", ["77", "(2,)"]),
    (fastce.cross_entropy_stats, [Z, Y], {"weight": W[2:]},
     ValueError, "weight", ["(10,)", "(8,)"]),
    (fastce.gradient_hessian, [Z, replaced(2, -1)], {}, IndexError, "targets", ["-1", "(2,)"]),
    (fastce.gradient_hessian, [Z, H], {}, TypeError, "targets", ["float32"]),
    (fastce.gradient_hessian, [Z, Y], {"hessian": "full"}, ValueError, "hessian", ["diag", "full"]),
    (fastce.gradient_hessian, [Z, Y], {"sample_weight": W},
     ValueError, "sample_weight", ["(4,)", "(10,)"]),
    (fastce.hessian_vector_product, [Z, V[:3]], {}, ValueError, "v", ["(4, 10)", "(3, 10)"]),
    (fastce.hessian_vector_product, [Z.astype(int), V], {}, TypeError, "logits", ["int64"]),
    (fastce.hessian_vector_product, [Z, V], {"grad_output": W},
     ValueError, "grad_output", ["(10,)"]),
    (fastce.set_num_threads, [0], {}, ValueError, "n", ["0"]),
    (fastce.set_num_threads, [-1], {}, ValueError, "n", ["-1"]),
    (fastce.set_num_threads, [1.5], {}, TypeError, "n", ["1.5|float"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "options", "kind", "name", "words"), OTHER_ERRORS
)
def test_other_functions(function, arguments, options, kind, name, words):
    with pytest.raises(kind) as error:
        function(*arguments, **options)
    says(error, name, words)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (fastce.cross_entropy, [Z, Y, -1]),
        (fastce.cross_entropy_and_grad, [Z, Y, -1]),
        (fastce.cross_entropy_stats, [Z, Y, -1]),
        (fastce.logsumexp, [Z, -1]),
        (fastce.softmax, [Z, -1]),
        (fastce.log_softmax, [Z, -1]),
        (fastce.nll_loss, [Z, Y, -1]),
        (fastce.nll_loss_and_grad, [Z, Y, -1]),
        (fastce.binary_cross_entropy, [Z, H, None]),
        (fastce.binary_cross_entropy_and_grad, [Z, H, None]),
        (fastce.gradient_hessian, [Z, Y, -1]),
        (fastce.hessian_vector_product, [Z, V, -1]),
    ],
)
def test_options_are_keyword_only(function, arguments):
    with pytest.raises(TypeError, match="positional"):
        function(*arguments)
