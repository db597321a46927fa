"""Tables (.csv, .tsv, .parquet, .feather) as the commands read them: what works, what is refused.

How the commands go on with what was read is in test_cli_fit.py and test_cli_eval.py.
"""

import datetime
import decimal
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from fastce._cli import columns, table
from fastce._cli.terminal import Failure
from tests.test_cli import cli

FORMATS = [".csv", ".tsv", ".parquet", ".feather"]
BINARY = {".parquet": parquet.write_table, ".feather": feather.write_feather}


def write(path, columns):
    """Write a table of these columns in the format of the suffix."""
    if path.suffix in BINARY:
        BINARY[path.suffix](pa.table(columns), path)
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}[path.suffix]
        rows = zip(*columns.values(), strict=True)
        lines = [delimiter.join(map(str, row)) for row in [columns, *rows]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, target="y", features=None):
    return table.read([path], table.Wanted(target, target is not None, features))


def refused(path, **wanted):
    with pytest.raises(Failure) as found:
        read(path, **wanted)
    message = str(found.value)
    assert "\n" not in message
    return message


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_and_labels(tmp_path, suffix):
    x = np.random.default_rng(0).normal(size=(1000, 3))
    y = ["é" if i % 3 else "z" for i in range(1000)]
    path = write(tmp_path / f"a{suffix}", {"a": x[:, 0], "y": y, "b": x[:, 1], "c": x[:, 2]})
    found = read(path)
    np.testing.assert_array_equal(found.x, x)
    assert found.y.tolist() == y
    assert found.names == ["a", "b", "c"]
    chosen = read(path, target=None, features=["c", "a"])
    np.testing.assert_array_equal(chosen.x, x[:, [2, 0]])
    assert chosen.y is None


@pytest.mark.parametrize("suffix", FORMATS)
def test_many_batches_are_one_table(tmp_path, monkeypatch, suffix):
    """Types are not guessed from the first rows: integers, then floats; numbers, then text."""
    monkeypatch.setattr(columns, "_BLOCK_NUMBERS", 200)
    monkeypatch.setattr(columns, "_TEXT_BYTES", 64)
    values = [float(i) if i > 800 else i for i in range(1000)]
    labels = [str(i % 2) if i < 900 else "c" for i in range(1000)]
    if suffix in BINARY:
        values = np.array(values, float)
    found = read(write(tmp_path / f"a{suffix}", {"a": values, "y": labels}))
    np.testing.assert_array_equal(found.x[:, 0], np.arange(1000))
    assert found.y.tolist() == labels


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffa,b,y\n1,2,0\n3,4,1\n",
        "a,b,y\r\n1,2,0\r\n3,4,1\r\n",
        "\n\na,b,y\n\n1,2,0\n\n\n3,4,1",
        '"a","b","y"\n"1","2","0"\n"3","4","1"\n',
        "a,b,y\n 1, +2 ,0\n3.,4e0,1\n",
        "a,b,y\n1_0e-1,2,0\n3,4,1\n",
    ],
    ids=["BOM", "CRLF", "blank lines", "quoted", "blanks", "as Python reads it"],
)
def test_text_as_people_write_it(tmp_path, content):
    found = read(text(tmp_path / "a.csv", content))
    assert found.x.tolist() == [[1, 2], [3, 4]]
    assert found.y.tolist() == [0, 1]
    assert found.names == ["a", "b"]


def test_quotes_hold_delimiters_and_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_TEXT_BYTES", 64)
    monkeypatch.setattr(columns, "_TEXT_LINES", 1)
    label = "x\n1,y\n2,z"
    content = "a,y\n" + "".join(f'{i},"{label}"\n' for i in range(100))
    found = read(text(tmp_path / "a.csv", content))
    assert found.x[:, 0].tolist() == [*range(100)]
    assert found.y.tolist() == [label] * 100
    found = read(text(tmp_path / "a.csv", 'a,"b\n, ""c""",y\n1,2,"x\ny"\n3,4,"x,y"\n'))
    assert found.names == ["a", 'b\n, "c"']
    assert found.y.tolist() == ["x\ny", "x,y"]


def test_a_line_longer_than_what_is_read_at_a_time(tmp_path):
    long = "x" * 3_000_000
    found = read(text(tmp_path / "a.csv", f"a,y\n1,a\n2,b\n3,{long}\n4,a\n"))
    assert found.x[:, 0].tolist() == [1, 2, 3, 4]
    assert found.y.tolist() == ["a", "b", long, "a"]


