"""The whole of a job's settings: one tree of frozen dataclasses, read from flags and YAML.

Only plain values live here; what a value means is checked where it is used, and `validate` checks what can be
known before any work starts. Reading them from a file lives in `fedq.configfile`, from flags in `fedq.cli`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from fedq.codecs import codec, codec_schedule
from fedq.codecs.sign import Sign
from fedq.errors import Check, FieldError, check_all, one_of
from fedq.federated.chaos import chaos
from fedq.federated.limits import norm_limit
from fedq.federated.local_optimizer import local_optimizer
from fedq.federated.optim import server_optimizer
from fedq.feedback import feedback_rule
from fedq.hooks import check_step_codec, check_step_spec, is_powersgd
from fedq.lowbit import Binary, choose_quantizers
from fedq.models import MODELS, build_model, is_own
from fedq.personalize.settings import check_personal, check_quped

AUTO = "auto"
"""An uplink that is chosen before training starts, and is a codec from then on."""
_OF_ROUNDS = {
    "clients": ("cohort", "min_cohort", "norm_limit"),
    "local": ("local_epochs", "prox_mu", "side_by_side"),
    "exchange": ("start", "aggregate", "server", "downlink_to"),
    "run": ("chaos", "histogram_every"),
}
"""Settings, by section, that --exchange step cannot have."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and where they are."""

    dataset: str = "auto"
    """auto, cifar10, mnist, digits, or a folder of images or Parquet. auto: CIFAR-10 if on disk, otherwise digits."""
    data_dir: Path = Path("data")
    """Where data sets lie on disk."""
    download: bool = False
    """Fetch a missing data set (never done without this flag)."""
    image_size: int | None = None
    """Side of the square images; default: the data set's own (32; digits and MNIST are resized to 32)."""
    train_examples: int | None = None
    """Use only this many training images, a seeded subset. Default: all."""
    val_fraction: float = 0.1
    """Share of the training set held out for every choice (best round, early stop)."""
    augment: bool = True
    """Random crop with padding 4 and, where the data allow it, horizontal flip."""


@dataclass(frozen=True)
class ClientsConfig:
    """Who takes part."""

    num_clients: int = 4
    """Clients in the federation; may exceed the ranks. With --exchange step every rank is one."""
    cohort: int | None = None
    """Clients sampled each round. Default: all."""
    partition: str = "iid"
    """iid, dirichlet:alpha=0.1, shards:classes=2, or groups:0-3/4-6/7-9 (label groups)."""
    min_examples: int = 10
    """Fewest training images a client may hold; a draw with fewer is redrawn."""
    min_cohort: int = 1
    """Fewest usable updates a round needs; with fewer the model stays as it is and the round is named."""
    norm_limit: str = "none"
    """clip:3 scales updates down to 3 times the round's median norm; drop:3 leaves those beyond it out."""


@dataclass(frozen=True)
class LocalConfig:
    """What one client does in one round."""

    model: str = "resnet18"
    """resnet18, resnet50, resnet20, resnet32, improved_cnn, convnet9, cnn62k, cnn1m, or package.module:function."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation layers of the ResNets, convnet9 and improved_cnn."""
    local_epochs: int = 1
    """Passes over the client's images each round."""
    local_steps: int | None = None
    """Optimizer steps each round, instead of --local-epochs."""
    batch_size: int = 16
    """Images a step."""
    optimizer: str = "sgd"
    """Local optimizer, with new state each round: sgd:momentum=0.9,weight_decay=5e-4, adam:weight_decay=0, or adamw."""
    lr: float = 0.03
    """Local learning rate of the first round."""
    lr_schedule: str = "cosine"
    """Over rounds: constant, cosine, or steps:at=20+30,factor=0.1."""
    prox_mu: float = 0.0
    """FedProx: pull towards the round's starting point."""
    side_by_side: int = 1
    """Clients that a rank trains at a time, as one stacked model: for small models on a GPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of local training. auto: bf16 and channels_last where the hardware runs them fast."""


