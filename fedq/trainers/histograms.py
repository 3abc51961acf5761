"""Histograms of weights and updates, before and after coding, for one client of some rounds."""

from __future__ import annotations

from torch import Tensor

from fedq.federated.client import Client
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext
from fedq.lowbit import few_bit_layers
from fedq.trainers.job import Job
from fedq.wire import Frame, Kind, split_body


class HistogramLog(Part):
    """Writes the histograms of a round's first client on rank 0, in the first, the last and every n-th round.

    Args:
        job: Job whose settings say how often, and whose folder takes the histograms.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_round = -1

    def after_encoding(self, context: RoundContext, client: Client, update: Tensor, frame: Frame) -> None:
        """Take one update; the job's model still holds the weights that the client trained."""
        if not self._job.is_root or frame.kind != Kind.UPDATE or not self._is_due(context.round):
            return
        assert client.layouts is not None
        self._last_round = context.round
        weights = self._job.training.layout.tensors(self._job.model)
        layout = client.layouts.at(context.round)
        few_bit = {f"{name}.weight": chosen for name, chosen in few_bit_layers(self._job.model).items()}
        datas = split_body(layout, frame.body)
        for (span, payload), weight in zip(layout.payloads(datas, seed=frame.seed), weights, strict=True):
            if span.role != "coded":
                continue
            stages = {"weight": weight, "update": update[span.slice], "decoded": payload.decode()}
            if span.name in few_bit:
                stages["deployed"] = few_bit[span.name].quantize(weight.contiguous())
            codes = span.codec.codes(payload)
            if codes is not None:
                stages["codes"] = codes
            for stage, values in stages.items():
                self._job.folder.log_histogram(context.round, client.number, span.name, stage, values)

    def _is_due(self, round: int) -> bool:
        run = self._job.config.run
        if round == self._last_round:
            return False
        return round in (0, run.rounds - 1) or (run.histogram_every > 0 and round % run.histogram_every == 0)
