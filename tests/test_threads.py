"""Nothing may crash or hang: threads at once, pools, forks, nesting, interrupts, interpreter exit.

Each program runs in a process of its own under a time limit, with `z` big enough for several
threads and `small` small enough for one, and `check` compares with the values of a serial call.
"""

import threading

import numpy as np
import pytest

import fastce
from tests.checks import draw, draw_targets, same_bits

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
import fastce

rng = np.random.default_rng(0)
z = rng.normal(size=(2000, 1000)).astype("f4")
y = rng.integers(0, 1000, 2000)
small, small_y = z[:32, :10].copy(), y[:32] % 10
with fastce.num_threads(1):
    want = fastce.cross_entropy_and_grad(z, y)
    want_small = fastce.cross_entropy_and_grad(small, small_y)
fastce.set_num_threads(2)

def check(_=None):
    for logits, targets, (loss, grad) in ((z, y, want), (small, small_y, want_small)):
        got_loss, got_grad = fastce.cross_entropy_and_grad(logits, targets)
        assert got_loss == loss, (got_loss, loss)
        assert np.array_equal(got_grad, grad)
    return os.getpid()

def in_child(work):
    "Run work in a forked child that is killed if it hangs."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with wait status {status}"
"""

PROGRAMS = {
    "two threads at once": """
failures = []
def work():
    try:
        for _ in range(20):
            check()
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()
assert not failures, failures
""",
    "the first calls of a process at once": """
import concurrent.futures
fresh = [lambda: fastce.logsumexp(z[:, :50]), lambda: fastce.logsumexp(z.astype("f8")),
         lambda: fastce.softmax(z), lambda: fastce.cross_entropy(z.astype("f8"), y)] * 2
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    results = [f.result() for f in [pool.submit(f) for f in fresh]]
for first, second in zip(results[:4], results[4:]):
    assert np.array_equal(first, second)
""",
    "ThreadPool": """
from multiprocessing.pool import ThreadPool
with ThreadPool(8) as pool:
    pool.map(check, range(40))
""",
    "a ThreadPool inside a ThreadPool": """
from multiprocessing.pool import ThreadPool
def outer(_):
    with ThreadPool(3) as inner:
        inner.map(check, range(6))
with ThreadPool(3) as pool:
    pool.map(outer, range(4))
""",
    "joblib, processes": """
from joblib import Parallel, delayed
check()
def work(z, y, loss, grad):
    import fastce, numpy as np
    for n in (1, 2):
        with fastce.num_threads(n):
            got = fastce.cross_entropy_and_grad(z, y)
            assert got[0] == loss and np.array_equal(got[1], grad)
Parallel(n_jobs=2, timeout=300)(delayed(work)(z, y, *want) for _ in range(4))
check()
""",
    "joblib, threads": """
from joblib import Parallel, delayed
Parallel(n_jobs=4, backend="threading")(delayed(check)() for _ in range(20))
""",
    "a forked child": """
check()
for _ in range(3):
    in_child(check)
check()
""",
    "a forked child of a forked child": """
check()
in_child(lambda: (check(), in_child(check), check()))
check()
""",
    "a forked child that never ran in the parent": "in_child(check)",
    "a forked child while other threads compute": """
check()
stop, failures = threading.Event(), []
def work():
    try:
        while not stop.is_set():
            check()
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(2)]
for t in threads: t.start()
for _ in range(15):
    in_child(check)
stop.set()
for t in threads: t.join()
assert not failures, failures
""",
    "a forked child that exits in the ordinary way": """
check()
child = os.fork()
if child == 0:
    signal.alarm(60)
    check()
    sys.exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
check()
""",
    "a forked child while another thread compiles": """
wide = z[:9].astype("f8")
def work():
    fastce.logsumexp(wide), fastce.softmax(wide), fastce.log_softmax(wide)
thread = threading.Thread(target=work)
thread.start()
while thread.is_alive():
    in_child(lambda: fastce.gradient_hessian(small, small_y))
thread.join()
""",
    "a fork Pool after use": """
import multiprocessing
check()
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert len(pool.map_async(check, range(12)).get(timeout=300)) == 12
check()
""",
    "a spawned process": """
import concurrent.futures, multiprocessing
check()
with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    assert pool.submit(fastce.cross_entropy, z, y).result(timeout=300) == want[0]
""",
    "an interrupt in the middle": """
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
caught = 0
for i in range(120):
    out = np.empty_like(z)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-5 * (i % 60 + 1))
        for _ in range(50):
            fastce.cross_entropy_and_grad(z, y, out=out)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        caught += 1
    del out
    if i % 20 == 0:
        check()
assert caught > 100, caught
check()
""",
    "an interrupt after another while helpers write": """
def press():
    while not stop.is_set():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        time.sleep(0.002)
def interrupt(*_):
    raise KeyboardInterrupt
