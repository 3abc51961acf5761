"""Gradients of several parameters as one flat buffer, and back, for whoever has no DDP to make buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.layout import as_real

RUN_BYTES = 25 << 20
"""Size of a flat buffer, as of DDP's buckets; a larger parameter has one of its own."""


class GradientRun:
    """Parameters of one type and device whose gradients lie one after another in a buffer that is reused.

    A parameter without a gradient counts as zeros, and has one afterwards. Complex ones lie there as real and imaginary
    parts, in turn.

    Args:
        numbers: Numbers of the parameters in their model.
        params: The parameters, one for each number.
        buffer: Flat tensor of as many real numbers as the parameters have together; None: the one parameter's
            gradient is averaged in place where it is contiguous.
        keep_strides: Whether a parameter's elements lie in the order in which they lie in memory, as in DDP's buckets,
            or in row-major order.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        params: Sequence[nn.Parameter],
        buffer: Tensor | None,
        *,
        keep_strides: bool = True,
    ) -> None:
        self.numbers = list(numbers)
        self.params = list(params)
        self.keep_strides = keep_strides
        self.views: list[Tensor] = []
        if buffer is not None:
            self._use(buffer)

    def load(self) -> Tensor:
        """Return the gradients, flat."""
        grads = [None if param.grad is None else _as_real_gradient(param.grad) for param in self.params]
        if not self.views:
            (only,), (param,) = grads, self.params
            real = as_real(param.detach())
            if only is not None and _lies_like(only, real) and not param.grad.is_conj():  # type: ignore[union-attr]
                return only.view(-1)
            self._use(torch.empty(real.numel(), dtype=real.dtype, device=real.device))
        places, present = [], []
        for view, grad in zip(self.views, grads, strict=True):
            if grad is None:
                view.zero_()
            else:
                places.append(view)
                present.append(grad)
        if present:
            torch._foreach_copy_(places, present)
        return self.buffer

    def store(self) -> None:
        """Write back what `load` returned."""
        if not self.views:
            return
        grads = []
        for param in self.params:
            if param.grad is None or param.grad.is_conj():
                param.grad = torch.empty_like(param)
            grads.append(as_real(param.grad))
        torch._foreach_copy_(grads, self.views)

    def _use(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.views = views_of(buffer, self.params, keep_strides=self.keep_strides)


def views_of(buffer: Tensor, params: Sequence[Tensor], *, keep_strides: bool) -> list[Tensor]:
    """Return each parameter's place in a flat buffer, in the parameter's shape as real numbers; see `GradientRun`."""
    reals = [as_real(param.detach()) for param in params]
    offsets = accumulate((real.numel() for real in reals), initial=0)
    views = []
    for param, offset in zip(reals, offsets, strict=False):
        if keep_strides and _is_dense(param):
            views.append(buffer.as_strided(param.shape, param.stride(), offset))
        else:
            views.append(buffer[offset : offset + param.numel()].view(param.shape))
    return views


def _as_real_gradient(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise FieldError("gradient", "sparse", "dense gradients")
    return as_real(grad)


def _lies_like(grad: Tensor, param: Tensor) -> bool:
    return grad.is_contiguous() and param.is_contiguous() and grad.dtype == param.dtype


def _is_dense(param: Tensor) -> bool:
    """Return whether a tensor's elements fill a stretch of memory, in whatever order: what `empty_like` can imitate."""
    return torch.empty_like(param, device="meta").stride() == param.stride()


def gradient_runs(params: Mapping[int, nn.Parameter], limit_bytes: int = RUN_BYTES) -> list[GradientRun]:
    """Divide parameters, given by number and in order, into runs of one type and device of at most ``limit_bytes``.

    Runs of one type and device share a buffer: they are averaged one after another.
    """
    groups: list[list[int]] = []
    for number, param in params.items():
        last = [params[i] for i in groups[-1]] if groups else []
        if last and _kind(last[0]) == _kind(param) and sum(map(_nbytes, [*last, param])) <= limit_bytes:
            groups[-1].append(number)
        else:
            groups.append([number])
    buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    runs = []
    for group in groups:
        members = [params[number] for number in group]
        kind, nbytes = _kind(members[0]), sum(map(_nbytes, members))
        dtype, device = kind
        if kind not in buffers:
            buffers[kind] = torch.empty(limit_bytes // dtype.itemsize, dtype=dtype, device=device)
        numel = nbytes // dtype.itemsize
        runs.append(GradientRun(group, members, buffers[kind][:numel] if nbytes <= limit_bytes else None))
    return runs


def _kind(param: Tensor) -> tuple[torch.dtype, torch.device]:
    return param.dtype.to_real(), param.device


def _nbytes(param: Tensor) -> int:
    return param.numel() * param.element_size()
