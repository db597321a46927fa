"""``fastce fit`` and ``fastce predict``, end to end, and every way their input can be wrong."""

import json
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from sklearn.datasets import dump_svmlight_file, load_iris

from fastce.__main__ import main
from fastce._cli import npy
from fastce.sklearn import SoftmaxRegression
from tests.test_cli import cli

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with the same data in every format."""
    monkeypatch.chdir(tmp_path)
    lines = ["a,b,kind,c,d"]
    lines += [f"{r[0]},{r[1]},{k},{r[2]},{r[3]}" for r, k in zip(X, NAMES, strict=True)]
    (tmp_path / "iris.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "iris.tsv").write_text("\n".join(lines).replace(",", "\t") + "\n")
    columns = dict(zip("abcd", X.T, strict=True)) | {"kind": NAMES}
    parquet.write_table(pa.table(columns), tmp_path / "iris.parquet")
    feather.write_feather(pa.table(columns), tmp_path / "iris.feather")
    np.savez(tmp_path / "iris.npz", X=X, kind=NAMES)
    np.savez(tmp_path / "two.npz", first=X, kind=Y)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    np.save(tmp_path / "h.npy", np.eye(3)[Y])
    dump_svmlight_file(X, Y, str(tmp_path / "iris.svmlight"), zero_based=False)
    return tmp_path


FOREIGN = """
import warnings
from fastce.sklearn import SoftmaxRegression
fit = SoftmaxRegression.fit
def warns(model, x, y):
    for category in (DeprecationWarning, FutureWarning):
        warnings.warn_explicit(f"of another library: {category.__name__}", category, "theirs.py", 1)
    return fit(model, x, y)
