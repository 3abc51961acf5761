"""Every personalised method against a dense loop written from its equations, what clients keep, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.federated.evaluate import Evaluator
from fedq.federated.image_training import LocalTraining
from fedq.feedback import ResidualStore
from fedq.layout import Layout
from fedq.lowbit.centres import CentreSchedule
from fedq.personalize.distilled import Distillation, Mutual, QuPeD, QuPeL, divergence
from fedq.personalize.evaluate import PersonalEvaluator
from fedq.personalize.learners import Quantization
from fedq.personalize.meta import PerFedAvg, PFedMe
from fedq.personalize.methods import GlobalModel, Local, Method
from fedq.personalize.own_models import Network, OwnModels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
FP32 = Precision("fp32", "cpu", channels_last=False)
MOMENTUM, DECAY, LR, RATIO = 0.9, 5e-4, 0.05, 0.5
SEED, CLIENT = 11, 1
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}  # two steps in float32 against float64
Named = dict[str, Tensor]


def small_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5, 4)
    )


def normed_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=DECAY, fused=True)


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(4, (60,), generator=generator))


INDICES = torch.arange(3, 35, 2)  # sixteen examples: two batches


def training(split: Split, make: Callable[[], nn.Module] = small_model) -> LocalTraining:
    model = make()
    return LocalTraining(model, Layout.of(model, "fp32"), split, MEAN, STD, sgd, FP32, batch_size=8, augment=False)


def own_models(bits: int = 32, make: Callable[[], nn.Module] = small_model, **options: object) -> OwnModels:
    """Two clients, of which the second is trained; its own model starts as another than the global one."""
    model = make(7)  # type: ignore[call-arg]
    layout = Layout.of(model, "fp32")
    network = Network("small", model, layout, layout.flatten(model))
    return OwnModels([network, network], [32, bits], ResidualStore(), **options)  # type: ignore[arg-type]


def run(method: Method, *, make: Callable[[], nn.Module] = small_model) -> Named:
    """Train client 1 for a round from a fixed global model; return what travels, by name."""
    layout = method.local.layout
    start = layout.flatten(make())
    flat = method.run(CLIENT, start, INDICES, lr=LR, seed=SEED).flat
    return layout.views(flat)


def own_values(method: Method) -> Named:
    own = method.models.load(CLIENT, torch.empty(0))
    return own.network.layout.views(own.flat)


# ---- the loop by hand ----


def doubled(model: nn.Module) -> Named:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def logits(params: Named, images: Tensor) -> Tensor:
    return functional_call(small_model().double(), params, (images,))


def batches(split: Split, num: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that a seed gives, float64."""
    order = torch.randperm(len(INDICES), generator=torch.Generator().manual_seed(SEED)).split(8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return [((split.images[INDICES[b]].double() / 255 - mean) / std, split.labels[INDICES[b]]) for b in order][:num]


def gradient(loss: Tensor, params: Named) -> Named:
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


class Momentum:
    """SGD with momentum and weight decay, written out."""

    def __init__(self, lr: float, momentum: float = MOMENTUM, decay: float = DECAY) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.velocity: Named = {}

    def step(self, params: Named, grads: Named) -> Named:
        moved = {}
        for name, param in params.items():
            g = grads[name] + self.decay * param.detach()
            self.velocity[name] = self.momentum * self.velocity[name] + g if name in self.velocity else g
            moved[name] = (param.detach() - self.lr * self.velocity[name]).requires_grad_()
        return moved


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """T² KL(p || q), by torch.distributions."""
    p, q = (torch.distributions.Categorical(logits=z / temperature) for z in (p_logits, q_logits))
    return temperature**2 * torch.distributions.kl_divergence(p, q).mean()


def assert_same(actual: Named, expected: Named) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value.detach(), **TOLERANCE)


# ---- methods ----


def test_local_is_plain_training_that_goes_on(split: Split) -> None:
    method = Local(training(split), own_models(), RATIO)
    flats = [method.local.layout.flatten(small_model(7))]
    plain = replace(training(split), model=small_model(7))
    for seed in (SEED, SEED + 1):
        flats.append(plain.run(flats[-1], INDICES, lr=LR * RATIO, seed=seed).flat)
        start = torch.randn(plain.layout.numel)
        assert torch.equal(method.run(CLIENT, start, INDICES, lr=LR, seed=seed).flat, start), (
            "nothing is learned from it"
        )
        assert torch.equal(method.models.load(CLIENT, start).flat, flats[-1])
    assert not torch.equal(flats[1], flats[2])


