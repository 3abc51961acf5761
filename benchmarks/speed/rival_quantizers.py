"""Quantizers of torch and bitsandbytes, for `bench_kernels.py`; needs nothing of fedq.

As a script it times them in its own interpreter: ``python rival_quantizers.py ELEMENTS THREADS``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

Pass = Callable[[], object]


def timed(work: Pass) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def passes(x: Tensor) -> dict[str, Pass]:
    """Return what the libraries of this interpreter offer for comparable work."""
    residual = torch.zeros_like(x)
    scales, zeros = x.view(-1, 256).abs().amax(1) / 127, torch.zeros(x.numel() // 256, dtype=torch.int64)

    def sign_with_feedback() -> Tensor:
        total = (x + residual).view(-1, 1024)
        scale = total.abs().mean(1, keepdim=True)
        bits = (total < 0).view(-1, 8)
        packed = (bits * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        residual.copy_((total - scale * torch.where(total < 0, -1.0, 1.0)).view(-1))
        return packed

    found: dict[str, Pass] = {
        "torch .to(bfloat16)": lambda: x.to(torch.bfloat16),
        "torch operations": sign_with_feedback,
        "torch quantize_per_channel": lambda: torch.quantize_per_channel(
            x.view(-1, 256), scales, zeros, 0, torch.qint8
        ),
        "torch topk": lambda: x.abs().topk(x.numel() // 100, sorted=False),
    }
    try:
        from bitsandbytes import functional
    except ImportError:
        return found
    found["bitsandbytes 8-bit"] = lambda: functional.quantize_blockwise(x, blocksize=256)
    found["bitsandbytes nf4"] = lambda: functional.quantize_4bit(x, blocksize=256, quant_type="nf4")
    return found


def versions() -> dict[str, str]:
    """Return the versions of the rivals in this interpreter."""
    found = {"torch": str(torch.__version__)}
    try:
        import bitsandbytes

        found["bitsandbytes"] = bitsandbytes.__version__
    except ImportError:
        pass
    return found


def serve(num: int, threads: int) -> None:
    """Answer on standard output: first the versions and names, then the seconds of each name read from input."""
    torch.set_num_threads(threads)
    work = passes(torch.randn(num))
    print(json.dumps({"versions": versions(), "names": list(work)}), flush=True)
    for line in sys.stdin:
        print(timed(work[line.strip()]), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
