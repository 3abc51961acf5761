"""Starting from a model on disk."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedq.errors import FieldError


def load_weights(path: Path, model: nn.Module) -> None:
    """Read a `model.safetensors` into a model, in place.

    Raises:
        FieldError: The file cannot be read, or is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise FieldError("warm_start", str(path), f"a model.safetensors that can be read ({error})") from None
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise FieldError("warm_start", str(path), f"weights of the same network as --model; {words[:300]}") from None
