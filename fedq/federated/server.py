"""The server's state: the master, what steps it, and the change that brings everybody's replica to it.

The master is exact (float32) and the server's alone; the replica is what every participant holds. The server sends
``C(master - replica)``, so whatever the downlink's codec loses stays in that difference and is sent later: the
downlink's error feedback needs no other memory. One server may hold the whole model, or several a part of it each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedq.federated.training import RoundContext
from fedq.layout import Layout
from fedq.wire import Frame, Kind, join_payloads

MakeServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Server:
    """The server's state and its two acts: `step` and `change`.

    The optimizer knows every parameter of the model by its number, but those of other servers' parts have no memory
    and never a gradient, so it leaves them alone. States of parts thus put together are the state of the whole.

    Args:
        initial: The whole model that everyone starts from, flat float32; copied.
        layout: Layout of the downlink (offsets are those of the uplink too), or this server's part of it.
        make_optimizer: Returns a `torch.optim.Optimizer` of the master's parameter tensors; it is fed the negative mean
            update as the gradient. Statistics never go through it: their mean change is added as it is.
    """

    def __init__(self, initial: Tensor, layout: Layout, make_optimizer: MakeServerOptimizer) -> None:
        self.layout = layout
        self.master = layout.take(initial).clone()
        views = layout.views(self.master)
        whole = [s for s in (layout.whole or layout).spans if s.role != "stats"]
        params = [views.get(s.name, initial.new_zeros(()).expand(s.shape)).requires_grad_() for s in whole]
        self._params = {s.name: param for s, param in zip(whole, params, strict=True) if s.name in views}
        self._numbers = {number for number, span in enumerate(whole) if span.name in views}
        self._variances = [s for s in layout.spans if s.role == "stats" and s.name.endswith("running_var")]
        self.optimizer = make_optimizer(params)

    def start(self, replica: Tensor) -> None:
        """Begin from the model that everyone holds, flat float32."""
        self.master.copy_(self.layout.take(replica))

    def step(self, mean: Tensor) -> None:
        """Apply a mean update to the master."""
        gradients = self.layout.views(mean.neg())
        for name, param in self._params.items():
            param.grad = gradients[name]
        if self._params:
            self.optimizer.step()
        for param in self._params.values():
            param.grad = None
        stats = slice(self.layout.num_params, self.layout.numel)
        self.master[stats] += mean[stats]
        for span in self._variances:  # a bfloat16 change may overshoot a variance that has shrunk to almost nothing
            self.master[span.slice].clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the master (of this part) and the optimizer's state of its parameters, by number."""
        return {"master": self.master, "optimizer": self._own(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a server that held the whole model, or of `join_states`."""
        self.master.copy_(self.layout.take(state["master"]))
        self.optimizer.load_state_dict(self._own(state["optimizer"]))

    def _own(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state without that of other servers' parameters."""
        return optimizer | {"state": {n: state for n, state in optimizer["state"].items() if n in self._numbers}}

    def change(self, replica: Tensor, context: RoundContext) -> Frame:
        """Return what brings the replica to the master, coded: their difference, or the master's values where those
        are sent. Of a part of the model, its share of the body."""
        seed = context.downlink_seed()
        sent = self.layout.to_sent_(self.master.clone(), self.layout.take(replica))
        body = join_payloads(self.layout, self.layout.encode(sent, seed=seed))
        return Frame(
            kind=Kind.CHANGE,
            round=context.round,
            client=2**32 - 1,
            layout_hash=self.layout.hash,
            seed=seed,
            weight=0.0,
            loss=0.0,
            accuracy=0.0,
            body=body,
        )


def join_states(layout: Layout, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a server of the whole model, put together from those of its parts.

    Args:
        layout: Layout of the whole model.
        states: `Server.state_dict` of every part, with ``numbers``: which spans of the whole the part holds.
    """
    master = torch.empty(layout.numel)
    params: dict[int, Any] = {}
    for state in states:
        part = layout.part(state["numbers"])
        for name, values in part.views(state["master"]).items():
            master[layout[name].slice] = values.reshape(-1)
        params |= state["optimizer"]["state"]
    return {"master": master, "optimizer": {**states[0]["optimizer"], "state": dict(sorted(params.items()))}}
