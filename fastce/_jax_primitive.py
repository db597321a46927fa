"""Losses and gradients of rows as one primitive of JAX, and what it becomes on each platform.

On CPUs it is a call of the kernels of `fastce.cpu`; on CUDA devices of those of `fastce.cuda`, if
the package numba-cuda is there.  Otherwise it is a formula, which XLA compiles.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastce import _arguments as arguments
from fastce.cpu.xla import IGNORED, Handler

NAME = "fastce_cross_entropy"  # what XLA knows the primitive by
BAD = -2  # of int32 targets: neither a class nor ignored
# Numba's type for the bits of each dtype.
_KINDS: dict[str, type[np.generic]] = {
    "float64": np.float64, "float32": np.float32, "float16": np.uint16, "bfloat16": np.int16,
}  # fmt: skip


class Options(NamedTuple):
    """What a call knows at trace time."""

    trailing: int  # axes behind the class axis
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@functools.partial(jax.jit, static_argnames="options", inline=True)
def rows(*operands: Any, options: Options) -> Any:
    """Losses of all rows, as an array in a list; with an upstream gradient the gradient, too.

    The operands are logits, labels (int32 classes, IGNORED or BAD; or probabilities typed like the
    logits) and perhaps the upstream gradient of each row.  It cannot be differentiated.
    """
    return _bind(operands, options)


def loss_dtype(logits: Any) -> Any:
    """The dtype of losses."""
    return arguments.compute_dtype(np.dtype(logits.dtype))


def _hard(labels: Any) -> bool:
    return bool(jnp.issubdtype(labels.dtype, jnp.integer))


_rows = Primitive(NAME)
_rows.multiple_results = True
_kernels = Primitive(f"{NAME}_kernels")  # the same of the rows that a device has
_kernels.multiple_results = True


def _bind(operands: Sequence[Any], options: Options) -> Any:
    """The primitive, along with what it becomes where there are kernels."""
    program = _divisible(options, tuple(a.ndim for a in operands))
    kernels = jax.make_jaxpr(program)(*map(jax.typeof, operands))
    return _rows.bind(*operands, options=options, kernels=kernels)


@_rows.def_abstract_eval  # type: ignore[untyped-decorator]
def _results_of_program(*operands: Any, options: Options, kernels: Any) -> Any:
    return kernels.out_avals


@_rows.def_impl  # type: ignore[untyped-decorator]
def _at_once(*operands: Any, options: Options, kernels: Any) -> Any:
    """Where JAX compiles nothing, as with `jax.disable_jit`: compiled all the same."""
    with jax.disable_jit(False):
        return rows(*operands, options=options)


def _batched(operands: Any, axes: Any, *, options: Options, kernels: Any) -> Any:
    """The rows of all members of a batch: one more axis in front."""
    size = next(a.shape[k] for a, k in zip(operands, axes, strict=True) if k is not None)
    spread = [
        jnp.broadcast_to(a, (size, *a.shape)) if k is None else jnp.moveaxis(a, k, 0)
        for a, k in zip(operands, axes, strict=True)
    ]
    results = _bind(spread, options)
    return results, [0] * len(results)


batching.primitive_batchers[_rows] = _batched


@_kernels.def_abstract_eval  # type: ignore[untyped-decorator]
def _results(*operands: Any, options: Options) -> Any:
    """Those of plain sums of the operands, by JAX's own rules.

    So it is known as well along which axes of a mesh results are divided and, inside of
    `jax.shard_map`, along which they differ.
    """

    def sums(logits: Any, labels: Any, *upstream: Any) -> Any:
        axis = logits.ndim - 1 - options.trailing
        z = logits.astype(loss_dtype(logits))
        given = labels if _hard(labels) else labels.sum(axis)
        losses = (z.sum(axis) + sum(upstream, given)).astype(z.dtype)
        if not upstream:
            return [losses]
        return [losses, (z + jnp.expand_dims(losses, axis)).astype(logits.dtype)]

    return jax.make_jaxpr(sums)(*operands).out_avals


# Several devices ----------------------------------------------------------------------------------


@functools.cache
def _divisible(options: Options, dimensions: tuple[int, ...]) -> Any:
    """What tells XLA that every device can compute the rows that it has, of all their classes.

    XLA cannot look into a call of kernels, and would bring all rows together on every device.  In
    programs for one device nothing of this is left.  The operands have so many `dimensions`.
    """
    count, whole = len(dimensions), dimensions[0]
    axis = whole - 1 - options.trailing

    def bind(*operands: Any) -> Any:
        return _kernels.bind(*operands[:count], options=options)

    def along(of_logits: Sequence[Any], ndim: int) -> tuple[Any, ...]:
        """What the axes of an array lie along, one for each of the logits or one for each row."""
        classes = of_logits[axis : axis + 1] if ndim == whole else ()
        return (*of_logits[:axis], *classes, *of_logits[axis + 1 :])

    def divided(mesh: Any, logits: Any, arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """A mesh, and how arrays are divided along it where logits are divided in some way."""
        if isinstance(logits.sharding, NamedSharding):
            spec = [*logits.sharding.spec, *[None] * whole][:whole]
            spec[axis] = None
        else:  # of no mesh, or of a part of one in shard_map: JAX has no names for it
            spec = [None] * whole
            mesh = Mesh(np.array(list(logits.sharding.device_set)), "devices")
        return mesh, [NamedSharding(mesh, PartitionSpec(*along(spec, a.ndim))) for a in arrays]

    def partition(mesh: Any, operands: Any, results: Any) -> tuple[Any, ...]:
        mesh, of_all = divided(mesh, operands[0], (*operands[:count], *results))
        everywhere = NamedSharding(mesh, PartitionSpec())
        return mesh, bind, of_all[count:], (*of_all[:count], everywhere)

    def infer(mesh: Any, operands: Any, results: Any) -> list[Any]:
        return divided(mesh, operands[0], results)[1]

    axes = [f"axis{k}" for k in range(whole)]
    operands, results = (
        tuple(ArrayMapping(*along(axes, ndim)) for ndim in of_arrays)
        for of_arrays in (dimensions, (whole - 1, whole)[: count - 1])
    )
    rule = SdyShardingRule((*operands, ArrayMapping("options")), results)
    call = custom_partitioning(bind)
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    # By this operand JAX's compilation cache tells options apart, which it does not see in `bind`.
    words = np.array(options, np.float64).view(np.int32)
    return lambda *operands: call(*operands, words)


# What it becomes ----------------------------------------------------------------------------------


def _foreign(name: str, context: Any, operands: Any, options: Options) -> Any:
    """A call of a handler that XLA knows by a name."""
    return jax.ffi.ffi_lowering(name)(
        context, *operands, label_smoothing=np.float64(options.label_smoothing),
        trailing=np.int64(options.trailing), z_loss=np.float64(options.z_loss),
    )  # fmt: skip


def _on_cpu(context: Any, *operands: Any, options: Options) -> Any:
    logits, labels = context.avals_in[:2]
    name, _ = _cpu_handler(str(logits.dtype), not _hard(labels), len(operands) == 3)
    return _foreign(name, context, operands, options)


@functools.cache
def _cpu_handler(dtype: str, soft: bool, with_grad: bool) -> tuple[str, Handler]:
    """Compile a handler and make it known to XLA; its name, and the handler to keep it alive."""
    handler = Handler(_KINDS[dtype], soft, with_grad)
    name = f"{NAME}{'_and_grad' * with_grad}_{'soft' if soft else 'hard'}_{dtype}"
    jax.ffi.register_ffi_target(name, _capsule(handler.address), platform="cpu")
    return name, handler


def _on_cuda(context: Any, *operands: Any, options: Options) -> Any:
    return _foreign(_cuda_handler(), context, operands, options)


def _cuda_rows(context: Any, *operands: Any, options: Options, kernels: Any) -> Any:
    lowered = _by_kernels if _has_cuda_kernels() else _elsewhere
    return lowered(context, *operands, options=options, kernels=kernels)


def _has_cuda_kernels() -> bool:
    """Whether CUDA devices have kernels: those at hand, or else any."""
    if importlib.util.find_spec("numba_cuda") is None:
        return False
    from fastce.cuda.driver import OLDEST

    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # there are none: the program is for another machine
        return True
    capabilities = (map(int, device.compute_capability.split(".")) for device in devices)
    return all(tuple(capability) >= OLDEST for capability in capabilities)


@functools.cache
def _cuda_handler() -> str:
    """Make the handler known to XLA; its name."""
    from fastce.cuda import xla

    handler = _capsule(xla.handler().address)
    stages = {"initialize": handler, "execute": handler}
    jax.ffi.register_ffi_target(NAME, stages, platform="CUDA")
    return NAME


def _capsule(address: int) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
    return new(address, None, None)


def formula(logits: Any, labels: Any, upstream: Any, options: Options) -> Any:
    """Losses and gradient in plain JAX: for other platforms, and for derivatives of the gradient.

    As in the kernels the exponential of one class with the maximum is left out of `rest`, so that a
    loss and a gradient next to zero keep their digits.
    """
    axis = logits.ndim - 1 - options.trailing
    z = logits.astype(loss_dtype(logits))
    counts = jnp.ones((), bool)
    h = labels.astype(z.dtype)
    if _hard(labels):
        labels = jnp.expand_dims(labels, axis)
        counts = labels != IGNORED
        z = jnp.where(counts, jnp.where(labels == BAD, jnp.nan, z), 0)
        h = (jax.lax.broadcasted_iota(labels.dtype, z.shape, axis) == labels).astype(z.dtype)
    u = (1 - options.label_smoothing) * h + options.label_smoothing / z.shape[axis]
    first = jnp.argmax(z, axis, keepdims=True)
    is_first = jax.lax.broadcasted_iota(first.dtype, z.shape, axis) == first
    m = jnp.where(is_first, z, 0).sum(axis, keepdims=True)
    m = jnp.where(m == jnp.inf, jnp.nan, m)
    e = jnp.where(is_first, 0, jnp.exp(z - m))
    rest = e.sum(axis, keepdims=True)
    log = jnp.log1p(rest)
    lse = m + log
    nll = jnp.where(u == 0, 0, u * ((m - z) + log)).sum(axis, keepdims=True)
    losses = jnp.where(counts, nll + options.z_loss * lse**2, 0).squeeze(axis)
    a = u.sum(axis, keepdims=True) + 2 * options.z_loss * lse
    share = jnp.where(is_first, rest, e) / (1 + rest)  # of the others, of the class itself
    grad = jnp.where(is_first, (a - u) - a * share, a * share - u)
    grad = jnp.where(counts, grad, 0) * jnp.expand_dims(upstream, axis)
    return losses, grad.astype(logits.dtype)


def _program(*operands: Any, options: Options, kernels: Any) -> Any:
    return jaxpr_as_fun(kernels)(*operands)


def _in_plain_jax(*operands: Any, options: Options, kernels: Any) -> Any:
    logits, labels, *upstream = operands
    if upstream:
        return formula(logits, labels, upstream[0], options)
    one = jnp.ones((1,) * (logits.ndim - 1), loss_dtype(logits))
    return formula(logits, labels, one, options)[:1]


_by_kernels = mlir.lower_fun(_program, multiple_results=True)
_elsewhere = mlir.lower_fun(_in_plain_jax, multiple_results=True)
mlir.register_lowering(_rows, _elsewhere)
mlir.register_lowering(_rows, _by_kernels, platform="cpu")
mlir.register_lowering(_rows, _cuda_rows, platform="cuda")
mlir.register_lowering(_kernels, _on_cpu, platform="cpu")
mlir.register_lowering(_kernels, _on_cuda, platform="cuda")
