"""Federated averaging as a socket demo does it: whole float32 state dicts, pickled, both ways, plain TCP.

    python benchmarks/rivals/socket_pickle.py --task DIR --report FILE --bind HOST:PORT --clients 2      # the server
    python benchmarks/rivals/socket_pickle.py --task DIR --connect HOST:PORT --number 0                  # a client

Written from the description of such a system, with its mistakes mended: the network is evaluated in evaluation mode,
shares are disjoint, the end is clean. A message is its length, 4 bytes big-endian, and a pickle, which whoever can
connect may fill with code: for a benchmark between processes of one's own, and for nothing else.
"""

from __future__ import annotations

import argparse
import pickle
import socket
import struct
import time
from pathlib import Path
from typing import Any

import torch
from network_task import NetworkTask
from task import Report
from torch import Tensor

State = dict[str, Tensor]


def send(connection: socket.socket, value: Any) -> int:
    """Send a message; return its bytes."""
    data = pickle.dumps(value)
    connection.sendall(struct.pack(">I", len(data)) + data)
    return 4 + len(data)


def receive(connection: socket.socket) -> tuple[Any, int]:
    """Return a message's value and its bytes."""
    (length,) = struct.unpack(">I", _exactly(connection, 4))
    return pickle.loads(_exactly(connection, length)), 4 + length


def _exactly(connection: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        taken = connection.recv_into(view)
        if not taken:
            raise ConnectionError("the other side is gone")
        view = view[taken:]
    return data


def mean(states: list[State]) -> State:
    """Return the plain mean; counters of integers as well, rounded down."""
    return {name: torch.stack([s[name] for s in states]).double().mean(0).to(t.dtype) for name, t in states[0].items()}


def serve(task: NetworkTask, report: Report, bind: str, num_clients: int) -> None:
    host, port = bind.rsplit(":", 1)
    model, accuracies, moved = task.build(), [], 0
    with socket.create_server((host, int(port))) as listener:
        connections = [listener.accept()[0] for _ in range(num_clients)]
    begin = time.time()
    for round in range(task.num_rounds):
        moved += sum(send(connection, (round, model.state_dict())) for connection in connections)
        answers = [receive(connection) for connection in connections]
        moved += sum(nbytes for _, nbytes in answers)
        model.load_state_dict(mean([state for state, _ in answers]))
        accuracies.append(task.val_accuracy(model))
        report.round_done()
        print(f"round {round + 1}: validation accuracy {accuracies[-1]:.4f}", flush=True)
        if accuracies[-1] >= task.target:
            break
    for connection in connections:
        send(connection, None)
        connection.close()
    versions = {"torch": torch.__version__}
    report.write(
        begin=begin, val_accuracies=accuracies, test_accuracy=task.accuracy(model), moved=moved, versions=versions
    )


def take_part(task: NetworkTask, connect: str, number: int) -> None:
    host, port = connect.rsplit(":", 1)
    model = task.build()
    task.warm_up(model, number)
    connection = _connect(host, int(port))
    while (message := receive(connection)[0]) is not None:
        round, state = message
        model.load_state_dict(state)
        task.train(model, number, round)
        send(connection, model.state_dict())


def _connect(host: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port))
        except OSError:  # the server is not there yet
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--bind")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--connect")
    parser.add_argument("--number", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.number)
    task = NetworkTask.load(args.task)
    if args.bind:
        serve(task, Report(args.report), args.bind, args.clients)
    else:
        take_part(task, args.connect, args.number)


if __name__ == "__main__":
    main()
