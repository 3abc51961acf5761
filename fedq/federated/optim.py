"""Server optimizers: what moves the global model once a round's mean client update is known.

Each is a `torch.optim.Optimizer` whose gradient is the pseudo-gradient, the *negative* weighted mean of the clients'
updates, so that any optimizer of torch's does as well. Averaging the updates is not done here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fedq.engines.optimizers import lean
from fedq.errors import FieldError, one_of
from fedq.specs import describe, parse_value


class _PseudoGradientOptimizer(Optimizer):
    """The shared loop over parameter groups; a rule implements `_move` with multi-tensor operations."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options, as `torch.optim.Optimizer` does; all must be float32."""
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)  # see fedq.engines.optimizers
        for param in param_group["params"]:
            if param.dtype != torch.float32:
                del self.param_groups[-1]
                raise FieldError("params", str(param.dtype), "torch.float32: the server keeps a float32 model")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient, the negative mean client update, by one server step.

        Args:
            closure: Function that is called first, with gradients enabled; None: nothing is called.

        Returns:
            The loss that ``closure`` returned; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._move(params, [param.grad for param in params], group)
        return loss

    def _move(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _accumulators(self, params: list[Tensor], name: str, start: float = 0.0) -> list[Tensor]:
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = torch.full_like(param, start)
        return [self.state[param][name] for param in params]


class FedAvg(_PseudoGradientOptimizer):
    """Add the mean update D: ``x += lr * D`` (McMahan et al. 2017, arXiv 1602.05629); lr = 1 is plain averaging.

    Args:
        params: Float32 parameters.
        lr: Server learning rate, at least 0.

    Raises:
        FieldError: An option outside its range.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0) -> None:
        _check_lr(lr)
        super().__init__(params, {"lr": lr})

    def _move(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        torch._foreach_add_(params, grads, alpha=-group["lr"])


class FedAvgM(_PseudoGradientOptimizer):
    """Add server momentum: ``V = momentum * V + D``, ``x += lr * V`` (Hsu et al. 2019, arXiv 1909.06335).

    Args:
        params: Float32 parameters.
        lr: Server learning rate, at least 0.
        momentum: Server momentum, from 0 to below 1.
        nesterov: Whether to step by ``D + momentum * V`` instead of V.

    Raises:
        FieldError: An option outside its range.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False) -> None:
        _check_lr(lr)
        _require(0 <= momentum < 1, "momentum", momentum, "0 to below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    def _move(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        velocity = self._accumulators(params, "velocity")
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, grads)
        if group["nesterov"]:
            velocity = list(torch._foreach_add(grads, velocity, alpha=group["momentum"]))
        torch._foreach_add_(params, velocity, alpha=-group["lr"])


