"""What every job sets up from its settings: data, clients' shares, model, training, evaluation, the run's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedq
from fedq.collectives import Transport
from fedq.config import Config, parse_lr_schedule
from fedq.configfile import config_dict
from fedq.data import Dataset, load_dataset, normalize
from fedq.engines import Engine, Precision, choose_precision, make_engine
from fedq.engines.accelerator import Trackers
from fedq.federated.evaluate import Evaluator
from fedq.federated.fedbat import FedBatTraining
from fedq.federated.image_training import LocalTraining
from fedq.federated.local_optimizer import local_optimizer
from fedq.federated.partition import label_counts, partition
from fedq.hooks import is_powersgd
from fedq.kernels import derive_seed, implementation
from fedq.layout import Layout
from fedq.ledger import Ledger
from fedq.lowbit import use_few_bits
from fedq.lowbit.update import use_binary_updates
from fedq.models import build_model, check_model
from fedq.phases import PhaseTimer, clock_of
from fedq.report import print_header
from fedq.runfolder import NullRunFolder, RunFolder, environment_info, git_commit
from fedq.runtime import Runtime, distributed, local_root_first
from fedq.runtime.allocator import keep_freed_memory
from fedq.runtime.watch import Watch
from fedq.specs import split_spec
from fedq.trainers.auto_uplink import choose_uplink, is_auto, keep_choice, why_this_uplink
from fedq.trainers.endings import command, farewell, stopped_by_disk
from fedq.trainers.fingerprint import Fingerprint, check_names
from fedq.trainers.interfaces import InterfaceCount
from fedq.trainers.opening import Opened, begin_again, identify, open_folder, stop_if_finished
from fedq.trainers.profiling import StepTrace
from fedq.trainers.starts import Place, noting_errors, repeated

GIB = 1 << 30


@dataclass(frozen=True)
class Job:
    """Everything that the trainers share; the same on every rank, but for the folder and the ranks themselves."""

    config: Config
    runtime: Runtime
    folder: RunFolder | NullRunFolder
    dataset: Dataset
    parts: list[Tensor]
    label_counts: Tensor
    model: nn.Module
    training: LocalTraining
    evaluator: Evaluator
    transport: Transport
    ledger: Ledger
    started: float
    path: Path
    """The run's folder, known to every rank."""
    watch: Watch
    start: int
    """Number of times that the run was started before."""
    fingerprint: Fingerprint
    """Settings, data and shapes of the model, by which checkpoints prove to be this run's."""
    timer: PhaseTimer
    """Timer of this rank's phases."""
    trace: StepTrace
    """Trace of the profiler, which records only where the settings ask for it."""
    interfaces: InterfaceCount
    """Count of the bytes that the machines' network interfaces have sent since this start."""
    rollbacks: int = 0
    """Number of times that the run has gone back to a checkpoint because its model had diverged."""

    @property
    def is_root(self) -> bool:
        """Whether this rank reports."""
        return self.runtime.is_root

    def lr(self, round: int) -> float:
        """Return the local learning rate of a round."""
        local = self.config.local
        name, steps, factor = parse_lr_schedule(local.lr_schedule)
        if name == "cosine":
            return local.lr * 0.5 * (1.0 + math.cos(math.pi * round / self.config.run.rounds))
        return local.lr * factor ** sum(round >= at for at in steps)

    def summary(self, **results: Any) -> dict[str, Any]:
        """Return the run's summary: what was asked for, where it ran, and the results given."""
        config, runtime = self.config, self.runtime
        return {
            "dataset": self.dataset.description,
            "model": config.local.model,
            "num_params": self.training.layout.num_params,
            "world_size": runtime.world_size,
            "launcher": runtime.launcher,
            "engine": self.training.steps_by.name,
            "backend": runtime.backend,
            "device": runtime.device.type,
            "precision": self.training.precision.name,
            "kernels": implementation(runtime.device),
            "threads": torch.get_num_threads(),
            "num_clients": config.clients.num_clients,
            "cohort": config.cohort_size,
            "partition": config.clients.partition,
            "weights": config.lowbit.weights,
            "activations": config.lowbit.activations,
            "algorithm": config.personal.algorithm,
            "exchange": config.exchange.exchange,
            "uplink": config.exchange.uplink,
            "uplink_chosen_because": why_this_uplink(self.path),
            "downlink": _sent_back(config),
            "downlink_to": config.exchange.downlink_to,
            "aggregate": config.exchange.aggregate,
            "server": config.exchange.server,
            "seed": config.run.seed,
            "command": command(runtime),
            "git_commit": git_commit(Path(fedq.__file__).parent),
            "restarts": self.start,
            **repeated(self.path),
            "changed_on_resume": self.fingerprint.changes,
            **environment_info(),
            **results,
        }


