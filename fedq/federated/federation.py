"""The front door: somebody's own model, data and training function, trained on many clients in rounds.

Nothing here knows images, labels or flags. `train.py`, `fedq server` and sites have settings of their own, and put
their rounds together by the same `fedq.federated.assembly`.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedq.checkpoint import CheckpointError, Checkpoints
from fedq.collectives import Transport
from fedq.errors import FieldError
from fedq.federated.assembly import RoundSettings, Seats, make_rounds, over_ranks
from fedq.federated.client_states import ClientStates
from fedq.federated.delivery import Delivery
from fedq.federated.given import (
    Clients,
    checked_callbacks,
    checked_metrics,
    counted_clients,
    place_among_ranks,
    trained_module,
)
from fedq.federated.own_evaluation import Evaluate, OwnEvaluation
from fedq.federated.parts import Part
from fedq.federated.plain_bytes import from_bytes, to_bytes
from fedq.federated.record import Record
from fedq.federated.results import RoundResult, Summary
from fedq.federated.rounds import Outcome, Rounds
from fedq.federated.rounds_state import RoundsState
from fedq.federated.training import RoundContext
from fedq.federated.training_means import TrainingMeans, mean_loss
from fedq.federated.versions import Versions
from fedq.feedback import ResidualStore
from fedq.kernels import derive_seed
from fedq.layout import Layout, uncompiled_name
from fedq.ledger import Ledger
from fedq.metrics import Metric
from fedq.runfolder import write_model
from fedq.runtime import on_root

LearningRate = float | Callable[[int], float]
_SECONDS = struct.Struct("<d")


class Federation:
    """Trains one model on many clients in rounds.

    Every rank makes the same federation and calls ``train`` of its own clients only (client number modulo ranks);
    rank 0's weights are everybody's first ones. Started by ``python`` there is one rank; under ``torchrun``, ``srun``
    and ``accelerate launch`` the process group is opened from the launcher's environment, and closed by `close`; a
    default group that exists is used and left alone.

    >>> fed = Federation(model, [Client(train_on(shard), num_examples=len(shard)) for shard in shards], uplink="int4")
    >>> for result in fed.rounds(10, lr=0.05):
    ...     print(result)

    ``callbacks`` may have ``on_start(fed)``, ``on_round(fed, result)`` and ``on_end(fed, summary)``; a function is an
    ``on_round``. They are called on every rank. If ``on_round`` returns True on rank 0, the training stops there.

    Args:
        model: Module that is trained in place; it holds the newest model between rounds. What travels is its trained
            parameters and its float statistics. DDP's wrapper is taken off; a compiled model stays compiled.
        clients: All clients; a function from a number to the client, which is called for those of this rank when they
            are first needed; or how many there are, where they come across a network (`fedq.network.serve`).
        num_clients: Number of clients, where ``clients`` is a function.
        uplink: Codec of the clients' updates: ``int4``, ``sign``, ``"int4 sign@7"``, or any of `fedq.codec_names`.
        downlink: Codec of the server's change to the model.
        server: The server's optimizer: ``fedavg``, ``fedadam:lr=0.01``, or one of torch's.
        cohort: Clients a round; default: all.
        feedback: Whether clients keep what their codec loses: ``on``, ``off``, or ``auto``: where it loses more than a
            cast does.
        aggregate: Who averages: ``rooted`` (rank 0), or ``two_phase`` (every rank the tensors that it owns).
        min_cohort: Fewest usable updates a round needs; with fewer the model stays as it is.
        max_update_norm: Limit of an update's norm, as a multiple of the round's median; default: none.
        evaluate: ``evaluate(model)`` returns a number or numbers by name, on rank 0, without gradients, in eval mode.
            One that also names ``rank`` and ``ranks`` is called on every rank, and returns a pair (sum, count) by name.
        metrics: What is measured, with its unit and which way is better; the first one decides what is best.
        callbacks: Functions or objects, as above, that are told of the start, every round and the end.
        parts: What takes part in every round; see `fedq.federated.parts.Part`.
        seed: Seed of everything random.
        out: The run's folder, with configuration, metrics, ledger, model and checkpoints; default: nothing is written.
        resume: Go on with the run in ``out``, if it has finished a round.

    Raises:
        FieldError: An argument cannot be used; raised on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Clients,
        *,
        num_clients: int | None = None,
        uplink: str = "int4",
        downlink: str = "int8",
        server: str = "fedavg",
        cohort: int | None = None,
        feedback: str = "auto",
        aggregate: str = "rooted",
        min_cohort: int = 1,
        max_update_norm: float | None = None,
        evaluate: Evaluate | None = None,
        metrics: Sequence[Metric] = (Metric("loss"),),
        callbacks: Sequence[Any] = (),
        parts: Iterable[Part] = (),
        seed: int = 0,
        out: Path | str | None = None,
        resume: bool = False,
    ) -> None:
        self._make, self.num_clients, self._own_codecs = counted_clients(clients, num_clients)
        self.settings = RoundSettings(
            uplink=uplink,
            downlink=downlink,
            server=server,
            cohort=cohort,
            feedback=feedback,  # type: ignore[arg-type]
            aggregate=aggregate,  # type: ignore[arg-type]
            min_cohort=min_cohort,
            norm_limit="none" if max_update_norm is None else f"clip:{max_update_norm:g}",
        )
        self.settings.check(self.num_clients)
        for number, own in enumerate(clients if isinstance(clients, Sequence) else ()):
            self.settings.check_own(number, own.uplink)
        if resume and out is None:
            raise FieldError("out", out, "the run's folder, with resume=True")
        self.model = trained_module(model)
        self.metrics = checked_metrics(metrics)
        self.seed = seed
        self.callbacks = checked_callbacks(callbacks)
        self.ledger = Ledger()
        self._evaluate = evaluate
        self._evaluation: OwnEvaluation | None = None
        self._parts = tuple(parts)
        self._open = ExitStack()
        self._rounds: Rounds | None = None
        try:
            self._set_up(None if out is None else Path(out), resume)
        except BaseException:
            self.close()
            raise

    def _set_up(self, out: Path | None, resume: bool) -> None:
        self._layout = Layout.of(self.model, "fp32")
        device = next(self.model.parameters()).device
        self.runtime = place_among_ranks(self._open, device)
        self.transport = Transport(device)
        if self._evaluate is not None:
            self._evaluation = OwnEvaluation(self._evaluate, self.metrics[0].name, self.transport)
        self._record = Record(out, self.metrics)
        on_root(self.runtime, lambda: self._record.open(resume=resume))
        self._open.callback(self._record.close)
        self._resumes = resume
        self._states = ClientStates(None if out is None else out / "states")
        self._means = TrainingMeans(self._states)
        self._num_rounds = 0
        if self._make is not None:
            self._deliver_by_ranks()

    # ---- a training --------------------------------------------------------------------------------------------------

    def rounds(self, num: int, lr: LearningRate) -> Iterator[RoundResult]:
        """Run rounds until there have been so many, those before a resume and in earlier calls included.

        Args:
            num: Rounds in all.
            lr: Local learning rate, or a function from the round's number to it.

        Yields:
            Each round's result, the same on every rank, once it is on disk.
        """
        rate = lr if callable(lr) else lambda number: lr
        if self._num_rounds >= num:
            self.save()  # a process that ended after its last checkpoint has left no summary
            return
        self._record.describe(self._description(num))
        self._tell("on_start", self)
        is_stopped = False
        while self._num_rounds < num and not is_stopped:
            result, is_stopped = self._run_round(rate(self._num_rounds))
            is_last = is_stopped or self._num_rounds >= num
            if is_last:
                self.save()
            yield result
        self._tell("on_end", self, self.summary())

    def run(self, num: int, lr: LearningRate) -> Summary:
        """Run rounds as `rounds` does, and return what they have come to."""
        for _ in self.rounds(num, lr):
            pass
        return self.summary()

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model as it is; the same numbers on every rank.

        Raises:
            FieldError: No evaluation function was given, or it has returned no numbers.
        """
        if self._evaluation is None:
            raise FieldError("evaluate", None, "a function of the model, given when the federation is made")
        values, nbytes = self._evaluation.run(self.model, derive_seed(self.seed, "evaluate"))
        self._book(nbytes)
        return values

    def summary(self) -> Summary:
        """Return what the rounds so far have come to."""
        return self._record.total

    def save(self, path: Path | str | None = None) -> None:
        """Write the model as it is, on rank 0, and in the run's folder what `fedq report` reads.

        Args:
            path: A safetensors file to write instead.
        """
        if not self.runtime.is_root:
            return
        state = self.model.state_dict().items()
        tensors = {uncompiled_name(name): tensor for name, tensor in state if isinstance(tensor, Tensor)}
        if path is not None:
            write_model(Path(path), tensors)
        else:
            self._record.write(self.ledger, tensors, self._description(self._num_rounds), self._place())

    def close(self) -> None:
        """Close the run's folder, and the process group if it was opened here; calling it twice is harmless."""
        self._open.close()

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, the one that prints."""
        return self.runtime.is_root

    @property
    def replica(self) -> Tensor:
        """The model that everybody holds, flat float32; updated in place."""
        return self._ready().replica

    @property
    def has_clients(self) -> bool:
        """Whether its clients are here, and not somewhere across a network."""
        return self._make is not None

    @property
    def path(self) -> Path | None:
        """The run's folder."""
        return self._record.path

    # ---- one round ---------------------------------------------------------------------------------------------------

    def _run_round(self, lr: float) -> tuple[RoundResult, bool]:
        """Run a round; return what it has come to, and whether the callbacks want no more."""
        began, number, ledger = time.perf_counter(), self._num_rounds, self.ledger
        before = {direction: ledger.totals(direction) for direction in ("uplink", "downlink")}
        rounds = self._ready()
        self._means.clear()
        outcome = rounds.run(RoundContext(number, lr, self.seed))
        self._layout.unflatten_(rounds.replica, self.model)
        values = self.evaluate() if self._evaluation is not None else {}
        means, kept = self._gather_means(outcome)
        result = None
        if self.runtime.is_root:
            spent = {
                f"{direction}_{name}": getattr(ledger.totals(direction), kind) - getattr(totals, kind)
                for direction, totals in before.items()
                for name, kind in (("bytes", "payload"), ("bytes_fp32", "raw"))
            }
            metrics = {f"train_{name}": value for name, value in means.items()}
            metrics |= {f"val_{name}": value for name, value in values.items()}
            used = [frame.client for _, frame in outcome.frames if frame.client not in outcome.left_out]
            result = RoundResult(
                number,
                mean_loss(outcome),
                metrics,
                tuple(used),
                outcome.left_out,
                outcome.clipped,
                seconds=time.perf_counter() - began,
                **spent,
            )
        result = self._shared(result)
        self._num_rounds = number + 1
        self._record.add(result, lr, outcome, ledger, self.transport.received)
        is_stopped = self._wants_end(result)  # whose bytes belong to the round
        self._checkpoint(kept)
        return result, is_stopped

    def _shared(self, result: RoundResult | None) -> RoundResult:
        """Return rank 0's result on every rank; in as many bytes however long it took."""
        message = None
        if result is not None:
            rest = json.dumps({**result.as_dict(), "seconds": 0}).encode()
            message = torch.frombuffer(bytearray(_SECONDS.pack(result.seconds) + rest), dtype=torch.uint8)
        told, moved = self.transport.broadcast(message)
        self._book(moved.payload + moved.sizes)
        data = told.cpu().numpy().tobytes()
        values = json.loads(data[_SECONDS.size :])
        return RoundResult.from_dict(values | {"seconds": _SECONDS.unpack_from(data)[0]})

    def _gather_means(self, outcome: Outcome) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Return on rank 0 the means of what clients have measured, over examples, and whose files have changed."""
        changed = {"states": sorted(self._means.kept), "residuals": sorted(self._means.remembered)}
        counts = [1] * self.transport.world_size
        gathered, moved = self.transport.gather([to_bytes([self._means.told, changed])], counts)
        self._book(moved.payload + moved.sizes)
        told: dict[int, dict[str, float]] = {}
        kept: dict[str, list[int]] = {"states": [], "residuals": []}
        for (message,) in gathered:
            measured, changed = from_bytes(message)
            told |= {int(client): values for client, values in measured.items()}
            for name, owners in changed.items():
                kept[name] += owners
        weights = {f.client: f.weight for _, f in outcome.frames if f.client not in outcome.left_out}
        sums: dict[str, list[float]] = {}
        for client in sorted(told.keys() & weights.keys()):
            for name, value in told[client].items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += value * weights[client]
                total[1] += weights[client]
        return {name: total / weight for name, (total, weight) in sums.items()}, kept

    def _checkpoint(self, kept: Mapping[str, Iterable[int]]) -> None:
        if self._record.checkpoints is None:
            return
        for name, owners in kept.items():
            self._state.files[name].note(owners)
        self._state.save(self._num_rounds, self._record.checkpoints, self._state_dict)

    def _state_dict(self) -> dict[str, Any]:
        return {**self._state.state_dict(), "federation": self._identity(), "record": self._record.state_dict()}

    def _wants_end(self, result: RoundResult) -> bool:
        """Tell the callbacks of a round; return whether rank 0's want to stop, on every rank."""
        wants_end = any(isinstance(told, bool | np.bool_) and told for told in self._tell("on_round", self, result))
        answers, moved = self.transport.all_gather(torch.tensor([float(wants_end)]))  # rank 0 alone may have callbacks
        self._book(moved.payload)
        return bool(answers.flatten()[0])

    def _tell(self, moment: str, *what: Any) -> list[Any]:
        told = []
        for callback in self.callbacks:
            method = getattr(callback, moment, None)
            if method is None and moment == "on_round" and callable(callback):
                method = callback
            if method is not None:
                told.append(method(*what))
        return told

    def _book(self, nbytes: int) -> None:
        """Book what crossed between ranks for no client."""
        self._ready().delivery.note_peer(self._num_rounds, nbytes)

    # ---- who delivers ------------------------------------------------------------------------------------------------

    def _deliver_by_ranks(self) -> None:
        assert self._make is not None
        path = self._record.path
        store = ResidualStore(folder=None if path is None else path / "residuals")
        seats = Seats(self.num_clients, self._make, self.model, self.settings, store, self._states.follow)
        delivery = over_ranks(
            self.model, self.settings, seats, self.transport, self.ledger, sticky=True, own_codecs=self._own_codecs
        )
        self.deliver_by(delivery, store)

    def deliver_by(self, delivery: Delivery, store: ResidualStore | None = None, parts: Iterable[Part] = ()) -> int:
        """Begin, or go on, with what brings tasks to clients and their answers back.

        Args:
            delivery: What brings tasks to clients and their answers back.
            store: Residuals of this rank's clients; None: none is kept here.
            parts: What takes part in rounds beside the federation's own parts.

        Returns:
            Number of rounds that were run before.

        Raises:
            FieldError: The run in the folder cannot be gone on with, or the ranks' models do not agree.
        """
        parts = [self._means, *self._parts, *parts]
        rounds = make_rounds(self.model, self.settings, delivery, parts=parts, transport=self.transport)
        self._rounds = rounds
        path = self._record.path or Path()
        files = {"residuals": Versions(store), "states": Versions(self._states)}
        self._state = RoundsState(rounds, self.model, self.transport, self.ledger, path, files)
        checkpoints = self._record.checkpoints
        if self._resumes and checkpoints is not None and checkpoints.numbers():
            self._compare(checkpoints)
            loaded, damaged = checkpoints.newest_whole(self._state.check)
            self._state.load_state_dict(loaded.state)
            self._num_rounds = loaded.number
            self._record.load_state_dict(loaded.state["record"])
            for number in damaged if self.runtime.is_root else ():
                checkpoints.set_aside(number)
        else:
            self._record.begin()
            rounds.share_start(self.model)
        self._layout.unflatten_(rounds.replica, self.model)
        return self._num_rounds

    def _compare(self, checkpoints: Checkpoints) -> None:
        """Compare the settings with those of the run that is resumed, as its newest readable checkpoint has them.

        Raises:
            FieldError: The settings differ, or the folder holds a run of another kind.
        """
        before: dict[str, Any] | None = {}
        for number in reversed(checkpoints.numbers()):
            with suppress(CheckpointError):
                before = checkpoints.load_part(number, "federation")
                break
        if before is None:
            raise FieldError("resume", str(self.path), "the folder of a run of fedq.Federation")
        for name, value in self._identity().items() if before else ():
            if before[name] == value:
                continue
            if isinstance(value, dict):
                name, value, was = _first_difference(value, before[name])
                raise FieldError(name, value, f"{was}, as in the run that is resumed")
            raise FieldError(name, value, f"{before[name]!r}, as in the run that is resumed")

    def _ready(self) -> Rounds:
        if self._rounds is None:
            raise FieldError("clients", self.num_clients, "served by fedq.network.serve, where they are a number")
        return self._rounds

    # ---- what it is --------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed."""
        chosen = self.settings
        shapes = {span.name: list(span.shape) for span in self._layout.spans}
        return {
            "num_clients": self.num_clients,
            "uplink": chosen.uplink,
            "downlink": chosen.downlink,
            "server": chosen.server,
            "cohort": chosen.cohort,
            "feedback": chosen.feedback,
            "seed": self.seed,
            "model": shapes,
        }

    def _description(self, num_rounds: int) -> dict[str, Any]:
        """Return the settings, as a run's folder has them."""
        chosen, path = self.settings, self._record.path
        run = {"rounds": num_rounds, "seed": self.seed, "out": None if path is None else str(path)}
        members = {
            "num_clients": self.num_clients,
            "cohort": chosen.cohort,
            "min_cohort": chosen.min_cohort,
            "norm_limit": chosen.norm_limit,
        }
        exchange = {name: getattr(chosen, name) for name in ("uplink", "downlink", "server", "feedback", "aggregate")}
        return {"clients": members, "exchange": {"exchange": "round", **exchange}, "run": run}

    def _place(self) -> dict[str, Any]:
        runtime = self.runtime
        return {
            "model": type(self.model).__name__,
            "num_params": self._layout.num_params,
            "world_size": runtime.world_size,
            "launcher": runtime.launcher,
            "backend": runtime.backend,
            "device": self.transport.device.type,
            "root_ingress_bytes": self.transport.received,
        }


def _first_difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the first name whose values differ, and both in words."""
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    one, other = (f"shape {shapes[name]}" if name in shapes else "not there" for shapes in (now, before))
    return name, one, other