def test_per_fedavg_takes_the_gradient_after_an_inner_step(split: Split) -> None:
    rate = 0.1
    method = PerFedAvg(training(split), own_models(), rate, steps=3)
    w, optimizer, (first, second) = doubled(small_model()), Momentum(LR), batches(split)
    for (inner_x, inner_y), (x, y) in ((first, second), (second, first)):
        g = gradient(functional.cross_entropy(logits(w, inner_x), inner_y), w)
        v = {name: (p - rate * g[name]).detach().requires_grad_() for name, p in w.items()}
        w = optimizer.step(w, gradient(functional.cross_entropy(logits(v, x), y), v))
    assert_same(run(method), w)


def test_per_fedavg_is_tested_a_few_plain_steps_from_the_global_model(split: Split) -> None:
    rate = 0.1
    method = PerFedAvg(training(split), own_models(), rate, steps=2)
    start = method.local.layout.flatten(small_model())
    network = method.deploy(CLIENT, start, INDICES, seed=SEED)
    v, plain = doubled(small_model()), Momentum(rate, momentum=0.0, decay=0.0)
    for x, y in batches(split):
        v = plain.step(v, gradient(functional.cross_entropy(logits(v, x), y), v))
    assert_same(dict(network.module.named_parameters()), v)


def test_pfedme_solves_the_envelope_and_pulls_the_copy(split: Split) -> None:
    attachment, rate = 3.0, 0.04
    method = PFedMe(training(split), own_models(), rate, 3, attachment)
    w, inner = doubled(small_model()), Momentum(rate)
    theta = w
    for x, y in batches(split):
        for _ in range(3):
            envelope = sum((theta[n] - w[n].detach()).square().sum() for n in w) * attachment / 2
            theta = inner.step(theta, gradient(functional.cross_entropy(logits(theta, x), y) + envelope, theta))
        w = {n: w[n].detach() - LR * attachment * (w[n].detach() - theta[n].detach()) for n in w}
    assert_same(run(method), w)
    assert_same(own_values(method), theta)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["mutual learning", "quped mutual", "quped distill"])
def test_both_models_learn_from_each_other(split: Split, kind: str, temperature: float) -> None:
    weight = 0.3
    distillation, models = Distillation(weight, temperature), own_models()
    method: Method = Mutual(training(split), models, RATIO, distillation)
    if kind != "mutual learning":
        method = QuPeD(training(split), models, RATIO, distillation, None, kind.split()[1])  # type: ignore[arg-type]
    x, w = doubled(small_model(7)), doubled(small_model())
    of_x, of_w = Momentum(LR * RATIO), Momentum(LR)
    for images, labels in batches(split):
        own, copy = logits(x, images), logits(w, images)
        own_loss = (1 - weight) * functional.cross_entropy(own, labels) + weight * kl(copy.detach(), own, temperature)
        entropy = (1 - weight) * functional.cross_entropy(copy, labels)
        copy_loss = {
            "mutual learning": entropy + weight * kl(own.detach(), copy, temperature),
            "quped mutual": entropy + weight * kl(copy, own.detach(), temperature),
            "quped distill": weight * kl(copy, own.detach(), temperature),
        }[kind]
        gx, gw = gradient(own_loss, x), gradient(copy_loss, w)
        x, w = of_x.step(x, gx), of_w.step(w, gw)
    assert_same(run(method), w)
    assert_same(own_values(method), x)


def quantization(**changes: float) -> Quantization:
    given = {"num_epochs": 10, "freeze_at": 0.8, "regularizer_weight": 0.02, "centre_lr": 0.01} | changes
    return Quantization(CentreSchedule(**given), regularizer="l2")  # type: ignore[arg-type]


def nearest_by_hand(x: Tensor, centres: Tensor) -> Tensor:
    return (x.unsqueeze(-1) - centres).abs().argmin(-1)


