"""Train ResNet-50 with federated clients; `python train_resnet50.py --help` lists the settings."""

import sys

from fedq.cli import main
from fedq.config import Config, LocalConfig

if __name__ == "__main__":
    sys.exit(main(defaults=Config(local=LocalConfig(model="resnet50"))))
