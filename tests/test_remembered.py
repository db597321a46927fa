"""Section 4: an option given as an array or tensor of one number has its value at the time of the
call, in every public function, and is never remembered."""

import importlib

import numpy as np
import pytest

from tests.public_calls import NUMBERS, OTHERS, Public, public_functions

FUNCTIONS = public_functions()


@pytest.mark.parametrize("public", FUNCTIONS)
def test_every_parameter_is_known_here(public: Public):
    unknown = set(public.parameters) - set(public.values) - set(NUMBERS) - OTHERS
    assert not unknown


class Tensor:
    """Holds a number that can be changed, is known by its identity, as torch's tensors are."""

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value

    def fill_(self, value):
        self.value = value


def _torch_tensor(shape):
    def holder(value):
        import torch

        return torch.full(shape, value, dtype=torch.tensor(value).dtype)

    return holder


HOLDERS = {
    "0-d array": np.array,
    "array of one": lambda value: np.array([value]),
    "item": Tensor,
    "0-d tensor": _torch_tensor(()),
    "tensor of one": _torch_tensor((1,)),
}


def _outcome(public, option, value):
    """What a call results in, or the error that it raises."""
    try:
        return [a.tobytes() for a in public.results(**{option: value})]
    except (TypeError, ValueError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("holder", [
    pytest.param(name, marks=pytest.mark.needs("test-torch")) if "tensor" in name else name
    for name in HOLDERS
])  # fmt: skip
@pytest.mark.parametrize("public", FUNCTIONS)
def test_an_option_has_its_value_at_the_time_of_the_call(public, holder):
    for option in sorted(set(public.parameters) & set(NUMBERS)):
        values = NUMBERS[option]
        want = [_outcome(public, option, value) for value in values]
        assert want[0] != want[1], f"{option}: the values make no difference"
        held = HOLDERS[holder](values[0])
        for value, outcome in zip((*values, values[0]), (*want, want[0]), strict=True):
            (held.fill if isinstance(held, np.ndarray) else held.fill_)(value)
            assert _outcome(public, option, held) == outcome, (option, value)


@pytest.mark.needs("test-torch")
@pytest.mark.parametrize("module", ["functional", "distributed"])
def test_the_backward_pass_has_the_value_of_the_forward_pass(module, tmp_path):
    import torch

    losses = importlib.import_module(f"fastce.torch.{module}")
    z, y = torch.randn(6, 6), torch.arange(6)
    given, loss = {}, losses
    if module == "functional":
        loss = losses.cross_entropy
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
        )
        given = {"class_offset": torch.zeros((), dtype=torch.int64), "classes": torch.tensor(6)}
        loss = losses.vocabulary_parallel_cross_entropy
    try:
        want = torch.autograd.grad(torch.nn.functional.cross_entropy(z.requires_grad_(), y), z)[0]
        normalizer, axis = torch.tensor(3.0), torch.tensor(1)
        value = loss(z, y, normalizer=normalizer, axis=axis, **given)
        for held in (normalizer, axis, *given.values()):
            held.add_(1)
        # An upstream gradient other than 1: what is kept of the forward pass does not do.
        assert torch.allclose(torch.autograd.grad(3 * value, z)[0], 6 * want)
    finally:
        if given:
            torch.distributed.destroy_process_group()


@pytest.mark.needs("test-torch")
def test_the_backward_pass_of_a_linear_layer_too():
    import torch

    import fastce.torch as ft

    x, w, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3), torch.arange(6)
    normalizer = torch.tensor(3.0)
    value = ft.linear_cross_entropy(x, w, y, normalizer=normalizer)
    with torch.no_grad():
        want = torch.autograd.functional.jacobian(
            lambda x: ft.linear_cross_entropy(x, w, y, normalizer=3.0), x.detach()
        )
    normalizer.fill_(5.0)
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert torch.allclose(first, want)
    assert torch.allclose(torch.autograd.grad(value, x)[0], want)  # computed anew
