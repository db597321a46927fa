"""Where the commands write: files that appear when complete; devices, pipes and links as they are.

And what ends a command early or cannot take what it prints.
"""

import contextlib
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastce.__main__ import main
from fastce._cli import output
from fastce._cli.terminal import Failure
from tests.test_cli import cli

posix = pytest.mark.skipif(sys.platform == "win32", reason="has no such files")

X = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
LABELS = ["é", "z", "é", "z"]

# Commands by their outputs: whatever is in place of OUT is written.
EVAL = ["eval", "logits.npy", "targets.npy", "--grad", "OUT"]
MODEL = ["fit", "data.npz", "--target", "y", "--output", "OUT"]
CURVE = ["fit", "data.npz", "--target", "y", "--curve", "OUT"]
CLASSES = ["predict", "fitted.npz", "x.npy", "--output", "OUT"]
COMMANDS = {"eval": EVAL, "model": MODEL, "curve": CURVE, "classes": CLASSES}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with data and a model."""
    monkeypatch.chdir(tmp_path)
    np.save("logits.npy", np.zeros((4, 3), np.float32))
    np.save("targets.npy", np.array([0, 1, 2, 0]))
    np.save("weight.npy", np.ones(3))
    np.save("x.npy", X)
    np.savez("data.npz", X=X, y=np.array(LABELS))
    np.savez(
        "fitted.npz",
        format=np.array("fastce softmax regression 1"),
        classes=np.array(["z", "é"]),
        coef=np.array([[1.0, 0.0], [0.0, 2.0]]),
        intercept=np.zeros(2),
    )
    return tmp_path


def run(capsys, command, path):
    """Run a command with this output; its status and what it said."""
    status = main([str(path) if word == "OUT" else word for word in command])
    return status, capsys.readouterr()


def check_content(command, content):
    """Whether the bytes are what a command writes, whole."""
    if command is CURVE:
        assert content.startswith(b"\x89PNG")
        assert b"IEND" in content
        return
    found = np.load(io.BytesIO(content))
    if command is EVAL:
        assert found.shape == (4, 3)
    elif command is MODEL:
        assert found["classes"].tolist() == ["z", "é"]
    else:
        assert found.tolist() == ["é", "z", "z", "z"]


def left(folder):
    """Names that no command has been asked to make."""
    made = {"model.npz", "model.png"}
    data = {"logits.npy", "targets.npy", "weight.npy", "x.npy", "data.npz", "fitted.npz"}
    return {path.name for path in folder.iterdir()} - data - made


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


# --- devices, pipes, links ------------------------------------------------------------------------


@posix
def test_a_pipe_gets_what_is_written(here, capsys, command):
    os.mkfifo("pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    status = 2
    while status == 2:  # until the reader is there
        status, said = run(capsys, command, "pipe")
    reader.join()
    assert status == 0, said.err
    assert Path("pipe").is_fifo()
    check_content(command, got[0])
    assert left(here) == {"pipe"}


@posix
def test_a_pipe_that_nobody_reads(here, capsys, command):
    os.mkfifo("pipe")
    status, said = run(capsys, command, "pipe")
    assert (status, said.out) == (2, "")
    assert said.err.endswith(": pipe: expected somebody who reads the pipe, got nobody\n")
    assert Path("pipe").is_fifo()
    assert {path.name for path in here.iterdir()} & {"model.npz", "model.png"} == set()


@posix
def test_a_device_stays_one(here, capsys, command):
    before = Path(os.devnull).stat()
    status, said = run(capsys, command, os.devnull)
    assert status == 0, said.err
    assert stat.S_ISCHR(before.st_mode)
    assert os.path.samestat(before, Path(os.devnull).stat())


@posix
def test_both_outputs_may_be_thrown_away(here, capsys):
    status, said = run(capsys, [*MODEL, "--curve", os.devnull], os.devnull)
    assert status == 0, said.err
    assert left(here) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
def test_a_full_device(here, capsys, command):
    status, said = run(capsys, command, "/dev/full")
    assert status == 2
    assert said.err.endswith(": /dev/full: No space left on device\n")
    assert said.err.count("\n") == 1


@posix
def test_a_socket_is_refused(here, capsys, command):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        status, said = run(capsys, command, "socket")
    assert status == 2
    assert "expected a file, a device or a pipe, got the socket socket" in said.err


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="has no such name")
def test_standard_output_is_written_in_its_order(here):
    """A file it goes to is neither replaced nor written from its start."""
    command = "echo before; {} -m fastce predict fitted.npz x.npy --output /dev/stdout; echo after"
    with Path("log").open("wb") as log:
        subprocess.run(["sh", "-c", command.format(sys.executable)], stdout=log, check=True)
    content = Path("log").read_bytes()
    assert content.startswith(b"before\n")
    assert content.endswith(b"after\n")
    check_content(CLASSES, content[len(b"before\n") : -len(b"after\n")])


@posix
def test_a_link_is_written_through(here, capsys, command):
    Path("file").write_text("old")
    Path("file").chmod(0o640)
    Path("link").symlink_to("file")
    status, said = run(capsys, command, "link")
    assert status == 0, said.err
    assert Path("link").is_symlink()
    check_content(command, Path("file").read_bytes())
    assert stat.S_IMODE(Path("file").stat().st_mode) == 0o640
    assert left(here) == {"file", "link"}


@posix
def test_links_to_what_is_not_there(here, capsys):
    Path("link").symlink_to("file")
    assert run(capsys, EVAL, "link")[0] == 0
    check_content(EVAL, Path("file").read_bytes())
    Path("loop").symlink_to("loop")
    status, said = run(capsys, EVAL, "loop")
    assert (status, said.err[:17]) == (2, "fastce eval: loop")
    assert Path("loop").is_symlink()
    Path("lost").symlink_to("missing/file")
    status, said = run(capsys, EVAL, "lost")
    assert (status, said.err) == (2, "fastce eval: lost: No such file or directory\n")


def test_a_new_file_has_the_mode_of_any(here, capsys, command):
    Path("file").write_text("")
    assert run(capsys, command, "new")[0] == 0
    assert Path("new").stat().st_mode == Path("file").stat().st_mode


def test_a_file_that_may_not_be_written_is_not_replaced(here, capsys, command, monkeypatch):
    Path("file").write_text("precious")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # of which root has no need
    status, said = run(capsys, command, "file")
    assert (status, Path("file").read_text()) == (2, "precious")
    assert said.err.endswith(": file: Permission denied\n")


def test_a_name_as_long_as_names_can_be(here, capsys, command):
    assert run(capsys, command, "n" * 250)[0] == 0
    assert left(here) == {"n" * 250}


# --- no output is an input ------------------------------------------------------------------------


@pytest.fixture
def spellings(here):
    """Functions that give another name to a file."""

    def link(make):
        def spell(name):
            make(Path("other"), Path(name).resolve())
            return "other"

        return spell

    Path("folder").mkdir()
    return {
        "same": lambda name: name,
        "dots": lambda name: f"folder/../{name}",
        "full": lambda name: Path(name).resolve(),
        "hard link": link(Path.hardlink_to),
        "symbolic link": link(Path.symlink_to),
    }


@pytest.mark.parametrize("spelling", ["same", "dots", "full", "hard link", "symbolic link"])
@pytest.mark.parametrize(
    "command, name",
    [
        ([*EVAL, "--weight", "weight.npy"], "logits.npy"),
        ([*EVAL, "--weight", "weight.npy"], "targets.npy"),
        ([*EVAL, "--weight", "weight.npy"], "weight.npy"),
        (MODEL, "data.npz"),
        (CURVE, "data.npz"),
        (CLASSES, "x.npy"),
        (CLASSES, "fitted.npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_no_output_is_an_input(here, capsys, spellings, spelling, command, name):
    before = Path(name).read_bytes()
    status, said = run(capsys, command, spellings[spelling](name))
    assert status == 2
    assert ": expected a file of its own, got " in said.err
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("curve", ["m", "./m", "folder/../m"])
def test_no_output_is_another(here, capsys, there, curve):
    Path("folder").mkdir()
    if there:
        Path("m").write_text("old")
    status, said = run(capsys, [*MODEL, "--curve", curve], "m")
    assert status == 2
    assert "--curve: expected a file of its own, got " in said.err
    assert left(here) == {"folder"} | ({"m"} if there else set())


def test_outputs_that_cannot_be_are_refused_before_anything_is_read(here, capsys, command):
    option = command[-2]
    for path, message in [
        ("no/file", f"{option}: expected a folder that exists, got no"),
        ("x.npy/file", f"{option}: expected a folder that exists, got x.npy"),
        (".", f"{option}: expected a file of its own, got ."),
    ]:
        status, said = run(capsys, command, path)
        assert (status, said.out) == (2, "")
        assert said.err.endswith(f": {message}\n")


# --- complete or not at all -----------------------------------------------------------------------


def test_what_ends_badly_leaves_nothing(here):
    Path("file").write_text("old")
    for error in (KeyboardInterrupt, SystemExit, Failure("wrong")):
        with contextlib.suppress(BaseException), output.written(Path("file")) as file:
            file.write(b"half")
            raise error
        assert left(here) == {"file"}
        assert Path("file").read_text() == "old"


SIGNALS = """
import os, pathlib, signal, numpy
name, *later = sys.argv.pop().split()
read, remove = numpy.load, pathlib.Path.unlink
def load(path, **options):
    assert len([*pathlib.Path().glob(".model.*.tmp")]) == 2
    os.kill(os.getpid(), getattr(signal, name))
    return read(path, **options)
