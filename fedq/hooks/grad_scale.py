"""The factor by which float16 training scales its gradients: whoever was handed over, and whoever was not."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

GradScale = torch.amp.GradScaler | Callable[[], float | Tensor]
"""A gradient scaler, or what returns the factor by which gradients are scaled now."""
_LOOK_EVERY = 100  # steps, at a scale on a GPU: reading it waits for the device


def current_scale(scaler: GradScale | None) -> float | Tensor | None:
    """Return the factor by which gradients are scaled now, or None if they are not."""
    if isinstance(scaler, torch.amp.GradScaler):
        return scaler._scale if scaler.is_enabled() else None
    return None if scaler is None else scaler()


class UnknownScalers:
    """Gradient scalers that nobody handed over: looked for at the first step, and said once if their scale changes.

    Residuals are then kept at a scale that no longer holds. A gradient scaler leaves no trace in the gradients, so all
    that the process has are watched.
    """

    def __init__(self) -> None:
        self._first: list[tuple[weakref.ref[torch.amp.GradScaler], float]] | None = None
        self._num_looks = 0

    def look(self) -> None:
        """Look for them, or at them; called once a step."""
        if self._first is None:
            self._first = [(weakref.ref(scaler), scaler.get_scale()) for scaler in _all_scalers()]
        self._num_looks += 1
        for reference, first in self._first:
            scaler = reference()
            scale = None if scaler is None else scaler._scale
            if scale is None or (scale.device.type != "cpu" and self._num_looks % _LOOK_EVERY):
                continue
            if float(scale) != first:
                self._first = []
                warnings.warn(
                    f"a GradScaler has changed its scale from {first:g} to {float(scale):g}; if it scales this model's "
                    "loss, give it to register or step_state as grad_scaler, so that residuals are kept unscaled",
                    stacklevel=2,
                )
                return


def _all_scalers() -> list[torch.amp.GradScaler]:
    found = [scaler for scaler in gc.get_objects() if issubclass(type(scaler), torch.amp.GradScaler)]
    return [scaler for scaler in found if scaler.is_enabled()]
