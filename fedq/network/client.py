"""`fedq client`, and `join` for one's own model and data: connect, take part, come back after a lost connection."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedq.config import Config, validate
from fedq.configfile import with_settings
from fedq.data import Dataset
from fedq.engines import choose_precision, make_engine
from fedq.errors import FieldError
from fedq.federated.aggregate import why_left_out
from fedq.federated.assembly import wants_feedback
from fedq.federated.client import Client
from fedq.federated.frozen import check_frozen, frozen_checksums
from fedq.federated.local_optimizer import local_optimizer
from fedq.federated.training import ExampleTraining, OnExamples
from fedq.feedback import feedback_rule
from fedq.files import replace_file
from fedq.layout import Layout, frozen_parameters
from fedq.models import is_own
from fedq.network.certs import Identity, client_number, load_identity
from fedq.network.connection import Backoff, Connection, Lost, NotWanted
from fedq.network.fields import FOLDER, check_note, check_settings
from fedq.network.multi_rank_client import MultiRankClient
from fedq.network.participant import Diverged, Participant, VersionsOnDisk
from fedq.network.settings import ClientConfig, check_client
from fedq.report import human_bytes, human_seconds, print_header
from fedq.runtime import Runtime, distributed, from_root
from fedq.runtime.allocator import keep_freed_memory
from fedq.trainers.build import round_settings
from fedq.trainers.job import build_network, client_parts, load_data, local_training, make_model
from fedq.waiting import Say, Wait, speaking
from fedq.wire import Kind, Message, read_note

_PATIENCE_S = 7 * 86_400.0
"""How long a client's other ranks wait for the next round."""
_DESCRIBE_S = 30.0
"""Longest single try to hear what the federation is."""


def run_client(config: ClientConfig) -> dict[str, Any]:
    """Take part in a federation, on this rank of the client, until the server says that it is over.

    Returns:
        What the server said at the end, on rank 0.

    Raises:
        FieldError: A setting that cannot be used, or a server that does not take this client.
    """
    check_client(config)
    keep_freed_memory(of_any_size=True)
    with distributed(config.device, config.threads, timeout_s=_PATIENCE_S) as runtime:
        if not runtime.is_root:
            _work_for_root(config, runtime)
            return {}
        identity, number = _who(config)
        connection = Connection(config.connect, identity, number, server_name=config.server_name)
        try:
            federation = _describe(connection, config.give_up_after)
            from_root(runtime, federation)
            return _take_part(config, runtime, connection, federation)
        finally:
            connection.close()


def join(
    connect: str,
    *,
    model: nn.Module,
    client: Client | None = None,
    train: Callable[[float], float | Sequence[float] | None] | None = None,
    num_examples: int | None = None,
    certs: Path | str | None = None,
    insecure: bool = False,
    number: int | None = None,
    uplink: str | None = None,
    out: Path | str | None = None,
    give_up_after: float = 600.0,
    say: Say = print,
) -> dict[str, Any]:
    """Take part in a federation with a model and data of one's own.

    The process keeps the memory that it frees, where malloc is glibc's: rounds take and free the same buffers.

    Args:
        connect: The server's ``host:port``.
        model: A module like the server's; it is trained in place and holds the final model at the end.
        client: The client that trains it, as in a `fedq.Federation`; its weight must be a whole number.
        train: Function instead of ``client``: ``train(lr)`` trains ``model`` for a round and returns its mean
            loss, or loss and accuracy, or None.
        num_examples: This client's weight in the average, with ``train``.
        certs: This client's folder of certificates.
        insecure: Whether to do without TLS; on loopback only, with ``number``.
        number: This client's number, from 0, where there is no TLS; a certificate says it otherwise.
        uplink: Codec of this client's updates; default: the client's own, or the server's.
        out: Folder for this client's residual and state; default: ``clients/<number>``.
        give_up_after: Seconds without a server after which to end.
        say: Function that takes one line of progress at a time.

    Returns:
        What the server said at the end: ``rounds``, ``test_accuracy``; or ``stopped``, why the run was given up.

    Raises:
        FieldError: A setting that cannot be used, another model than the server's, or a server that refuses.
    """
    client = _own_client(client, train, num_examples)
    config = ClientConfig(
        connect=connect,
        certs=None if certs is None else Path(certs),
        insecure=insecure,
        number=number,
        uplink=client.uplink if uplink is None else uplink,
        out=None if out is None else Path(out),
        give_up_after=give_up_after,
    )
    check_client(config)
    keep_freed_memory(of_any_size=True)
    identity, number = _who(config)
    connection = Connection(connect, identity, number)
    try:
        federation = _describe(connection, give_up_after)
        settings = settings_of(federation, config, has_own_model=True)
        participant = _participant(config, federation, settings, client, model, own=True)
        result = follow(connection, participant, Backoff(connection, give_up_after, say), say)
        if participant.replica is not None:
            participant.layout.unflatten_(participant.replica, model)
        return result
    finally:
        connection.close()


