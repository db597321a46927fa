"""PyTorch tensors on the card at hand, for the tests of the contract."""

from typing import Any

import ml_dtypes
import numpy as np
import torch


def forget_arrays() -> None:
    """Nothing is remembered of a real device."""


def to_device(host: Any) -> torch.Tensor:
    """A tensor with the values, shape and strides of an array of NumPy."""
    if host.dtype == ml_dtypes.bfloat16:
        return _to_device(host.view(np.int16)).view(torch.bfloat16)
    return _to_device(host)


def _to_device(host: Any) -> torch.Tensor:
    base = host
    while isinstance(base.base, np.ndarray):
        base = base.base
    whole = torch.from_numpy(np.ascontiguousarray(base).reshape(-1).copy()).cuda()
    start = host.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    strides = [s // host.itemsize for s in host.strides]
    return torch.as_strided(whole, host.shape, strides, start // host.itemsize)


def to_host(tensor: torch.Tensor) -> Any:
    """The tensor as an array of NumPy."""
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