big, labels = np.zeros((3, 3_000_000), "f4"), np.zeros(3, int)  # a row is a piece of work
out = np.empty_like(big)
fastce.cross_entropy_and_grad(big, labels, out=out)
caught = changed = 0
for attempt in range(25):
    out[...] = 7
    stop = threading.Event()
    thread = threading.Thread(target=press)
    signal.signal(signal.SIGUSR1, interrupt)
    try:
        try:
            thread.start()
            fastce.cross_entropy_and_grad(big, labels, out=out)
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    except KeyboardInterrupt:
        caught += 1
    stop.set()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    thread.join()
    before = out[:, ::1009].copy()
    time.sleep(0.03)
    changed += not np.array_equal(before, out[:, ::1009])
assert caught > 10, caught
assert changed == 0, changed
check()
""",
    "a signal handler that calls while helpers are started": """
done = []
def handler(*_):
    if not done:
        done.append(1)
        check()
signal.signal(signal.SIGALRM, handler)
fastce.set_num_threads(1)
check()
for n in range(2, 150):
    fastce.set_num_threads(n)
    done.clear()
    signal.setitimer(signal.ITIMER_REAL, 2e-5 + 1e-6 * (n % 100))
    check()
    signal.setitimer(signal.ITIMER_REAL, 0)
""",
    "a signal handler that forks while helpers work": """
def handler(*_):
    in_child(check)
signal.signal(signal.SIGALRM, handler)
for i in range(10):
    signal.setitimer(signal.ITIMER_REAL, 1e-4 * (i + 1))
    for _ in range(5):
        check()
    signal.setitimer(signal.ITIMER_REAL, 0)
""",
    "a call left by an error in a helper": """
from fastce.cpu import threads
main = threading.main_thread()
begun = threading.Event()
def kernel(counter):
    if threading.current_thread() is not main:
        begun.set()
        raise MemoryError("in a helper")
    begun.wait(10)
try:
    threads.launch(kernel, (), True)
except MemoryError as error:
    assert str(error) == "in a helper"
else:
    raise AssertionError("lost")
check()
""",
    "a call that is left waits for who has begun": """
from fastce.cpu import threads
main = threading.main_thread()
begun, ended = threading.Event(), []
def kernel(counter):
    if threading.current_thread() is not main:
        begun.set()
        time.sleep(0.3)
        ended.append(1)
        return
    begun.wait(10)
    raise KeyboardInterrupt
for _ in range(3):
    begun.clear(), ended.clear()
    try:
        threads.launch(kernel, (), True)
    except KeyboardInterrupt:
        assert ended == [1]
check()
""",
    "no thread can be started": """
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
check()
""",
    "exit while a daemon thread computes": """
def work():
    while True:
        fastce.cross_entropy_and_grad(z, y)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
""",
    "a call at interpreter exit": """
import atexit
check()
atexit.register(lambda: (check(), print("done", flush=True)))
""",
    "the first parallel call at interpreter exit": """
import atexit
atexit.register(lambda: (check(), print("done", flush=True)))
""",
    "many short calls from many threads": """
def work():
    for _ in range(300):
        assert fastce.cross_entropy(small, small_y) == want_small[0]
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
check()
""",
    "the number of threads changes under way": """
stop = threading.Event()
def change():
    n = 1
    while not stop.is_set():
        fastce.set_num_threads(n)
        n = n % 4 + 1
thread = threading.Thread(target=change)
thread.start()
try:
    for _ in range(40):
        check()
finally:
    stop.set()
    thread.join()
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_survives(name, python):
    # with the cache off where what counts is compiling
    cache = {"FASTCE_CACHE_DIR": ""} if "compiles" in name or "first calls" in name else {}
    done = python(PRELUDE + PROGRAMS[name], **cache)
    assert not done.stderr, done.stderr
    assert done.stdout == ("done\n" if "interpreter exit" in name else "")


def test_set_and_get():
    for n in (1, 2, 5):
        fastce.set_num_threads(n)
        assert fastce.get_num_threads() == n
    fastce.set_num_threads(np.int64(2))
    assert fastce.get_num_threads() == 2


def test_the_context_restores():
    fastce.set_num_threads(2)
    with fastce.num_threads(1):
        assert fastce.get_num_threads() == 1
        with fastce.num_threads(3):
            assert fastce.get_num_threads() == 3
        assert fastce.get_num_threads() == 1
    assert fastce.get_num_threads() == 2
    with pytest.raises(KeyError), fastce.num_threads(1):
        raise KeyError
    assert fastce.get_num_threads() == 2
    with pytest.raises(ValueError, match="n: expected"), fastce.num_threads(0):
        pass
    assert fastce.get_num_threads() == 2


def test_the_interpreter_lock_is_released():
    """Other Python threads go on while a kernel runs."""
    logits, targets = draw((1500, 2000)), draw_targets((1500,), 2000)
    fastce.set_num_threads(1)
    out = np.empty_like(logits)
    fastce.cross_entropy_and_grad(logits, targets, out=out)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(1e-4):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        most = 0
        for _ in range(100):
            before = ticks[0]
            fastce.cross_entropy_and_grad(logits, targets, out=out)
            most = max(most, ticks[0] - before)
    finally:
        stop.set()
        thread.join()
    assert most >= 2  # a call takes milliseconds; with the lock held none or one tick gets through


