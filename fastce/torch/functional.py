"""The losses as functions of tensors."""

import torch
from torch import Tensor
from torch.nn import _reduction as legacy

from fastce._arguments import integer, plain_options
from fastce.torch import _head, _head_operators, _logits
from fastce.torch import _vmap as _vmap  # registers its rules
from fastce.torch._eager import CrossEntropy, InPlace, LinearCrossEntropy
from fastce.torch._tensors import Options, eager, is_dtensor, refuse_gradient


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    axis: int = 1,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | None = None,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
) -> Tensor:
    """Cross-entropy of logits, as `torch.nn.functional.cross_entropy`; the options are ours.

    For a row z of logits with the class y, and a scalar upstream gradient g::

        loss = logsumexp(z) - z[y]          d loss / d z = g * (softmax(z) - onehot(y))

    `fastce.cross_entropy` has the formula with all options.

    Parameters
    ----------
    input : torch.Tensor of float64, float32, float16 or bfloat16
        Logits, of any strides, on the CPU or a CUDA device: (C,), (N, C) or (N, C, d1, ...). A
        DTensor may have its classes and rows divided; see docs/torch.md.
    target : torch.Tensor
        Classes, integers of any dtype shaped like `input` without the class axis; or probabilities,
        floats shaped like `input`, which may require a gradient.
    weight : torch.Tensor of shape (C,), optional
        One factor per class; its gradient is not to be had.
    size_average, reduce : bool, optional
        What torch had before `reduction`, and warns of.
    ignore_index, reduction, label_smoothing
        As in torch.
    axis : int, default 1
        The class axis; 0 where `input` has but one dimension.
    z_loss, softcap, normalizer
        As in `fastce.cross_entropy`; numbers.
    dtype : torch.dtype, optional
        Dtype of the loss. None is torch's choice: that of `input`, and under `torch.autocast`
        float32 for 16-bit logits. Losses are computed in float32 at least, and so is their sum.
    in_place : bool, default False
        Let the gradient take the memory of `input`, which holds no logits from then on: at once
        where loss and gradient are computed in one pass, but for 16-bit logits, otherwise in the
        backward pass. Only in eager mode, and not for a leaf of the graph. Without a gradient to
        compute it does nothing.

    Returns
    -------
    torch.Tensor
        The loss: a scalar, or for "none" shaped like `input` without the class axis.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `fastce.cross_entropy` does, which calls the two `logits` and `targets`. ValueError also
        if `weight` requires a gradient, or `in_place` is asked for a leaf.
    RuntimeError
        If `in_place` has put the gradient of an earlier loss into the memory of `input`, or if a
        backward pass needs logits that are gone by then.
    NotImplementedError
        If a tensor is neither on the CPU nor with `input` on a CUDA device; for `in_place` under
        torch.compile or torch.func or for a DTensor; for second derivatives with `z_loss` or
        `softcap`, on a CUDA device, or of forward mode in forward mode.

    See Also
    --------
    linear_cross_entropy : The same where the logits come from a linear layer.
    CrossEntropyLoss : As a module.

    Notes
    -----
    In eager mode loss and gradient are computed in one pass if `input` requires a gradient, and the
    loss alone otherwise. An upstream gradient other than 1 costs a second pass: divide by
    `normalizer` instead of afterwards. With "none", under torch.compile and torch.func, and on a
    CUDA device the gradient is computed in the backward pass, into which the upstream gradient
    enters.

    Upstream gradients, loss scales for instance, enter before gradients are rounded to 16 bits,
    with `in_place` as well: 16-bit logits are read once more for that in the backward pass.

    Second derivatives come from `fastce.hessian_vector_product`, third ones do not come.

    Where torch's answer and the contract of fastce differ:

    - Rows that are ignored have gradient 0, whatever they hold; torch's is NaN for NaN and inf.
    - A mean over rows whose weights are all 0 is NaN in both, its gradient 0 here and NaN in torch.
    - A target of probability or weight 0 at a logit of -inf counts 0; torch returns NaN.
    - Losses and gradients of confident rows keep their digits; torch returns 0.
    - A label smoothing below 0 is a ValueError; torch takes it for 0.
    - Targets may be integers of any dtype; torch takes int64 and uint8.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import cross_entropy
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> print(f"{loss:.4f}", logits.grad)
    0.2887 tensor([[-0.1674,  0.1224,  0.0450],
            [ 0.0210, -0.0781,  0.0571]])
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    if input.ndim == 1 and axis == 1:
        axis = 0
    arguments = input, target, weight, axis
    watched = not eager(input, target, weight)
    if watched and is_dtensor(input):
        from fastce.torch import _dtensor

        _check_in_place(in_place, None)
        return _as_asked(_dtensor.cross_entropy(*arguments, options), input, dtype)
    # Now, for the backward pass as well; of DTensors after the ranks have agreed on errors.
    options = Options(*plain_options(*options))
    arguments = input, target, weight, integer("axis", axis)
    differentiated = _differentiated(weight, input, target)
    if watched or (differentiated and target.requires_grad):
        _check_in_place(in_place, None)
        loss = _logits.cross_entropy(*arguments, *options)
    elif not differentiated:
        loss = _logits.loss(*arguments, options)
    elif in_place:
        _check_in_place(in_place, input)
        loss = InPlace.apply(*arguments, options)
    else:
        loss = CrossEntropy.apply(*arguments, options)
    return _as_asked(loss, input, dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer whose logits are never held whole.

    The arguments are those of `torch.nn.functional.linear_cross_entropy`, and our options::

        logits = input @ linear_weight.T + linear_bias
        loss   = cross_entropy(logits, target, weight, ...)

    Parameters
    ----------
    input : torch.Tensor of float64, float32, float16 or bfloat16, of shape (..., D)
        Observations or hidden states, on the CPU. A DTensor may have its rows divided, and
        `linear_weight` its classes; see docs/torch.md.
    linear_weight : torch.Tensor of shape (C, D)
        One row per class; of any of these dtypes, as `linear_bias` is.
    target : torch.Tensor
        Classes, integers shaped (...); or probabilities shaped (..., C), which may not require a
        gradient.
    linear_bias : torch.Tensor of shape (C,), optional
        None means 0.
    weight : torch.Tensor of shape (C,), optional
        One factor per class.
    ignore_index : int, optional
        None means -100.
    reduction, label_smoothing, z_loss, softcap, normalizer, dtype
        As in `cross_entropy`.

    Returns
    -------
    torch.Tensor
        The loss: a scalar, or for "none" shaped (...).

    Raises
    ------
    TypeError, ValueError, IndexError
        As `fastce.linear_cross_entropy` does, which calls the first three `x`, `weight` and
        `targets`. ValueError also if `target` or `weight` requires a gradient.
    NotImplementedError
        If a tensor is not on the CPU; for second derivatives with `z_loss` or `softcap`, or of
        forward mode in forward mode.

    See Also
    --------
    cross_entropy : Of given logits; what is common to both.
    LinearCrossEntropyLoss : As a module.
    fastce.linear_cross_entropy_and_grad : Memory, accuracy, and options for NumPy arrays.

    Notes
    -----
    In eager mode loss and gradients are computed together and the gradients handed over in the
    first backward pass. Logits and products are computed in float32 at least, for which 16-bit
    tensors are widened whole. Three matrix products are computed whichever of the gradients is
    wanted.

    Second derivatives and forward mode need as little memory: logits, how they change and what
    becomes of both are held for some rows at a time. With G the gradient of the logits, H the
    Hessian of each row and (U, V, c) a direction, or a cotangent, of `input`, `linear_weight` and
    `linear_bias`::

        T     = U @ linear_weight.T + input @ V.T + c       slope of each row: sum of G * T
        dX'   = (H T) @ linear_weight + G @ V               db' = (H T).sum(0)
        dW'   = (H T).T @ input + G.T @ U

    Third derivatives do not come.

    `torch.func.vmap` goes through the batch one by one.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import linear_cross_entropy
    >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    >>> weight = torch.tensor([[0.2, 0.1], [0.0, -0.3], [0.5, 0.5]], requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([2, 0]))
    >>> loss.backward()
    >>> print(f"{loss:.4f}", weight.grad)
    0.7579 tensor([[-0.0557,  0.5689],
            [ 0.1499, -0.1316],
            [-0.0942, -0.4373]])
    """
    options = Options(
        -100 if ignore_index is None else ignore_index,
        label_smoothing, z_loss, softcap, reduction, normalizer,
    )  # fmt: skip
    given = input, linear_weight, target, linear_bias, weight
    watched = not eager(*given)
    if watched and any(t is not None and is_dtensor(t) for t in given):
        from fastce.torch import _dtensor_head

        return _as_asked(_dtensor_head.linear_cross_entropy(*given, options), input, dtype)
    options = Options(*plain_options(*options))
    rows, x, labels = _head.flattened(input, linear_weight, target)
    arguments = x, linear_weight, labels, linear_bias, weight
    differentiated = _differentiated(weight, *(t for t in arguments[:4] if t is not None))
    refuse_gradient("target", differentiated and target.requires_grad)
    if watched:
        loss = _head_operators.linear_cross_entropy(*arguments, *options)
    elif not differentiated:
        loss = _head.loss(*arguments, options)
    else:
        loss = LinearCrossEntropy.apply(*arguments, options)
    if options.reduction == "none":
        loss = loss.reshape(rows)
    return _as_asked(loss, input, dtype)


def _differentiated(weight: Tensor | None, *tensors: Tensor) -> bool:
    """Whether gradients are asked for; that of class weights nobody computes."""
    if not torch.is_grad_enabled():
        return False
    refuse_gradient("weight", weight is not None and weight.requires_grad)
    for tensor in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if tensor.requires_grad:
            return True
    return False


def _check_in_place(in_place: bool, input: Tensor | None) -> None:
    """Fail where the memory of the logits cannot take the gradient; None stands for such logits."""
    if not in_place:
        return
    if input is None:
        raise NotImplementedError(
            "in_place: expected False under torch.compile, torch.func and forward_ad, for DTensors "
            "and for targets that require a gradient, got True"
        )
    whole = input if input._base is None else input._base
    if whole.is_leaf and whole.requires_grad:
        raise ValueError("in_place: expected logits that were computed, got a leaf of the graph")


def _as_asked(loss: Tensor, input: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The loss in the dtype asked for, or that of the input."""
    if dtype is None and loss.dtype is input.dtype:
        return loss
    if dtype is None:
        autocast = torch.is_autocast_enabled(input.device.type)
        dtype = loss.dtype if autocast else input.dtype
    return loss if loss.dtype is dtype else loss.to(dtype)