def quantized_step(
    x: Named, centres: Tensor, optimizer: Momentum, loss: Callable[[Tensor], Tensor], images: Tensor, strength: float
) -> tuple[Named, Tensor, Tensor, Tensor]:
    """Return weights, centres, and logits of both models after a step with the squared distance as the regularizer."""
    float_logits = logits(x, images)
    x = optimizer.step(x, gradient(loss(float_logits), x))
    y = x["2.weight"].detach()
    s = strength * optimizer.lr
    x["2.weight"] = ((y + 2 * s * centres[nearest_by_hand(y, centres)]) / (1 + 2 * s)).requires_grad_()
    codes = nearest_by_hand(x["2.weight"].detach(), centres)
    leaf = centres.clone().requires_grad_()
    quantized = logits({**x, "2.weight": leaf[codes]}, images)
    (h,) = torch.autograd.grad(loss(quantized), [leaf])
    e2, moved = 0.01, centres.clone()
    for j in range(len(centres)):
        members = x["2.weight"].detach()[codes == j]
        moved[j] = (centres[j] - e2 * h[j] + 2 * strength * e2 * members.sum()) / (1 + 2 * strength * e2 * len(members))
    return x, moved.sort().values, float_logits.detach(), quantized.detach()


def first_centres(bits: int) -> Tensor:
    weight = small_model(7)[2].weight.detach().double()
    if bits == 1:
        return torch.stack((weight[weight < 0].mean(), weight[weight >= 0].mean()))
    return torch.linspace(weight.min(), weight.max(), 2**bits, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2])
def test_quped_moves_weights_centres_and_the_copy(split: Split, bits: int) -> None:
    weight, temperature, round = 0.3, 2.0, 2
    method = QuPeD(
        training(split), own_models(bits), RATIO, Distillation(weight, temperature), quantization(), "distill"
    )
    method.round = round
    x, w, centres = doubled(small_model(7)), doubled(small_model()), first_centres(bits)
    of_x, of_w = Momentum(LR * RATIO), Momentum(LR)
    for images, labels in batches(split):
        copy = logits(w, images)
        teacher = copy.detach()

        def loss(z: Tensor, labels: Tensor = labels, teacher: Tensor = teacher) -> Tensor:
            return (1 - weight) * functional.cross_entropy(z, labels) + weight * kl(teacher, z, temperature)

        x, centres, own, quantized = quantized_step(x, centres, of_x, loss, images, 0.02 * (round + 1))
        copy_loss = weight * (kl(copy, own, temperature) + kl(copy, quantized, temperature))
        w = of_w.step(w, gradient(copy_loss, w))
    assert_same(run(method), w)
    kept = method.models.load(CLIENT, torch.empty(0))
    assert_same(kept.network.layout.views(kept.flat), x)
    assert kept.centres is not None
    torch.testing.assert_close(kept.centres.values["2"].double(), centres, **TOLERANCE)
    deployed = method.deploy(CLIENT, torch.empty(0), INDICES, seed=0).module[2].weight  # type: ignore[index]
    expected = centres[nearest_by_hand(x["2.weight"].detach(), centres)]
    torch.testing.assert_close(deployed.detach().double(), expected, **TOLERANCE)


@pytest.mark.parametrize("bits", [1, 32])
def test_qupel_ties_both_models_by_their_distance(split: Split, bits: int) -> None:
    weight, strength = 0.4, 0.02
    method = QuPeL(training(split), own_models(bits), RATIO, weight, quantization())
    x, w, centres = doubled(small_model(7)), doubled(small_model()), first_centres(1)
    w = {name: p.detach() for name, p in w.items()}
    optimizer = Momentum(LR * RATIO)

    def deployed(values: Named) -> Named:
        if bits == 32:
            return values
        inner = values["2.weight"]
        return {**values, "2.weight": centres[nearest_by_hand(inner.detach(), centres)]}

    for images, labels in batches(split):
        g = gradient(functional.cross_entropy(logits(x, images), labels), x)
        g = {n: g[n] + weight * (deployed(x)[n].detach() - w[n]) for n in x}
        x = optimizer.step(x, g)
        if bits == 1:
            s, y = strength * optimizer.lr, x["2.weight"].detach()
            x["2.weight"] = ((y + 2 * s * centres[nearest_by_hand(y, centres)]) / (1 + 2 * s)).requires_grad_()
            codes = nearest_by_hand(x["2.weight"].detach(), centres)
            leaf = centres.clone().requires_grad_()
            tied = weight / 2 * (leaf[codes] - w["2.weight"]).square().sum()
            loss = functional.cross_entropy(logits({**x, "2.weight": leaf[codes]}, images), labels) + tied
            (h,) = torch.autograd.grad(loss, [leaf])
            members = [x["2.weight"].detach()[codes == j] for j in range(2)]
            s = strength * 0.01
            centres = torch.stack(
                [
                    (c - 0.01 * hj + 2 * s * m.sum()) / (1 + 2 * s * len(m))
                    for c, hj, m in zip(centres, h, members, strict=True)
                ]
            )
        w = {n: w[n] - LR * weight * (w[n] - deployed(x)[n].detach()) for n in w}
    assert_same(run(method), w)
    assert_same(own_values(method), x)


