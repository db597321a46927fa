"""Who still works on the arrays of a call: helpers that have begun are waited for, others kept out.

The caller must not leave before, for whatever reason: its arrays may be gone an instant later.  An
exception in the middle of waiting, as of Ctrl-C, would let it leave.  So it waits in compiled code,
where no signal handler of Python's runs, as often as somebody presses.
"""

from typing import Any

from fastce.cpu.ffi import add, give_way
from fastce.cpu.jit import kernel

BEGUN, DONE, FORKS = range(3)  # words of a gate; the last counts forks, and is that of all gates
CLOSED = 1 << 32  # added to those who have begun

ENTER, LEAVE, CLOSE = range(3)


@kernel
def pass_gate(gate: Any, forks: Any, what: int) -> bool:
    """ENTER: whether one may begin; LEAVE: one is done; CLOSE: nobody may begin, and all are done.

    In a forked child there is nobody to wait for: `forks` differs from when the gate was made.
    """
    if what == ENTER:
        return bool(add(gate, BEGUN, 1) < CLOSED)
    if what == LEAVE:
        add(gate, DONE, 1)
        return True
    begun = add(gate, BEGUN, CLOSED)
    while add(gate, DONE, 0) < begun and add(forks, 0, 0) == gate[FORKS]:
        give_way()
    return True