def test_many_columns_are_read_in_time_that_grows_with_them(tmp_path):
    took = []
    for number in (2000, 16_000):
        names = ",".join(f"c{i}" for i in range(number))
        rows = "\n".join(",".join(["1"] * number) + f",{label}" for label in "uv")
        path = text(tmp_path / "wide.csv", f"{names},y\n{rows}\n")
        read(path)
        began = time.perf_counter()
        assert read(path).x.shape == (2, number)
        took.append(time.perf_counter() - began)
    assert took[1] < 24 * took[0]  # the square would be 64 times


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
def test_text_from_a_pipe(tmp_path):
    path = tmp_path / "a.csv"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=["a,y\n1,u\n2,v\n"])
    writer.start()
    assert read(path).x.tolist() == [[1], [2]]
    writer.join()


VALUES = {
    "int8": pa.array([1, 0, 1], pa.int8()),
    "uint64": pa.array([1, 0, 1], pa.uint64()),
    "float16": pa.array(np.array([1, 0, 1], np.float16)),
    "float32": pa.array([1, 0, 1], pa.float32()),
    "decimal": pa.array([decimal.Decimal(i) for i in (1, 0, 1)]),
    "bool": pa.array([True, False, True]),
    "dictionary": pa.array([1, 0, 1]).dictionary_encode(),
}


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize("kind", VALUES)
def test_types_of_features(tmp_path, suffix, kind):
    found = read(write(tmp_path / f"a{suffix}", {"a": VALUES[kind], "y": [0, 1, 1]}))
    assert found.x.tolist() == [[1], [0], [1]]
    assert found.x.dtype == (kind if kind.startswith("float") else "float64")


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize(
    "labels, want",
    [
        (["u", "v", "u"], ["u", "v", "u"]),
        (pa.array(["u", "v", "u"]).dictionary_encode(), ["u", "v", "u"]),
        (pa.array(["u", "v", "u"], pa.large_string()), ["u", "v", "u"]),
        (pa.array([1, 0, 1], pa.int16()), [1, 0, 1]),
        (pa.array([2**63, 0, 1], pa.uint64()), [2**63, 0, 1]),
        ([True, False, True], [True, False, True]),
        ([1.0, 0.0, 1.0], [1, 0, 1]),
        ([decimal.Decimal(i) for i in (1, 0, 1)], [1, 0, 1]),
        (
            [datetime.date(2020, 1, i) for i in (1, 2, 1)],
            ["2020-01-01", "2020-01-02", "2020-01-01"],
        ),
    ],
    ids=["text", "dictionary", "large", "int16", "uint64", "bool", "float", "decimal", "date"],
)
def test_types_of_labels(tmp_path, suffix, labels, want):
    found = read(write(tmp_path / f"a{suffix}", {"a": range(len(labels)), "y": labels}))
    assert found.y.tolist() == want


@pytest.mark.parametrize(
    "labels, dtype",
    [
        (["-1", "0", "7"], "int64"),
        (["9223372036854775807", "0", "7"], "int64"),
        (["99999999999999999999", "0", "7"], object),  # beyond 64 bits: text, as ids may be
        (["01", "1", "7"], object),  # not one class
        (["NA", "no", "yes"], object),  # a country, say
        (["1.0", "2", "7"], object),
    ],
)
def test_text_is_integers_where_all_of_it_is(tmp_path, labels, dtype):
    found = read(write(tmp_path / "a.csv", {"a": [1, 2, 3], "y": labels}))
    assert found.y.dtype == dtype
    assert [str(label) for label in found.y] == labels


def test_the_index_of_a_data_frame_is_no_feature(tmp_path):
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "y": [0, 1, 1]})
    for index in ([7, 3, 5], pd.Index([7, 3, 5], name="id"), pd.RangeIndex(3)):
        frame.set_index(pd.Index(index)).to_parquet(tmp_path / "a.parquet")
        found = read(tmp_path / "a.parquet")
        assert (found.names, found.x.tolist()) == (["a"], [[1], [2], [3]])


