"""The front door: what a federation of somebody's own model comes to, against a loop by hand and against itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_group
from own_federations import (
    FLOAT32,
    NUM_CLIENTS,
    WIDTH,
    client,
    clients,
    data_of,
    ended,
    examples,
    net,
    plain,
    steps,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fedq
from fedq.errors import FieldError
from fedq.federated.aggregate import why_left_out
from fedq.federated.training import RoundContext
from fedq.wire import HEADER_NBYTES

# ---- against a loop by hand ------------------------------------------------------------------------------------------


def federated_averaging(model: nn.Module, cohorts: list[tuple[int, ...]], lr: float) -> Tensor:
    """FedAvg in float64, three full steps of gradient descent a client and round: the flat model."""
    model = model.double()
    for cohort in cohorts:
        start = [param.detach().clone() for param in model.parameters()]
        mean = [torch.zeros_like(param) for param in start]
        total = sum(len(examples(client)[0]) for client in cohort)
        for number in cohort:
            for param, value in zip(model.parameters(), start, strict=True):
                param.data.copy_(value)
            x, y = (values.double() for values in examples(number))
            for _ in range(3):
                gradients = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
                for param, gradient in zip(model.parameters(), gradients, strict=True):
                    param.data.sub_(gradient, alpha=lr)
            for param, one in zip(model.parameters(), mean, strict=True):
                one.add_(param.detach(), alpha=len(x) / total)
        for param, value in zip(model.parameters(), mean, strict=True):
            param.data.copy_(value)
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


@pytest.mark.parametrize("cohort", [None, 1, 3])
def test_rounds_in_float32_are_federated_averaging(cohort: int | None) -> None:
    fed = fedq.Federation(net(), clients(), cohort=cohort, **FLOAT32)
    results = list(fed.rounds(4, lr=0.2))
    assert [len(result.clients) for result in results] == [cohort or NUM_CLIENTS] * 4
    by_hand = federated_averaging(net(), [result.clients for result in results], 0.2)
    way = (by_hand - nn.utils.parameters_to_vector(net().parameters())).norm()
    off = (nn.utils.parameters_to_vector(fed.model.parameters()) - by_hand).norm()
    assert way > 0.2
    assert off < 1e-6 * way * 4, "float32 against float64, over 4 rounds of 3 steps"
    losses = [len(examples(c)[0]) for c in results[0].clients]
    assert min(losses) > 0


def outer_rounds_by_hand(num: int, *, keeps: bool) -> Tensor:
    """Inner AdamW in float64, each client with a model and an optimizer of its own; outside SGD with Nesterov."""
    models = [net().double() for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    master = nn.Parameter(nn.utils.parameters_to_vector(net().parameters()).detach().double())
    outer = torch.optim.SGD([master], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(num):
        ends = []
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            nn.utils.vector_to_parameters(master.detach().clone(), model.parameters())
            x, y = (values.double() for values in examples(number))
            used = optimizer if keeps else torch.optim.AdamW(model.parameters(), lr=0.01)
            for _ in range(4):
                used.zero_grad()
                mse_loss(model(x), y).backward()
                used.step()
            ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        master.grad = master.detach() - torch.stack(ends).mean(0)
        outer.step()
    return master.detach()


def test_kept_moments_and_a_server_with_momentum_are_outer_rounds() -> None:
    model = net()

    def make(number: int) -> fedq.Client:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return fedq.Client(
            lambda model, lr: steps(model, optimizer, number, num=4), num_examples=1, state={"adamw": optimizer}
        )

    server = "fedavgm:lr=0.7,momentum=0.9,nesterov=true"
    fed = fedq.Federation(model, make, num_clients=3, server=server, **FLOAT32)
    fed.run(5, 0.01)
    ended, kept = flat(model).double(), outer_rounds_by_hand(5, keeps=True)
    way = (kept - flat(net())).norm()
    assert (ended - kept).norm() < 1e-4 * way
    assert (ended - outer_rounds_by_hand(5, keeps=False)).norm() > 1e-3 * way


def test_the_loss_of_a_round_is_the_mean_over_examples() -> None:
    fed = fedq.Federation(net(), clients(3), **FLOAT32)
    (result,) = fed.rounds(1, lr=0.2)
    own, weights = [], [len(examples(number)[0]) for number in range(3)]
    for number in range(3):
        model = net()
        own.append(steps(model, torch.optim.SGD(model.parameters(), lr=0.2), number))
    assert result.loss == pytest.approx(np.average(own, weights=weights), rel=1e-6)
    assert result.metrics == {"train_loss": pytest.approx(result.loss, rel=1e-6)}


TEN_LINES = """
import fedq, torch
from torch.nn.functional import cross_entropy
def train_on(x, y):
    def train(model, lr):                                  # one round, in place
        opt = torch.optim.SGD(model.parameters(), lr=lr)
        for a, b in zip(x.split(32), y.split(32)): opt.zero_grad(); loss = cross_entropy(model(a), b); loss.backward(); opt.step()
        return loss.item()
    return fedq.Client(train, num_examples=len(x))
