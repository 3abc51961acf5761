"""Weights as a finished run has deployed them, read from the models that it has left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedq.errors import FieldError
from fedq.report.arms import FLOAT_BITS, Run

NUM_BINS = 64


@dataclass(frozen=True)
class Deployed:
    """One deployed model.

    Args:
        path: The model's file.
        words: Words for the model's owner, where a run has several models; empty where it has one.
        bits: Bits of a weight; None where layers differ.
        round: The round, from 0, after which the model was written.
    """

    path: Path
    words: str
    bits: float | None
    round: int

    def weights(self) -> tuple[str, np.ndarray]:
        """Return name and values of the second weight of a convolution, or else of a linear layer: the first is exact.

        A model that has neither is shown by its largest tensor. Values are float64, whatever the model's type.

        Raises:
            FieldError: The file cannot be read, or has no weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise FieldError("runs", str(self.path), f"a model's file ({error})") from None
        tensors = {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
        kernels = [name for name in tensors if tensors[name].ndim == 4] or [n for n in tensors if tensors[n].ndim == 2]
        if not tensors:
            raise FieldError("runs", str(self.path), "a model with weights")
        kernels = kernels or [max(tensors, key=lambda name: tensors[name].numel())]
        name = kernels[min(1, len(kernels) - 1)]
        return name, tensors[name].double().numpy()

    def histogram(self) -> tuple[str, list[tuple[float, float, float]]]:
        """Return the weights' name and their bins: from, to, share of the finite values."""
        name, values = self.weights()
        finite = values[np.isfinite(values)]
        counts, edges = np.histogram(finite, bins=NUM_BINS)
        shares = counts / max(1, finite.size)
        return name, list(zip(edges[:-1].tolist(), edges[1:].tolist(), shares.tolist(), strict=True))


def deployed_models(run: Run) -> Iterator[Deployed]:
    """Yield a run's models: where clients have their own, the first client's of each bit width and network.

    Models that are not there any more are left out.
    """
    rows = run.table("personal")
    firsts: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        firsts.setdefault((row["bits"], row["model"]), row)
    networks = {model for _, model in firsts}
    for (bits, model), row in sorted(firsts.items()):
        path = run.path / "personal" / f"client-{row['client']:06d}.safetensors"
        words = f"client {row['client']}" + (f", {_bits_words(bits)}" if len(firsts) > 1 else "")
        words += f", {model}" if len(networks) > 1 else ""
        if path.exists():
            yield Deployed(path, words, float(bits), row["best_round"])
    path = run.path / "model.safetensors"
    if not rows and path.exists():
        yield Deployed(path, "", run.bits, run.summary["rounds"] - 1)


def _bits_words(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits} bit" + "s" * (bits > 1)
