"""`python -m fedq.personalize`: the flags of `train.py`, with the defaults of a personalised job."""

from __future__ import annotations

import sys
from dataclasses import replace

from fedq.cli import main
from fedq.config import Config

_CONFIG = Config()
DEFAULTS = replace(
    _CONFIG,
    clients=replace(_CONFIG.clients, num_clients=10, partition="shards:classes=3"),
    local=replace(_CONFIG.local, model="cnn62k"),
    personal=replace(_CONFIG.personal, algorithm="quped", personal_test=True),
    run=replace(_CONFIG.run, rounds=20),
)
"""Ten clients of about three classes each, tested on their own, with models of their own."""

if __name__ == "__main__":
    sys.exit(main(defaults=DEFAULTS))