def test_names_with_dots_are_names(tmp_path):
    found = read(
        write(tmp_path / "a.parquet", {"a": [1, 2], "a.b": [3, 4], "y": [0, 1]}), "y", ["a"]
    )
    assert found.x.tolist() == [[1], [2]]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,a,y\n1,2,0\n", "expected one column a, got 2 of that name"),
        ("a,y,y\n1,2,0\n", "expected one column y, got 2 of that name"),
        ("a,y\n1,0\n,1\n", "expected a number, got '' in data row 2, column a"),
        ("a,y\n1,0\nNA,1\n", "expected a number, got 'NA' in data row 2, column a"),
        ("a,y\n1,0\nnan,1\n", "expected finite features, got NaN or inf in data row 2, column a"),
        ("a,y\n1,0\n1e999,1\n", "got NaN or inf in data row 2, column a"),
        ("a,y\n\n1,0\n\n2,\n", "expected a label, got an empty one in data row 2, column y"),
        ('a,y\n1,0\n2,""\n', "expected a label, got an empty one in data row 2, column y"),
        ("a,y\n1,0\n2,  \n", "expected a label, got an empty one in data row 2, column y"),
        ("a,y\n1,0\n2,NA\n3,nan\n", "as labels, as all others are, got NA in data row 2"),
        ("a,y\n1,0\n2\n", "expected 2 fields, got 1 in data row 2"),
        ("a,y\n1,0,\n2,1,\n", "expected 2 fields, got 3 in data row 1"),
        ("a,y,\n1,0,\n2,1,\n", "expected a number, got '' in data row 1, column"),
        ("y\n0\n1\n", "expected at least one feature, got none"),
        ("a,y\n", "expected at least one row, got none"),
        ("a,y", "expected at least one row, got none"),
        ("", "expected a line of column names, got an empty file"),
        ("a,b\n1,0\n", "--target: expected one of a, b, got y"),
        ("é,y\n1,0\n".encode("latin-1"), "expected a table, got something else: 'utf-8' codec"),
        ("a,y\n1,é\n".encode("latin-1"), "expected a table, got something else: "),
        ("a,y\n1,0\n".encode("utf-16"), "expected a table, got something else: 'utf-8' codec"),
        ("a,y\r1,0\r", "expected a table, got something else: new-line character"),
    ],
)  # fmt: skip
def test_text_that_is_refused(tmp_path, content, message):
    assert message in refused(text(tmp_path / "a.csv", content))


def test_the_row_of_a_later_batch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_TEXT_BYTES", 64)
    lines = [f"{i},0\n" for i in range(100)]
    for wrong, message in [
        ("x,0\n", "got 'x' in data row 78, column a"),
        ("1,\n", "got an empty one in data row 78, column y"),
        ("1\n", "expected 2 fields, got 1 in data row 78"),
    ]:
        content = "a,y\n" + "".join([*lines[:77], wrong, *lines[77:]])
        assert message in refused(text(tmp_path / "a.csv", content))


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize(
    "columns, message",
    [
        ({"a": [1.0, None], "y": [0, 1]}, "expected a number, got null in data row 2, column a"),
        ({"a": [1.0, math.nan], "y": [0, 1]}, "got NaN or inf in data row 2, column a"),
        ({"a": pa.nulls(2), "y": [0, 1]}, "expected a number, got null in data row 1, column a"),
        ({"a": ["1", "2"], "y": [0, 1]}, "expected numbers, got string in column a"),
        ({"a": [[1], [2]], "y": [0, 1]}, "expected numbers, got list<"),
        ({"a": [datetime.date(2020, 1, 1)] * 2, "y": [0, 1]}, "got date32[day] in column a"),
        ({"a": [1, 2], "y": [0, None]}, "expected a label, got an empty one in data row 2"),
        ({"a": [1, 2], "y": ["u", None]}, "expected a label, got an empty one in data row 2"),
        ({"a": [1, 2], "y": ["u", ""]}, "expected a label, got an empty one in data row 2"),
        ({"a": [1, 2], "y": [0.0, math.nan]}, "expected a label, got an empty one in data row 2"),
        ({"a": [1, 2], "y": pa.nulls(2)}, "expected a label, got an empty one in data row 1"),
        ({"a": [1, 2], "y": [[0], [1]]}, "expected labels, got list<"),
        ({"a": [1, 2], "y": [{"b": 0}, {"b": 1}]}, "got struct<b: int64> in column y"),
        ({"a": [1, 2], "y": [b"\xff", b"u"]}, "Invalid UTF8 payload"),
        ({"a": pa.array([], pa.int8()), "y": pa.array([], pa.int8())}, "expected at least one row"),
        ({"y": [0, 1]}, "expected at least one feature, got none"),
    ],
)  # fmt: skip
def test_columns_that_are_refused(tmp_path, suffix, columns, message):
    assert message in refused(write(tmp_path / f"a{suffix}", columns))


