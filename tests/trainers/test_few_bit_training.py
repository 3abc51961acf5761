"""Training with few-bit weights against hand-written loops, and what of them travels, on one and more ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import client_on
from distributed import run_group
from jobs import file_hash, run_watched, small_config
from local_training import FP32, MEAN, STD, sgd
from properties import few, slow_but_for
from safetensors.torch import load_file
from stopped_jobs import Stop, run_jobs
from torch import Tensor, nn
from torch.nn import functional

from fedq.codecs import codec
from fedq.data import Split, normalize
from fedq.errors import FieldError
from fedq.federated.aggregate import aggregate, apply_change
from fedq.federated.client import Client
from fedq.federated.evaluate import Evaluator
from fedq.federated.fedbat import FedBatTraining
from fedq.federated.image_training import LocalTraining
from fedq.federated.server import Server
from fedq.federated.training import RoundContext, Trained, seeded
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.layout import Layout, LayoutSchedule, plain_name
from fedq.lowbit import deploy, deployed, deployed_state_dict, few_bit_layers, quantizer, use_few_bits
from fedq.lowbit.activations import BinaryInput
from fedq.lowbit.update import BinaryUpdate, binary_updates, use_binary_updates
from fedq.lowbit.which import layer_names
from fedq.models import build_model
from fedq.wire import split_body

SPECS = ("binary", "binary:per=channel", "binary:scale=learned,per=channel", "ternary", "2", "int4:grid=dorefa", "3")
CONTEXT = RoundContext(0, 0.1, 5)
SIGN = "sign:magnitude=mean,scale=tensor,rotate=false"


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Linear(6, 4),
    )


def few_bit_model(spec: str, activations: str = "float") -> nn.Module:
    model = small_model()
    use_few_bits(model, spec, activations=activations)
    return model


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(4, (60,), generator=generator))


def training(
    model: nn.Module, split: Split, kind: type[LocalTraining] = LocalTraining, **options: Any
) -> LocalTraining:
    layout = Layout.of(model, "fp32")
    return kind(model, layout, split, MEAN, STD, sgd, FP32, batch_size=8, augment=False, **options)


def inputs(num: int = 5) -> Tensor:
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(2))


# ---- layers --------------------------------------------------------------------------------------------------------


def test_names_and_places_are_those_of_the_plain_model() -> None:
    plain, layout = Layout.of(small_model(), "int4"), Layout.of(few_bit_model("binary"), "int4")
    assert layout == plain
    assert layout.hash == plain.hash
    learned = few_bit_model("binary:scale=learned")
    added = {span.name for span in Layout.of(learned, "int4").spans} - {span.name for span in plain.spans}
    assert added == {"3.weight_scale", "6.weight_scale"}
    assert plain_name("a.parametrizations.b.weight") == "a.parametrizations.b.weight"  # a layer may be called so


@pytest.mark.parametrize("spec", SPECS)
def test_the_deployed_tensors_give_a_plain_model_the_same_outputs(spec: str) -> None:
    model = few_bit_model(spec)
    plain = small_model()
    plain.load_state_dict(deployed_state_dict(model))
    for name, chosen in few_bit_layers(model).items():
        num_groups = 8 if chosen.per == "channel" else 1
        assert len(plain.get_submodule(name).weight.unique()) <= chosen.num_levels * num_groups
    with torch.no_grad(), deployed(model):
        outputs = model(inputs())
    assert model.training
    plain.eval()
    assert torch.equal(outputs, plain(inputs()))
    assert torch.equal(deploy(model).eval()(inputs()), outputs)
    assert not few_bit_layers(model)
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


@pytest.mark.parametrize("spec", ["binary", "ternary", "int4", "2", "binary:per=channel"])
def test_local_training_equals_swapping_weights_by_hand(spec: str, split: Split) -> None:
    """Quantize, forward and backward, put the float weights back, step: as it is written without parametrizations."""
    local = training(few_bit_model(spec), split, steps=6)
    start = local.layout.flatten(few_bit_model(spec))
    trained = local.run(start, torch.arange(60), lr=0.05, seed=9)

    model, chosen = small_model(), quantizer(spec)
    optimizer = sgd(list(model.parameters()), 0.05)
    weights = [model.get_submodule(name).weight for name in ("3", "6")]
    for batch in local.index_batches(60, seeded(9)):
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.copy_(chosen.quantize(weight))
        optimizer.zero_grad()
        logits = model(normalize(split.images[batch], MEAN, STD))
        functional.cross_entropy(logits, split.labels[batch]).backward()
        with torch.no_grad():
            for weight, values in zip(weights, kept, strict=True):
                weight.copy_(values)
        optimizer.step()
    assert torch.equal(trained.flat, Layout.of(model, "fp32").flatten(model))
    assert not torch.equal(trained.flat, start)


def test_stochastic_rounding_is_of_training_alone() -> None:
    model = few_bit_model("int2:grid=dorefa,rounding=stochastic")
    torch.manual_seed(0)
    first, second = model[3].weight.detach(), model[3].weight.detach()
    assert not torch.equal(first, second)
    with deployed(model):
        nearest = model[3].weight.detach().clone()
    assert torch.equal(nearest, quantizer("int2:grid=dorefa").quantize(small_model()[3].weight.detach()))


def test_evaluation_is_that_of_the_deployed_model(split: Split) -> None:
    model, plain = few_bit_model("binary"), small_model()
    plain.load_state_dict(deployed_state_dict(model))
    evaluator = Evaluator(MEAN, STD, FP32, batch_size=16)
    scores, of_plain, of_other = (
        (told.loss, told.accuracy) for told in (evaluator.run(one, split)[0] for one in (model, plain, small_model()))
    )
    assert scores == of_plain
    assert scores != of_other


def test_weights_that_are_not_finite_stay_visible() -> None:
    for spec in SPECS:
        model = few_bit_model(spec)
        with torch.no_grad():
            model[3].parametrizations.weight.original[0, 0, 0, 0] = torch.nan
        trained = model[3].weight
        assert not torch.isfinite(trained).all() or "learned" in spec, spec


def test_binary_inputs_are_signs_with_a_clipped_gradient() -> None:
    x = torch.tensor([[-2.0, 0.2, 0.3, 0.25, 1.2, 1.3]], requires_grad=True)
    layer = BinaryInput(6)
    layer(x).backward(torch.arange(1.0, 7.0).view(1, 6))
    assert layer(x).tolist() == [[-1, -1, 1, 1, 1, 1]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 2, 3, 4, 5, 0]]
    assert layer.threshold.grad is not None
    assert layer.threshold.grad.tolist() == [0, -2, -3, -4, -5, 0]

    seen: list[Tensor] = []
    model = few_bit_model("binary", activations="binary")
    for name in ("3", "6"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(inputs())
    assert [sorted(set(x.flatten().tolist())) for x in seen] == [[-1.0, 1.0]] * 2
    assert "3.binary_input.threshold" in deployed_state_dict(model)


def test_a_layer_takes_few_bits_once() -> None:
    model = few_bit_model("binary")
    with pytest.raises(FieldError, match=r"weights='3'.*not parametrized yet"):
        use_few_bits(model, "ternary")


# ---- what travels --------------------------------------------------------------------------------------------------


def client(number: int, local: LocalTraining, layout: Layout, *, feedback: bool = True) -> Client:
    keeps = ErrorFeedback(ResidualStore()) if feedback else NoFeedback()
    return client_on(number, torch.arange(10 * number, 10 * number + 10), local, LayoutSchedule.always(layout), keeps)


def test_binary_weights_travel_as_signs_and_scales_and_are_averaged(split: Split) -> None:
    local = training(few_bit_model("binary"), split, steps=2)
    names = ("3.weight", "6.weight")
    layout = Layout.of(local.model, codec("int4")).with_values({name: codec(SIGN) for name in names})
    replica = local.layout.flatten(local.model)
    frames, expected = [], torch.zeros_like(replica)
    for number in (0, 1):
        one = client(number, local, layout)
        trained = one.train(replica, CONTEXT)
        local_model = trained.flat.clone()
        frame = one.message(layout.to_sent_(trained.flat, replica), trained, CONTEXT)
        frames.append(frame)
        decoded = torch.zeros_like(replica)
        layout.decode_add(split_body(layout, frame.body), decoded, seed=frame.seed)
        for name in names:
            weight = local_model[layout[name].slice]
            scale = weight.abs().mean().to(torch.bfloat16).float()
            assert torch.equal(decoded[layout[name].slice], torch.where(weight < 0, -scale, scale))
        expected += 0.5 * decoded
    result = aggregate(layout, frames, replica.device)
    assert result.mean is not None
    server = Server(replica, Layout.of(local.model, "int8"), lambda params: torch.optim.SGD(params, lr=1.0))
    server.step(layout.to_change_(result.mean, replica))
    for span in layout.spans:
        want = expected[span.slice] if span.name in names else (replica + expected)[span.slice]
        assert torch.allclose(server.master[span.slice], want, atol=1e-6), span.name


def test_values_leave_no_residual(split: Split) -> None:
    local = training(few_bit_model("binary"), split, steps=1)
    layout = Layout.of(local.model, codec("sign").resolved(feedback=True)).with_values({"3.weight": codec(SIGN)})
    store = ResidualStore()
    one = client_on(0, torch.arange(10), local, LayoutSchedule.always(layout), ErrorFeedback(store))
    replica = local.layout.flatten(local.model)
    trained = one.train(replica, CONTEXT)
    one.message(layout.to_sent_(trained.flat, replica), trained, CONTEXT)
    residual = store.get(0, layout.num_params)
    assert not residual[layout["3.weight"].slice].any()
    assert residual[layout["6.weight"].slice].any()


def test_the_server_may_send_the_deployed_model() -> None:
    model = few_bit_model("binary")
    layout = Layout.of(model, "int8")
    plain = dict.fromkeys((span.name for span in layout.spans), codec("bf16"))
    layout = layout.with_values(plain | {"3.weight": codec(SIGN), "6.weight": codec(SIGN)})
    initial = layout.flatten(model)
    server = Server(initial, layout, lambda params: torch.optim.SGD(params, lr=1.0))
    replica = torch.full_like(initial, 7.0)  # whatever it was
    apply_change(layout, server.change(replica, CONTEXT), replica)
    for span in layout.spans:
        values = initial[span.slice]
        if span.name in ("3.weight", "6.weight"):
            values = quantizer("binary").quantize(values.view(span.shape)).view(-1)
        assert torch.equal(replica[span.slice], values.to(torch.bfloat16).float()), span.name
    assert torch.equal(server.master, initial)


def job_config(out: Path, **flags: Any) -> Any:
    return small_config(out, **({"num_clients": 3, "cohort": 2} | flags))


JOBS: dict[str, dict[str, Any]] = {
    "binary": {"weights": "binary", "uplink": "sign"},
    "learned": {"weights": "binary:scale=learned,per=channel", "activations": "binary"},
    "list": {"weights": "head=8,body=1,tail=8"},
    "stochastic": {"weights": "int3:rounding=stochastic", "feedback": "off"},
    "sends": {"weights": "binary", "sends": "weights", "uplink": "sign"},
    "server": {"weights": "binary:per=channel", "server_sends": "weights", "uplink": "sign"},
    "both": {"weights": "binary", "server_sends": "weights", "sends": "weights"},
    "fedbat": {"algorithm": "fedbat", "uplink": "sign", "local_steps": 4},
    "step": {"weights": "binary", "exchange": "step", "cohort": None, "rounds": 1},
}


class Ran:
    """Folders of jobs by world size and case, each run when it is first asked for."""

    def __init__(self, make: pytest.TempPathFactory) -> None:
        self._roots = {world_size: make.mktemp(f"few-bit{world_size}") for world_size in (1, 2)}

    def __getitem__(self, key: tuple[int, str]) -> Path:
        world_size, case = key
        folder = self._roots[world_size] / case
        if not folder.exists():
            job = job_config(folder, **JOBS[case]), None
            run_group(world_size, run_jobs if case == "step" else run_watched, [job])
        return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory)


@pytest.mark.parametrize("case", slow_but_for([case for case in JOBS if case != "step"], "both", "fedbat"))
def test_the_model_does_not_depend_on_the_ranks(case: str, ran: Ran) -> None:
    assert file_hash(ran[1, case] / "model.safetensors") == file_hash(ran[2, case] / "model.safetensors")


@pytest.mark.parametrize("case", slow_but_for(JOBS, "both", "fedbat", "learned", "list"))
def test_the_saved_model_has_few_bits_and_the_accuracy_that_is_reported(case: str, ran: Ran) -> None:
    folder = ran[2, case]
    state = load_file(folder / "model.safetensors")
    assert not [name for name in state if "parametrizations" in name]
    model = build_model("cnn62k")
    if JOBS[case].get("activations") == "binary":
        use_few_bits(model, "binary", activations="binary")
        deploy(model)
    model.load_state_dict(state)
    stem, *inner, _ = [len(model.get_submodule(name).weight.unique()) for name in layer_names(model)]
    most = {"stochastic": [8] * 3, "learned": [32, 240, 168], "server": [32, 240, 168], "fedbat": [10**9] * 3}
    assert all(n <= limit for n, limit in zip(inner, most.get(case, [2] * 3), strict=True))
    assert (stem <= 256) == (case == "list")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights"] == JOBS[case].get("weights", "float")
    assert summary["algorithm"] == JOBS[case].get("algorithm", "fedavg")


def test_sent_weights_cost_one_bit_each(ran: Ran) -> None:
    both = json.loads((ran[2, "both"] / "summary.json").read_text())
    signs = [2400 // 8, 48000 // 8, 10080 // 8]
    assert both["downlink"] == "weights"
    downloads = 3 * 2  # rounds, clients in each
    exact = 2 * (450 + 6 + 16 + 120 + 84 + 840 + 10)
    body = sum(signs) + 2 * len(signs)
    assert downloads * (body + exact) <= both["downlink_bytes"] <= downloads * (body + exact + 200)


@pytest.mark.parametrize("case", few(["both", "learned", "fedbat"], 1))
def test_a_resumed_few_bit_job_equals_one_that_never_stopped(case: str, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    never, stopped = job_config(whole, **JOBS[case]), job_config(folder, **JOBS[case])
    again = job_config(folder, resume=folder, **JOBS[case])
    run_group(2, run_jobs, [(never, None), (stopped, Stop(1, "log")), (again, None)])
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    totals = [json.loads((path / "summary.json").read_text())["downlink_bytes"] for path in (folder, whole)]
    assert totals[0] == totals[1]


def test_a_first_model_drawn_from_the_seed_is_not_sent(tmp_path: Path) -> None:
    flags = {"weights": "binary", "uplink": "sign", "downlink": "sign", "downlink_to": "all"}
    sent = job_config(tmp_path / "sent", **flags)
    drawn = [job_config(tmp_path / f"drawn{n}", start="seed", **flags) for n in (1, 2)]
    run_group(1, run_jobs, [(sent, None), (drawn[0], None)])
    run_group(2, run_jobs, [(drawn[1], None)])
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("sent", "drawn1", "drawn2")]
    assert len({file_hash(tmp_path / name / "model.safetensors") for name in ("sent", "drawn1", "drawn2")}) == 1
    assert summaries[0]["downlink_bytes"] - summaries[1]["downlink_bytes"] == 3 * 4 * 62006
    assert summaries[1]["downlink_bytes"] == summaries[2]["downlink_bytes"]
    assert summaries[1]["downlink_bytes_fp32"] == 3 * 3 * 4 * 62006
    # This helper lets rank 1 draw another model.
    with pytest.raises(Exception, match="start='seed' is not allowed; allowed: sent: the ranks drew different models"):
        run_group(2, run_watched, [(job_config(tmp_path / "other", start="seed", **flags), None)])


# ---- FedBAT --------------------------------------------------------------------------------------------------------


def test_binary_updates_are_unbiased_within_the_step() -> None:
    update = BinaryUpdate(torch.zeros(7))
    m = torch.tensor([-0.02, -0.01, -0.004, 0.0, 0.003, 0.01, 0.05])
    update.binarize(torch.full((7,), 0.01))
    assert update.step.item() == pytest.approx(0.01)
    torch.manual_seed(0)
    drawn = torch.stack([update(m).detach() for _ in range(5_000)])
    assert set(drawn.abs().flatten().tolist()) == {update.step.item()}
    # 6 standard errors of a mean of 5,000 draws of +-0.01.
    assert torch.allclose(drawn.mean(dim=0), m.clamp(-0.01, 0.01), atol=6 * 0.01 / 5_000**0.5)


def test_gradients_of_binary_updates_are_the_published_ones() -> None:
    update = BinaryUpdate(torch.zeros(4))
    update.binarize(torch.full((4,), 0.02))
    weight = torch.tensor([-0.05, -0.01, 0.012, 0.03], requires_grad=True)
    torch.manual_seed(3)
    out = update(weight)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out.backward(grad)
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 2, 3, 0]
    ratio, sign = weight.detach() / 0.02, out.detach().sign()
    of_step = torch.stack([-grad[0], grad[1] * (sign - ratio)[1], grad[2] * (sign - ratio)[2], grad[3]]).sum()
    assert update.exponent.grad is not None
    assert update.exponent.grad.item() == pytest.approx(6 * 0.02 * of_step.item(), rel=1e-5)


def test_the_step_stays_in_its_range() -> None:
    for size, expected in ((1e-6, 5e-4), (1.0, 5e-2)):
        update = BinaryUpdate(torch.zeros(3))
        update.binarize(torch.full((3,), size))
        assert update.step.item() == pytest.approx(expected)


def test_fedbat_trains_first_as_ever_and_ends_with_two_values_a_tensor(split: Split) -> None:
    model = small_model()
    use_binary_updates(model)
    local = training(model, split, FedBatTraining, steps=6)
    assert local.layout == Layout.of(small_model(), "fp32")
    start = local.layout.flatten(small_model())
    trained: Trained = local.run(start, torch.arange(40), lr=0.1, seed=4)
    again: Trained = local.run(start, torch.arange(40), lr=0.1, seed=4)
    assert torch.equal(trained.flat, again.flat)
    assert trained.num_steps == 6
    change = trained.flat - start
    for name in ("0.weight", "3.weight", "6.weight", "7.weight"):
        sizes = change[local.layout[name].slice].abs()
        assert sizes.min() * 1.001 >= 5e-4
        assert sizes.max() - sizes.min() < 1e-6  # adding to a weight and taking it off again rounds
    assert all(update.exponent.item() == 0 and update.first_step is None for _, update in binary_updates(model))

    # With all of its steps in full precision it is plain local training.
    plain = training(small_model(), split, steps=3)
    before: list[Tensor] = []
    binarize = BinaryUpdate.binarize

    def noted(self: BinaryUpdate, weight: Tensor) -> None:
        before.append(weight.detach().clone())
        binarize(self, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BinaryUpdate, "binarize", noted)
        local.run(start, torch.arange(40), lr=0.1, seed=4)
        order = local.index_batches(40, seeded(4))[:3]
    generator = seeded(4)
    plain.layout.unflatten_(start, plain.model)
    plain.index_batches(40, generator)
    plain.steps_by.start(0.1)
    plain.train(torch.arange(40), order, generator)
    weights = [m.weight.detach() for m in plain.model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


# ---- settings ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weights": "int17"}, "bits=17.*1 to 16"),
    ({"weights": "bits"}, "weights='bits'.*binary, float, int2"),
    ({"weights": "head=8,layer7=1"}, "'layer7' fits none of conv1, conv2"),
    ({"activations": "binary"}, "activations='binary'.*float, unless --weights"),
    ({"sends": "weights"}, "sends='weights'.*update, unless --weights"),
    ({"weights": "int4", "sends": "weights"}, "sends='weights'.*all few-bit layers are binary"),
    ({"weights": "1", "server_sends": "weights", "aggregate": "two_phase"}, "server_sends=.*rooted"),
    ({"weights": "1", "server_sends": "weights", "downlink": "int4"}, "downlink='int4'.*left out"),
    ({"weights": "1", "sends": "weights", "norm_limit": "clip:2"}, "norm_limit='clip:2'.*left out"),
    ({"algorithm": "fedbat"}, "uplink='int4'.*sign without rotation"),
    ({"algorithm": "fedbat", "uplink": "sign:rotate=true"}, "uplink=.*sign without rotation"),
    ({"algorithm": "fedbat", "uplink": "sign", "feedback": "on"}, "feedback='on'.*auto or off"),
    ({"algorithm": "fedbat", "uplink": "sign", "side_by_side": 2}, "side_by_side=2.*1 with"),
    ({"algorithm": "fedbat", "uplink": "sign", "weights": "1"}, "weights='1'.*float with"),
    ({"algorithm": "fedbat", "uplink": "sign", "exchange": "none"}, "algorithm='fedbat'.*--exchange round"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_settings_that_cannot_be_used_are_named(flags: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=text):
        small_config(tmp_path, **flags)


def test_a_model_without_inner_layers_is_refused() -> None:
    with pytest.raises(FieldError, match=r"Sequential.*between its first and its last"):
        use_few_bits(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "binary")
    with pytest.raises(FieldError, match="convolutions or linear layers"):
        use_few_bits(nn.Sequential(nn.ReLU()), "head=1")
