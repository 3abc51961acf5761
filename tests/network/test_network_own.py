"""Somebody's own federation across a network: the same model as in one process, and clients that keep a state."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import environ, free_ports
from torch import nn
from torch.nn.functional import mse_loss

import fedq
from fedq.network import join, serve

EXAMPLE = Path(__file__).parents[2] / "examples" / "across_a_network.py"
LIMIT_S = 120


def run_example(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environ(), **pipes)


@pytest.mark.slow
def test_the_example_ends_in_one_model_wherever_its_clients_are(tmp_path: Path) -> None:
    address = f"localhost:{free_ports()}"
    parties = [
        run_example("here", cwd=tmp_path),
        run_example("serve", "--insecure", "--address", address, cwd=tmp_path),
    ]
    for number in ("0", "1"):
        client = ("join", number, "--insecure", "--address", address, "--out", f"client{number}")
        parties.append(run_example(*client, cwd=tmp_path))
    said = [party.communicate(timeout=LIMIT_S)[0] for party in parties]
    assert [party.returncode for party in parties] == [0] * 4, said
    assert len({re.search(r"CRC32 is ([0-9a-f]{8})", text)[1] for text in said}) == 1, said  # type: ignore[index]
    assert [text.count("round ") for text in said[:2]] == [5, 5]


def shard(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(60 + 20 * number, 6, generator=draw)
    return x, x.sin().sum(dim=1, keepdim=True)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))


def with_adam(number: int, model: nn.Module) -> fedq.Client:
    """Return a client that keeps its optimizer's moments, and counts its steps."""
    x, y = shard(number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(model: nn.Module, lr: float, first_step: int, seed: int) -> float:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed % 2**63))
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + first_step)
        for picked in order.split(20):
            optimizer.zero_grad()
            loss = mse_loss(model(x[picked]), y[picked])
            loss.backward()
            optimizer.step()
        return loss.item()

    return fedq.Client(train, num_examples=len(x), state=optimizer)


def here(rounds: int) -> nn.Module:
    model = network()
    with fedq.Federation(model, [with_adam(n, model) for n in range(2)], uplink="sign", seed=5) as fed:
        fed.run(rounds, lr=0.02)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Joined(threading.Thread):
    """A client in a thread of the test."""

    def __init__(self, port: int, number: int, folder: Path, **more: Any) -> None:
        super().__init__(daemon=True)
        self.model = network()
        self.given = {"client": with_adam(number, self.model), "number": number, "out": folder / f"client{number}"}
        self.given |= more
        self.address, self.outcome = f"localhost:{port}", None
        self.start()

    def run(self) -> None:
        try:
            quiet = {"insecure": True, "say": lambda line: None}
            self.outcome = join(self.address, model=self.model, **quiet, **self.given)
        except Exception as error:
            self.outcome = error


def test_a_kept_state_is_the_same_across_a_network_and_after_a_stop(tmp_path: Path) -> None:
    """Server and clients stop after two of four rounds, and go on in new objects from what they have on disk."""
    for num in (2, 4):
        port = free_ports()
        clients = [Joined(port, number, tmp_path) for number in range(2)]
        with fedq.Federation(network(), 2, uplink="sign", seed=5, out=tmp_path / "run", resume=True) as fed:
            summary = serve(fed, rounds=num, lr=0.02, bind=f"localhost:{port}", insecure=True, say=lambda line: None)
        for client in clients:
            client.join(LIMIT_S)
            assert client.outcome["rounds"] == num, client.outcome
        assert summary.rounds == num
        assert same(fed.model, here(num))
        assert all(same(client.model, fed.model) for client in clients)


def test_what_cannot_be_served_or_joined_is_refused_by_name(tmp_path: Path) -> None:
    model = network()
    own = with_adam(0, model)
    with (
        fedq.Federation(model, [own]) as fed,
        pytest.raises(fedq.FieldError, match="federation='1 clients on 1 ranks'"),
    ):
        serve(fed, rounds=1, lr=0.1, insecure=True)
    with fedq.Federation(model, 2) as fed:
        with pytest.raises(fedq.FieldError, match=r"clients=2 .*fedq\.network\.serve"):
            fed.run(1, lr=0.1)
        with pytest.raises(fedq.FieldError, match="certs=None"):
            serve(fed, rounds=1, lr=0.1)
        with pytest.raises(fedq.FieldError, match="quorum=0"):
            serve(fed, rounds=1, lr=0.1, insecure=True, quorum=0)
    where = {"connect": "localhost:1", "model": model, "insecure": True, "number": 0}
    with pytest.raises(fedq.FieldError, match=r"client=None .*a fedq\.Client; or train and num_examples"):
        join(**where)
    with pytest.raises(fedq.FieldError, match=r"num_examples=3 .*left out with client"):
        join(**where, client=own, num_examples=3)
    half = fedq.Client(lambda model, lr: None, num_examples=0.5)
    with pytest.raises(fedq.FieldError, match=r"num_examples=0\.5 .*whole number"):
        join(**where, client=half)
