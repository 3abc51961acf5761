"""Keeps a module what it is around code of the user's: clients share it, and the next one must find it whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedq.errors import FieldError

_ALLOWED = "changed in place, with the shape, type, device and requires_grad that it had"
_FROZEN = "as it was: frozen parameters do not travel, so all clients must have the same"


@contextmanager
def kept_intact(model: nn.Module) -> Iterator[None]:
    """Put back what the body has replaced, reshaped, moved, frozen, added or removed; also one that fails.

    The values of parameters and of float statistics may change. Integer buffers and buffers outside of `state_dict`
    get the values that they had, without a word: they are never averaged, so no client's may stay.

    Raises:
        FieldError: The body has changed what it may not; the text names the first such tensor or module.
    """
    held = [_Held.of(module, path) for path, module in model.named_modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            problems = [problem for one in held for problem in one.put_back()]
    if problems:
        raise FieldError(*min(problems))


@dataclass(frozen=True)
class _Parameter:
    """A parameter as it was."""

    param: nn.Parameter
    data: Tensor
    is_trained: bool
    version: int

    @classmethod
    def of(cls, param: nn.Parameter) -> _Parameter:
        return cls(param, param.data, param.requires_grad, param._version)

    def put_back(self) -> tuple[str, str] | None:
        """Make it what it was, but for a trained one's values; return what was wrong, and what is allowed."""
        param, data, problem = self.param, self.data, None
        if not _alike(param.data, data):
            param.data = data
            problem = "reshaped or moved while training", _ALLOWED
        if param.requires_grad != self.is_trained:
            problem = "frozen" if self.is_trained else "trained", _ALLOWED
            param.requires_grad_(self.is_trained)
        elif not self.is_trained and (param._version != self.version or param.data_ptr() != data.data_ptr()):
            problem = "changed while training", _FROZEN
            param.data = data
        return problem


@dataclass(frozen=True)
class _Held:
    """What one module consists of, as it was."""

    module: nn.Module
    path: str
    children: dict[str, nn.Module | None]
    params: dict[str, _Parameter | None]
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]
    """Values of the buffers that are never averaged, by name."""

    @classmethod
    def of(cls, module: nn.Module, path: str) -> _Held:
        buffers, local = dict(module._buffers), module._non_persistent_buffers_set
        own = {n: b.clone() for n, b in buffers.items() if b is not None and (n in local or not _is_averaged(b))}
        params = {name: None if p is None else _Parameter.of(p) for name, p in module._parameters.items()}
        return cls(module, path, dict(module._modules), params, buffers, own)

    def put_back(self) -> list[tuple[str, str, str]]:
        """Make the module what it was; return what was wrong: a name, what happened, and what is allowed."""
        return [*self._children_back(), *self._params_back(), *self._buffers_back()]

    def _name(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _children_back(self) -> Iterator[tuple[str, str, str]]:
        now = self.module._modules
        changed = [name for name in {**self.children, **now} if now.get(name, ()) is not self.children.get(name, ())]
        if changed:
            now.clear()
            now.update(self.children)
            yield self._name(changed[0]), "added, removed or replaced while training", "the module as it is"

    def _params_back(self) -> Iterator[tuple[str, str, str]]:
        now = self.module._parameters
        before = {name: None if held is None else held.param for name, held in self.params.items()}
        changed = [name for name in {**before, **now} if now.get(name, ()) is not before.get(name, ())]
        if changed:
            now.clear()
            now.update(before)
            yield self._name(changed[0]), "added, removed or replaced while training", _ALLOWED
        for name, held in self.params.items():
            problem = None if held is None else held.put_back()
            if problem is not None:
                yield self._name(name), *problem

    def _buffers_back(self) -> Iterator[tuple[str, str, str]]:
        now = dict(self.module._buffers)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for name, buffer in self.buffers.items():
            after = now.get(name)
            if buffer is None:
                continue
            if name in self.values:
                if not _alike(buffer, self.values[name]):
                    buffer.data = self.values[name]
                else:
                    buffer.copy_(self.values[name])
            elif after is None or not _alike(after, buffer):
                yield self._name(name), "removed, reshaped or moved while training", _ALLOWED
            elif after is not buffer:  # as `self.mean = 0.9 * self.mean + 0.1 * mean` leaves it
                buffer.copy_(after.detach())


def _is_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