def test_concurrent_calls_do_not_share_scratch():
    """Different problems at once, each with its own right answer."""
    problems = []
    for i, shape in enumerate([(900, 1000), (3000, 301), (7, 100_003), (50_000, 17)]):
        logits, targets = draw(shape, seed=i), draw_targets(shape[:1], shape[1], seed=i)
        problems.append((logits, targets, fastce.cross_entropy_and_grad(logits, targets)))
    fastce.set_num_threads(2)
    wrong = []

    def work(logits, targets, want):
        for _ in range(5):
            got = fastce.cross_entropy_and_grad(logits, targets)
            if not (same_bits(got[0], want[0]) and same_bits(got[1], want[1])):
                wrong.append(logits.shape)

    threads = [threading.Thread(target=work, args=p) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ENVIRONMENTS = [
    ({"FASTCE_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, "3"),
    ({"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, "2"),
    ({"OMP_NUM_THREADS": "1"}, "1"),
    ({"OMP_NUM_THREADS": "3,2,1"}, "3"),  # a number for each level of nested regions
    ({"OMP_NUM_THREADS": " 3 , 2"}, "3"),
    ({"FASTCE_NUM_THREADS": " 5\t"}, "5"),
    ({"FASTCE_NUM_THREADS": " ", "OMP_NUM_THREADS": "7"}, "7"),
    ({"NUMBA_NUM_THREADS": "many", "OMP_NUM_THREADS": "7"}, "7"),
    ({"OMP_NUM_THREADS": "1000000"}, "4096"),
    ({"OMP_NUM_THREADS": "0"}, "processors.available()"),
    ({"OMP_NUM_THREADS": "9" * 5000}, "processors.available()"),
    ({}, "processors.available()"),
]


@pytest.mark.parametrize(("environment", "want"), ENVIRONMENTS, ids=str)
def test_the_environment_chooses(environment, want, python):
    names = ("FASTCE_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
    program = (
        "import fastce\nfrom fastce.cpu import processors\n"
        f"assert fastce.get_num_threads() == {want}, fastce.get_num_threads()"
    )
    python(program, **{name: environment.get(name) for name in names})


@pytest.mark.parametrize("value", ["abc", "0", "-2", "2,1", "1.5", "4097", "9" * 5000])
def test_nonsense_in_the_own_variable_is_an_error_that_names_it(value, python):
    """At the first call that asks for the number, as an import would take the program along."""
    python(
        f"""
import numpy as np, fastce
fastce.logsumexp([0.0, 1.0])  # asks for no threads
for call in (fastce.get_num_threads, lambda: fastce.logsumexp(np.zeros((2000, 100)))) * 2:
    try:
        call()
    except ValueError as error:
        assert str(error).startswith("FASTCE_NUM_THREADS: expected"), error
        assert {value[:40]!r} in str(error) and len(str(error)) < 120
    else:
        raise AssertionError("no error")
fastce.set_num_threads(2)
fastce.logsumexp(np.zeros((2000, 100)))
""",
        FASTCE_NUM_THREADS=value,
    )


@pytest.mark.parametrize("n", [0, -1, 4097, 2**70])
def test_a_number_of_threads_has_bounds(n):
    before = fastce.get_num_threads()
    with pytest.raises(ValueError, match=rf"^n: expected .*\[1, 4096\], got {n}$"):
        fastce.set_num_threads(n)
    with pytest.raises(ValueError, match=r"^n: expected"), fastce.num_threads(n):
        pass
    assert fastce.get_num_threads() == before


@pytest.mark.parametrize("n", [True, 2.0, "2", None])
def test_a_number_of_threads_is_an_integer(n):
    with pytest.raises(TypeError, match=r"^n: expected an integer"):
        fastce.set_num_threads(n)


PIECES = {
    "cross_entropy": "fastce.cross_entropy(z, y)",
    "softmax": "fastce.softmax(z)",
    "binary_cross_entropy": "fastce.binary_cross_entropy(z, z)",
    "partial": "shards.partial(z, y, class_offset=0, classes=100)",
    "linear_cross_entropy_and_grad":
        "fastce.linear_cross_entropy_and_grad(z, z[:100], y, skip_below=1e-9)",
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_no_more_threads_than_pieces_of_work(name, python):
    python(f"""
import threading
import numpy as np, fastce
from fastce import shards
z, y = np.zeros((1400, 100), "f4"), np.zeros(1400, int)
fastce.set_num_threads(1000)
{PIECES[name]}
assert 1 < threading.active_count() < 20, threading.active_count()
""")


@pytest.mark.parametrize("value", ["", "many", "0", "-2", "2,1"])
def test_a_bad_environment_does_not_break_the_import(value, python):
    python(
        "import fastce; assert fastce.get_num_threads() >= 1; fastce.logsumexp([0.0, 1.0])",
        FASTCE_NUM_THREADS=None, NUMBA_NUM_THREADS=None, OMP_NUM_THREADS=value,
    )  # fmt: skip
