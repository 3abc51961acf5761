"""Optimizer classes of torch without the wrappers through which they import torch's compiler.

Making any `torch.optim.Optimizer`, and stepping most, imports ``torch._dynamo`` only to tell it not to trace what
follows. Nothing is compiled here, so that would be a second of each start and 150 MB of each rank for nothing.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
from torch.optim import Optimizer

_Class = TypeVar("_Class", bound=type[Optimizer])
_WRAPPED = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
_lean: dict[type[Optimizer], type[Optimizer]] = {}


def lean(cls: _Class) -> _Class:
    """Return a subclass that computes the same, bit for bit, by the same code, but cannot be compiled.

    Args:
        cls: Any optimizer whose step is not itself differentiated.
    """
    if cls not in _lean:
        methods = {name: inspect.unwrap(getattr(cls, name)) for name in _WRAPPED}
        step = torch.no_grad()(inspect.unwrap(cls.step))
        _lean[cls] = type(cls.__name__, (cls,), methods | {"step": step})
    return _lean[cls]  # type: ignore[return-value]
