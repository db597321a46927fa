"""`import fastce` is cheap and complete: no framework, no compiler, every name of the contract."""

import inspect
import json

import pytest

import fastce
from tests.conftest import PACKAGE

FRAMEWORKS = {
    "torch", "jax", "tensorflow", "sklearn", "scipy", "pandas", "cupy", "ml_dtypes", "xgboost",
    "lightgbm", "mpi4py", "dask",
}  # fmt: skip
COMPILER = {"numba", "llvmlite"}

LOSS = [
    "axis",
    "weight",
    "ignore_index",
    "label_smoothing",
    "z_loss",
    "softcap",
    "reduction",
    "normalizer",
]
NLL = ["axis", "weight", "ignore_index", "reduction", "normalizer"]
BINARY = ["weight", "pos_weight", "reduction"]
GRADIENT = ["grad_output", "out"]

# positional arguments, then keyword-only options
LINEAR = ["bias", "class_weight", *LOSS[2:]]
SIGNATURES = {
    "cross_entropy": (["logits", "targets"], LOSS),
    "cross_entropy_and_grad": (["logits", "targets"], LOSS + GRADIENT),
    "cross_entropy_stats": (["logits", "targets"], ["axis", "weight", "ignore_index"]),
    "logsumexp": (["x"], ["axis", "keepdims"]),
    "softmax": (["x"], ["axis", "out"]),
    "log_softmax": (["x"], ["axis", "out"]),
    "nll_loss": (["log_probs", "targets"], NLL),
    "nll_loss_and_grad": (["log_probs", "targets"], NLL + GRADIENT),
    "binary_cross_entropy": (["logits", "targets"], BINARY),
    "binary_cross_entropy_and_grad": (["logits", "targets"], BINARY + GRADIENT),
    "linear_cross_entropy": (["x", "weight", "targets"], LINEAR),
    "linear_cross_entropy_and_grad": (
        ["x", "weight", "targets"],
        [*LINEAR, *GRADIENT, "accumulate", "skip_below"],
    ),
    "gradient_hessian": (["logits", "targets"], ["axis", "sample_weight", "hessian"]),
    "hessian_vector_product": (["logits", "v"], ["axis", "grad_output"]),
}
DEFAULTS = {
    "axis": -1, "weight": None, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0,
    "softcap": None, "reduction": "mean", "normalizer": None, "grad_output": None, "out": None,
    "keepdims": False, "pos_weight": None, "sample_weight": None, "hessian": "diag",
    "bias": None, "class_weight": None, "accumulate": False, "skip_below": 0.0,
}  # fmt: skip
OTHERS = {"CrossEntropyStats", "set_num_threads", "get_num_threads", "num_threads"}


def imported(python, program):
    program += (
        "\nimport sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    return set(json.loads(python(program).stdout))


def test_import_brings_no_framework_and_no_compiler(python):
    assert not imported(python, "import fastce") & (FRAMEWORKS | COMPILER)


def test_thread_controls_need_no_compiler(python):
    program = "import fastce; fastce.set_num_threads(2); fastce.get_num_threads()"
    assert not imported(python, program) & (FRAMEWORKS | COMPILER)


def test_a_call_brings_no_framework(python):
    # numba itself asks SciPy for its BLAS, so that one is numba's affair
    program = "import fastce; fastce.cross_entropy([[0.0, 1.0]], [1]); fastce.logsumexp([0.0, 1.0])"
    assert not imported(python, program) & (FRAMEWORKS - {"scipy"})


def test_works_without_the_optional_packages(python):
    python(
        f"import sys; sys.modules.update(dict.fromkeys({sorted(FRAMEWORKS)}))\n"
        "import numpy as np, fastce\n"
        "loss, grad = fastce.cross_entropy_and_grad(np.zeros((2, 4), 'f2'), [1, 2])\n"
        "assert abs(loss - np.log(4)) < 1e-6\n"
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    function = getattr(fastce, name)
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert (positional, [p.name for p in options]) == SIGNATURES[name]
    assert {p.name: p.default for p in options} == {p.name: DEFAULTS[p.name] for p in options}


def test_public_names():
    missing = (set(SIGNATURES) | OTHERS) - set(fastce.__all__)
    assert not missing
    assert all(hasattr(fastce, name) for name in fastce.__all__)
    assert set(fastce.__all__) <= set(dir(fastce))
    assert isinstance(fastce.__version__, str)


@pytest.mark.parametrize("name", sorted(set(SIGNATURES) | OTHERS))
def test_everything_public_is_documented(name):
    thing = getattr(fastce, name)
    doc = inspect.getdoc(thing) or ""
    assert len(doc.splitlines()[0]) > 10
    if name in SIGNATURES:
        assert all(parameter in doc for part in SIGNATURES[name] for parameter in part)
        assert ">>>" in doc


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        fastce.no_such_name  # noqa: B018


def test_typed():
    assert (PACKAGE / "py.typed").exists()


def test_without_a_compiler_the_error_names_the_reason(python):
    python(
        """
import numpy as np, fastce
try:
    fastce.cross_entropy(np.zeros((3, 4)), [0, 1, 2])
except ImportError as error:
    assert "NUMBA_DISABLE_JIT" in str(error)
else:
    raise AssertionError("computed")
""",
        NUMBA_DISABLE_JIT="1",
    )
