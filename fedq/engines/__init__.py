"""What takes an optimizer step: plain PyTorch, DeepSpeed or Accelerate, each behind the same few methods."""

from fedq.engines.base import Engine, MakeOptimizer
from fedq.engines.choose import make_engine
from fedq.engines.precision import Precision, choose_precision
from fedq.engines.torch_engine import TorchEngine

__all__ = ["Engine", "MakeOptimizer", "Precision", "TorchEngine", "choose_precision", "make_engine"]