fed = fedq.Federation(my_model, [train_on(x, y) for x, y in shards], uplink="int4", downlink="int8")
for result in fed.rounds(10, lr=0.05): print(result)       # round 0: loss 2.301, up 41.2 kB (7.8x less), down 83 kB
"""  # noqa: E501


def test_ten_lines_train_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in TEN_LINES.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    shards = [(x, x[:, :4].argmax(1)) for x in (torch.randn(160, 20) for _ in range(4))]
    exec(TEN_LINES, {"my_model": model, "shards": shards})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    shown = [re.fullmatch(r"round (\d): loss ([\d.]+), up [\d.]+ kB \((.*)x less\), down .*", line) for line in said]
    assert [int(one[1]) for one in shown if one] == list(range(10))
    assert float(shown[-1][2]) < 0.9 * float(shown[0][2])  # type: ignore[index]
    assert all(float(one[3]) > 6 for one in shown if one)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, options: dict[str, Any]) -> tuple[bytes, list[dict[str, Any]], list[int]]:
    made: list[int] = []

    def make(number: int) -> fedq.Client:
        made.append(number)
        return client(number, uplink="int8" if options.get("own") and number == 1 else None)

    chosen = {name: value for name, value in options.items() if name != "own"}
    chosen |= {"evaluate": evaluate_parts, "metrics": [fedq.Metric("mse")]}
    data, results = ended(model=net(seed=rank), clients=make, num_clients=NUM_CLIENTS, **chosen)
    return data, results, made


def evaluate_parts(model: nn.Module, rank: int, ranks: int) -> dict[str, tuple[float, int]]:
    x, y = examples(9)
    mine = (model(x) - y).square()[rank::ranks]
    return {"mse": (float(mine.double().sum()), len(mine))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"uplink": "int4", "downlink": "int8", "cohort": 3, "max_update_norm": 1.0},
        {"uplink": "topk:density=0.1", "aggregate": "two_phase", "server": "fedadam:lr=0.01"},
        {"uplink": "int4 sign@2", "own": True},
    ],
    ids=["defaults", "cohorts", "two_phase", "own-codec"],
)
def test_ranks_end_in_the_same_bytes_and_results(options: dict[str, Any]) -> None:
    (alone,) = run_group(1, _on_rank, options)
    together = run_group(2, _on_rank, options)
    assert together[0][0] == together[1][0] == alone[0], "rank 1 began with other weights than rank 0"
    assert together[0][1] == together[1][1]
    for one, two in zip(alone[1], together[0][1], strict=True):
        assert one["metrics"].pop("val_mse") == pytest.approx(two["metrics"].pop("val_mse"), rel=1e-12)
        assert one == two
    asked = {number for result in alone[1] for number in result["clients"]}
    assert sorted(alone[2]) == sorted(asked)
    assert [sorted(one[2]) for one in together] == [sorted(n for n in asked if n % 2 == rank) for rank in range(2)]


def test_a_group_that_exists_is_used_and_left_open() -> None:
    assert run_group(2, _uses_group) == [(2, True), (2, True)]


def _uses_group(rank: int) -> tuple[int, bool]:
    with fedq.Federation(net(), clients()) as fed:
        fed.run(1, 0.1)
        world_size = fed.runtime.world_size
    return world_size, dist.is_initialized()


def test_codecs_of_clients_own_are_counted_and_used() -> None:
    fed = fedq.Federation(net(), [client(0), client(1, uplink="fp32"), client(2, uplink="fp32")], uplink="int8")
    (result,) = fed.rounds(1, lr=0.1)
    rows = [row for row in fed.ledger.table().to_pylist() if row["direction"] == "uplink"]
    by_client = {n: sum(row["payload"] for row in rows if row["client"] == n) for n in range(3)}
    assert by_client[1] == by_client[2] == 4 * (WIDTH * 8 + 8 + 8 + 1) + HEADER_NBYTES
    assert by_client[0] < by_client[1]
    assert sum(by_client.values()) == result.uplink_bytes
    with pytest.raises(FieldError, match=r"uplink of client 1='int8'.*two_phase"):
        fedq.Federation(net(), [client(0), client(1, uplink="int8")], aggregate="two_phase")


# ---- what a client's function is told --------------------------------------------------------------------------------


def test_a_training_function_gets_what_it_names() -> None:
    heard: list[tuple[int, int, int, int, float, float]] = []

    def train(model: nn.Module, lr: float, *, seed: int, round: int, first_step: int, client: int) -> None:
        steps(model, torch.optim.SGD(model.parameters(), lr=lr), client, num=2 + client)
        torch.manual_seed(seed)
        heard.append((round, client, first_step, seed, lr, torch.rand(()).item()))

    fed = fedq.Federation(net(), [fedq.Client(train, num_examples=1.5) for _ in range(2)], seed=7)
    list(fed.rounds(3, lr=lambda number: 0.1 / (1 + number)))
    assert [row[:3] for row in heard] == [(r, c, r * (2 + c)) for r in range(3) for c in range(2)]
    assert [row[3] for row in heard] == [RoundContext(r, 0.0, 7).local_seed(c) for r in range(3) for c in range(2)]
    assert [row[4] for row in heard] == [0.1, 0.1, 0.05, 0.05, 0.1 / 3, 0.1 / 3]
    assert len({row[5] for row in heard}) == 6


def test_random_numbers_of_torch_are_seeded_by_round_and_client() -> None:
    drawn: list[float] = []

    def train(model: nn.Module, lr: float) -> None:
        drawn.append(torch.rand(()).item())

    for _ in range(2):
        fedq.Federation(net(), [fedq.Client(train, num_examples=1) for _ in range(2)]).run(2, 0.1)
        torch.rand(17)
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) == 4


def test_gradients_that_a_client_has_left_are_no_other_clients() -> None:
    def train(model: nn.Module, lr: float, client: int) -> None:
        assert all(param.grad is None for param in model.parameters())
        steps(model, torch.optim.SGD(model.parameters(), lr=lr), client)

    fed = fedq.Federation(net(), [fedq.Client(train, num_examples=1) for _ in range(3)])
    assert [result.left_out for result in fed.rounds(2, 0.1)] == [{}, {}]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: fedq.Client(lambda model, lr, epochs: None, num_examples=1), r"train=.*epochs.*train\(model, lr\)"),
        (lambda: fedq.Client(lambda model: None, num_examples=1), "train="),
        (lambda: fedq.Client(client(0)._train, num_examples=0), "num_examples=0 .*above 0"),
        (lambda: fedq.Client(client(0)._train, num_examples="3"), "num_examples='3'"),  # type: ignore[arg-type]
        (lambda: fedq.Client(3, num_examples=1), r"train='int' .*train\(model, lr\)"),  # type: ignore[arg-type]
        (lambda: client(0, state=[1]), "state='list'.*state_dict"),
        (lambda: client(0, state={"scheduler": 3}), "scheduler='int'"),
        (lambda: client(0, uplink="int99"), "int99"),
        (lambda: fedq.Federation(net(), []), "num_clients=0"),
        (lambda: fedq.Federation(net(), client), "num_clients=None .*1 or more"),
        (lambda: fedq.Federation(net(), clients(2), num_clients=3), "num_clients=3 .*2 clients"),
        (lambda: fedq.Federation(net(), [client(0), net()]), "client 1='Sequential'"),  # type: ignore[list-item]
        (lambda: fedq.Federation(net(), clients(), uplink="int99"), "int99"),
        (lambda: fedq.Federation(net(), clients(), cohort=6), "cohort=6 .*1 to 5"),
        (lambda: fedq.Federation(net(), clients(), server="fedsgd"), "fedsgd"),
        (lambda: fedq.Federation(net(), clients(), feedback="maybe"), "feedback='maybe'"),
        (lambda: fedq.Federation(net(), clients(), resume=True), "out=None"),
        (lambda: fedq.Federation(net(), clients(), metrics=()), r"metrics=\(\)"),
        (lambda: fedq.Federation(net(), clients(), metrics=["mse"]), "metric 0='mse'"),  # type: ignore[list-item]
        (lambda: fedq.Federation(net(), clients(), callbacks=[3]), "callback='int'"),
        (lambda: fedq.Federation(net(), clients(), evaluate=3), "evaluate='int'"),  # type: ignore[arg-type]
        (lambda: fedq.Federation(nn.ReLU(), clients()), "model='no parameter is trained'"),
        (lambda: fedq.Federation(net, clients()), "model='function'"),  # type: ignore[arg-type]
        (lambda: fedq.Federation(net().requires_grad_(False), clients()), "model="),
        (lambda: fedq.Federation(net(), clients()).evaluate(), "evaluate=None"),
        (lambda: list(fedq.Federation(net(), 3).rounds(1, 0.1)), "clients=3 .*fedq.network.serve"),
        (lambda: fedq.Federation(net(), lambda n: net(), num_clients=2).run(1, 0.1), "client 0='Sequential'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        made()


def test_a_state_of_two_clients_is_refused() -> None:
    optimizer = torch.optim.AdamW(net().parameters())
    with pytest.raises(FieldError, match=r"state of client 1='that of client 0'.*a state of its own"):
        fedq.Federation(net(), clients(2, state=optimizer))


# ---- what a module may be --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, a frozen layer, an integer buffer, a float statistic and a table outside of `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, 1)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("table", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean()
            self.table = self.table + 1
        return self.last(self.norm(self.tied(torch.relu(self.first(x))) + self.frozen(x)))


def test_a_model_with_all_that_a_model_may_have() -> None:
    model, fresh = Odd(), Odd()
    fed = fedq.Federation(model, clients(3))
    result = [*fed.rounds(2, lr=0.1)][-1]
    assert result.clients == (0, 1, 2), result.left_out
    assert model.tied.weight is model.first.weight
    assert not torch.equal(model.first.weight, fresh.first.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.frozen.parameters(), fresh.frozen.parameters(), strict=True))
    assert model.calls == 0
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.table, fresh.table)
    assert model.scale != 1, "statistics travel"
    assert not torch.equal(model.norm.running_mean, fresh.norm.running_mean)
    names = {row["tensor"] for row in fed.ledger.table().to_pylist()}
    assert {"first.weight", "scale", "norm.running_mean"} < names
    assert not {"tied.weight", "frozen.weight", "calls", "table"} & names


def test_a_model_in_bfloat16_learns() -> None:
    fed = fedq.Federation(net().bfloat16(), clients(3), **FLOAT32)
    exact = fedq.Federation(net(), clients(3), **FLOAT32)
    first, *_, last = fed.rounds(6, lr=0.1)
    assert last.loss < 0.96 * first.loss
    assert last.loss == pytest.approx([*exact.rounds(6, lr=0.1)][-1].loss, rel=0.01)  # bfloat16 has 8 bits
    assert next(fed.model.parameters()).dtype == torch.bfloat16


def test_a_compiled_model_ends_as_the_plain_one_and_is_saved_under_plain_names(tmp_path: Path) -> None:
    compiled = torch.compile(net(), backend="eager")
    assert ended(model=compiled) == ended()
    with fedq.Federation(compiled, clients()) as fed:
        fed.save(tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == net().state_dict().keys()


def _wrapped(rank: int) -> tuple[bytes, list[dict[str, Any]]]:
    return ended(model=nn.parallel.DistributedDataParallel(net()))


def test_a_model_in_ddp_is_unwrapped() -> None:
    assert [data for data, _ in run_group(2, _wrapped)] == [ended()[0]] * 2


def _unlike(rank: int) -> str:
    model = net()
    model[0].requires_grad_(rank == 0)
    with pytest.raises(FieldError) as refused:
        fedq.Federation(model, clients())
    return str(refused.value)


def test_ranks_with_other_models_are_refused() -> None:
    assert all("one model on every rank" in words for words in run_group(2, _unlike))


# ---- trainings that go wrong -----------------------------------------------------------------------------------------


def raises(model: nn.Module) -> Any:
    model[0].weight.data.fill_(7)
    raise OSError("no disk")


def replaces(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(8, WIDTH))


def replaces_layer(model: nn.Module) -> None:
    model[2] = nn.Linear(8, 1)


def reshapes(model: nn.Module) -> None:
    model[2].bias.data = torch.zeros(3)


def to_double(model: nn.Module) -> None:
    model.double()


def freezes(model: nn.Module) -> None:
    model[0].requires_grad_(False)


def adds(model: nn.Module) -> None:
    model.register_parameter("more", nn.Parameter(torch.zeros(3)))


def removes(model: nn.Module) -> None:
    del model[2]


def spoils(model: nn.Module) -> float:
    model[0].weight.data[0, 0] = math.nan
    return 1.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (raises, "training failed: OSError: no disk"),
        (replaces, "0.weight='added, removed or replaced"),
        (replaces_layer, "2='added, removed or replaced"),
        (reshapes, "2.bias='reshaped or moved"),
        (to_double, "0.bias='reshaped or moved"),
        (freezes, "0.bias='frozen'"),
        (adds, "more='added"),
        (removes, "2='added, removed"),
        (spoils, "update is not finite"),
        (lambda model: "good", "result of train=\"'good'\""),
        (lambda model: torch.ones(2), "result of train="),
        (lambda model: (1.0, 0.5, 3.0), "result of train="),
        (lambda model: {"loss": "x"}, "result of train="),
        (lambda model: object(), "result of train="),
        (lambda model: {"accuracy": 97.0}, "accuracy=97.0"),
    ],
)
def test_a_training_that_goes_wrong_is_left_out_and_harms_nobody(wrong: Callable, words: str) -> None:
    def train(model: nn.Module, lr: float, round: int) -> Any:
        loss = steps(model, torch.optim.SGD(model.parameters(), lr=lr), 1)
        return wrong(model) if round == 1 else loss

    model = net()
    fed = fedq.Federation(model, [client(0), fedq.Client(train, num_examples=3, name="Ada"), client(2)], **FLOAT32)
    results = list(fed.rounds(3, lr=0.1))
    assert [result.clients for result in results] == [(0, 1, 2), (0, 2), (0, 1, 2)]
    assert words in results[1].left_out[1]
    assert f"left out client 1: {results[1].left_out[1]}" in str(results[1])
    by_hand = _by_hand_with_weights([(0, 1, 2), (0, 2), (0, 1, 2)], {0: 8, 1: 3, 2: 16})
    now = nn.utils.parameters_to_vector(model.parameters()).double()
    assert (now - by_hand).norm() < 1e-5 * by_hand.norm()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net().named_parameters()]


def _by_hand_with_weights(cohorts: list[tuple[int, ...]], weights: dict[int, int]) -> Tensor:
    model = net()
    for cohort in cohorts:
        ends = []
        for number in cohort:
            trained = net()
            trained.load_state_dict(model.state_dict())
            steps(trained, torch.optim.SGD(trained.parameters(), lr=0.1), number)
            ends.append(nn.utils.parameters_to_vector(trained.parameters()).double() * weights[number])
        mean = torch.stack(ends).sum(0) / sum(weights[number] for number in cohort)
        nn.utils.vector_to_parameters(mean.float(), model.parameters())
    return nn.utils.parameters_to_vector(model.parameters()).double()


def test_words_that_are_no_utf_8_can_be_sent() -> None:
    seated = client(0).seated(0, None, model=net())
    frame = seated.failure(ValueError("\ud800 " + "é" * 1000), RoundContext(0, 0.1, 0))
    assert why_left_out(frame).startswith("training failed: ValueError: ? ééé")


def test_a_frozen_parameter_that_training_changes_is_named() -> None:
    def train(model: Odd, lr: float) -> None:
        with torch.no_grad():
            model.frozen.weight.add_(1)

    (result,) = fedq.Federation(Odd(), [client(0), fedq.Client(train, num_examples=1)]).rounds(1, 0.1)
    assert "frozen.weight='changed while training'" in result.left_out[1]


def test_a_round_with_nobody_leaves_the_model_as_it_is() -> None:
    fed = fedq.Federation(net(), [fedq.Client(lambda model, lr: raises(model), num_examples=1) for _ in range(2)])
    before = data_of(fed.model)
    result = [*fed.rounds(2, 0.1)][-1]
    assert result.clients == ()
    assert math.isnan(result.loss)
    assert data_of(fed.model) == before
    assert "loss" not in str(result).split("left out")[0]


def test_a_loss_beyond_float32_is_infinite() -> None:
    members = [fedq.Client(lambda model, lr: 1e300, num_examples=1), client(1)]
    (result,) = fedq.Federation(net(), members).rounds(1, 0.1)
    assert result.loss == math.inf
    assert result.clients == (0, 1)


def test_means_are_those_of_clients_that_tell_them() -> None:
    told = [None, 3.0, {"loss": 1.0, "mae": 4.0}, {"mae": 1.0}]
    members = [fedq.Client(lambda model, lr, what=what: what, num_examples=n + 1) for n, what in enumerate(told)]
    (result,) = fedq.Federation(net(), members).rounds(1, 0.1)
    assert result.loss == pytest.approx((3 * 2 + 1 * 3) / 5)
    assert result.metrics == {"train_loss": pytest.approx(1.8), "train_mae": pytest.approx((4 * 3 + 1 * 4) / 7)}
    assert "mae 2.286" in str(result)


# ---- evaluation and callbacks ----------------------------------------------------------------------------------------


def test_an_evaluation_runs_in_eval_mode_without_gradients_and_leaves_no_trace() -> None:
    model, seen = Odd(), []

    def evaluate(module: nn.Module) -> float:
        seen.append((module.training, torch.is_grad_enabled()))
        return float(module(examples(0)[0]).square().mean())

    fed = fedq.Federation(model, clients(2), evaluate=evaluate, metrics=[fedq.Metric("power", "W", "higher")])
    model.frozen.eval()
    values = fed.evaluate()
    assert seen == [(False, False)]
    assert model.training
    assert not model.frozen.training
    assert values.keys() == {"power"}
    best = []
    for result in fed.rounds(3, 0.1):
        assert result.metrics["val_power"] == fed.evaluate()["power"]
        best.append(result.metrics["val_power"])
    assert fed.summary().best == max(best)
    assert model.training


@pytest.mark.parametrize(
    ("value", "words"),
    [("good", "'good'"), (None, "None"), (torch.ones(2), "tensor"), ({"a": [1, 2]}, "a"), ({"a": (1, 2)}, "a")],
)
def test_an_evaluation_that_returns_no_numbers_is_refused(value: Any, words: str) -> None:
    fed = fedq.Federation(net(), clients(2), evaluate=lambda model: value)
    with pytest.raises(FieldError, match=f"result of evaluate=.*{words}.*a number, or numbers by name"):
        fed.run(1, 0.1)


def _evaluation_fails(rank: int) -> list[str]:
    def on_root(model: nn.Module) -> Any:
        return torch.ones(2)

    def on_all(model: nn.Module, rank: int, ranks: int) -> Any:
        if rank == 1:
            raise ZeroDivisionError("no examples")
        return {"mse": (1.0, 2)}

    said = []
    for evaluate in (on_root, on_all):
        with pytest.raises((FieldError, RuntimeError)) as failed:
            fedq.Federation(net(), clients(), evaluate=evaluate).run(1, 0.1)
        said.append(str(failed.value))
    return said


def test_an_evaluation_that_fails_on_one_rank_fails_on_all() -> None:
    one, two = run_group(2, _evaluation_fails)
    assert one == two
    assert "result of evaluate=" in one[0]
    assert "evaluate has failed on rank 1" in one[1]
    assert "ZeroDivisionError: no examples" in one[1]


def _draws(rank: int) -> list[float]:
    fed = fedq.Federation(net(), clients(3), evaluate=lambda model: torch.rand(()).item())
    return [*(result.metrics["val_loss"] for result in fed.rounds(2, 0.1)), fed.evaluate()["loss"]]


def test_what_an_evaluation_draws_does_not_depend_on_ranks() -> None:
    drawn = run_group(2, _draws)
    assert drawn[0] == drawn[1] == _draws(0)
    assert len(set(drawn[0])) == 1


def _few(rank: int, options: dict[str, Any]) -> bytes:
    return ended(clients=clients(1), **options)[0]


@pytest.mark.parametrize("options", [{}, {"aggregate": "two_phase"}], ids=str)
def test_more_ranks_than_clients_are_well(options: dict[str, Any]) -> None:
    assert run_group(2, _few, options) == [_few(0, options)] * 2


class Watching:
    """Stops after the second round, if it may."""

    def __init__(self, *, stops: bool) -> None:
        self.stops = stops
        self.heard: list[Any] = []

    def on_start(self, fed: fedq.Federation) -> None:
        self.heard.append("start")

    def on_round(self, fed: fedq.Federation, result: fedq.RoundResult) -> bool:
        self.heard.append(result.round)
        return self.stops and result.round == 1

    def on_end(self, fed: fedq.Federation, summary: fedq.Summary) -> None:
        self.heard.append(summary.rounds)


def test_callbacks_are_told_and_may_stop() -> None:
    watching, lines = Watching(stops=True), []
    fed = fedq.Federation(net(), clients(), callbacks=[watching, lambda fed, result: lines.append(str(result)) or 5])
    assert fed.run(5, 0.1).rounds == 2, "5 is not True, so the second one stops nothing"
    assert watching.heard == ["start", 0, 1, 2]
    assert len(lines) == 2
    assert fed.run(3, 0.1).rounds == 3


def _stops(rank: int, who: str) -> int:
    callbacks = {"root": [Watching(stops=rank == 0)] if rank == 0 else [], "other": [Watching(stops=rank == 1)]}
    return fedq.Federation(net(), clients(), callbacks=callbacks[who]).run(4, 0.1).rounds


@pytest.mark.parametrize(("who", "rounds"), [("root", 2), ("other", 4)])
def test_rank_0s_callbacks_decide(who: str, rounds: int) -> None:
    assert run_group(2, _stops, who) == [rounds, rounds]


def test_rounds_go_on_where_they_were_left() -> None:
    whole = ended(rounds=4)
    with fedq.Federation(net(), clients()) as fed:
        first = list(fed.rounds(2, 0.1))
        for result in fed.rounds(4, 0.1):
            first.append(result)
            break
        assert fed.summary().rounds == 3
        first += fed.rounds(4, 0.1)
        assert list(fed.rounds(4, 0.1)) == []
        assert (data_of(fed.model), plain(first)) == whole


class Noisy(fedq.Part):
    """Doubles every update, and replaces the mean of the second round."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def after_training(self, context: Any, client: fedq.Client, trained: Any) -> None:
        self.trained.append(client.number)

    def before_encoding(self, context: Any, client: fedq.Client, update: Tensor) -> None:
        update.mul_(2)

    def mean(self, context: Any, updates: Any, weights: Any) -> Tensor | None:
        return torch.zeros(updates.layout.numel) if context.round == 1 else None


def test_parts_take_part() -> None:
    noisy = Noisy()
    fed = fedq.Federation(net(), clients(3), parts=[noisy], **FLOAT32)
    doubled, plain_fed = data_after(fed, 1), data_after(fedq.Federation(net(), clients(3), **FLOAT32), 1)
    torch.testing.assert_close(doubled - flat(net()), 2 * (plain_fed - flat(net())), rtol=1e-4, atol=1e-6)
    assert torch.equal(data_after(fed, 2), doubled)
    assert noisy.trained == [0, 1, 2] * 2


def data_after(fed: fedq.Federation, rounds: int) -> Tensor:
    fed.run(rounds, 0.1)
    return flat(fed.model)


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
