"""Federated rounds in which clients have models of their own, each tested on its client's classes.

The rounds, and all that travels, are those of every federated job; only how a client trains differs, and what is
tested.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

from torch import nn

from fedq.federated.rounds import Rounds
from fedq.federated.training import RoundContext
from fedq.feedback import ResidualStore
from fedq.layout import Layout, frozen_parameters
from fedq.personalize.distilled import Distillation, Mutual, QuPeD, QuPeL
from fedq.personalize.meta import PerFedAvg, PFedMe
from fedq.personalize.methods import GlobalModel, Local, Method
from fedq.personalize.own_models import Network, OwnModels
from fedq.personalize.settings import SHARED, parse_client_bits, parse_client_models
from fedq.trainers.build import build_rounds, residual_store, round_settings
from fedq.trainers.job import GIB, Job, make_model
from fedq.trainers.loop import Log, Ran, run_to_the_end
from fedq.trainers.personal.first_weights import load_weights
from fedq.trainers.personal.quantization import make_quantization, starts_at_one
from fedq.trainers.personal.scores import PersonalScores
from fedq.trainers.personal.state import PersonalState
from fedq.trainers.records import finish, is_lost, log_round, report_left_out
from fedq.trainers.state import Progress


def run_personal(job: Job) -> dict[str, Any]:
    """Run rounds with a personalised method, a checkpoint after each, and write every client's results.

    `test_accuracy` is the mean over clients, each with the model that was best on its own validation data.
    `model.safetensors` is the global model, or client 0's where there is none; `personal/` has the clients'.
    """
    personal = job.config.personal
    if personal.warm_start is not None:
        load_weights(personal.warm_start, job.model)
    method = make_method(job)
    settings = round_settings(job.config, job.model, sends=method.sends)
    residuals = residual_store(job, settings)
    rounds = build_rounds(job, settings, residuals, None if method.is_shared else method.training_of)
    test = PersonalScores(job, method, rounds, _store(job, "best"))
    state = PersonalState(job, rounds, Progress(), residuals, test)
    if not (job.config.run.resume and state.go_on()):
        rounds.share_start(job.model)
    results = run_to_the_end(
        job, state, lambda number: _run_round(job, rounds, state, test, number), measure=test.measure
    )
    test.save_models()
    accuracies = test.test_accuracies
    return finish(
        replace(job, model=_final_model(job, rounds, test)),
        feedback=residuals is not None,
        root_ingress_bytes=job.transport.received,
        algorithm=personal.algorithm,
        client_test_accuracy=accuracies,
        client_last_test_accuracy=test.last_test_accuracies,
        personal_test_accuracy=_spread(accuracies),
        **results,
    )


def make_method(job: Job) -> Method:
    """Return the method that the settings name, with this rank's part of the clients' own models."""
    personal, local = job.config.personal, job.config.local
    models, rate = _own_models(job), local.lr if personal.personal_lr is None else personal.personal_lr
    training, ratio = job.training, rate / local.lr
    distillation = Distillation(personal.distill_weight, personal.temperature)
    if personal.algorithm in SHARED:
        return GlobalModel(training, models)
    if personal.algorithm == "local":
        return Local(training, models, ratio)
    if personal.algorithm == "perfedavg":
        return PerFedAvg(training, models, rate, personal.personal_steps)
    if personal.algorithm == "pfedme":
        return PFedMe(training, models, rate, personal.personal_steps, personal.attachment)
    if personal.algorithm == "mutual":
        return Mutual(training, models, ratio, distillation)
    if personal.algorithm == "qupel":
        return QuPeL(training, models, ratio, personal.distill_weight, make_quantization(job))
    return QuPeD(training, models, ratio, distillation, make_quantization(job), personal.global_loss)


def _own_models(job: Job) -> OwnModels:
    personal, num_clients = job.config.personal, len(job.parts)
    names = parse_client_models(personal.client_models, job.config.local.model, num_clients)
    networks = {name: _network(job, name) for name in dict.fromkeys(names)}
    bits = parse_client_bits(personal.client_bits, num_clients)
    at_one = {name: starts_at_one(job, network.module) for name, network in networks.items()}
    return OwnModels([networks[n] for n in names], bits, _store(job, "own"), [at_one[n] for n in names])


def _network(job: Job, name: str) -> Network:
    """Return an architecture; a client's first model of `--model` is what it downloads first."""
    if job.config.personal.algorithm in SHARED:
        return Network(name, job.model, job.training.layout)
    module = make_model(job.config, name, job.dataset, job.runtime.device, job.training.precision)
    layout = Layout.of(module, "fp32")
    if name != job.config.local.model:
        return Network(name, module, layout, layout.flatten(module))
    shared = frozen_parameters(job.model)  # no part of what is downloaded
    for frozen, param in frozen_parameters(module).items():
        param.data.copy_(shared[frozen])
    return Network(name, module, layout)


def _store(job: Job, name: str) -> ResidualStore:
    """Return this rank's part of one of two kinds of models, in half of the memory that there is for clients' state."""
    return ResidualStore(int(job.config.run.memory_limit_gib * GIB) // 2, job.path / "personal" / name)


def _run_round(job: Job, rounds: Rounds, state: PersonalState, test: PersonalScores, number: int) -> Ran:
    test.method.round = number
    result = rounds.run(RoundContext(number, state.lr(number), job.config.run.seed))
    state.note(result)
    state.so_far.left_out += report_left_out(number, result)
    log: Log = lambda metrics: log_round(job, number, result, metrics, test.val_accuracies(number))  # noqa: E731
    return Ran(log, is_lost(job, number, result))


def _final_model(job: Job, rounds: Rounds, test: PersonalScores) -> nn.Module:
    """Return what `model.safetensors` holds, on rank 0."""
    if not test.method.sends and job.is_root:
        return test.fill_best(0).module
    job.training.layout.unflatten_(rounds.replica, job.model)
    return job.model


def _spread(accuracies: list[float]) -> dict[str, float]:
    """Return mean, standard deviation, least and largest of the clients' accuracies, of those that are known."""
    known = [accuracy for accuracy in accuracies if not math.isnan(accuracy)] or [math.nan]
    sd = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": statistics.fmean(known), "sd": sd, "min": min(known), "max": max(known)}
