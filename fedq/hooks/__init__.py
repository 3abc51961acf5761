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
from fedq.hooks.agreement import agreed
from fedq.hooks.deepspeed import without_deepspeed
from fedq.hooks.exchange import GatheredState, StepExchange
from fedq.hooks.grad_scale import GradScale
from fedq.hooks.powersgd import PowerSGDExchange
from fedq.hooks.powersgd_options import PowerSGDOptions, is_powersgd
from fedq.hooks.state import StepState
from fedq.layout import uncompiled_name
from fedq.phases import PhaseTimer

__all__ = [
    "GatheredState",
    "GradScale",
    "PowerSGDExchange",
    "StepExchange",
    "StepState",
    "check_step_codec",
    "check_step_spec",
    "compressed_mean_hook",
    "is_powersgd",
    "make_exchange",
    "register",
    "step_state",
]


def register(
    model: nn.parallel.DistributedDataParallel,
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
    """Replace a DDP model's all-reduce by the compressed mean; every rank calls it.

    The ranks compare their settings and models once, as `step_state` does.

    Args:
        model: The model as `DistributedDataParallel` returned it, on every rank.
        spec: Codec of the first leg, or ``powersgd:...``; see `step_state`, as for the rest.
        second: Codec of the second leg.
        feedback: Whether what is lost is added to the next step.
        schedule: Schedule by which messages travel between the ranks.
        ranks_per_node: Number of consecutive ranks that share a node.
        seed: Seed of rotation, index choice and rounding noise.
        grad_scaler: The scaler of float16 training.
        timer: Timer of what encoding, waiting and decoding take.

    Returns:
        The state: bytes sent, and residuals to be saved and restored.

    Raises:
        FieldError: Not a DDP model, or see `step_state`. A parameter that DDP does not average, because it was frozen
            or not there when DDP wrapped the model, is an error in the first step.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise FieldError("model", type(model).__name__, "a DistributedDataParallel model")
    state = step_state(
        model.module,
        spec,
        peers=Peers(_own_group(model.process_group)),
        second=second,
        feedback=feedback,
        schedule=schedule,
        ranks_per_node=ranks_per_node,
        seed=seed,
        grad_scaler=grad_scaler,
        timer=timer,
    )
    state.under_ddp({uncompiled_name(name) for name in model.parameters_to_ignore})
    try:
        model.register_comm_hook(state, compressed_mean_hook)
    except RuntimeError as error:
        raise FieldError("model", "a model with a communication hook", f"one without ({error})") from error
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
    spec: str | Codec = "int4",
    *,
    peers: Peers | None = None,
    second: str | Codec | None = None,
    feedback: bool | None = None,
    schedule: str = "auto",
    ranks_per_node: int = 1,
    seed: int = 0,
    grad_scaler: GradScale | None = None,
    timer: PhaseTimer | None = None,
) -> StepExchange:
    """Return what averages a module's gradients: in the codes of two legs, or by PowerSGD; every rank calls it.

    Parameters with at most one dimension travel as bfloat16 in the same messages; under a cast (``fp32``, ``fp16``,
    ``bf16``) everything travels in that type. The ranks compare settings, names, shapes and values of the parameters
    once, so that they neither train apart nor wait for each other in vain.

    Args:
        module: The module, without DDP around it, whole on every rank; or a DeepSpeed engine at ZeRO stage 0, whose own
            all-reduce is then switched off.
        spec: Codec of the first leg, of fixed payload size; or ``powersgd:rank=2,start=10``, which has no use for
            ``second``, ``feedback`` (it is always on), ``schedule`` and ``ranks_per_node``.
        peers: The ranks that take part; default: all.
        second: Codec of the second leg; default: the same.
        feedback: Whether what is lost is added to the next step; default: if the codec loses more than a cast does.
        schedule: Schedule as for `fedq.collectives.compressed_mean`; ``auto`` decides once, for the whole model.
        ranks_per_node: Number of consecutive ranks that share a node.
        seed: Seed of rotation, index choice and rounding noise; the same on all ranks.
        grad_scaler: The scaler of float16 training, so that residuals are kept unscaled; or a function that returns
            the factor by which gradients are scaled now. Default: DeepSpeed's own, if the module is its engine.
        timer: Timer of what encoding, waiting and decoding take; default: one of its own.

    Raises:
        FieldError: A codec, schedule or option that cannot be used, on whatever rank; ranks that differ, with the
            values of each; parameters that are sharded over ranks (FSDP, tensor parallel, ZeRO), without values yet,
            or with sparse gradients. The error is the same on every rank.
    """
    peers = Peers() if peers is None else peers

    def make() -> StepExchange:
        plain, scale = without_deepspeed(module)
        return make_exchange(
            plain,
            peers,
            spec,
            second=second,
            feedback=feedback,
            schedule=schedule,
            ranks_per_node=ranks_per_node,
            seed=seed,
            grad_scaler=scale if grad_scaler is None else grad_scaler,
            timer=timer,
        )

    return agreed(peers, make, lambda exchange: (exchange.settings(), exchange.parameters.by_name))


def make_exchange(
    module: nn.Module,
    peers: Peers,
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
    """Return what `step_state` does without asking other ranks: for planning, where it is never run.

    Raises:
        FieldError: See `step_state`.
    """
    common: Any = {"seed": seed, "grad_scaler": grad_scaler, "timer": timer}
    if not is_powersgd(spec):
        return StepState(
            module,
            peers,
            spec,
            second=second,
            feedback=feedback,
            schedule=schedule,
            ranks_per_node=ranks_per_node,
            **common,
        )
    given = (
        ("second", second, None, "no codec for the second leg under powersgd: Q travels there, in float32"),
        ("feedback", feedback is not False, True, "true under powersgd: without feedback it does not converge"),
        ("schedule", schedule, "auto", "auto under powersgd: P and Q are summed on the way"),
    )
    for field, value, default, allowed in given:
        if value != default:
            raise FieldError(field, value, allowed)
    return PowerSGDExchange(module, peers, PowerSGDOptions.parse(str(spec)), **common)


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