@dataclass(frozen=True)
class ExchangeConfig:
    """What travels, and what the server does with it."""

    exchange: Literal["round", "step", "none"] = "round"
    """round: federated rounds. step: gradients are averaged in every step. none: clients train alone."""
    uplink: str = "int4"
    """Codec of the clients' updates: int4:block=256, sign, blocktopk:k=1; 'int4 sign@7': sign from round 7; or auto."""
    link: Path | None = None
    """With --uplink auto: the link.json of `fedq probe` to choose by. Default: a few seconds' probe before training."""
    downlink: str = "int8"
    """Codec of the server's change to the model; with --exchange step of the second leg, from owners to all."""
    start: Literal["sent", "seed"] = "sent"
    """The first model: sent in float32 to all who join, or drawn by everyone from the seed, and not sent."""
    aggregate: Literal["rooted", "two_phase"] = "rooted"
    """Who averages the updates: rank 0, or every rank the tensors that it owns, with the same result."""
    schedule: Literal["auto", "reduce", "one_phase", "two_phase", "hierarchical"] = "auto"
    """How gradients travel with --exchange step; auto chooses by ranks and payload."""
    feedback: str = "auto"
    """Error feedback of the uplink: auto (on for codecs that lose more than a cast does), on, off; auto:memory=0.5
    leaves half of a client's residual after each round in which it was not sampled."""
    downlink_to: Literal["cohort", "all"] = "cohort"
    """Who is charged for a round's change: the clients of the next cohorts as they come, or every client at once."""
    server: str = "fedavg"
    """fedavg, fedavgm, fedadagrad, fedadam, fedyogi or any torch.optim class, as in fedadam:lr=0.01,tau=0.001."""


@dataclass(frozen=True)
class LowBitConfig:
    """Models whose weights have few bits while they are trained."""

    weights: str = "float"
    """float, binary, ternary, int2 to int16, or bits by layer: head=8,body=1,tail=8. Stem and last layer stay float."""
    activations: Literal["float", "binary"] = "float"
    """Inputs of the few-bit layers; binary: signs around a learned threshold."""
    sends: Literal["update", "weights"] = "update"
    """What clients send of binary layers: the change of their float weights, or the binary weights themselves."""
    server_sends: Literal["change", "weights"] = "change"
    """What the server sends: the change of the float model, or the model as deployed, which is all a newcomer needs."""


@dataclass(frozen=True)
class PersonalConfig:
    """Models of the clients' own."""

    algorithm: Literal["fedavg", "fedbat", "local", "perfedavg", "pfedme", "mutual", "qupel", "quped"] = "fedavg"
    """fedavg: one model. fedbat: one, learned 1-bit updates. The others give every client a model of its own."""
    personal_test: bool = False
    """Test every client on the images of its own classes; always so where clients have models of their own."""
    client_bits: str = "32"
    """Bits of the clients' own models, dealt over the clients in turn: 2, or 1,2,32. quped and qupel only."""
    client_models: str = ""
    """Networks of the clients' own models, dealt in turn: resnet20,cnn62k. Default: --model."""
    regularizer: Literal["l1", "l2"] = "l1"
    """Distance of weights to their centres that quped and qupel penalise."""
    regularizer_weight: float = 1e-4
    """Weight of that distance in the first epoch; it grows by as much in every epoch."""
    centres: Literal["learned", "fixed"] = "learned"
    """fixed: two centres at -1 and +1 (ProxQuant)."""
    centre_lr: float = 1e-4
    """Learning rate of the centres; a tenth from 2/5, and a hundredth from 7/10 of the rounds before freezing."""
    centre_sign: Literal["corrected", "published"] = "corrected"
    """Sign of the penalty in the l1 step of the centres: its subgradient's, or that of QuPeD's published code."""
    freeze_at: float = 0.8
    """Share of the rounds after which weights are set to their centres and the rest is trained on."""
    warm_start: Path | None = None
    """A model.safetensors to start from."""
    distill_weight: float = 0.1
    """Weight of the distillation (quped, mutual) or of the pull to the global model (qupel)."""
    temperature: float = 1.0
    """Softmax temperature of the distillation."""
    global_loss: Literal["mutual", "distill"] = "mutual"
    """Loss of quped's global copy on a client: distillation with cross-entropy, or distillation alone."""
    personal_lr: float | None = None
    """Learning rate of the inner step (perfedavg, pfedme) or of the client's own model. Default: --lr."""
    personal_steps: int = 5
    """Inner steps on a batch (pfedme), or steps from the global model before a test (perfedavg)."""
    attachment: float = 15.0
    """Weight of the squared distance to the global model (pfedme's lambda)."""


