"""The same model, data and training function as in one process, with every client on a machine of its own.

    python examples/across_a_network.py serve --insecure                # needs no data
    python examples/across_a_network.py join 0 --insecure               # and another with 1
    python examples/across_a_network.py here                            # both clients in this process: the same model

Without --insecure, which works on loopback only, each side has a folder of certificates: see `fedq certs`.
"""

import argparse
import zlib

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fedq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("role", choices=["serve", "join", "here"])
parser.add_argument("number", type=int, nargs="?", default=0)
parser.add_argument("--address", default="localhost:8470")
parser.add_argument("--certs", help="this side's folder of certificates")
parser.add_argument("--insecure", action="store_true")
parser.add_argument("--out", help="where a client keeps its state, or the server its run")
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def client(number: int) -> fedq.Client:
    """Return a client with made-up measurements of its own."""
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(200, 8, generator=draw)
    y = x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(200, 1, generator=draw)

    def train(model: nn.Module, lr: float) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for a, b in zip(x.split(20), y.split(20), strict=True):
            optimizer.zero_grad()
            loss = mse_loss(model(a), b)
            loss.backward()
            optimizer.step()
        return loss.item()

    return fedq.Client(train, num_examples=len(x))


trust = {"certs": args.certs, "insecure": args.insecure}
if args.role == "join":
    fedq.network.join(args.address, model=model, client=client(args.number), number=args.number, out=args.out, **trust)
else:
    clients = 2 if args.role == "serve" else [client(0), client(1)]
    fed = fedq.Federation(model, clients, uplink="int4", callbacks=[lambda fed, result: print(result)], out=args.out)
    if args.role == "serve":
        fedq.network.serve(fed, rounds=5, lr=0.05, bind=args.address, **trust)
    else:
        fed.run(5, lr=0.05)
    fed.close()
values = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
print(f"the model's CRC32 is {zlib.crc32(values):08x}")
