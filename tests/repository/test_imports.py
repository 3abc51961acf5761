"""What codes and carries an update works with torch and numpy alone, and importing it does nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, random, sys

BLOCKED = {"torchvision", "pyarrow", "rich", "tyro", "sklearn", "yaml", "safetensors", "tensorboard", "PIL", "scipy"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())

import logging
import numpy as np
import torch
import torch.distributed as dist

read = []
environ = type(os.environ)

class Watched(environ):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)

os.environ.__class__ = Watched
def states():
    return (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_num_threads(), logging.getLogger().handlers, logging.getLogger().level)
before = states()
import fedq, fedq.kernels, fedq.codecs, fedq.layout, fedq.feedback, fedq.wire, fedq.collectives
assert states() == before, "an import seeded, set threads or set up logging"
assert not dist.is_initialized()
assert not torch.cuda.is_initialized()
ours = [key for key in read if not key.startswith(("PYTHON", "TORCH"))]
assert not ours, f"the environment was read: {ours}"
os.environ.__class__ = environ

x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
payload = fedq.codec("int4:block=256").encode(x, seed=0)
assert payload.nbytes < 1000 * 4 * 0.14
assert (payload.decode() - x).norm() < 0.2 * x.norm()

model = torch.nn.Linear(30, 20)
layout = fedq.layout.Layout.of(model, "sign")
feedback = fedq.feedback.ErrorFeedback(fedq.feedback.ResidualStore())
update = torch.randn(layout.numel)
body = fedq.wire.join_payloads(layout, feedback.encode(0, layout, update, seed=1))
out = torch.zeros(layout.numel)
layout.decode_add(fedq.wire.split_body(layout, body), out, seed=1)
left = feedback.store.get(0, layout.num_params)
assert torch.allclose(out + left, update, atol=1e-6)
assert fedq.collectives.Transport().gather([body], [1])[0][0][0] is body
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("works")
"""


def test_the_core_needs_torch_and_numpy_alone_and_importing_it_does_nothing() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "works\n"
