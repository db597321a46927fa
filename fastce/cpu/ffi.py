"""XLA's foreign function interface for compiled code: how a frame and what it names lie in memory.

The layout is part of XLA's stable binary interface, version 0, as its header
``xla/ffi/api/c_api.h`` has it.  All that is read here is made of 64-bit words, whose numbers are
given below; a 32-bit field is the lower half of its word.  Handlers touch no Python object.
"""

import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastce.cpu.jit import device
from fastce.cpu.memory import array_at
from fastce.cpu.vector import I32, I64, call_llvm

# Version of the interface; later minor ones only add to it.
MAJOR, MINOR = 0, 1

# Words of the frame; of an extension and what it points to; of a buffer; of an attribute; of the
# table of functions.
EXTENSION, API, CONTEXT, STAGE, ATTRIBUTES, FRAME = 1, 2, 3, 4, 20, 21
COUNT, ARGUMENTS, RESULTS = 7, 9, 14  # of arguments
EXTENSION_TYPE, METADATA, VERSION, TRAITS = 1, 3, 3, 4
DTYPE, DATA, RANK, DIMENSIONS = 2, 3, 4, 5
VALUE = 1
ERROR_CREATE, ERROR_DESTROY, STREAM, SCHEDULE, POOL_SIZE, ORDINAL = 6, 8, 10, 17, 18, 23
METADATA_EXTENSION, INITIALIZE, EXECUTE = 1, 2, 3
RECORDABLE = 1  # the trait of handlers whose calls may become part of a CUDA graph
LOWER_HALF = 0xFFFFFFFF

# Attributes, which come sorted by their names.
LABEL_SMOOTHING, TRAILING, Z_LOSS = range(3)

_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


@intrinsic
def allocate(typingctx, size):
    """Memory from the heap."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "malloc", I64, args[0])

    return types.int64(types.int64), codegen


@intrinsic
def free(typingctx, address):
    """Give it back."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, "free", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call(typingctx, function, arguments):
    """Call the function at an address with a tuple of words; the word that it returns."""
    count = len(arguments)

    def codegen(context, builder, sig, args):
        function_type = ir.FunctionType(I64, [I64] * count)
        place = builder.inttoptr(args[0], function_type.as_pointer())
        return builder.call(place, [builder.extract_value(args[1], k) for k in range(count)])

    return types.int64(types.int64, types.UniTuple(types.int64, count)), codegen


@intrinsic
def symbol(typingctx, name):
    """The word at the address that `binding.add_symbol` has given a name."""
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal

    def codegen(context, builder, sig, args):
        word = ir.GlobalVariable(builder.module, I64, name.literal_value)
        return builder.load(word, typ=I64)

    return types.int64(name), codegen


@intrinsic
def add(typingctx, words, number, value):
    """Add to a word that threads share, in order with all that they do else; its value before."""

    def codegen(context, builder, sig, args):
        data = context.make_array(words)(context, builder, args[0]).data
        place = builder.gep(data, [args[1]], source_etype=I64)
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(words, types.int64, types.int64), codegen


@intrinsic
def exchange(typingctx, words, number, old, new):
    """Set a word that threads share if it is still the old one; whether it was.  As ordered."""

    def codegen(context, builder, sig, args):
        data = context.make_array(words)(context, builder, args[0]).data
        place = builder.gep(data, [args[1]], source_etype=I64)
        done = builder.cmpxchg(place, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(done, 1)

    return types.boolean(words, types.int64, types.int64, types.int64), codegen


@intrinsic
def give_way(typingctx):
    """Let another thread run."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, _YIELD, I32)
        return context.get_dummy_value()

    return types.void(), codegen


@device
def words(address, count):
    """Words at an address."""
    return array_at(address, np.int64, count)


@device
def _product(numbers, start, stop):
    product = 1
    for k in range(start, stop):
        product *= numbers[k]
    return product


@device
def answer(extension, traits):
    """Tell XLA which interface this is, if that is what it asks."""
    asked = words(extension, METADATA + 1)
    if asked[EXTENSION_TYPE] & LOWER_HALF != METADATA_EXTENSION:
        return False
    metadata = words(asked[METADATA], TRAITS + 1)
    metadata[VERSION] = MAJOR | MINOR << 32
    metadata[TRAITS] = traits
    return True


@device
def function(frame, number):
    """The address of one of XLA's functions."""
    return words(frame[API], number + 1)[number]


@device
def ask(frame, place, number, size, third, fourth):
    """Call a function of XLA's with a structure that is made at a place; its error, or 0."""
    structure = words(place, 5)
    structure[0] = size
    structure[1] = 0
    structure[2] = frame[CONTEXT]
    structure[3] = third
    structure[4] = fourth
    return call(function(frame, number), (place,))


@device
def attribute(frame, number):
    """The bits of an attribute, one word."""
    attributes = words(frame[ATTRIBUTES], number + 1)
    return words(words(attributes[number], VALUE + 1)[VALUE], 1)[0]


@device
def buffer(list_of_buffers, number):
    """The words of an operand or a result."""
    return words(words(list_of_buffers, number + 1)[number], DIMENSIONS + 1)


@device
def sizes(frame):
    """Of the logits: rows before the class axis, classes, and rows behind it."""
    logits = buffer(frame[ARGUMENTS], 0)
    dimensions = words(logits[DIMENSIONS], logits[RANK])
    axis = logits[RANK] - 1 - attribute(frame, TRAILING)
    inner = _product(dimensions, axis + 1, logits[RANK])
    return _product(dimensions, 0, axis), dimensions[axis], inner