def test_the_divergence_has_the_gradient_of_its_size_at_any_temperature() -> None:
    student, teacher = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(divergence(student, teacher, 2.5), kl(teacher, student, 2.5))
    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, 2.5), (student, teacher))
    assert divergence(student, student, 4.0).abs() < 1e-12


@pytest.mark.parametrize("global_loss", ["mutual", "distill"])
def test_without_distillation_quped_of_float_models_is_local_training(split: Split, global_loss: str) -> None:
    methods = [
        Local(training(split), own_models(), RATIO),
        QuPeD(training(split), own_models(), RATIO, Distillation(0.0), None, global_loss),  # type: ignore[arg-type]
    ]
    for method in methods:
        run(method)
    kept = [method.models.load(CLIENT, torch.empty(0)).flat for method in methods]
    assert torch.equal(*kept)


def test_without_distillation_the_copy_of_quped_is_that_of_fedavg(split: Split) -> None:
    travels = [
        run(GlobalModel(training(split), own_models())),
        run(QuPeD(training(split), own_models(), 1.0, Distillation(0.0))),
    ]
    assert all(torch.equal(travels[0][name], travels[1][name]) for name in travels[0])


def test_frozen_weights_are_their_centres_and_the_rest_goes_on(split: Split) -> None:
    models = own_models(2, normed_model)
    method = QuPeD(training(split, normed_model), models, 1.0, Distillation(0.5), quantization())
    start = method.local.layout.flatten(normed_model())
    seen = []
    for method.round in (0, 8, 9):
        method.run(CLIENT, start, INDICES, lr=LR, seed=method.round)
        own = models.load(CLIENT, start)
        assert own.centres is not None
        seen.append((own.fill(quantized=True)[2].weight.detach().clone(), own.network.layout.views(own.flat)))  # type: ignore[index]
        values = own.centres.values["2"]
    (_, before), (quantized, frozen), (later, after) = seen
    assert torch.equal(frozen["2.weight"], quantized)
    assert torch.equal(later, quantized)
    assert torch.equal(after["2.weight"], quantized)
    assert set(after["2.weight"].unique().tolist()) <= set(values.tolist())
    assert not torch.equal(before["2.weight"], quantized)
    assert not torch.equal(frozen["5.weight"], after["5.weight"])
    assert all(param.requires_grad for param in models.networks[CLIENT].module.parameters())
    # Its statistics are those of the model that is deployed.
    deployed = models.load(CLIENT, start)
    deployed.fill(quantized=True)
    module = deployed.network.module
    assert torch.equal(module[1].running_mean, after["1.running_mean"])  # type: ignore[index]


def test_fixed_centres_stay_and_their_model_has_statistics(split: Split) -> None:
    models = own_models(1, normed_model, outer_at_one=[True, True])
    method = QuPeD(
        training(split, normed_model), models, 1.0, Distillation(0.5), replace(quantization(), centres="fixed")
    )
    before = models.load(CLIENT, torch.empty(0))
    run(method, make=normed_model)
    own = models.load(CLIENT, torch.empty(0))
    assert before.centres is not None
    assert own.centres is not None
    assert own.centres.values["2"].tolist() == [-1.0, 1.0]
    assert not torch.equal(own.centres.statistics["3.running_var"], before.centres.statistics["3.running_var"])


def test_quantized_models_keep_statistics_of_their_own(split: Split) -> None:
    models = own_models(1, normed_model)
    method = QuPeD(training(split, normed_model), models, 1.0, Distillation(0.5), quantization())
    run(method, make=normed_model)
    own = models.load(CLIENT, torch.empty(0))
    of_float = own.network.layout.views(own.flat)["3.running_mean"]
    of_quantized = own.fill(quantized=True)[3].running_mean  # type: ignore[index]
    assert not torch.equal(of_float, of_quantized)
    own.fill(quantized=False)
    assert torch.equal(own.network.module[3].running_mean, of_float)  # type: ignore[index]


