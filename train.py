"""Train ResNet-18 with federated clients; `python train.py --help` lists the settings."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports should not show one

    from fedq.cli import main

    sys.exit(main())
