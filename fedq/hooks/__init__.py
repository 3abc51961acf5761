"""A DDP communication hook: each gradient bucket is averaged in few bits while the backward pass goes on.

    state = fedq.hooks.register(ddp_model, "int4")

Residuals belong to parameters, not to buckets, so DDP may rebuild its buckets. On Gloo one worker thread takes the
buckets in the order in which DDP hands them out, the same on every rank; on NCCL a stream of its own does. Without
DDP, ``state = fedq.hooks.step_state(module)`` and ``state.average_gradients()`` between backward and step do the same.

(No postponed annotations here: DDP compares those of its hook with types.)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from fedq.codecs import Codec, codec
from fedq.collectives.peers import Peers
from fedq.collectives.segments import check_fixed_size
from fedq.errors import FieldError
from fedq.hooks.exchange import GradScale, StepExchange
from fedq.hooks.powersgd import PowerSGDExchange
from fedq.hooks.powersgd_options import PowerSGDOptions, is_powersgd
from fedq.hooks.state import StepState
from fedq.phases import PhaseTimer

__all__ = [
    "PowerSGDExchange",
    "StepExchange",
    "StepState",
    "check_step_codec",
    "check_step_spec",
    "compressed_mean_hook",
    "is_powersgd",
    "register",
    "step_state",
]


def register(model: nn.parallel.DistributedDataParallel, spec: str | Codec = "int4", **options: Any) -> StepExchange:
    """Replace a DDP model's all-reduce by the compressed mean.

    Args:
        model: As `DistributedDataParallel` returned it, on every rank.
        spec: What travels; see `step_state`.
        options: Of `step_state`.

    Returns:
        The state: bytes sent, and residuals to be saved and restored.

    Raises:
        FieldError: Not a DDP model, or a codec or schedule that cannot be used.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise FieldError("model", type(model).__name__, "a DistributedDataParallel model")
    state = step_state(model.module, Peers(_own_group(model.process_group)), spec, **options)
    model.register_comm_hook(state, compressed_mean_hook)
    return state


def _own_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks for the worker thread alone.

    Gloo pairs collectives by the order in which a rank starts them, and DDP starts some of its own while the thread is
    at work (``find_unused_parameters``). On NCCL there is no thread.
    """
    if dist.get_backend(group) != "gloo" or group.size() == 1:
        return group
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    ranks = dist.get_process_group_ranks(group)
    own = dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup), "this rank is a member"
    return own


def step_state(
    module: nn.Module,
    peers: Peers | None = None,
    spec: str | Codec = "int4",
    *,
    second: str | Codec | None = None,
    feedback: bool | None = None,
    schedule: str = "auto",
    ranks_per_node: int = 1,
    seed: int = 0,
    grad_scaler: GradScale | None = None,
    timer: PhaseTimer | None = None,
) -> StepExchange:
    """Return what averages a module's gradients: in the codes of two legs, or by PowerSGD.

    Parameters with at most one dimension travel as bfloat16 in the same messages; under a cast (``fp32``, ``fp16``,
    ``bf16``) everything travels in that type.

    Args:
        module: The module, without DDP around it.
        peers: The ranks that take part; default: all.
        spec: Codec of the first leg, of fixed payload size; or ``powersgd:rank=2,start=10``, which has no use for
            ``second``, ``feedback`` (it is always on), ``schedule`` and ``ranks_per_node``.
        second: Codec of the second leg; default: the same.
        feedback: Whether what is lost is added to the next step; default: if the codec loses more than a cast does.
        schedule: See `fedq.collectives.compressed_mean`; ``auto`` decides once, for the whole model.
        ranks_per_node: Consecutive ranks that share a node.
        seed: Of rotation, index choice and rounding noise; the same on all ranks.
        grad_scaler: The scaler of float16 training, so that residuals are kept unscaled; or a function that returns
            the factor by which gradients are scaled now.
        timer: Told what encoding, waiting and decoding take; default: one of its own.

    Raises:
        FieldError: A codec, schedule or option that cannot be used.
    """
    peers = Peers() if peers is None else peers
    if not is_powersgd(spec):
        return StepState(
            module,
            peers,
            spec,
            second=second,
            feedback=feedback,
            schedule=schedule,
            ranks_per_node=ranks_per_node,
            seed=seed,
            grad_scaler=grad_scaler,
            timer=timer,
        )
    given = (
        ("second", second, None, "no codec for the second leg under powersgd: Q travels there, in float32"),
        ("feedback", feedback is not False, True, "true under powersgd: without feedback it does not converge"),
        ("schedule", schedule, "auto", "auto under powersgd: P and Q are summed on the way"),
    )
    for field, value, default, allowed in given:
        if value != default:
            raise FieldError(field, value, allowed)
    options = PowerSGDOptions.parse(str(spec))
    return PowerSGDExchange(module, peers, options, seed=seed, grad_scaler=grad_scaler, timer=timer)


def compressed_mean_hook(state: StepExchange, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average one bucket; the DDP communication hook that `register` registers."""
    return state.average(bucket)


def check_step_codec(spec: str) -> None:
    """Refuse what no leg of gradients can travel as.

    Raises:
        FieldError: No codec, or one whose payload size depends on the values.
    """
    check_fixed_size(codec(spec), spec)


def check_step_spec(spec: str) -> None:
    """Refuse what `register` does not take as its ``spec``.

    Raises:
        FieldError: Neither PowerSGD with options that it has, nor a codec of fixed payload size.
    """
    if is_powersgd(spec):
        PowerSGDOptions.parse(spec)
    else:
        check_step_codec(spec)