@pytest.mark.parametrize("name", ["pfedme", "qupel", "perfedavg", "mutual"])
def test_the_global_model_has_statistics_of_passes(split: Split, name: str) -> None:
    models, local = own_models(32, normed_model), training(split, normed_model)
    method = {
        "pfedme": PFedMe(local, models, 0.05, 2, 3.0),
        "qupel": QuPeL(local, models, 1.0, 0.1),
        "perfedavg": PerFedAvg(local, models, 0.05, 1),
        "mutual": Mutual(local, models, 1.0, Distillation(0.5)),
    }[name]
    travels = run(method, make=normed_model)
    assert not torch.equal(travels["1.running_mean"], torch.zeros(4))


def test_counters_stay_where_they_were(split: Split) -> None:
    method = Mutual(training(split, normed_model), own_models(32, normed_model), 1.0, Distillation(0.5))
    start = method.local.layout.flatten(normed_model())
    method.training_of(CLIENT).run(start, INDICES, lr=LR, seed=SEED)
    for module in (method.local.model, method.models.networks[CLIENT].module):
        assert module[1].num_batches_tracked == 0  # type: ignore[index]


# ---- what clients keep ----


def test_a_model_of_another_architecture_starts_as_it_was_built_others_as_downloaded() -> None:
    models = own_models()
    downloaded = torch.arange(float(models.networks[0].layout.numel))
    assert torch.equal(models.load(0, downloaded).flat, models.networks[0].start)  # type: ignore[arg-type]
    models.networks = [replace(network, start=None) for network in models.networks]
    first = models.load(0, downloaded).flat
    assert torch.equal(first, downloaded)
    first += 1
    assert torch.equal(models.load(0, downloaded).flat, downloaded), "a copy"


def test_what_is_kept_comes_back_with_centres_counts_and_statistics() -> None:
    models = own_models(2, normed_model)
    own = models.load(CLIENT, torch.empty(0))
    assert own.centres is not None
    own.flat += 1
    own.centres.values["2"] += 0.25
    own.centres.idle["2"][1] = 17
    own.centres.statistics["3.running_var"] *= 3
    models.save(CLIENT, own)
    again = models.load(CLIENT, torch.empty(0))
    assert again.centres is not None
    assert torch.equal(again.flat, own.flat)
    for part, values in own.centres.state_dict().items():
        for name, value in values.items():
            assert torch.equal(again.centres.state_dict()[part][name], value)


def test_a_model_that_is_not_finite_is_not_kept(split: Split) -> None:
    method = Local(training(split), own_models())
    run(method)
    before = method.models.load(CLIENT, torch.empty(0)).flat
    with pytest.raises(ArithmeticError, match="not finite"):
        method.run(CLIENT, before, INDICES, lr=1e30, seed=SEED)
    assert torch.equal(method.models.load(CLIENT, torch.empty(0)).flat, before)


# ---- scores ----


class Fixed(nn.Module):
    """Says the class that an image's first pixel names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return functional.one_hot(x[:, 0, 0, 0].round().long(), 4).float() * self.scale


def test_a_client_is_scored_on_its_classes_in_its_proportions() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 4)
    said = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    images = said.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    evaluator = Evaluator((0.0,), (1 / 255,), FP32, None, batch_size=5)
    # Class 3 has no test image; client 1 has one class, client 2 none that can be tested.
    counts = torch.tensor([[30, 10, 0, 5], [0, 0, 7, 0], [0, 0, 0, 9]])
    scores = PersonalEvaluator(evaluator, counts)
    split, everything = Split(images, labels), scores.class_means(Fixed(), Split(images, labels))
    for client, expected in enumerate([0.75 * 3 / 6 + 0.25 * 2 / 3, 1.0]):
        own = scores.class_means(Fixed(), split, scores.classes(client))
        for means in (own, everything):
            told = scores.score(client, means)
            assert told.accuracy == pytest.approx(expected)
            assert told.balanced_accuracy == pytest.approx([(3 / 6 + 2 / 3) / 2, 1.0][client])
    assert own[0].isnan().all(), "a class of other clients is not looked at"
    assert all(value != value for value in astuple(scores.score(2, everything)))
    losses = functional.cross_entropy(functional.one_hot(said, 4).float(), labels, reduction="none")
    assert scores.score(1, everything).loss == pytest.approx(float(losses[labels == 2].mean()))