@dataclass(frozen=True)
class RunConfig:
    """How long, where to, and how it is reported."""

    rounds: int = 7
    """Federated rounds; with --exchange step: epochs."""
    seed: int = 0
    """Seed of everything: data split, partition, sampling, weights, noise."""
    target_accuracy: float | None = None
    """Stop cleanly once the validation accuracy (0 to 1) reaches this."""
    eval_every: int = 1
    """Rounds between evaluations on the validation set; the last round always counts."""
    histogram_every: int = 0
    """Rounds between histograms of weights and updates; 0: first and last round only."""
    out: Path | None = None
    """The run's folder. Default: runs/<time>-<name>."""
    name: str | None = None
    """Name of the run. Default: <dataset>-<model>-<uplink>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    deepspeed_config: Path | None = None
    """DeepSpeed's JSON file; goes over --config. Started by deepspeed, default: deepspeed_config.json if it is here."""
    log_with: str = ""
    """Trackers to log to as well, by way of Accelerate, which must be installed: wandb,mlflow."""
    threads: int | None = None
    """CPU threads a rank. Default: 1 when there are several ranks on a machine, otherwise torch's choice."""
    profile: bool = False
    """Trace the first round (of each rank up to 500 steps) with PyTorch's profiler: trace-rank0.json.gz and so on."""
    checkpoint_every: int = 1
    """Rounds between checkpoints; a crash loses at most this many."""
    resume: Path | None = None
    """Go on with the run in this folder, as if it had never stopped; its config.yaml gives the settings."""
    resume_changed: tuple[str, ...] = ()
    """A setting that may differ from that of the run that is resumed, or data, or model; several: a,b or repeated."""
    on_existing: Literal["auto", "resume", "refuse", "new"] = "auto"
    """If --out holds a run: go on with it, refuse, or begin another beside it. auto: go on unless it is finished."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """If the model diverges: stop at the last good checkpoint; or go back to it, and on with half of the lr."""
    timeout: float = 1800.0
    """Seconds without progress after which a rank ends the job, with its name and traceback."""
    chaos: str = ""
    """Faults on purpose, as probabilities: kill=0.02,nan=0.01,fail=0.01,slow=0.05,slow_s=1,seed=1."""
    memory_limit_gib: float = 4.0
    """Above this, images are memory-mapped and client residuals spill to disk."""


@dataclass(frozen=True)
class Config:
    """A federated job."""

    command: ClassVar[tuple[str, ...]] = ()
    """Words between the program's name and its flags, where it is one of several commands."""

    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    lowbit: LowBitConfig = field(default_factory=LowBitConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def cohort_size(self) -> int:
        """Clients a round."""
        return self.clients.num_clients if self.clients.cohort is None else self.clients.cohort


def parse_lr_schedule(spec: str) -> tuple[str, tuple[int, ...], float]:
    """Split a learning rate schedule into its name, the rounds at which it steps, and the factor of a step.

    Args:
        spec: ``constant``, ``cosine``, or ``steps:at=20+30,factor=0.1`` with rising rounds.

    Returns:
        For example ``("steps", (20, 30), 0.1)``; without steps the rounds are empty and the factor is 1.

    Raises:
        FieldError: The text is none of these.
    """
    if spec in ("constant", "cosine"):
        return spec, (), 1.0
    match = re.fullmatch(r"steps:at=(\d+(?:\+\d+)*),factor=(\d*\.?\d+(?:[eE]-?\d+)?)", spec)
    if match:
        at, factor = tuple(int(number) for number in match[1].split("+")), float(match[2])
        if all(a < b for a, b in zip((0, *at), at, strict=False)) and 0 < factor <= 1:
            return "steps", at, factor
    raise FieldError(
        "lr_schedule",
        spec,
        "constant, cosine, or steps:at=20+30,factor=0.1 with rising rounds from 1 and a factor above 0 and at most 1",
    )


def validate(config: Config) -> None:
    """Check everything that can be known before any work starts.

    Raises:
        FieldError: The first setting that cannot be used, by the name its flag has.
    """
    check_all(_checks(config))
    parse_lr_schedule(config.local.lr_schedule)
    chaos(config.run.chaos)
    local_optimizer(config.local.optimizer)
    norm_limit(config.clients.norm_limit)
    feedback_rule(config.exchange.feedback)
    is_step = config.exchange.exchange == "step"
    if config.exchange.uplink == AUTO:
        _check_auto(config)
    else:
        _check_codec("uplink", config.exchange.uplink, check_step_spec if is_step else codec_schedule)
    if config.exchange.link is not None and config.exchange.uplink != AUTO:
        raise FieldError("link", str(config.exchange.link), "left out, unless with --uplink auto")
    _check_codec("downlink", config.exchange.downlink, check_step_codec if is_step else codec)
    _check_mode(config)
    _check_lowbit(config)
    _check_personal(config)
    server_optimizer(config.exchange.server, [torch.nn.Parameter(torch.zeros(1))])


def _checks(config: Config) -> Iterator[Check]:
    """Yield name, value, whether it is allowed, and what is; a NaN fails every comparison, as it should."""
    data, clients, local, run = config.data, config.clients, config.local, config.run
    yield "val_fraction", data.val_fraction, 0 <= data.val_fraction <= 0.5, "0 to 0.5"
    yield "num_clients", clients.num_clients, clients.num_clients >= 1, "1 or more"
    fits = 1 <= config.cohort_size <= clients.num_clients
    yield "cohort", clients.cohort, fits, f"1 to {clients.num_clients}, the number of clients (num_clients)"
    fits = 1 <= clients.min_cohort <= config.cohort_size
    yield "min_cohort", clients.min_cohort, fits, f"1 to {config.cohort_size}, the cohort"
    fits = run.on_divergence == "stop" or config.exchange.exchange != "none"
    yield "on_divergence", run.on_divergence, fits, "stop with --exchange none, which has no checkpoints"
    yield "timeout", run.timeout, 0 < run.timeout < math.inf, "above 0"
    is_model = local.model in MODELS or is_own(local.model)
    yield "model", local.model, is_model, one_of(MODELS, local.model) + ", or package.module:function"
    is_allowed = local.norm == "batch" or not (is_own(local.model) or is_own(config.personal.client_models))
    yield "norm", local.norm, is_allowed, "batch with a model of one's own, which has its own layers"
    yield "prox_mu", local.prox_mu, 0 <= local.prox_mu < math.inf, "0 or more"
    for name, amount in (("lr", local.lr), ("memory_limit_gib", run.memory_limit_gib)):
        yield name, amount, 0 < amount < math.inf, "above 0"
    target = run.target_accuracy
    yield "target_accuracy", target, target is None or 0 < target <= 1, "above 0 and at most 1"
    for name, number in (
        ("image_size", data.image_size),
        ("train_examples", data.train_examples),
        ("min_examples", clients.min_examples),
        ("local_epochs", local.local_epochs),
        ("local_steps", local.local_steps),
        ("batch_size", local.batch_size),
        ("side_by_side", local.side_by_side),
        ("rounds", run.rounds),
        ("eval_every", run.eval_every),
        ("checkpoint_every", run.checkpoint_every),
        ("threads", run.threads),
    ):
        yield name, number, number is None or number >= 1, "1 or more"
    for name, number in (("seed", run.seed), ("histogram_every", run.histogram_every)):
        yield name, number, number >= 0, "0 or more"


def _check_mode(config: Config) -> None:
    """Refuse settings of rounds in a job that has none, and the other way round.

    Raises:
        FieldError: A setting of the other mode that is not its default.
    """
    mode, defaults = config.exchange.exchange, Config()
    if mode != "step":
        if config.exchange.schedule != "auto":
            raise FieldError("schedule", config.exchange.schedule, f"auto, unless with --exchange step (here {mode})")
        return
    for section, names in _OF_ROUNDS.items():
        for name in names:
            value, default = (getattr(getattr(tree, section), name) for tree in (config, defaults))
            if value != default:
                raise FieldError(name, value, f"{default} with --exchange step, which has no rounds")
    if feedback_rule(config.exchange.feedback).memory != 1:
        raise FieldError(
            "feedback", config.exchange.feedback, "without memory with --exchange step, which has no rounds"
        )
    if is_powersgd(config.exchange.uplink):
        for name in ("downlink", "schedule"):
            value, default = (getattr(tree.exchange, name) for tree in (config, defaults))
            if value != default:
                raise FieldError(name, value, "left out with --uplink powersgd, which has a second leg of its own")


def _check_auto(config: Config) -> None:
    """Refuse what leaves no codec to choose.

    Raises:
        FieldError: A job that sends no updates, or has codecs of its own.
    """
    for name, holds in (
        ("--exchange none", config.exchange.exchange == "none"),
        ("--algorithm fedbat", config.personal.algorithm == "fedbat"),
        ("--sends weights", config.lowbit.sends == "weights"),
    ):
        if holds:
            raise FieldError("uplink", AUTO, f"a codec, with {name}")


def _check_lowbit(config: Config) -> None:
    """Check few-bit weights and updates against the model, which is built without values for it.

    Raises:
        FieldError: A spec that fits no layer, or settings that contradict each other.
    """
    lowbit = config.lowbit
    is_fedbat = config.personal.algorithm == "fedbat"
    if is_fedbat:
        _check_fedbat(config)
    if lowbit.weights == "float":
        for name in ("activations", "sends", "server_sends"):
            value, default = getattr(lowbit, name), getattr(LowBitConfig(), name)
            if value != default:
                raise FieldError(name, value, f"{default}, unless --weights are few-bit")
        return
    if is_fedbat:
        raise FieldError("weights", lowbit.weights, "float with --algorithm fedbat, whose updates are binary instead")
    with torch.device("meta"):
        chosen = choose_quantizers(build_model(config.local.model), lowbit.weights)
    _check_sent_weights(config, all(isinstance(one, Binary) for one in chosen.values()))


def _check_sent_weights(config: Config, are_binary: bool) -> None:
    """Refuse what does not go with messages of weights instead of changes."""
    lowbit, exchange = config.lowbit, config.exchange
    for name, default in (("sends", "update"), ("server_sends", "change")):
        value = getattr(lowbit, name)
        if value == default:
            continue
        if not are_binary:
            raise FieldError(name, value, f"{default}, unless all few-bit layers are binary")
        if exchange.exchange != "round" or exchange.aggregate != "rooted":
            raise FieldError(name, value, f"{default}, unless with --exchange round and --aggregate rooted")
    if lowbit.sends == "weights" and norm_limit(config.clients.norm_limit) is not None:
        raise FieldError("norm_limit", config.clients.norm_limit, "left out with --sends weights")
    for name in ("downlink", "start"):
        value = getattr(exchange, name)
        if lowbit.server_sends == "weights" and value != getattr(ExchangeConfig(), name):
            raise FieldError(name, value, "left out with --server-sends weights")


def _check_fedbat(config: Config) -> None:
    """Refuse what does not go with binary updates."""
    exchange = config.exchange
    if exchange.exchange != "round":
        raise FieldError("algorithm", "fedbat", "fedavg, unless with --exchange round")
    schedule = codec_schedule(exchange.uplink)
    if not all(isinstance(c, Sign) and not c.rotates and c.rounding == "nearest" for _, c in schedule):
        raise FieldError("uplink", exchange.uplink, "sign without rotation with --algorithm fedbat")
    side_by_side, words = config.local.side_by_side, "with --algorithm fedbat"
    check_all(
        [
            (
                "feedback",
                exchange.feedback,
                not feedback_rule(exchange.feedback).asked,
                f"auto or off {words}",
            ),
            ("side_by_side", side_by_side, side_by_side == 1, f"1 {words}"),
        ]
    )


def _check_personal(config: Config) -> None:
    """Check the settings of clients' own models.

    Raises:
        FieldError: One that cannot be used.
    """
    own, local, defaults = asdict(config.personal), asdict(config.local), asdict(PersonalConfig())
    exchange, weights = config.exchange.exchange, config.lowbit.weights
    if own["algorithm"] == "quped" and exchange == "none":
        check_quped(own, local, defaults, weights=weights)
    else:
        check_personal(own, local, defaults, exchange=exchange, weights=weights)


def _check_codec(name: str, spec: str, parse: Callable[[str], object]) -> None:
    """Parse a codec, so that an error names the direction too and not only the codec's option."""
    try:
        parse(spec)
    except FieldError as error:
        about = "" if error.value == spec else f"for {error.field}, "
        raise FieldError(name, spec, about + error.allowed) from None
