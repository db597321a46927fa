"""``fastce eval``: the numbers of one call on the whole, in pieces, in bounded memory.

Bad files get one line and status 2; a failure or an interrupt leaves nothing half written.
"""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastce
from fastce.__main__ import main
from fastce._cli import npy
from tests.test_cli import cli


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 4 KiB, so that a small file has many of every kind."""
    monkeypatch.setattr(npy, "PIECE_BYTES", 4096)


def saved(folder, **arrays):
    """Save arrays and return their paths in order."""
    paths = [folder / f"{name}.npy" for name in arrays]
    for path, array in zip(paths, arrays.values(), strict=True):
        np.save(path, array)
    return paths


def evaluated(capsys, *arguments):
    status = main(["eval", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def sample(rng, shape, axis, dtype="float32"):
    logits = rng.normal(scale=3, size=shape).astype(dtype)
    rows = np.delete(shape, axis)
    return logits, rng.integers(0, shape[axis], rows)


# (shape, class axis): several pieces each, whole blocks and parts of one, odd remainders
LAYOUTS = [
    ((1000, 10), -1),
    ((7, 2000), -1),
    ((13, 1000), 0),
    ((3, 11, 700), 1),
    ((50, 11, 7), 1),
    ((5, 7, 11, 3), 2),
    ((100,), 0),
    ((3000, 1), -1),
]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_pieces_add_up_to_one_call(capsys, tmp_path, rng, small_pieces, shape, axis, order):
    logits, targets = sample(rng, shape, axis)
    targets[rng.random(targets.shape) < 0.2] = -100
    logits, targets = np.asarray(logits, order=order), np.asarray(targets, order=order)
    paths = saved(tmp_path, logits=logits, targets=targets)
    found = evaluated(capsys, *paths, "--axis", axis, "--grad", tmp_path / "grad.npy")

    loss, grad = fastce.cross_entropy_and_grad(logits, targets, axis=axis)
    stats = fastce.cross_entropy_stats(logits, targets, axis=axis)
    valid = targets != -100
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6, abs=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["accuracy"] == np.mean(stats.predicted[valid] == targets[valid])
    assert (found["rows"], found["ignored"]) == (targets.size, (~valid).sum())
    assert found["total_weight"] == valid.sum()
    written = np.load(tmp_path / "grad.npy")
    assert written.dtype == logits.dtype
    # Rounded alike but where a piece is of another shape, and so of another kernel, than the whole.
    np.testing.assert_allclose(written, grad, rtol=1e-6, atol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grad.npy", "logits.npy", "targets.npy",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"ignore_index": 3},
    {"weight": np.linspace(0, 2, 10)},
    {"weight": np.linspace(0, 2, 10), "label_smoothing": 0.2, "ignore_index": 0},
    {"weight": np.arange(10), "reduction": "sum"},
], ids=lambda options: "+".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_options(capsys, tmp_path, rng, small_pieces, options, soft):
    logits, targets = sample(rng, (1000, 10), -1)
    if soft:
        options = {name: value for name, value in options.items() if name != "ignore_index"}
        targets = rng.dirichlet(np.ones(10), size=1000).astype("float32")
    paths = saved(tmp_path, logits=logits, targets=targets)
    arguments = [*paths, "--grad", tmp_path / "grad.npy"]
    for name, value in options.items():
        if name == "weight":
            (value,) = saved(tmp_path, weight=value)
        arguments += ["--" + name.replace("_", "-"), value]
    found = evaluated(capsys, *arguments)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, **options)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)
    # The sum of the weights, in another order, may differ in its last bit; atol is for components
    # that are small differences of terms around 1e-4.
    np.testing.assert_allclose(np.load(tmp_path / "grad.npy"), grad, rtol=1e-6, atol=1e-11)
    shared = {name: options[name] for name in ("weight", "ignore_index") if name in options}
    nll = fastce.cross_entropy(logits, targets, **shared)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


@pytest.mark.parametrize(("logits_order", "targets_order"), [*itertools.product("CF", "CF")])
def test_soft_targets_in_either_order(
    capsys, tmp_path, rng, small_pieces, logits_order, targets_order
):
    logits = rng.normal(size=(1000, 10)).astype("float32", order=logits_order)
    targets = rng.dirichlet(np.ones(10), size=1000).astype("float32", order=targets_order)
    found = evaluated(capsys, *saved(tmp_path, logits=logits, targets=targets))
    assert found["loss"] == pytest.approx(float(fastce.cross_entropy(logits, targets)), rel=1e-6)
    assert found["accuracy"] == np.mean(logits.argmax(1) == targets.argmax(1))


@pytest.mark.parametrize("dtype", ["<f8", ">f8", ">f4", "<f2", "bfloat16"])
def test_dtypes(capsys, tmp_path, rng, dtype):
    named = [] if dtype != "bfloat16" else ["--dtype", "bfloat16"]
    dtype = np.dtype(ml_dtypes.bfloat16 if named else dtype)
    logits, targets = sample(rng, (300, 10), -1, dtype)
    paths = saved(tmp_path, logits=logits, targets=targets.astype(">i2"))
    found = evaluated(capsys, *paths, "--grad", tmp_path / "grad.npy", *named)
    native = logits.astype(dtype.newbyteorder("="))
    loss, grad = fastce.cross_entropy_and_grad(native, targets)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)
    written = np.load(tmp_path / "grad.npy")
    np.testing.assert_array_equal(written.view(native.dtype), grad)


@pytest.mark.parametrize("targets", [np.full(5, -100), np.empty(0, int)], ids=["ignored", "none"])
def test_nothing_to_count(capsys, tmp_path, targets):
    logits = np.ones((len(targets), 3), np.float32)
    paths = saved(tmp_path, logits=logits, targets=targets)
    found = evaluated(capsys, *paths, "--grad", tmp_path / "grad.npy")
    # JSON knows no NaN
    assert found["loss"] is found["perplexity"] is found["accuracy"] is None
    np.testing.assert_array_equal(np.load(tmp_path / "grad.npy"), np.zeros_like(logits))


def test_for_people(tmp_path):
    paths = saved(tmp_path, logits=np.zeros((8, 4)), targets=np.zeros(8, int))
    found = cli(
        "eval", *paths, "--grad", tmp_path / "grad.npy", prelude="sys.modules['rich'] = None"
    )
    assert found.stdout.splitlines()[:5] == [
        f"loss             {math.log(4):.9g}",
        "perplexity       4",
        "accuracy         100.0000%",
        "rows             8 (0 ignored)",
        "total weight     8",
    ]
    assert found.stdout.endswith(f"gradient written to {tmp_path / 'grad.npy'}\n")


# --- bad input ------------------------------------------------------------------------------------


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.fixture
def files(tmp_path):
    """Good files by name, and bad ones beside them."""
    good = np.zeros((4, 3), np.float32)
    arrays = {
        "logits": good,
        "targets": np.array([0, 1, 2, -100]),
        "integers": good.astype(int),
        "complex": good.astype(complex),
        "records": good.astype(ml_dtypes.bfloat16),
        "scalar": np.float32(1),
        "classless": good[:, :0],
        "cube": np.zeros((4, 3, 2), np.float32),
        "cube_targets": np.zeros((4, 2), int, order="F"),
        "long": np.zeros(5, int),
        "floats": np.zeros(4, np.float32),
        "booleans": np.zeros(4, bool),
        "range": np.array([0, 1, 7, 9]),
        "negative": np.array([0, -1, 7, 9]),
        "nan_weight": np.full(4, 1.0),
        "truncated": good,
        "headless": good,
        "no_dict": good,
        "version": good,
    }
    paths = dict(zip(arrays, saved(tmp_path, **arrays), strict=True))
    np.save(tmp_path / "pickled.npy", np.array([{}, None], object), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", good)
    (tmp_path / "empty.npy").write_bytes(b"")
    damaged(paths["truncated"], lambda content: content[:-1])
    damaged(paths["headless"], lambda content: content[:40])
    damaged(paths["no_dict"], lambda content: content.replace(b"descr", b"d('[c"))
    damaged(paths["version"], lambda content: content.replace(b"NUMPY\x01", b"NUMPY\x09"))
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), [
    ("missing.npy targets.npy", "missing.npy: No such file or directory"),
    (". targets.npy", ": Is a directory"),
    ("logits.npy empty.npy", "empty.npy: expected a .npy file, got something else"),
    ("zip.npz targets.npy", "zip.npz: expected a .npy file, got something else"),
    ("truncated.npy targets.npy", "truncated.npy: truncated: expected 176 bytes, got 175"),
    ("headless.npy targets.npy", "headless.npy: expected a .npy header, got a damaged one"),
    ("no_dict.npy targets.npy", "no_dict.npy: expected a .npy header, got a damaged one"),
    ("version.npy targets.npy", "version.npy: expected .npy format 1.0 or 2.0, got 9.0"),
    ("pickled.npy targets.npy", "pickled.npy: expected numbers, got pickled Python objects"),
    ("integers.npy targets.npy", "integers.npy: expected logits of float64, float32, float16"),
    ("complex.npy targets.npy", "got complex128"),
    ("records.npy targets.npy", "got |V2; is it --dtype bfloat16?"),
    ("logits.npy targets.npy --dtype bfloat16", "expected two-byte records for bfloat16"),
    ("scalar.npy targets.npy", "--axis: expected an integer in [0, 0), got -1"),
    ("logits.npy targets.npy --axis 2", "--axis: expected an integer in [-2, 2), got 2"),
    ("classless.npy targets.npy", "expected at least one class, got shape (4, 0)"),
    ("logits.npy long.npy", "long.npy: expected integers of shape (4,) or floats of shape (4, 3), "
     "got int64 of shape (5,)"),
    ("logits.npy floats.npy", "got float32 of shape (4,)"),
    ("logits.npy booleans.npy", "got bool of shape (4,)"),
    ("cube.npy cube_targets.npy --axis 1", "expected C order like the logits, got Fortran order"),
    ("logits.npy range.npy", "range.npy: expected integers in [0, 3), got 7 at index (2,)"),
    ("logits.npy negative.npy", "expected integers in [0, 3), got -1 at index (1,)"),
    ("logits.npy targets.npy --weight nan_weight.npy", "expected numbers of shape (3,), got"),
    ("logits.npy targets.npy --weight missing.npy", "missing.npy: No such file or directory"),
    ("logits.npy targets.npy --label-smoothing 2", "label_smoothing: "),
    ("logits.npy targets.npy --grad missing/g.npy", "--grad: expected a folder that exists"),
    ("logits.npy targets.npy --grad logits.npy/g.npy", "--grad: expected a folder that exists"),
    ("logits.npy targets.npy --grad .", "--grad: expected a file of its own, got ."),
    ("logits.npy targets.npy --grad logits.npy", "--grad: expected a file of its own"),
    ("logits.npy range.npy --grad g.npy", "got 7 at index (2,)"),
], ids=lambda value: value if value.startswith(("logits", "cube")) else None)  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert main(["eval", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastce eval: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_bad_input_from_the_shell(tmp_path):
    found = cli("eval", tmp_path / "missing.npy", tmp_path / "targets.npy")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"fastce eval: {tmp_path / 'missing.npy'}: No such file or directory\n"


@pytest.mark.parametrize(("shape", "axis", "order", "index"), [
    ((5000, 3), -1, "C", (4321,)),
    ((70, 3, 90), 1, "C", (61, 17)),
    ((70, 3, 90), 1, "F", (61, 17)),
])  # fmt: skip
def test_out_of_range_target_is_named_by_its_place_in_the_file(
    tmp_path, capsys, small_pieces, shape, axis, order, index
):
    targets = np.zeros(np.delete(shape, axis), np.int64, order=order)
    targets[index] = 3
    paths = saved(tmp_path, logits=np.zeros(shape, order=order), targets=targets)
    assert main(["eval", *map(str, paths), "--axis", str(axis)]) == 2
    assert capsys.readouterr().err.endswith(
        f"expected integers in [0, 3), got 3 at index {index}\n"
    )


@pytest.mark.parametrize("position", range(6, 80))
def test_any_damage_to_a_header_is_noticed_or_harmless(tmp_path, capsys, position):
    logits, targets = saved(tmp_path, logits=np.zeros((4, 3)), targets=np.zeros(4, int))
    for byte in (0, 0x27, 0x2D, 0x39, 0xFF):
        np.save(logits, np.zeros((4, 3)))
        damaged(
            logits,
            lambda content, byte=byte: content[:position] + bytes([byte]) + content[position + 1 :],
        )
        assert main(["eval", str(logits), str(targets)]) in (0, 2)
        assert capsys.readouterr().err.count("\n") <= 1


# --- large files ----------------------------------------------------------------------------------


def sparse(path, shape, dtype, fortran_order=False):
    """A file of zeros that takes no room on the disk."""
    dtype = np.dtype(dtype)
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": fortran_order, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)
    return path


PEAK = """
import atexit, pathlib, re
status = pathlib.Path("/proc/self/status")
peak = re.compile(r"VmHWM:\\s+(\\d+) kB")
atexit.register(lambda: print(peak.search(status.read_text())[1], file=sys.stderr))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of memory")
@pytest.mark.parametrize(("shape", "axis", "fortran_order"), [
    ((110_000, 1000), -1, False),
    ((110_000, 1000), -1, True),
    ((4, 10_000, 2750), 1, False),
], ids=str)  # fmt: skip
def test_memory_is_bounded(tmp_path, shape, axis, fortran_order):
    """440 MB of logits, and as much gradient, in at most 300 MB beyond the bare interpreter."""
    bare = subprocess.run(
        [sys.executable, "-c", "import sys" + PEAK], capture_output=True, text=True, check=True
    )
    logits = sparse(tmp_path / "logits.npy", shape, "f4", fortran_order)
    rows = tuple(int(extent) for extent in np.delete(shape, axis))
    targets = sparse(tmp_path / "targets.npy", rows, "i8", fortran_order)
    found = cli("eval", logits, targets, "--axis", axis, "--grad", tmp_path / "g.npy", prelude=PEAK)
    assert found.returncode == 0, found.stderr
    assert f"{math.log(shape[axis]):.7g}"[:7] in found.stdout
    assert int(found.stderr) - int(bare.stderr) < 300_000
    assert (tmp_path / "g.npy").stat().st_size == logits.stat().st_size


@pytest.fixture
def heard_interrupts():
    """Whoever runs the tests in the background ignores SIGINT, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent another way")
@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_interrupt_leaves_nothing_half_written(tmp_path, name, status):
    # 20 GB of logits: far more than can be done before the signal comes.
    logits = sparse(tmp_path / "logits.npy", (5_000_000, 1000), "f4")
    targets = sparse(tmp_path / "targets.npy", (5_000_000,), "i1")
    grad = tmp_path / "grad.npy"
    grad.write_text("from an earlier run")
    command = [sys.executable, "-m", "fastce", "eval", logits, targets, "--grad", grad]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".grad.npy.*.tmp")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    assert out == ""
    assert err == ("fastce eval: interrupted\n" if name == "SIGINT" else "")
    assert grad.read_text() == "from an earlier run"
    assert {path.name for path in tmp_path.iterdir()} == {"grad.npy", "logits.npy", "targets.npy"}