def _sent_back(config: Config) -> str:
    """Return what travels on the second leg: PowerSGD has one of its own."""
    if config.lowbit.server_sends == "weights":
        return "weights"
    has_own = config.exchange.exchange == "step" and is_powersgd(config.exchange.uplink)
    return config.exchange.uplink if has_own else config.exchange.downlink


@contextmanager
def open_job(config: Config, rollbacks: int = 0) -> Iterator[Job]:
    """Set a job up and close its folder and process group afterwards.

    Args:
        config: The job's settings.
        rollbacks: Number of times that the run has gone back to a checkpoint because its model had diverged.

    Raises:
        FieldError: A setting cannot be used; raised on every rank.
        Finished: An earlier start of the same command has finished the run; raised on every rank.
    """
    given, run = config, config.run
    check_names(config)
    with distributed(run.device, run.threads, timeout_s=run.timeout) as runtime:
        started = time.perf_counter()
        if runtime.device.type == "cpu":
            keep_freed_memory()
        place = Place(runtime, is_new=not rollbacks)
        config = keep_choice(place.found(config))
        if given.run.resume is None:
            stop_if_finished(config, runtime)
        folder, opened = open_folder(config, runtime, place)
        path, start, say = opened.path, opened.start, partial(farewell, config, runtime, opened.path)
        with (
            noting_errors(path, start, runtime.rank),
            stopped_by_disk(path, say),
            folder,
            Watch(runtime.rank, run.timeout, say, folder.unlock) as watch,
        ):
            if runtime.is_root and config.run.resume is not None and config.exchange.exchange == "none":
                begin_again(folder, path, start)
            dataset = load_data(config, runtime)
            if runtime.is_root:
                kernels = implementation(runtime.device)
                slow = " (slow: see fedq doctor)" if kernels == "reference" else ""
                print_header([f"{dataset.description} | {runtime.note} | kernels: {kernels}{slow}", *dataset.notes])
            job = _job(config, runtime, folder, dataset, started, opened, watch)
            try:
                yield replace(job, rollbacks=rollbacks)
            finally:
                job.trace.stop()


def load_data(config: Config, runtime: Runtime) -> Dataset:
    """Load the data set of the settings; the first rank of a machine goes first."""
    data = config.data
    with local_root_first(runtime):
        return load_dataset(
            data.dataset,
            data_dir=data.data_dir,
            download=data.download,
            image_size=data.image_size,
            train_examples=data.train_examples,
            val_fraction=data.val_fraction,
            seed=config.run.seed,
            memory_limit_bytes=int(config.run.memory_limit_gib * GIB),
            progress=runtime.is_root,
        )


