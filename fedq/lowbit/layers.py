"""Training with few-bit weights: layers whose forward pass sees ``Q(w)`` while the optimizer moves the float ``w``.

`use_few_bits` turns a model's layers into such ones by torch parametrizations; `deployed_state_dict` and `deploy` give
back a plain model with the few-bit values. What ``Q`` is stands in `fedq.lowbit.quantizers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedq.errors import FieldError
from fedq.layout import plain_name, uncompiled_name
from fedq.lowbit.activations import BinaryInput
from fedq.lowbit.quantizers import Quantizer
from fedq.lowbit.which import FEW_BIT_LAYERS, choose_quantizers


class FewBitWeight(nn.Module):
    """The parametrization of one weight: ``Q(w)`` forward, the gradient of ``Q(w)`` for ``w`` (straight-through).

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432) is the identity here, also for weights beyond
    the grid. In evaluation mode rounding is to nearest, so that it computes what a packed model does.

    Args:
        quantizer: The map ``Q``.
        weight: The float weight, from which a learned scale starts.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._loaded_scales: Tensor | None = None  # no buffer: buffers travel
        if quantizer.learns_scale:
            self.scale = nn.Parameter(quantizer.scales(quantizer.rows(weight.detach())).flatten())

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scales in use, [groups, num_scales]: learned, loaded, or those that follow from the weight."""
        if self.quantizer.learns_scale:
            return self.scale.detach().view(-1, 1)
        if self._loaded_scales is not None:
            return self._loaded_scales.to(weight.device)
        return self.quantizer.scales(self.quantizer.rows(weight.detach()))

    @torch.no_grad()
    def load_scales(self, scales: Tensor) -> None:
        """Take scales that need not follow from the weight, until the first forward pass in training mode.

        A grid's own values do not give its scales back in general, so a model that was loaded as few-bit values needs
        both to compute the same as before.
        """
        if self.quantizer.learns_scale:
            self.scale.copy_(scales.flatten())
        else:
            self._loaded_scales = scales.clone()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the few-bit weight, of the shape of the float one."""
        if self.quantizer.learns_scale:
            signs: Tensor = _LearnedScale.apply(weight, self.scale)  # type: ignore[no-untyped-call]
            return signs
        if self.training:
            self._loaded_scales = None
        with torch.no_grad():
            stochastic = self.training and self.quantizer.is_stochastic
            values = self.quantizer.quantize(weight.detach(), stochastic=stochastic, scales=self.scales(weight))
        quantized: Tensor = _StraightThrough.apply(weight, values)  # type: ignore[no-untyped-call]
        return quantized

    def extra_repr(self) -> str:
        """Show the spec."""
        return self.quantizer.spec


class _StraightThrough(torch.autograd.Function):
    """Take a value, and pass its gradient on to what it was rounded from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _LearnedScale(torch.autograd.Function):
    """``a·sign(w)`` with the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153, section 2.2) for ``a``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return _signs(weight) * _along(scale, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weight, scale = ctx.saved_tensors
        sums = (grads[0] * _signs(weight)).reshape(len(scale), -1).sum(dim=1)
        return grads[0], sums * (len(scale) / weight.numel()) ** 0.5


def _signs(weight: Tensor) -> Tensor:
    return 2.0 * (weight >= 0).to(weight.dtype) - 1.0


def _along(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))


def use_few_bits(model: nn.Module, spec: str, *, activations: str = "float") -> dict[str, Quantizer]:
    """Give a model's layers few-bit weights, in place.

    Args:
        model: The model; its float weights stay parameters, under ``<layer>.parametrizations.weight.original``.
        spec: Spec of the bits of each layer, see `fedq.lowbit.which.choose_quantizers`.
        activations: ``float``; or ``binary``: the inputs of these layers become signs, see `fedq.lowbit.activations`.

    Returns:
        The quantizer of each changed layer, by name.

    Raises:
        FieldError: The spec does not fit the model, or a layer is parametrized already.
    """
    chosen = choose_quantizers(model, spec)
    for name, quantizer in chosen.items():
        layer = model.get_submodule(name)
        if parametrize.is_parametrized(layer):
            raise FieldError("weights", name, "layers whose weights are not parametrized yet")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # unsafe: the check that it allows runs a forward pass of its own.
        parametrize.register_parametrization(layer, "weight", FewBitWeight(quantizer, weight), unsafe=True)
        if activations == "binary":
            layer.register_module("binary_input", BinaryInput.of(layer))
            layer.register_forward_pre_hook(_binarize_input)
    return chosen


def _binarize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    binary_input = layer.binary_input
    assert isinstance(binary_input, BinaryInput)
    return (binary_input(inputs[0]), *inputs[1:])


def few_bit_layers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of a model's few-bit layers, by layer name, in the model's order."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FEW_BIT_LAYERS) and (weight := few_bit_weight(layer)) is not None:
            found[name] = weight.quantizer
    return found


def few_bit_weight(layer: nn.Module) -> FewBitWeight | None:
    """Return the parametrization of a layer's weight, or None of a layer with a float weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    (parametrization,) = layer.parametrizations["weight"]  # type: ignore[index, union-attr]
    return parametrization if isinstance(parametrization, FewBitWeight) else None


def learned_scales(model: nn.Module, name: str) -> Tensor | None:
    """Return the learned scales of a few-bit layer, [groups, 1], or None where they follow from the weights."""
    weight = few_bit_weight(model.get_submodule(name))
    return weight.scale.detach().view(-1, 1) if weight is not None and weight.quantizer.learns_scale else None


@contextmanager
def deployed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and its few-bit weights are computed once."""
    was_training = model.training
    model.eval()
    try:
        with parametrize.cached():
            yield
    finally:
        model.train(was_training)


def deployed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors under their plain names, the few-bit weights as deployed.

    What only training needs (float weights behind few-bit ones, learned scales) is left out; a model without few-bit
    layers gives its own `state_dict`.
    """
    state = {}
    with torch.no_grad(), deployed(model):
        for name, tensor in ((uncompiled_name(name), tensor) for name, tensor in model.state_dict().items()):
            plain = plain_name(name)
            if plain == name:
                state[name] = tensor
            elif name.endswith(".original"):
                layer, _, attribute = plain.rpartition(".")
                state[plain] = getattr(model.get_submodule(layer), attribute).detach().clone()
    return state


def deploy(model: nn.Module) -> nn.Module:
    """Make the few-bit values a model's plain weights, in place, and return it; binary inputs stay."""
    state = deployed_state_dict(model)
    for name in few_bit_layers(model):
        layer = model.get_submodule(name)
        weight = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
        # Not remove_parametrizations, which takes the weight from the class that deep copies of the layer share.
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        layer.register_parameter("weight", weight)
        with torch.no_grad():
            weight.copy_(state[f"{name}.weight"])
    return model