def _own_client(client: Client | None, train: Callable[[float], Any] | None, num_examples: int | None) -> Client:
    """Return a client of the user's own.

    Raises:
        FieldError: There is none, or more than one way to train; or a weight that is no whole number.
    """
    if client is None:
        if train is None or num_examples is None:
            raise FieldError("client", None, "a fedq.Client; or train and num_examples")
        return Client(lambda model, lr: train(lr), num_examples=num_examples)
    if train is not None or num_examples is not None:
        raise FieldError(
            "train" if train is not None else "num_examples", train or num_examples, "left out with client"
        )
    if client.num_examples != int(client.num_examples):
        raise FieldError("num_examples", client.num_examples, "a whole number, across a network")
    return client


def follow(connection: Connection, participant: Participant, backoff: Backoff, say: Say) -> dict[str, Any]:
    """Hear the server and answer it until it says that it is over, through lost connections.

    Raises:
        FieldError: The server refuses this client, or could not be reached for too long.
    """
    result: dict[str, Any] | None = None
    connection.limits = participant.limits
    while True:
        try:
            # To the end also after the last words, so that the server knows that they were heard.
            for message in _followed(connection, participant, say):
                backoff.succeed()
                result = _hear(connection, participant, message, say) or result
            if result is not None:
                return result
            raise Lost("the server ended the connection")
        except Diverged as error:
            say(f"{error}: asking for a whole one")
        except Lost as error:
            if result is not None:
                return result
            backoff.wait(str(error))


def _followed(connection: Connection, participant: Participant, say: Say) -> Iterator[Message]:
    """Yield the server's messages; a person hears of the wait for its welcome, and for the first round."""
    messages = connection.follow(participant.hello())
    for deed in ("to take this client", "to begin a round"):
        whom = f"the server ({connection.where}) {deed}"
        with speaking(Wait(whom.__str__, hints=connection.hints, say=say)):
            message = next(messages, None)
        if message is None:
            return
        yield message
    yield from messages


def settings_of(federation: dict[str, Any], config: ClientConfig, *, has_own_model: bool = False) -> Config:
    """Return the federation's settings with this client's own.

    Raises:
        FieldError: The server's settings are none of this version, or name a model that only its owner has.
    """
    shared = check_settings(federation["settings"])
    if has_own_model:
        shared.pop("model", None)
    elif is_own(str(shared.get("model"))):  # importing what a server names would be running it
        raise FieldError("model", shared["model"], "a model of fedq's; for another use fedq.network.join")
    if shared.get("dataset") == FOLDER:
        shared["dataset"] = str(config.data_dir)
    settings = with_settings(Config(), shared)
    own = {"data_dir": str(config.data_dir), "download": config.download, "device": config.device}
    if config.threads is not None:
        own["threads"] = config.threads
    uplink = "int8" if config.quantization else config.uplink
    settings = with_settings(settings, own | ({"uplink": uplink} if uplink else {}))
    validate(settings)
    return settings


# ---- this client's parts ---------------------------------------------------------------------------------------------