def unlink(path):
    for name in later:  # while the first one's traces are removed
        os.kill(os.getpid(), getattr(signal, name))
    remove(path)
numpy.load, pathlib.Path.unlink = load, unlink
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@posix
@pytest.mark.parametrize(
    "names, status",
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGHUP SIGTERM SIGINT", 129)],
)
def test_what_ends_a_command_leaves_nothing(here, names, status):
    """In the middle of a fit, with both outputs begun under other names; a second signal too."""
    found = cli("fit", "data.npz", "--target", "y", names, prelude=SIGNALS)
    assert found.returncode == status, found.stderr
    assert found.stdout == ""
    assert found.stderr == ("fastce fit: interrupted\n" if names == "SIGINT" else "")
    assert left(here) == set()
    assert not Path("model.npz").exists()


@posix
def test_a_signal_that_is_ignored_stays_so(here):
    """As `nohup` has it."""
    ignored = SIGNALS + "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    found = cli("fit", "data.npz", "--target", "y", "SIGHUP", prelude=ignored)
    assert found.returncode == 0, found.stderr
    assert Path("model.npz").exists()


@posix
def test_signals_are_handled_as_before_when_a_command_has_ended(here, capsys):
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(name) for name in names]
    for path in ("g.npy", "no/g.npy"):
        run(capsys, EVAL, path)
        assert [signal.getsignal(name) for name in names] == before