@pytest.mark.parametrize("suffix", BINARY)
def test_repeated_names_are_refused_where_they_are_used(tmp_path, suffix):
    repeated = pa.table([pa.array([1, 2])] * 3 + [pa.array([0, 1])], names=["a", "a", "b", "y"])
    BINARY[suffix](repeated, tmp_path / f"a{suffix}")
    assert "one column a, got 2 of that name" in refused(tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}", features=["b"]).x.tolist() == [[1], [2]]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_no_file_of_that_kind(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert "No such file or directory" in refused(path)
    path.mkdir()
    assert ("expected a file, got" if suffix in BINARY else "Is a directory") in refused(path)
    path.rmdir()
    assert str(path) in refused(text(path, b"\xff\x00 nonsense" * 20))


@pytest.mark.parametrize("suffix", BINARY)
def test_damage_is_noticed_or_harmless(tmp_path, suffix):
    labels = pa.array(["u", "vv"] * 8).dictionary_encode()
    path = tmp_path / f"a{suffix}"
    options = {"compression": "uncompressed"} if suffix == ".feather" else {}
    BINARY[suffix](pa.table({"a": np.arange(16.0), "y": labels}), path, **options)
    content = path.read_bytes()
    assert str(path) in refused(text(path, content[:-10]))
    for place in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[place] ^= 0x80
        path.write_bytes(damaged)
        try:
            read(path)
        except Failure as failure:
            assert "\n" not in str(failure)  # noqa: PT017


def test_damaged_offsets_are_not_followed(tmp_path):
    """Which say where in the memory of a column a text begins and ends."""
    path = tmp_path / "a.feather"
    feather.write_feather(
        pa.table({"a": np.arange(16.0), "y": ["u", "vv"] * 8}), path, compression="uncompressed"
    )
    offsets = np.cumsum([0, *[1, 2] * 8], dtype=np.int32)
    before, after = path.read_bytes().split(offsets.tobytes())
    offsets[5] = 2**30
    path.write_bytes(before + offsets.tobytes() + after)
    assert "expected a table, got something else: " in refused(path)


def test_a_target_of_text_with_a_long_label_takes_no_room_for_each_row(tmp_path):
    labels = ["u" * 100_000, *["v"] * 49_999]
    found = read(write(tmp_path / "a.csv", {"a": range(50_000), "y": labels}))
    assert found.y.nbytes == 8 * 50_000  # as an array of fixed width it would be 20 GB


def test_without_pyarrow(tmp_path):
    path = write(tmp_path / "a.csv", {"a": [1, 2], "y": [0, 1]})
    found = cli("fit", path, "--target", "y", prelude="sys.modules['pyarrow'] = None")
    assert found.returncode == 2
    assert found.stderr == f"fastce fit: {path}: needs pyarrow: python -m pip install pyarrow\n"


def test_pyarrow_is_imported_only_for_tables(tmp_path):
    np.save(tmp_path / "z.npy", np.zeros((2, 2)))
    np.save(tmp_path / "y.npy", np.zeros(2, int))
    check = "import atexit\natexit.register(lambda: print(*sorted(sys.modules)))"
    found = cli("eval", tmp_path / "z.npy", tmp_path / "y.npy", prelude=check)
    assert found.returncode == 0
    assert "pyarrow" not in found.stdout.split()


# --- large files ----------------------------------------------------------------------------------

READ = """
import re, sys, pandas, pyarrow.csv, pyarrow.parquet  # which labels need
from pathlib import Path
from fastce._cli import table
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
x = table.read([Path(sys.argv[1])], table.Wanted("y", True)).x
print(peak() - before - x.nbytes // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("suffix", FORMATS)
def test_reading_takes_little_more_than_the_array(tmp_path, suffix):
    """Of 24 MB of numbers: the array, and at most 100 MB beside it."""
    rows = 150_000
    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.normal(size=rows).round(4) for i in range(20)}
    columns["y"] = rng.integers(0, 3, rows)
    path = tmp_path / f"a{suffix}"
    write(path, columns)
    found = subprocess.run(
        [sys.executable, "-c", READ, path], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 100_000