def _who(config: ClientConfig) -> tuple[Identity | None, int]:
    """Return the certificate and the number.

    Raises:
        FieldError: The certificate cannot be used, or is for another number.
    """
    if config.certs is None:
        assert config.number is not None
        return None, config.number
    identity = load_identity(config.certs, serves=False)
    number = client_number(identity.name)
    if number is None or config.number not in (None, number):
        raise FieldError("number", config.number, f"left out, or that of the certificate, {identity.name}")
    return identity, number


def _describe(connection: Connection, give_up_after: float) -> dict[str, Any]:
    """Ask what the federation is, until the server is there."""
    backoff = Backoff(connection, give_up_after)
    with speaking(backoff.begin()) as waiting:
        while True:
            try:
                return check_note(connection.describe(min(_DESCRIBE_S, 1 + waiting.left_s)), "federation")
            except Lost as error:
                backoff.wait(str(error))


def _take_part(
    config: ClientConfig, runtime: Runtime, connection: Connection, federation: dict[str, Any]
) -> dict[str, Any]:
    settings = settings_of(federation, config)
    number = int(federation["number"])
    data, training, indices = _prepare(config, settings, runtime, federation)
    client = Client(OnExamples(training, indices), num_examples=len(indices))
    participant = _participant(config, federation, settings, client, training.model, own=False)
    codec, where = settings.exchange.uplink, "TLS" if config.certs is not None else "no TLS"
    ranks = f", {runtime.world_size} ranks by {config.exchange}" if runtime.world_size > 1 else ""
    print_header(
        [
            f"client {number} of {federation['clients']} | {data.description} | {len(indices):,} images here",
            f"{settings.local.model}, uplink {codec}, server {config.connect} ({where}){ranks}",
            *data.notes,
        ]
    )
    say: Say = lambda line: print_header([line])  # noqa: E731
    try:
        result = follow(connection, participant, Backoff(connection, config.give_up_after, say), say)
    finally:
        if isinstance(training, MultiRankClient):
            training.dismiss()
    path = _save(participant, participant.on_disk.folder)
    accuracy = result.get("test_accuracy")
    words = "" if accuracy is None else f", test accuracy {100 * accuracy:.2f} %"
    end = f"the server has stopped: {result['stopped']};" if "stopped" in result else "finished"
    print_header(
        [
            f"{end} after {result.get('rounds')} rounds{words}",
            f"sent {human_bytes(connection.sent)}, received {human_bytes(connection.received)}; model in {path}",
        ]
    )
    return result


def _work_for_root(config: ClientConfig, runtime: Runtime) -> None:
    """Train with rank 0 until it says that it is over."""
    federation: dict[str, Any] = from_root(runtime, {})
    _, training, _ = _prepare(config, settings_of(federation, config), runtime, federation)
    assert isinstance(training, MultiRankClient)
    training.follow()


def _prepare(
    config: ClientConfig, settings: Config, runtime: Runtime, federation: dict[str, Any]
) -> tuple[Dataset, ExampleTraining, Tensor]:
    """Load the data, and build the model as the server has built its own."""
    if config.own_data:  # all of it is for training: the server has images of its own to test with
        settings = replace(settings, data=replace(settings.data, val_fraction=0.0, train_examples=None))
    data = load_data(settings, runtime)
    parts = [torch.arange(len(data.train))] if config.own_data else client_parts(settings, data.train.labels)
    indices = parts[0 if config.own_data else int(federation["number"])]
    _check_size(settings, data, config.max_model_mb)
    precision = choose_precision(settings.local.precision, runtime.device)
    model = make_model(settings, settings.local.model, data, runtime.device, precision)
    engine = make_engine("torch", model, local_optimizer(settings.local.optimizer).make, precision, settings={})
    alone = local_training(settings, data.to(runtime.device), model, precision, lambda: None, engine)
    if runtime.world_size == 1:
        return data, alone, indices
    together = MultiRankClient(
        runtime,
        alone,
        indices,
        settings,
        exchange=config.exchange,
        uplink=config.inner_uplink,
        downlink=config.inner_downlink,
    )
    return data, together, indices


