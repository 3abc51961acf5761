"""Gradients of several parameters as one flat buffer, and back, for whoever has no DDP to make buckets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fedq.errors import FieldError

RUN_BYTES = 25 << 20
"""Size of a flat buffer, as of DDP's buckets; a larger parameter has one of its own."""


class GradientRun:
    """Parameters of one type and device whose gradients lie one after another in a buffer that is reused.

    A parameter without a gradient counts as zeros, and has one afterwards.

    Args:
        numbers: Of the parameters in their model.
        params: The parameters.
        buffer: Flat, as many elements as the parameters have together; None: the one parameter's gradient is averaged
            in place where it is contiguous.
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
        grads = [param.grad for param in self.params]
        if any(grad is not None and grad.layout != torch.strided for grad in grads):
            raise FieldError("gradient", "sparse", "dense gradients")
        if not self.views:
            (only,) = grads
            (param,) = self.params
            if only is not None and only.is_contiguous() and param.is_contiguous() and only.dtype == param.dtype:
                return only.view(-1)
            self._use(torch.empty(param.numel(), dtype=param.dtype, device=param.device))
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
            if param.grad is None:
                param.grad = torch.empty_like(param)
            grads.append(param.grad)
        torch._foreach_copy_(grads, self.views)

    def _use(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.views = views_of(buffer, self.params, keep_strides=self.keep_strides)


def views_of(buffer: Tensor, params: Sequence[nn.Parameter], *, keep_strides: bool) -> list[Tensor]:
    """Return each parameter's place in a flat buffer, in the parameter's shape; see `GradientRun`."""
    offsets = accumulate((param.numel() for param in params), initial=0)
    views = []
    for param, offset in zip(params, offsets, strict=False):
        if keep_strides and _is_dense(param):
            views.append(buffer.as_strided(param.shape, param.stride(), offset))
        else:
            views.append(buffer[offset : offset + param.numel()].view(param.shape))
    return views


def _is_dense(param: Tensor) -> bool:
    """Return whether a tensor's elements fill a stretch of memory, in whatever order: what `empty_like` can imitate."""
    return torch.empty_like(param, device="meta").stride() == param.stride()


def gradient_runs(params: Sequence[nn.Parameter], limit_bytes: int = RUN_BYTES) -> list[GradientRun]:
    """Divide parameters, in order, into runs of one type and device of at most ``limit_bytes``.

    Runs of one type and device share a buffer: they are averaged one after another.
    """
    groups: list[list[int]] = []
    for number, param in enumerate(params):
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
        if kind not in buffers:
            buffers[kind] = torch.empty(limit_bytes // members[0].element_size(), dtype=kind[0], device=kind[1])
        numel = nbytes // members[0].element_size()
        runs.append(GradientRun(group, members, buffers[kind][:numel] if nbytes <= limit_bytes else None))
    return runs


def _kind(param: Tensor) -> tuple[torch.dtype, torch.device]:
    return param.dtype, param.device


def _nbytes(param: Tensor) -> int:
    return param.numel() * param.element_size()
