"""``fastce fit`` and ``fastce predict``, end to end, and every way their input can be wrong."""

import json

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file, load_iris

from fastce.__main__ import main
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
    data = {"iris.csv", "iris.npz", "two.npz", "x.npy", "y.npy", "h.npy", "iris.svmlight"}
    return {path.name for path in folder.iterdir()} - data


@pytest.mark.parametrize(
    "arguments",
    [
        ["iris.csv", "--target", "kind"],
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
        (lambda folder: np.save(folder / "o.npy", X.astype(object)), ["o.npy", "y.npy"], "Python objects"),
        (lambda folder: np.savez(folder / "o.npz", X=X.astype(object), y=Y),
         ["o.npz", "--target", "y"], "Object arrays cannot be loaded"),
        (lambda folder: np.savez(folder / "o.npz", A=X, B=X, y=Y), ["o.npz", "--target", "y"],
         "expected an array X, or one beside the target, got A, B, y"),
        (lambda folder: np.save(folder / "s.npy", X.astype(str)), ["s.npy", "y.npy"],
         "expected numbers as features, got <U"),
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