def _check_size(settings: Config, data: Dataset, limit_mb: float) -> None:
    """Refuse a model that is too large, before it has any memory.

    Raises:
        FieldError: It is.
    """
    name, size = settings.local.model, data.image_shape[1]
    with torch.device("meta"):
        model = build_network(settings, name, data)
    mb = 4 * Layout.of(model, "fp32").numel / 1e6
    if mb > limit_mb:
        raise FieldError("max_model_mb", limit_mb, f"{mb:.0f} or more for the server's model, {name} at {size}x{size}")


def _participant(
    config: ClientConfig, federation: dict[str, Any], settings: Config, client: Client, model: nn.Module, *, own: bool
) -> Participant:
    """Return this client's side of the federation.

    Args:
        config: The client's own settings.
        federation: The server's description of the federation, a note's fields by name.
        settings: The federation's settings, with this client's own.
        client: The client that trains, not seated yet.
        model: The module that it trains.
        own: Whether the user brought model and data, of which the server knows neither.
    """
    exchange, number = settings.exchange, int(federation["number"])
    check_frozen(frozen_checksums(model), federation.get("frozen", {}), "the server's")
    rule, has_feedback = feedback_rule(exchange.feedback), wants_feedback(exchange.feedback, exchange.uplink)
    on_disk = VersionsOnDisk(config.out or Path("clients") / str(number), number, has_feedback=has_feedback)
    layouts = round_settings(settings, model).uplink_layouts(model, feedback=has_feedback)
    return Participant(
        client.seated(number, layouts, on_disk.feedback, model=model, residual_memory=rule.memory),
        on_disk,
        run=federation["run"],
        uplink=exchange.uplink,
        has_own_data=config.own_data or own,
        has_start=exchange.start == "seed" and not own,
    )


def _save(participant: Participant, folder: Path) -> Path:
    """Write the model as the client holds it."""
    path = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    model = participant.client.training.model
    if participant.replica is not None:
        participant.layout.unflatten_(participant.replica, model)
    tensors = participant.layout.named_tensors(model)
    tensors |= {name: param.detach() for name, param in frozen_parameters(model).items()}
    replace_file(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    return path


# ---- what the server says --------------------------------------------------------------------------------------------


def _hear(connection: Connection, participant: Participant, message: Message, say: Say) -> dict[str, Any] | None:
    """Do what a message of the server asks; return its last words.

    Raises:
        Diverged: The model here is not the server's.
        FieldError: A message that this version does not know.
    """
    if message.frame.kind in (Kind.MODEL, Kind.CHANGE):
        participant.take(message)
        return None
    text = check_note(read_note(message), "welcome", "task", "finished")
    if text["kind"] == "welcome":
        connection.opened(text["session"])
        return None
    participant.arrive(text)
    if text["kind"] == "finished":
        return text
    _answer(connection, participant, message, text, say)
    return None


def _answer(connection: Connection, participant: Participant, message: Message, text: dict[str, Any], say: Say) -> None:
    began = time.perf_counter()
    answer = participant.answer(text, message.sequence)
    trained = time.perf_counter()
    try:
        connection.send(answer, timeout=float(text["timeout"]))
    except NotWanted as error:
        participant.undo()
        say(f"round {text['round'] + 1}: the server did not take the answer: {error}")
        return
    words = _outcome(answer)
    say(
        f"round {text['round'] + 1}: {words}, trained {human_seconds(trained - began)}, "
        f"sent {human_bytes(answer.nbytes)} in {human_seconds(time.perf_counter() - trained)}"
    )


def _outcome(answer: Message) -> str:
    frame = answer.frame
    if frame.kind == Kind.UPDATE:
        told = [] if math.isnan(frame.loss) else [f"loss {frame.loss:.3f}"]
        told += [] if math.isnan(frame.accuracy) else [f"accuracy {100 * frame.accuracy:.1f} %"]
        return ", ".join(told) or "update"
    return f"no update: {why_left_out(frame)}"