class _AdaptiveOptimizer(_PseudoGradientOptimizer):
    """``x += lr * m / (sqrt(v) + tau)`` (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), no bias correction."""

    def __init__(self, params: ParamsT, lr: float, tau: float, v0: float, **options: Any) -> None:
        _check_lr(lr)
        _require(0 < tau < math.inf, "tau", tau, "a finite number above 0")
        _require(0 <= v0 < math.inf, "v0", v0, "a finite number of at least 0")
        super().__init__(params, {"lr": lr, "tau": tau, "v0": v0, **options})

    def _move(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        second_moment = self._accumulators(params, "second_moment", group["v0"])
        self._accumulate(second_moment, grads, group)
        denominators = torch._foreach_sqrt(second_moment)
        torch._foreach_add_(denominators, group["tau"])
        torch._foreach_addcdiv_(params, self._direction(params, grads, group), denominators, value=-group["lr"])

    def _accumulate(self, second_moment: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _direction(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return grads


class FedAdagrad(_AdaptiveOptimizer):
    """Divide the mean update by the root of all squares so far: ``v += D^2``, ``x += lr * D / (sqrt(v) + tau)``.

    Reddi et al. 2021 (arXiv 2003.00295), algorithm 2 with beta1 = 0.

    Args:
        params: Float32 parameters.
        lr: Server learning rate, at least 0.
        tau: Degree of adaptivity, above 0.
        v0: Second moment before the first step, at least 0.

    Raises:
        FieldError: An option outside its range.
    """

    def __init__(self, params: ParamsT, lr: float = 0.1, tau: float = 1e-3, v0: float = 0.0) -> None:
        super().__init__(params, lr, tau, v0)

    def _accumulate(self, second_moment: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        torch._foreach_addcmul_(second_moment, grads, grads)


class FedAdam(_AdaptiveOptimizer):
    """Step by moving averages: ``m = b1 m + (1 - b1) D``, ``v = b2 v + (1 - b2) D^2``, ``x += lr m / (sqrt(v) + tau)``.

    Reddi et al. 2021 (arXiv 2003.00295), algorithm 2: m starts at 0 and neither average is corrected for its start,
    which torch's Adam cannot leave out.

    Args:
        params: Float32 parameters.
        lr: Server learning rate, at least 0.
        betas: Decay of m and of v, each from 0 to below 1.
        tau: Degree of adaptivity, above 0.
        v0: Second moment before the first step, at least 0.

    Raises:
        FieldError: An option outside its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        v0: float = 0.0,
    ) -> None:
        _require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, "two of 0 to below 1")
        super().__init__(params, lr, tau, v0, betas=tuple(betas))

    def _accumulate(self, second_moment: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        beta2 = group["betas"][1]
        torch._foreach_mul_(second_moment, beta2)
        torch._foreach_addcmul_(second_moment, grads, grads, value=1 - beta2)

    def _direction(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        first_moment = self._accumulators(params, "first_moment")
        torch._foreach_lerp_(first_moment, grads, 1 - group["betas"][0])
        return first_moment


class FedYogi(FedAdam):
    """FedAdam with ``v -= (1 - b2) * D^2 * sign(v - D^2)``: v grows and shrinks by steps of the size of D^2.

    Reddi et al. 2021 (arXiv 2003.00295), algorithm 2. Arguments and errors are those of `FedAdam`.
    """

    def _accumulate(self, second_moment: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        signed = torch._foreach_addcmul(second_moment, grads, grads, value=-1)
        torch._foreach_sign_(signed)
        torch._foreach_mul_(signed, grads)  # one temporary copy of the model, not two
        torch._foreach_addcmul_(second_moment, signed, grads, value=group["betas"][1] - 1)


_OURS: dict[str, type[Optimizer]] = {
    cls.__name__.lower(): cls for cls in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)
}

SERVER_OPTIMIZERS: tuple[str, ...] = tuple(_OURS)
"""Names of the server optimizers defined here; `server_optimizer` knows those of torch.optim too."""

_UNUSABLE = {
    "lbfgs": "it evaluates the loss again and again in a step, and the server has no data",
    "sparseadam": "it takes sparse gradients only, and a mean update is dense",
}
_NOT_OFFERED = {
    "params",
    "return",
    "maximize",  # would step away from the clients
    "capturable",  # for CUDA graphs
    "differentiable",  # for gradients through the step
}


def server_optimizer(spec: str, params: ParamsT) -> Optimizer:
    """Build the server optimizer that ``spec`` describes.

    Args:
        spec: A name of `SERVER_OPTIMIZERS` or of a class in torch.optim, in any case, then options of that class:
            ``fedavg``, ``fedadam:lr=0.01,tau=0.001``, ``AdamW:lr=1e-3,betas=0.9/0.999``. Options left out have the
            class's own defaults.
        params: The server's model; each ``grad`` must hold the negative weighted mean of the clients' updates.

    Returns:
        The optimizer; ``step`` applies the round.

    Raises:
        FieldError: The optimizer or an option is unknown, a value is of a wrong type or out of range, or the optimizer
            cannot be used on a server; the error names ``server``.
    """
    name, colon, text = spec.partition(":")
    cls = _optimizer_class(spec, name.strip().lower())
    options = _options(spec, cls, text) if colon else {}
    try:
        return lean(cls)(params, **options)
    except FieldError as error:
        raise FieldError("server", spec, f"{error.field}: {error.allowed}") from error
    except (ValueError, RuntimeError) as error:
        raise FieldError("server", spec, f"what {cls.__name__} accepts; it says: {error}") from error


def _optimizer_class(spec: str, name: str) -> type[Optimizer]:
    if name in _UNUSABLE:
        raise FieldError("server", spec, f"any optimizer but {name}: {_UNUSABLE[name]}")
    theirs = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls)
        and issubclass(cls, Optimizer)
        and cls is not Optimizer
        and name.lower() not in _UNUSABLE
    }
    classes = theirs | _OURS
    if name not in classes:
        raise FieldError("server", spec, one_of(classes, name))
    return classes[name]


def _options(spec: str, cls: type[Optimizer], text: str) -> dict[str, Any]:
    kinds = {key: kind for key, kind in get_type_hints(cls.__init__).items() if key not in _NOT_OFFERED}
    options: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in kinds or key in options:
            raise FieldError("server", spec, f"name=value, each name once, of {one_of(kinds, key)}")
        try:
            options[key] = parse_value(value, kinds[key])
        except ValueError:
            raise FieldError("server", spec, f"{key}={describe(kinds[key])}") from None
    return options


def _check_lr(lr: float) -> None:
    _require(0 <= lr < math.inf, "lr", lr, "a finite number of at least 0")


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise FieldError(field, value, allowed)
