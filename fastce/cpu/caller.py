"""The mode of floating-point arithmetic of the calling thread, for what is computed in Python."""

from typing import Any

from numba import types
from numba.extending import intrinsic

from fastce.cpu.jit import as_called
from fastce.cpu.mode import DEFAULT as DEFAULT
from fastce.cpu.mode import read, write


@intrinsic  # type: ignore[untyped-decorator]
def _read(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return read(builder)

    return types.int64(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _write(typingctx: Any, mode: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        write(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@as_called
def mode() -> Any:
    """The mode, as the register of the processor has it."""
    return _read()


@as_called
def set_mode(mode: Any) -> None:
    """Set it."""
    _write(mode)