def test_a_command_in_another_thread(here, capsys):
    """Which may not ask for signals."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run(capsys, EVAL, "g.npy")[0]))
    thread.start()
    thread.join()
    assert found == [0]


@posix
def test_a_signal_while_a_pipe_is_waited_for(here):
    os.mkfifo("p.csv")
    command = [sys.executable, "-m", "fastce", "fit", "p.csv", "--target", "y"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with Path("p.csv").open("w") as pipe:
            pipe.write("a,y\n1,0\n2,1\n")
            pipe.flush()
            for _ in range(12):  # one that comes right before a read is heard after it only
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                    break
            assert process.returncode == 143
    finally:
        process.kill()
        process.communicate()
    assert left(here) == {"p.csv"}


# --- what is printed ------------------------------------------------------------------------------


def shell(line, **environment):
    """Run `fastce predict fitted.npz x.npy` with what a shell can do to it."""
    return subprocess.run(
        ["sh", "-c", line.format(f"{sys.executable} -m fastce predict fitted.npz x.npy")],
        capture_output=True, env=os.environ | environment, check=False,
    )  # fmt: skip


@posix
@pytest.mark.parametrize("line", ["{} >&-", "{} <&- >&- 2>&-", "{} --output c.npy >&-"])
def test_an_output_that_is_closed_loses_what_it_is_given(here, line):
    found = shell(line)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")
    if "c.npy" in line:
        check_content(CLASSES, Path("c.npy").read_bytes())


@posix
def test_a_failure_that_nobody_can_be_told(here):
    for line in ("{} --output no/c.npy 2>&-", "{} --output no/c.npy 2>/dev/full"):
        found = shell(line)
        assert (found.returncode, found.stdout) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full(here, unbuffered):
    found = shell("{} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert found.returncode == 2
    assert found.stderr == b"fastce predict: standard output: No space left on device\n"
    found = shell("{} --help >/dev/full", PYTHONUNBUFFERED="")
    assert found.returncode == 2
    assert found.stderr == b"fastce: standard output: No space left on device\n"


@posix
def test_an_output_that_has_not_the_letters_of_a_label(here):
    found = shell("{}", PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout == b"\\xe9\nz\nz\nz\n"
    assert shell("{}", PYTHONIOENCODING="utf-8").stdout == "é\nz\nz\nz\n".encode()


def test_what_a_file_contains_does_not_break_the_line(here, capsys):
    Path("a.csv").write_text('"a\nb\x1b[1m\u2028",y\nz,0\n')
    assert main(["fit", "a.csv", "--target", "y"]) == 2
    err = capsys.readouterr().err
    assert err.endswith("got 'z' in data row 1, column a\\nb\\x1b[1m\\u2028\n")
    assert len(err.splitlines()) == 1


def test_an_output_that_is_no_stream_of_bytes(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["predict", "fitted.npz", "x.npy"]) == 0
    assert sys.stdout.getvalue() == "é\nz\nz\nz\n"


def test_the_output_is_as_before_when_a_command_has_ended(here, capsys):
    before = sys.stdout.errors
    run(capsys, CLASSES, "c.npy")
    assert sys.stdout.errors == before
