"""Train ResNet-50 with federated clients; `python train_resnet50.py --help` lists the settings."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports should not show one

    from fedq.cli import main
    from fedq.config import Config, LocalConfig

    sys.exit(main(defaults=Config(local=LocalConfig(model="resnet50"))))
