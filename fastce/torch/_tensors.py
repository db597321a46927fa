"""Tensors as the arrays that the kernels take: the same memory, seen from the other side."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fastce._arguments import AnyArray


class bfloat(np.void):  # type: ignore[misc]  # noqa: N801 (NumPy appends the bits: `bfloat16`)
    """Scalar type of an array that shows bfloat16 numbers as their bits.

    The kernels read the bits, and know the type by its name alone. So ml_dtypes, which torch does
    not bring along, is not needed. The one field tells the dtype from NumPy's plain two bytes.
    """


_BFLOAT16 = np.dtype((bfloat, [("bits", np.int16)]))
_PLAIN = (torch.Tensor, torch.nn.Parameter)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)

HUGE_PAGES = 4 << 20  # bytes from which NumPy does


class Options(NamedTuple):
    """The options of a loss in the order in which the operators take them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str
    normalizer: float | None


def array(tensor: torch.Tensor) -> AnyArray:
    """The memory of a tensor on the CPU as a NumPy array."""
    if not tensor.is_cpu:
        raise NotImplementedError(
            f"expected tensors on the CPU, got one on {tensor.device}; what is computed on CUDA "
            "devices is cross_entropy of logits that are there, and its first derivative"
        )
    if tensor.dtype is torch.bfloat16:
        bits: AnyArray = tensor.detach().view(torch.int16).numpy()
        return bits.view(_BFLOAT16)
    numbers: AnyArray = tensor.numpy(force=True)  # detach().numpy() takes longer
    return numbers


def tensor_of(array: AnyArray) -> torch.Tensor:
    """The tensor of which `array` makes such an array."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def kernel_array(like: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """What makes of tensors the arrays that `fastce` takes, for logits where `like` is.

    Those on a CUDA device are taken as they are. This is the place to tell devices apart.
    """
    return torch.Tensor.detach if like.is_cuda else array


def optional_array(tensor: torch.Tensor | None) -> AnyArray | None:
    """The same where there may be none."""
    return None if tensor is None else array(tensor)


def class_weight(weight: torch.Tensor | None, place: Callable[[torch.Tensor], Any] = array) -> Any:
    """Factors of classes, 16-bit ones widened: the core converts them and cannot convert bits."""
    return None if weight is None else place(wide(weight))


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.empty_like`, but large ones in memory that NumPy has asked huge pages for.

    Measured, loss and gradient of 1024 x 32000 in float32 take 15 ms in such fresh memory, and 44
    in that of torch.
    """
    size = tensor.numel() * (dtype or tensor.dtype).itemsize
    if size < HUGE_PAGES or not tensor.is_cpu:
        return torch.empty_like(tensor, dtype=dtype)
    like = torch.empty_like(tensor, dtype=dtype, device="meta")
    memory = torch.from_numpy(np.empty(size, np.uint8)).view(like.dtype)
    return memory.as_strided(like.shape, like.stride())


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or in float32 if it has 16 bits."""
    return tensor.float() if tensor.dtype in SIXTEEN_BITS else tensor


def mark_overwritten(logits: torch.Tensor) -> None:
    """Remember that a gradient has been written over logits.

    The version counter tells autograd, which asks it about what it has saved. Of calls that come
    later nobody asks, so the storage, which all views share, keeps where the gradient lies, and the
    version of its memory: whoever writes anew makes another.
    """
    storage: Any = logits.untyped_storage()
    version, spans = getattr(storage, "fastce_overwritten", (None, ()))
    if version != logits._version:
        spans = ()
    torch.autograd.graph.increment_version(logits)
    storage.fastce_overwritten = logits._version, (*spans, _span(logits))


def refuse_overwritten(logits: torch.Tensor) -> None:
    """Fail where the memory of logits holds the gradient of an earlier loss instead."""
    mark = getattr(logits.untyped_storage(), "fastce_overwritten", None)
    if mark is None or mark[0] != logits._version:
        return
    first, last = _span(logits)
    if any(first <= end and start <= last for start, end in mark[1]):
        raise RuntimeError(
            "logits: expected logits, got memory that in_place=True has put a gradient into; "
            "compute other losses of them before, or this one without in_place"
        )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first and the last element."""
    steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + sum(steps) * tensor.element_size()


def loss_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What losses are computed in: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def loss_tensor(loss: np.floating | AnyArray | torch.Tensor) -> torch.Tensor:
    """A reduced loss, or losses of rows, as a tensor of the dtype that they have."""
    if isinstance(loss, torch.Tensor):
        return loss
    # Of a number as well: this takes 0.8 microseconds, torch.scalar_tensor 1.2.
    return torch.from_numpy(np.asarray(loss))


def upstream(grad_output: torch.Tensor) -> float | AnyArray | torch.Tensor:
    """An upstream gradient as the kernels take it; one on a device is not waited for."""
    if grad_output.is_cuda:
        return grad_output.detach()
    return array(grad_output) if grad_output.ndim else grad_output.item()


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of a module that is not imported to find that out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_gradient(name: str, asked: bool) -> None:
    """Fail where the gradient of an argument is asked for that nobody computes."""
    if asked:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")


def forward_mode() -> bool:
    """Whether tensors may carry tangents: in `torch.autograd.forward_ad.dual_level`."""
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


def eager(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody but autograd looks on: no compiler, tracer, transform, mode or subclass.

    Then an operator of torch.library can be passed by, which takes as long as a small kernel
    (32 x 10, forward and backward: 157 microseconds, and 78 as a plain autograd.Function).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_mode()
        or torch._C._is_tracing()
    ):
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True
