"""What ``fastce eval`` reads: tables, soft targets that are no distributions, files that change."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import fastce
from fastce.__main__ import main
from fastce._cli import columns, evaluate, npy, output
from tests.test_cli import cli
from tests.test_cli_eval import PEAK, evaluated, saved
from tests.test_cli_tables import BINARY, FORMATS, text, write

ROWS = 3000


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_columns(matrix, **others):
    return {f"c{i}": column for i, column in enumerate(matrix.T)} | others


def refused(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_is_as_good_as_an_array(capsys, here, monkeypatch, rng, suffix):
    """Logits and targets in any mixture of tables and arrays, in several batches."""
    monkeypatch.setattr(columns, "_BLOCK_NUMBERS", 1000)
    monkeypatch.setattr(columns, "_TEXT_BYTES", 4096)
    logits, hard = rng.normal(size=(ROWS, 4)), rng.integers(0, 4, ROWS)
    hard[::7] = -100
    soft = rng.dirichlet(np.ones(4), ROWS)
    saved(here, logits=logits, hard=hard, soft=soft)
    write(here / f"logits{suffix}", as_columns(logits))
    write(here / f"both{suffix}", {"y": hard} | as_columns(logits))
    write(here / f"hard{suffix}", {"y": hard})
    write(here / f"soft{suffix}", as_columns(soft))
    exclude = {"seconds", "rows_per_second"}
    for kind, tables in {
        "hard": [
            [f"logits{suffix}", "hard.npy"],
            ["logits.npy", f"hard{suffix}"],
            [f"logits{suffix}", f"hard{suffix}"],
            [f"both{suffix}", "--target", "y"],
        ],
        "soft": [["logits.npy", f"soft{suffix}"], [f"logits{suffix}", f"soft{suffix}"]],
    }.items():
        want = evaluated(capsys, "logits.npy", f"{kind}.npy", "--grad", "want.npy")
        for arguments in tables:
            found = evaluated(capsys, *arguments, "--grad", "found.npy")
            for name in want.keys() - exclude:
                assert found[name] == want[name], (arguments, name)
            np.testing.assert_array_equal(np.load("found.npy"), np.load("want.npy"))
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_are_of_the_type_of_their_columns(capsys, here, rng, suffix, dtype):
    logits = rng.normal(size=(10, 3)).astype(dtype)
    y = pa.array([0, 1] * 5, pa.int8())
    write(here / f"a{suffix}", as_columns(logits, y=y))
    found = evaluated(capsys, f"a{suffix}", "--target", "y", "--grad", "g.npy")
    loss, grad = fastce.cross_entropy_and_grad(logits, y.to_numpy())
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)
    written = np.load("g.npy")
    assert written.dtype == dtype
    np.testing.assert_allclose(written, grad, rtol=1e-2)


def test_masked_classes_of_a_text(capsys, here):
    text(here / "a.csv", "a,b,y\n0,-inf,0\n-Infinity,1,1\n")
    assert evaluated(capsys, "a.csv", "--target", "y")["loss"] == 0


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        ("a,b,y\n1,2,0\n1,2,x\n", "--target y", "expected an integer, got 'x' in data row 2"),
        ("a,b,y\n1,2,0\n1,2,\n", "--target y", "expected an integer, got '' in data row 2"),
        ("a,b,y\n1,2,0\n1,2,1.0\n", "--target y", "got '1.0' in data row 2, column y"),
        ("a,b,y\n1,2,0\n1,2,9\n", "--target y",
         "a.csv, column y: expected integers in [0, 2), got 9 at index (1,)"),
        ("a,b,y\n1,2,99999999999999999999\n", "--target y", "expected an integer, got '9999999"),
        ("a,b,y\n1,x,0\n", "--target y", "expected a number, got 'x' in data row 1, column b"),
        ("a,b,y\n1,2,0\n", "--target z", "expected one column z, got a, b, y"),
        ("a,a,y\n1,2,0\n", "--target y", "expected one column a, got 2 of that name"),
        ("y\n0\n", "--target y", "expected at least one class, got shape (1, 0)"),
        ("a,b\n", "hard.npy", "expected integers of shape (0,)"),
        ("a,b\n1,2\n", "", "TARGETS: expected a file, or --target COLUMN in its place"),
        ("a,b\n1,2\n", "hard.npy --target b", "TARGETS: expected a file, or --target COLUMN in"),
        ("a,b\n1,2\n", "hard.csv", "No such file or directory"),
        ("a,b\n1,2\n", "hard.npy --dtype bfloat16", "expected two-byte records for bfloat16"),
        ("a,b\n1,2\n", "a.csv --grad a.csv", "--grad: expected a file of its own, got a.csv"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(capsys, here, content, arguments, message):
    text(here / "a.csv", content)
    saved(here, hard=np.array([0, 1]))
    assert message in refused(capsys, "a.csv", *arguments.split())


@pytest.mark.parametrize("suffix", BINARY)
def test_targets_in_a_column_are_integers(capsys, here, suffix):
    for values, message in [
        ([0.0, 1.0], "expected integers, got double in column y"),
        (["0", "1"], "expected integers, got string in column y"),
        ([True, False], "expected integers, got bool in column y"),
        ([0, None], "expected a number, got null in data row 2, column y"),
    ]:
        write(here / f"a{suffix}", {"a": [1.0, 2.0], "b": [1.0, 2.0], "y": values})
        assert message in refused(capsys, f"a{suffix}", "--target", "y")


def test_a_column_of_an_array_is_refused(capsys, here):
    saved(here, logits=np.zeros((2, 3)))
    message = "--target: expected logits in a table with that column, got logits.npy"
    assert message in refused(capsys, "logits.npy", "--target", "y")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
def test_no_room_for_the_copy_of_a_table(capsys, here, monkeypatch):
    full = Path("/dev/full")
    text(here / "a.csv", "a,b,y\n1,2,0\n")
    monkeypatch.setattr(output, "temporary", lambda stack: stack.enter_context(full.open("r+b", 0)))
    assert ": No space left on device" in refused(capsys, "a.csv", "--target", "y")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of memory")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_memory_is_bounded_for_tables(here, rng, suffix):
    """400 MB of logits, in at most 300 MB beyond the bare interpreter.

    The .parquet has few values in many columns: pages of many values take 2 MB for each column.
    """
    bare = subprocess.run(
        [sys.executable, "-c", "import sys" + PEAK], capture_output=True, text=True, check=True
    )
    classes, rows = 250, 200_000
    if suffix == ".csv":
        line = ",".join(["1"] * classes) + ",0\n"
        names = ",".join(f"c{i}" for i in range(classes))
        text(here / "a.csv", f"{names},y\n{line * rows}")
    else:
        column = pa.array(np.ones(rows)).dictionary_encode()
        write(here / "a.parquet", {f"c{i}": column for i in range(classes)} | {"y": [0] * rows})
    found = cli("eval", f"a{suffix}", "--target", "y", prelude=PEAK)
    assert found.returncode == 0, found.stderr
    assert f"rows             {rows} " in found.stdout
    assert int(found.stderr) - int(bare.stderr) < 300_000


# --- soft targets that are no distributions -------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(npy, "PIECE_BYTES", 4096)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("axis, shape", [(-1, (ROWS, 4)), (1, (30, 4, 50))])
def test_improper_targets_are_told(capsys, here, rng, small_pieces, axis, shape, order):
    soft = np.moveaxis(rng.dirichlet(np.ones(4), np.delete(shape, axis)), -1, axis)
    soft = np.array(soft, np.float32, order=order)
    first, *others = {2: [(1234,), (2998,), (2999,)], 3: [(24, 34), (29, 48), (29, 49)]}[len(shape)]
    rows = np.moveaxis(soft, axis, -1)
    rows[first] = [1.5, -0.5, 0, 0]
    rows[others[0]] = [0.5, 0.5, 0.5, -0.1]
    rows[others[1]] = [0.5, 0.1, 0.1, 0.1]
    saved(here, logits=np.zeros(shape, order=order), soft=soft)
    assert main(["eval", "logits.npy", "soft.npy", "--axis", str(axis), "--json"]) == 0
    out, err = capsys.readouterr()
    notes = [
        f"soft.npy: expected probabilities {expected}, got 2 rows of others, the first at "
        f"index {row}"
        for expected, row in (("of at least 0", first), ("that sum to 1 in each row", others[0]))
    ]
    assert json.loads(out)["warnings"] == notes
    assert err.splitlines() == [f"fastce eval: {note}" for note in notes]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rounding_is_no_fault(capsys, here, rng, dtype):
    for soft in (rng.dirichlet(np.ones(1000), 100), rng.dirichlet(np.ones(3), 100).round(5)):
        saved(here, logits=np.zeros(soft.shape, dtype), soft=soft.astype(dtype))
        assert evaluated(capsys, "logits.npy", "soft.npy")["warnings"] == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.01])
def test_whatever_is_not_one_is_a_fault(capsys, here, wrong):
    soft = np.eye(3)
    soft[1, 0] = wrong
    saved(here, logits=np.zeros((3, 3)), soft=soft)
    (warning,) = evaluated(capsys, "logits.npy", "soft.npy")["warnings"]
    assert "got 1 rows of others, the first at index (1,)" in warning


def test_classes_are_no_distributions(capsys, here):
    saved(here, logits=np.zeros((3, 3)), hard=np.array([0, 1, -100]))
    assert evaluated(capsys, "logits.npy", "hard.npy")["warnings"] == []


# --- files that change ----------------------------------------------------------------------------


def changing(monkeypatch, change):
    """Let another program change the files when the targets have been checked."""
    check = evaluate._total_weight

    def checked(*arguments):
        total = check(*arguments)
        change()
        return total

    monkeypatch.setattr(evaluate, "_total_weight", checked)


def overwritten(path, array):
    """Write over the content of a file, which stays the same file."""
    with path.open("r+b") as file:
        np.save(file, array)


def test_targets_that_change_are_refused(capsys, here, monkeypatch):
    saved(here, logits=np.zeros((4, 3)), hard=np.zeros(4, int))
    changing(monkeypatch, lambda: overwritten(here / "hard.npy", np.array([0, 10**11, 0, 0])))
    err = refused(capsys, "logits.npy", "hard.npy", "--grad", "g.npy")
    assert "hard.npy: expected targets that stay as they are, got new ones since a check" in err
    assert not (here / "g.npy").exists()


def test_a_file_that_becomes_shorter_is_refused(capsys, here, monkeypatch):
    for name in ("logits.npy", "hard.npy"):
        saved(here, logits=np.zeros((4, 3)), hard=np.zeros(4, int))
        with monkeypatch.context() as patch:
            changing(patch, lambda name=name: (here / name).write_bytes(b""))
            err = refused(capsys, "logits.npy", "hard.npy")
        assert f"{name}: truncated while it was read" in err


def test_a_piece_of_targets_is_a_copy(here):
    (path,) = saved(here, hard=np.zeros(4, int))
    with npy.opened(path) as stored:
        piece = stored.flat(0, 4)
        overwritten(path, np.ones(4, int))
        assert piece.tolist() == [0, 0, 0, 0]
