"""FedAvg as one writes it by hand: a model, a loop over clients, one all-reduce a round. No fedq but the network.

    torchrun --nproc-per-node 2 benchmarks/rivals/plain_loop.py --task DIR --report FILE

The floor that the engines are compared with: no bookkeeping, no checkpoints, no metrics, nothing compressed.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from task import Report, Task, arguments
from torch import Tensor, nn
from torch.nn import functional


def train(task: Task, model: nn.Module, client: int, seed: int, bf16: bool) -> int:
    """Train one epoch on a client's images, in an order that follows from the seed; return how many there are."""
    share = task.shares[client]
    order = share[torch.randperm(len(share), generator=torch.Generator().manual_seed(seed))]
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    channels_last = next(p for p in model.parameters() if p.dim() == 4).is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for picked in order.split(task.batch_size):
        x = task.normalize(task.images[picked]).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            logits = model(x)
        loss = functional.cross_entropy(logits.float(), task.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(share)


@torch.no_grad()
def run_round(task: Task, model: nn.Module, state: list[Tensor], round: int, rank: int, ranks: int, bf16: bool) -> None:
    """Train this rank's clients from the same start and replace the model by the weighted mean of what they made."""
    start = [tensor.clone() for tensor in state]
    total = torch.zeros(1 + sum(tensor.numel() for tensor in state))
    sums = [part.view(t.shape) for part, t in zip(total[1:].split([t.numel() for t in state]), state, strict=True)]
    for client, seed in list(zip(task.cohorts[round], task.seeds[round], strict=True))[rank::ranks]:
        torch._foreach_copy_(state, start)
        with torch.enable_grad():
            weight = train(task, model, client, seed, bf16)
        torch._foreach_add_(sums, torch._foreach_sub(state, start), alpha=weight)
        total[0] += weight
    if ranks > 1:
        dist.all_reduce(total)
    torch._foreach_copy_(state, start)
    torch._foreach_add_(state, torch._foreach_div(sums, float(total[0])))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.world_size > 1:
        dist.init_process_group("gloo")
    task, report = Task.load(args.task), Report(args.report)
    model = task.build(args.memory_format).train()
    state = [p.detach() for p in model.parameters()] + [b for b in model.buffers() if b.is_floating_point()]
    for round in range(task.num_rounds):
        run_round(task, model, state, round, args.rank, args.world_size, args.bf16)
        report.round_done()
    if args.rank == 0:
        torch.save(model.state_dict(), args.report.with_suffix(".pt"))
        moved = 8 * (args.world_size - 1) * (1 + sum(t.numel() for t in state))  # every float to and from each other
        report.write(accuracy=task.accuracy(model), mb_a_round=moved / 1e6, versions={"torch": torch.__version__})
    if args.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
