"""Models of the user's own: found by the name of a function, and built. Any model is tried on a batch of the data."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedq.errors import FieldError


def is_own(name: str) -> bool:
    """Whether a name is that of a function of one's own. Importing it runs code: never take it from others."""
    return ":" in name


def build_own(name: str, sizes: Mapping[str, int]) -> nn.Module:
    """Call the function ``package.module:function`` with those of the sizes that it takes, by name.

    Raises:
        FieldError: The function cannot be imported or called, needs anything else, or returns no module to train.
    """
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(path), attribute)
    except Exception as error:  # an import runs code, which raises nearly anything
        raise FieldError("model", name, f"package.module:function that can be imported ({_told(error)})") from error
    chosen = _chosen(name, function, sizes)
    try:
        model = function(**chosen)
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "no arguments"
        raise FieldError("model", name, f"a function that can be called with {given} ({_told(error)})") from error
    if not isinstance(model, nn.Module):
        raise FieldError("model", name, f"a function that returns a torch.nn.Module, not {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FieldError("model", name, "a function that returns a module with parameters to train")
    return model


def _chosen(name: str, function: Callable[..., object], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes that a function takes.

    Raises:
        FieldError: The function needs something else.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no function, or one without a signature: calling it tells
        return {}
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    is_variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in is_variable]
    other = [key for key in needed if key not in named or key not in sizes]
    if other:
        words = f"a function that needs no more than {', '.join(sizes)}, by name; this one needs {', '.join(other)}"
        raise FieldError("model", name, words)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {key: value for key, value in sizes.items() if takes_all or key in named}


def check_model(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Put one batch through a model, in eval mode, and compare what comes out with what is needed.

    Nothing of the model changes, nor do torch's random numbers.

    Args:
        name: Name of the model, for the error.
        model: Model on the device of the images.
        images: Images [N, C, H, W], as the model is trained on them.
        num_classes: Logits that each image needs.

    Raises:
        FieldError: Anything but floating-point logits [N, num_classes] comes out, or the model raises an exception.
    """
    shape, expected = tuple(images.shape), (len(images), num_classes)
    needed = f"a model that maps images of shape {shape} to logits of shape {expected}"
    try:
        with _left_as_it_is(model, images.device), torch.no_grad():
            output = model(images)
    except Exception as error:  # the user's code, which raises nearly anything
        raise FieldError("model", name, f"{needed}; this one raises {_told(error)}") from error
    if not isinstance(output, Tensor):
        raise FieldError("model", name, f"{needed}; this one returns a {type(output).__name__}, not a tensor")
    if output.shape != expected or not output.is_floating_point():
        raise FieldError("model", name, f"{needed}; this one returns {output.dtype} of shape {tuple(output.shape)}")


@contextmanager
def _left_as_it_is(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate inside; modes, buffers and random numbers are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training
        for buffer, before in buffers:
            buffer.copy_(before)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
