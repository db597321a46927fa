"""The command line: reads the arguments and hands them to one module of `fastce._cli`."""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastce._cli import terminal

_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the name of the program; by default that of this process.

    Returns
    -------
    int
        0 when all went well, 1 when a check of the command failed or nobody reads the output, 2
        when the input was wrong or an output could not be written, 130 when interrupted.
    """
    with terminal.streams(), _ended_by_signals():
        said = "fastce: "
        try:
            try:
                options = _parser().parse_args(arguments)
            finally:
                sys.stdout.flush()  # of the help
            said = f"fastce {options.command}: "
            # Imported only when chosen: `info` must not need what `demo` needs.
            command = importlib.import_module(f"fastce._cli.{options.module}")
            status: int = command.run(options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            terminal.say(said + "interrupted")
            return _INTERRUPTED
        except terminal.Failure as failure:
            terminal.say(said + str(failure))
            return 2
        except MemoryError as error:
            terminal.say(f"{said}out of memory: {error}")
            return 2
        except BrokenPipeError:  # whoever read the output has gone, as in `| head`
            terminal.abandon_output()
            return 1
        except OSError as error:  # of the output, for what is wrong with a file is a Failure
            terminal.abandon_output()
            terminal.say(f"{said}{error.filename or 'standard output'}: {error.strerror}")
            return 2
        return status


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let what ends programs be an exception, so that this one cleans up behind itself."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may ask for signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not known on Windows
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.getsignal(number)

    def end(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # cleaning up is short, and is not to be disturbed
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastce", description="Exact, fast softmax cross-entropy for NumPy arrays."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fit classifiers by maximum likelihood, with checks")
    demo.set_defaults(module="demo")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("fastce-demo.png"),
        metavar="FILE.png",
        help="where the picture goes (default: %(default)s)",
    )
    demo.add_argument(
        "--quick", action="store_true", help="smaller samples and arrays: a few seconds in all"
    )

    evaluate = commands.add_parser(
        "eval",
        help="loss, perplexity and accuracy of stored logits, of any size",
        description="Loss, perplexity and accuracy of logits stored in a .npy file of any size. "
        "It is read in pieces, at most 300 MB of memory at a time. Tables (.csv, .tsv, .parquet, "
        ".feather) are copied into a temporary file first.",
    )
    evaluate.set_defaults(module="evaluate")
    evaluate.add_argument(
        "logits", type=Path, metavar="LOGITS", help="a .npy, or a table with a column per class"
    )
    evaluate.add_argument(
        "targets",
        type=Path,
        nargs="?",
        metavar="TARGETS",
        help="integers shaped like the logits without the class axis, or probabilities shaped "
        "like the logits: a .npy, or a table of one column or as many as classes",
    )
    evaluate.add_argument(
        "--target", metavar="COLUMN", help="integers in the table of the logits, for TARGETS"
    )
    evaluate.add_argument(
        "--axis", type=int, default=-1, help="class axis of the logits (default: the last)"
    )
    evaluate.add_argument("--weight", type=Path, metavar="FILE.npy", help="one weight per class")
    evaluate.add_argument(
        "--ignore-index",
        type=int,
        default=-100,
        metavar="INDEX",
        help="target of rows to leave out (default: %(default)s)",
    )
    evaluate.add_argument("--label-smoothing", type=float, default=0.0, metavar="E")
    evaluate.add_argument(
        "--reduction",
        choices=("mean", "sum"),
        default="mean",
        help="of the loss and of the gradient (default: %(default)s)",
    )
    evaluate.add_argument(
        "--grad",
        type=Path,
        metavar="OUT.npy",
        help="also write the gradient with respect to LOGITS",
    )
    evaluate.add_argument(
        "--dtype",
        choices=("bfloat16",),
        help="read two-byte records as bfloat16: NumPy stores that type without its name",
    )
    evaluate.add_argument(
        "--json", action="store_true", help="one JSON object, null for NaN or inf"
    )

    _add_fit(commands)

    info = commands.add_parser("info", help="versions, processor, threads, cache")
    info.set_defaults(module="info")

    warmup = commands.add_parser("warmup", help="compile the usual kernels into the cache")
    warmup.set_defaults(module="warmup")
    warmup.add_argument(
        "--dtype",
        nargs="+",
        choices=("float64", "float32", "float16", "bfloat16"),
        help="of the logits (default: float32 float64; for CUDA float32 bfloat16)",
    )
    warmup.add_argument(
        "--cuda",
        nargs="*",
        metavar="sm_90",
        help="the CUDA kernels instead, for these architectures (default: that of device 0); "
        "needs no device if one is named",
    )
    return parser


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="softmax regression of a data set: fit, report, save",
        description="Fit a softmax regression by (penalised) maximum likelihood; report it, save "
        "the model as .npz and the curve of the objective as .png.",
    )
    fit.set_defaults(module="fit")
    fit.add_argument(
        "data",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="a table (.csv, .tsv, .parquet, .feather), an .npz with X and the target, a .svmlight "
        "file, or two files X.npy y.npy",
    )
    fit.add_argument("--target", metavar="COLUMN", help="of the table, or array of the .npz")
    fit.add_argument("--output", type=Path, default=Path("model.npz"), metavar="MODEL.npz")
    fit.add_argument("--curve", type=Path, default=Path("model.png"), metavar="CURVE.png")
    fit.add_argument("--l2", type=float, default=1.0, help="penalty; 0 for maximum likelihood")
    fit.add_argument("--solver", choices=("lbfgs", "newton-cg"), default="lbfgs")
    fit.add_argument("--tol", type=float, default=1e-6, help="of the gradient (default: 1e-6)")
    fit.add_argument("--max-iter", type=int, default=1000, metavar="N")
    fit.add_argument("--verbose", action="store_true", help="show progress")
    fit.add_argument("--json", action="store_true", help="one JSON object")

    predict = commands.add_parser("predict", help="classes of the rows of a data set, by a model")
    predict.set_defaults(module="predict")
    predict.add_argument("model", type=Path, metavar="MODEL.npz")
    predict.add_argument("data", type=Path, nargs=1, metavar="DATA", help="as for fit")
    predict.add_argument(
        "--output",
        type=Path,
        metavar="OUT.npy",
        help="where they go, instead of being printed; text if it is a .csv",
    )
    predict.add_argument(
        "--probabilities", action="store_true", help="a column for each class, in place of classes"
    )


if __name__ == "__main__":
    sys.exit(main())
