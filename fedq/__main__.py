"""`python -m fedq` is `fedq`, for launchers that start modules: ``torchrun --nproc-per-node 2 -m fedq probe``."""

from __future__ import annotations

import sys

from fedq.cli import main

if __name__ == "__main__":
    sys.exit(main())
