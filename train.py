"""Train ResNet-18 with federated clients; `python train.py --help` lists the settings."""

import sys

from fedq.cli import main

if __name__ == "__main__":
    sys.exit(main())