SoftmaxRegression.fit = warns
"""


def test_warnings_that_are_not_of_the_fit_are_shown_as_python_shows_them(here):
    found = cli("fit", "x.npy", "y.npy", "--json", prelude=FOREIGN)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["warnings"] == []
    assert "theirs.py:1: FutureWarning: of another library" in found.stderr
    assert "DeprecationWarning" not in found.stderr


def made(folder):
    """What is there beside the data."""
    data = {"two.npz", "x.npy", "y.npy", "h.npy"}
    return {path.name for path in folder.iterdir() if path.stem != "iris"} - data


@pytest.mark.parametrize(
    "arguments",
    [
        ["iris.csv", "--target", "kind"],
        ["iris.tsv", "--target", "kind"],
        ["iris.parquet", "--target", "kind"],
        ["iris.feather", "--target", "kind"],
        ["iris.npz", "--target", "kind"],
        ["two.npz", "--target", "kind"],
        ["x.npy", "y.npy"],
        ["x.npy", "h.npy"],
        ["iris.svmlight"],
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_every_format(here, capsys, arguments):
    assert main(["fit", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    want = SoftmaxRegression().fit(X, Y)
    assert found["log_likelihood"] == pytest.approx(want.log_likelihood(X, Y), rel=1e-6)
    assert found["loss"] == pytest.approx(-found["log_likelihood"] / 150)
    assert (found["rows"], found["features"], found["classes"]) == (150, 4, 3)
    assert found["accuracy"] == want.score(X, Y)
    assert found["warnings"] == []
    assert made(here) == {"model.npz", "model.png"}
    assert (here / "model.png").read_bytes().startswith(b"\x89PNG")
    with np.load("model.npz", allow_pickle=False) as model:
        np.testing.assert_allclose(model["coef"], want.coef_, atol=1e-4)

    assert main(["predict", "model.npz", arguments[0]]) == 0
    printed = capsys.readouterr().out.split()
    names = NAMES if "kind" in arguments and arguments[0] != "two.npz" else Y.astype(str)
    assert np.mean(np.array(printed) == names) == found["accuracy"]


def test_predictions_and_probabilities_in_a_file(here, capsys):
    main(["fit", "iris.csv", "--target", "kind"])
    assert main(["predict", "model.npz", "iris.csv", "--output", "p.npy", "--probabilities"]) == 0
    want = SoftmaxRegression().fit(X, Y)
    np.testing.assert_allclose(np.load("p.npy"), want.predict_proba(X), atol=1e-4)
    assert main(["predict", "model.npz", "iris.csv", "--output", "c.npy"]) == 0
    assert set(np.load("c.npy").tolist()) == set(NAMES)
    assert "150 predictions written to c.npy" in capsys.readouterr().out


def test_probabilities_as_text(here, capsys):
    """Printed, or in a .csv: a column for each class, named by it; or classes alone."""
    main(["fit", "iris.csv", "--target", "kind"])
    main(["predict", "model.npz", "iris.csv", "--output", "p.npy", "--probabilities"])
    capsys.readouterr()
    assert main(["predict", "model.npz", "iris.csv", "--probabilities"]) == 0
    printed = capsys.readouterr().out
    names, *rows = [line.split(",") for line in printed.splitlines()]
    assert names == ["setosa", "versicolor", "virginica"]
    np.testing.assert_array_equal(np.array(rows, float), np.load("p.npy"))
    main(["predict", "model.npz", "iris.csv", "--probabilities", "--output", "p.csv"])
    assert (here / "p.csv").read_text() == printed
    main(["predict", "model.npz", "iris.csv", "--output", "c.csv"])
    (target, *classes) = (here / "c.csv").read_text().split()
    assert target == "kind"
    assert classes == NAMES[np.load("p.npy").argmax(1) * 50].tolist()
    # and they are what `eval` takes
    np.save("y3.npy", np.eye(3)[Y])
    assert main(["eval", "y3.npy", "p.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"] == []


def test_predictions_are_made_some_rows_at_a_time(here, capsys, monkeypatch):
    main(["fit", "iris.csv", "--target", "kind"])
    outputs = {"p.npy": ["--probabilities"], "c.npy": [], "c.csv": []}
    found = []
    for size in (npy.PIECE_BYTES, 8 * 3 * 7):  # all rows, and 7
        monkeypatch.setattr(npy, "PIECE_BYTES", size)
        for name, arguments in outputs.items():
            main(["predict", "model.npz", "iris.csv", "--output", name, *arguments])
        capsys.readouterr()
        main(["predict", "model.npz", "iris.csv"])
        printed = capsys.readouterr().out
        found.append((np.load("p.npy"), np.load("c.npy"), (here / "c.csv").read_text(), printed))
    whole, pieces = found
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-12)  # products may be rounded otherwise
    assert pieces[1].tolist() == whole[1].tolist() == whole[3].split()
    assert pieces[2:] == whole[2:]


def test_columns_are_found_by_name(here, capsys):
    main(["fit", "iris.csv", "--target", "kind"])
    shuffled = "d,c,other,b,a\n" + "\n".join(f"{r[3]},{r[2]},x,{r[1]},{r[0]}" for r in X)
    (here / "new.csv").write_text(shuffled)
    capsys.readouterr()
    main(["predict", "model.npz", "new.csv"])
    first = capsys.readouterr().out
    main(["predict", "model.npz", "iris.csv"])
    assert capsys.readouterr().out == first


def test_the_report(here):
    found = cli("fit", "iris.csv", "--target", "kind", "--l2", "0.1", "--solver", "newton-cg")
    assert found.returncode == 0, found.stderr
    lines = dict(line.split("  ", 1) for line in found.stdout.splitlines()[:8])
    assert lines["rows"].strip() == "150"
    assert lines["accuracy"].strip().endswith("%")
    assert lines["iterations"].strip().isdigit()
    assert found.stdout.endswith("model written to model.npz, curve to model.png\n")


def test_notes_of_the_fit_are_shown(here, capsys):
    main(["fit", "iris.csv", "--target", "kind", "--max-iter", "2"])
    assert "\nnote: max_iter: 2 iterations were not enough" in capsys.readouterr().out


def test_progress_if_asked_for(here, capsys):
    main(["fit", "x.npy", "y.npy", "--verbose"])
    assert "iteration    1  objective" in capsys.readouterr().err


# Wrong input --------------------------------------------------------------------------------------


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def nothing(folder):
    pass


def archive(**arrays):
    return lambda folder: np.savez(folder / "o.npz", **({"X": X, "y": Y} | arrays))


def flipped(folder):
    np.savez(folder / "flipped.npz", X=X, y=Y)
    content = bytearray((folder / "flipped.npz").read_bytes())
    content[250] ^= 255
    (folder / "flipped.npz").write_bytes(content)


def members(folder):
    with zipfile.ZipFile(folder / "members.npz", "w") as file:
        file.writestr("X.npy", b"text")
        file.writestr("y.npy", b"text")


def renamed(old, new):
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def with_nan(folder):
    x = X.copy()
    x[7, 2] = np.nan
    np.save(folder / "nan.npy", x)


@pytest.mark.parametrize(
    "prepare, arguments, message",
    [
        (nothing, ["iris.csv"], "--target: expected the name of what is to be learnt"),
        (nothing, ["iris.csv", "--target", "x"], "expected one of a, b, kind, c, d, got x"),
        (nothing, ["iris.npz", "--target", "x"], "--target: expected one of X, kind, got x"),
        (nothing, ["iris.txt", "--target", "x"], ".svm, .libsvm, .npz or .npy, got .txt file"),
        (nothing, ["no.csv", "--target", "x"], "no.csv: No such file or directory"),
        (nothing, ["x.npy"], "DATA: expected two files, X.npy and y.npy, got one"),
        (nothing, ["x.npy", "y.npy", "h.npy"], "DATA: expected one file, or X.npy and y.npy"),
        (nothing, ["iris.csv", "iris.npz", "--target", "k"], "DATA: expected one file"),
        (nothing, ["y.npy", "x.npy"], "expected features of shape (rows, features), got (150,)"),
        (with_nan, ["nan.npy", "y.npy"], "expected finite features, got NaN or inf at row 7"),
        (nothing, ["x.npy", "y.npy", "--l2", "-1"], "l2: expected a number, at least 0, got -1.0"),
        (nothing, ["x.npy", "y.npy", "--output", "no/m.npz"], "--output: expected a folder"),
        (nothing, ["x.npy", "y.npy", "--curve", "no/m.png"], "--curve: expected a folder"),
        (nothing, ["x.npy", "y.npy", "--output", "x.npy"], "--output: expected a file"),
        (nothing, ["x.npy", "y.npy", "--output", "m", "--curve", "m"], "--curve: expected a file"),
        (nothing, ["x.npy", "y.npy", "--output", "."], "a file of its own, got ."),
        (text("e.csv", ""), ["e.csv", "--target", "y"], "expected a line of column names"),
        (text("e.csv", "a,y\n"), ["e.csv", "--target", "y"], "expected at least one row, got none"),
        (text("e.csv", "a,y\n1,0\n2\n"), ["e.csv", "--target", "y"], "expected 2 fields, got 1"),
        (text("e.csv", "a,y\n1,0\nz,1\n"), ["e.csv", "--target", "y"],
         "expected a number, got 'z' in data row 2, column a"),
        (text("e.csv", "a,y\n1,0\n2,0\n"), ["e.csv", "--target", "y"], "at least 2 classes"),
        (text("e.npz", "nonsense"), ["e.npz", "--target", "y"], "expected arrays of numbers, got"),
        (text("e.npy", "nonsense"), ["e.npy", "y.npy"], "expected an array of numbers, got"),
        (text("e.svmlight", "1 a:b\n"), ["e.svmlight"], "expected svmlight format, got"),
        (lambda folder: np.save(folder / "s.npy", X[:5]), ["s.npy", "y.npy"],
         "expected a target for each of 5 rows, got shape (150,)"),
        (lambda folder: np.save(folder / "o.npy", X.astype(object)), ["o.npy", "y.npy"],
         "expected an array of numbers, got damaged or other data: "),
        (lambda folder: np.savez(folder / "o.npz", X=X.astype(object), y=Y),
         ["o.npz", "--target", "y"], "Object arrays cannot be loaded"),
        (lambda folder: np.savez(folder / "o.npz", A=X, B=X, y=Y), ["o.npz", "--target", "y"],
         "expected an array X, or one beside the target, got A, B, y"),
        (lambda folder: np.save(folder / "s.npy", X.astype(str)), ["s.npy", "y.npy"],
         "expected numbers as features, got <U"),
        (archive(y=3), ["o.npz", "--target", "y"], "a target for each of 150 rows, got shape ()"),
        (archive(y=Y.astype("S")), ["o.npz", "--target", "y"],
         "expected a target of numbers or text, got |S"),
        (archive(y=Y + 0j), ["o.npz", "--target", "y"], "numbers or text, got complex128"),
        (archive(y=np.where(Y == 1, np.nan, Y)), ["o.npz", "--target", "y"],
         "expected a label, got an empty one or NaN at row 50"),
        (archive(y=np.where(Y == 1, "", "a")), ["o.npz", "--target", "y"], "or NaN at row 50"),
        (archive(y=np.where(Y[:, None] == 1, np.nan, np.eye(3)[Y])), ["o.npz", "--target", "y"],
         "expected a label, got an empty one or NaN at row 50"),
        (archive(X=X[:, :0]), ["o.npz", "--target", "y"], "at least one feature, got none"),
        (flipped, ["flipped.npz", "--target", "y"], "got damaged or other data: Bad CRC-32"),
        (members, ["members.npz", "--target", "y"], "expected an array X, got something else"),
        (renamed("x.npy", "a.npz"), ["a.npz", "--target", "y"], "expected an archive of arrays"),
        (renamed("iris.npz", "a.npy"), ["a.npy", "y.npy"], "a single array, got an archive"),
        (renamed("iris.npz", "a.npy"), ["x.npy", "a.npy"], "a single array, got an archive"),
        (text("e.svmlight", "0 1:1\n1 99999999999:1\n"), ["e.svmlight"],
         "expected svmlight format, got damaged or other data: value too large"),
        (text("e.svmlight", "nan 1:1\n1 1:1\n"), ["e.svmlight"], "or NaN at row 0"),
        (text("e.svmlight", "0 1:nan\n1 1:1\n"), ["e.svmlight"], "expected finite features"),
        (text("e.svmlight", ""), ["e.svmlight"], "expected at least one row, got none"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_status_2_one_line_and_no_file(
    here, capsys, prepare, arguments, message
):
    prepare(here)
    before = made(here)
    assert main(["fit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastce fit: ")
    assert message in err
    assert err.count("\n") == 1
    assert made(here) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.npz", "x.npy"], "no.npz: No such file"),
        (["iris.npz", "x.npy"], "iris.npz: expected a model that fastce fit has saved"),
        (["x.npy", "x.npy"], "x.npy: expected a model that fastce fit has saved"),
        (["model.npz", "iris.npz", "--output", "no/p.npy"], "--output: expected a folder"),
        (["model.npz", "x.npy", "--output", "x.npy"], "--output: expected a file of its own"),
        (["model.npz", "narrow.npy"], "narrow.npy: expected 4 features, as the model has, got 3"),
        (["model.npz", "short.csv"], "short.csv: expected one column b, got a"),
    ],
)
def test_bad_input_of_predict(here, capsys, arguments, message):
    main(["fit", "iris.csv", "--target", "kind"])
    np.save("narrow.npy", X[:, :3])
    (here / "short.csv").write_text("a\n1\n")
    capsys.readouterr()
    before = made(here)
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert made(here) == before


MODEL = {
    "format": np.array("fastce softmax regression 1"),
    "classes": np.array(["u", "v"]),
    "coef": np.zeros((2, 4)),
    "intercept": np.zeros(2),
    "features": np.array(["a", "b", "c", "d"]),
    "target": np.array("kind"),
}


@pytest.mark.parametrize(
    "damage",
    [
        {"format": np.array("another")},
        {"format": np.array(["fastce softmax regression 1"] * 2)},
        {"classes": np.array([["u"], ["v"]])},
        {"classes": np.array(["u", None])},
        {"classes": np.array([b"u", b"v"])},
        {"classes": np.array("u")},
        {"classes": np.array(["u", "v", "w"])},
        {"coef": np.full((2, 4), np.nan)},
        {"coef": np.zeros((2, 4), "U3")},
        {"coef": np.zeros((2, 4, 1))},
        {"coef": np.zeros(4)},
        {"intercept": np.full(2, np.inf)},
        {"intercept": np.zeros((2, 1))},
        {"intercept": np.array(["0", "0"])},
        {"features": np.array(["a", "b"])},
        {"features": np.array([["a", "b", "c", "d"]])},
        {"features": np.arange(4)},
        {"target": np.array(["kind", "other"])},
        {"coef": None},
    ],
    ids=lambda damage: " ".join(damage),
)
def test_a_damaged_model_is_one_line(here, capsys, damage):
    arrays = {name: array for name, array in (MODEL | damage).items() if array is not None}
    np.savez("m.npz", **arrays)
    assert main(["predict", "m.npz", "iris.csv"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "fastce predict: m.npz: expected a model that fastce fit has saved\n")


def test_any_damage_to_the_file_of_a_model_is_noticed_or_harmless(here, capsys):
    np.savez("m.npz", **MODEL)
    content = (here / "m.npz").read_bytes()
    damaged = [content[:-1], content[:200], b"", b"PK"]
    damaged += [
        content[:k] + bytes([content[k] ^ 255]) + content[k + 1 :]
        for k in range(0, len(content), 5)
    ]
    for each in damaged:
        (here / "m.npz").write_bytes(each)
        assert main(["predict", "m.npz", "x.npy"]) in (0, 2)
        assert capsys.readouterr().err.count("\n") <= 1


def test_an_undamaged_model(here, capsys):
    np.savez("m.npz", **MODEL)
    assert main(["predict", "m.npz", "iris.parquet"]) == 0
    assert capsys.readouterr().out == "u\n" * 150


def test_data_without_labels_can_be_predicted(here, capsys):
    """Labels that are not known, as files of this kind write them, are not looked at."""
    main(["fit", "iris.svmlight"])
    lines = (here / "iris.svmlight").read_text().splitlines()
    unknown = "\n".join("nan" + line[line.index(" ") :] for line in lines)
    (here / "new.svmlight").write_text(unknown)
    capsys.readouterr()
    assert main(["predict", "model.npz", "new.svmlight"]) == 0
    assert len(capsys.readouterr().out.split()) == 150


def test_labels_beyond_64_bits(here, capsys):
    big = [2**64, 7]
    (here / "id.csv").write_text(f"a,y\n1,{big[0]}\n2,{big[1]}\n3,{big[1]}\n")
    assert main(["fit", "id.csv", "--target", "y"]) == 0
    assert np.load("model.npz")["classes"].tolist() == [str(2**64), "7"]
    np.savez("id.npz", X=X[:3], y=np.array([2**63, 7, 7], np.uint64))
    assert main(["fit", "id.npz", "--target", "y"]) == 0
    assert np.load("model.npz")["classes"].tolist() == [7, 2**63]


def test_no_memory_is_one_line(here, capsys, monkeypatch):
    def none(model, x, y):
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(SoftmaxRegression, "fit", none)
    assert main(["fit", "x.npy", "y.npy"]) == 2
    assert capsys.readouterr().err == "fastce fit: out of memory: Unable to allocate 1 TiB\n"
    assert made(here) == set()


def test_a_failure_while_writing_leaves_nothing(here, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["fit", "x.npy", "y.npy"]) == 2
    assert capsys.readouterr().err == "fastce fit: model.png: No space left on device\n"
    assert made(here) == set()


def test_an_earlier_model_survives_a_failure(here, monkeypatch):
    (here / "model.npz").write_text("precious")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    assert main(["fit", "x.npy", "y.npy"]) == 130
    assert (here / "model.npz").read_text() == "precious"
    assert made(here) == {"model.npz"}


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_without_the_extra(here, package):
    found = cli("fit", "x.npy", "y.npy", prelude=f"sys.modules['{package}'] = None")
    assert found.returncode == 2
    assert found.stderr.startswith(f"fastce fit: needs {package}: python -m pip install")
