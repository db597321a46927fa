"""IEEE's default mode of floating-point arithmetic, whatever mode a caller has set for its thread.

A program may round otherwise than to nearest, flush numbers below the smallest normal one to zero,
or ask for a signal where a result is no number: torch.set_flush_denormal does, and any library that
is built with -ffast-math when it is loaded.  Such a mode is that of one thread.  Kernels, whose
chunks are done by several, would come to other bits on each.

So whatever calls a kernel calls it through a door that sets the default mode, and the mode of
before, with its flags, on the way out.  Functions of `fastce.rows` have none: they are part of a
user's own compiled code, and compute in the mode that it has set.
"""

import copy
from typing import Any

from llvmlite import ir
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.typed_passes import BaseNativeLowering, NativeLowering

_I32, _I64, _BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_PROCESSOR = cpu_target.target_context.codegen().magic_tuple()[0].partition("-")[0]
_X86 = _PROCESSOR in ("x86_64", "i386", "i686")
_ARM = _PROCESSOR in ("aarch64", "arm64")

# To nearest, nothing flushed, no signals, no flags: as the register of x86 and that of ARM have it.
DEFAULT = 0x1F80 if _X86 else 0


def _call(builder: Any, name: str, result: ir.Type, *values: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    known = builder.module.globals.get(name)
    return builder.call(ir.Function(builder.module, kind, name) if known is None else known, values)


def read(builder: Any) -> Any:
    """The mode as a 64-bit integer; 0 on processors that are not known here."""
    if _X86:
        place = builder.alloca(_I32)
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), _bytes(builder, place))
        return builder.zext(builder.load(place), _I64)
    return _call(builder, "llvm.aarch64.get.fpcr", _I64) if _ARM else _I64(0)


def write(builder: Any, mode: Any) -> None:
    """Set the mode."""
    if _X86:
        place = builder.alloca(_I32)
        builder.store(builder.trunc(mode, _I32), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), _bytes(builder, place))
    elif _ARM:
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), mode)


def _bytes(builder: Any, place: Any) -> Any:
    return builder.bitcast(place, _BYTE.as_pointer())


class _Lower(Lower):  # type: ignore[misc]
    """Puts a function behind a door that has its name."""

    def setup_function(self, fndesc: Any) -> None:
        door = self.context.declare_function(self.module, fndesc)
        inner = copy.copy(fndesc)
        inner.mangled_name = f"{fndesc.mangled_name}.in_default_mode"
        # As part of the door, its arithmetic could be moved past the change of the mode; the door
        # itself may well become part of who calls.
        inner.inline = False
        super().setup_function(inner)
        self.function.attributes.add("noinline")
        builder = ir.IRBuilder(door.append_basic_block())
        before = read(builder)
        write(builder, _I64(DEFAULT))
        status = builder.call(self.function, door.args)
        write(builder, before)
        builder.ret(status)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(BaseNativeLowering):  # type: ignore[misc]
    _name = "lowering_in_default_mode"

    @property
    def lowering_class(self) -> type[Lower]:
        return _Lower


class InDefaultMode(CompilerBase):  # type: ignore[misc]
    """Numba's compiler of functions, for those that compute in the default mode."""

    def define_pipelines(self) -> list[Any]:
        """The ordinary steps, but for the one that makes LLVM's functions."""
        builder = DefaultPassBuilder.define_nopython_pipeline(self.state)
        builder.passes = [
            (_Lowering if step is NativeLowering else step, name) for step, name in builder.passes
        ]
        builder.finalize()
        return [builder]