def _job(
    config: Config,
    runtime: Runtime,
    folder: RunFolder | NullRunFolder,
    data: Dataset,
    started: float,
    opened: Opened,
    watch: Watch,
) -> Job:
    given, clients, labels, path = config, config.clients, data.train.labels, opened.path
    if config.exchange.exchange == "step":  # every rank is a client
        clients = replace(clients, num_clients=runtime.world_size)
        config = replace(config, clients=clients)
    parts = client_parts(config, labels)
    if runtime.is_root:
        _report_small_clients(parts, config.local.batch_size)
    on_device = data.to(runtime.device) if _fits(data, config) else data
    precision = choose_precision(config.local.precision, runtime.device)
    model = make_model(config, config.local.model, data, runtime.device, precision)
    if is_auto(config):
        config = choose_uplink(config, runtime, model, data, precision, path)
    fingerprint = identify(replace(given, exchange=config.exchange), opened, folder, data, model, runtime)
    timer = PhaseTimer(clock_of(runtime.device))
    transport = Transport(runtime.device, timer=timer)
    trace = StepTrace(config.run.profile, path, runtime.rank, runtime.device, timer)
    optimizer = local_optimizer(config.local.optimizer)
    engine = make_engine(
        runtime.launcher,
        model,
        optimizer.make,
        precision,
        settings={**asdict(config.local), **asdict(optimizer), "optimizer": split_spec(config.local.optimizer)[0]},
        deepspeed_config=config.run.deepspeed_config,
    )
    if config.run.log_with:
        folder.follow(Trackers(config.run.log_with, runtime.device, path, config_dict(config)))
    return Job(
        config=config,
        runtime=runtime,
        folder=folder,
        dataset=on_device,
        parts=parts,
        label_counts=label_counts(labels, parts, data.num_classes),
        model=model,
        training=local_training(config, on_device, model, precision, _each(watch.beat, trace.step), engine),
        evaluator=Evaluator(data.mean, data.std, precision, transport),
        transport=transport,
        ledger=Ledger(),
        started=started,
        path=path,
        watch=watch,
        start=opened.start,
        fingerprint=fingerprint,
        timer=timer,
        trace=trace,
        interfaces=InterfaceCount(transport),
    )


def client_parts(config: Config, labels: Tensor) -> list[Tensor]:
    """Return every client's training examples, disjoint; whoever has the same labels gets the same."""
    clients = config.clients
    return partition(
        labels, clients.num_clients, clients.partition, seed=config.run.seed, min_examples=clients.min_examples
    )


def build_network(config: Config, name: str, data: Dataset) -> nn.Module:
    """Build a network for the data, with weights from torch's generator; see `build_model`."""
    channels, size = data.image_shape[:2]
    norm = config.local.norm
    return build_model(name, num_classes=data.num_classes, in_channels=channels, image_size=size, norm=norm)


def make_model(config: Config, name: str, data: Dataset, device: torch.device, precision: Precision) -> nn.Module:
    """Build a network with weights that follow from the run's seed.

    Raises:
        FieldError: `build_model` cannot build the network, or `check_model` finds that it does not fit the data.
    """
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    model = build_network(config, name, data)
    memory_format = torch.channels_last if precision.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    batch = normalize(data.train.images[:2].to(device), data.mean, data.std, channels_last=precision.channels_last)
    with precision.autocast():
        check_model(name, model, batch, data.num_classes)
    if config.lowbit.weights != "float":
        use_few_bits(model, config.lowbit.weights, activations=config.lowbit.activations)
    if config.personal.algorithm == "fedbat":
        use_binary_updates(model)
    return model


def local_training(
    config: Config, data: Dataset, model: nn.Module, precision: Precision, beat: Callable[[], None], engine: Engine
) -> LocalTraining:
    """Return how clients train, as the settings say."""
    local = config.local
    kind = FedBatTraining if config.personal.algorithm == "fedbat" else LocalTraining
    return kind(
        model=model,
        layout=Layout.of(model, "fp32"),
        split=data.train,
        mean=data.mean,
        std=data.std,
        make_optimizer=local_optimizer(local.optimizer).make,
        precision=precision,
        batch_size=local.batch_size,
        epochs=local.local_epochs,
        steps=local.local_steps,
        prox_mu=local.prox_mu,
        augment=config.data.augment,
        flip=data.flip,
        beat=beat,
        engine=engine,
    )


def _each(*actions: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for action in actions:
            action()

    return call


def _report_small_clients(parts: list[Tensor], batch_size: int) -> None:
    small = sum(len(part) < batch_size for part in parts)
    if small:
        print_header([f"{small} of {len(parts)} clients hold fewer than {batch_size} images: smaller batches there"])


def _fits(data: Dataset, config: Config) -> bool:
    """Whether the images go to the device whole; mapped ones stay on disk."""
    nbytes = sum(split.images.numel() for split in (data.train, data.val, data.test))
    return nbytes <= config.run.memory_limit_gib * GIB
