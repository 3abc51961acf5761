"""Which parameters of a module are averaged, as real numbers, and what may change about them between steps."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedq.errors import FieldError
from fedq.layout import as_real, uncompiled_name

_AGAIN = "register or step_state called again after the change; load_state_dict takes the residuals along"


class Parameters:
    """A module's parameters by name and number.

    A number is the place among all of the module's parameters, frozen ones too, so what depends on it (seeds, owners,
    residuals) stays as it is when layers are frozen and unfrozen.

    Args:
        module: The module, without DDP around it.

    Raises:
        FieldError: A parameter that cannot be averaged: sharded over ranks, without values yet, or with sparse
            gradients; or none that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.by_name = {uncompiled_name(name): param for name, param in module.named_parameters()}
        _refuse_unusable(module, self.by_name)
        self.names = list(self.by_name)
        self.number: dict[Tensor, int] = {param: number for number, param in enumerate(self.by_name.values())}
        self._frozen_strangers: list[nn.Parameter] = []
        self._take_note()
        if not self.trained:
            raise FieldError("module", type(module).__name__, "a module with a parameter that requires a gradient")

    def __getitem__(self, number: int) -> nn.Parameter:
        return self._params[number]

    @property
    def trained_names(self) -> list[str]:
        """The names of those that require a gradient."""
        return [self.names[number] for number in self.trained]

    def changed(self) -> bool:
        """Return whether others require a gradient than when this was last asked.

        Raises:
            FieldError: One that requires a gradient is not of the module as it was.
        """
        same = self._tree() == self._seen and not any(param.requires_grad for param in self._frozen_strangers)
        if same and [param.requires_grad for param in self._params] == self._flags:
            return False
        if not same:
            self._look_for_strangers()
        self._take_note()
        return True

    def _look_for_strangers(self) -> None:
        strangers = {n: p for n, p in self.module.named_parameters() if p not in self.number}
        new = [uncompiled_name(name) for name, param in strangers.items() if param.requires_grad]
        if new:
            raise FieldError("parameters", in_words(new), f"those that the module had at registration; {_AGAIN}")
        self._frozen_strangers = list(strangers.values())

    def _take_note(self) -> None:
        self._modules = list(self.module.modules())
        self._params = list(self.by_name.values())
        self._seen = self._tree()
        self._flags = [param.requires_grad for param in self._params]
        self.trained = [number for number, flag in enumerate(self._flags) if flag]
        """Numbers of those that require a gradient."""

    def _tree(self) -> list[int]:
        """Return what tells whether a module or parameter was added, taken away or replaced: some 50 us a step."""
        return [id(x) for m in self._modules for of_kind in (m._parameters, m._modules) for x in of_kind.values()]


def in_words(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse_unusable(module: nn.Module, params: dict[str, nn.Parameter]) -> None:
    """Refuse, by name, what no mean over ranks can be taken of.

    Raises:
        FieldError: See `Parameters`.
    """
    sharded_module = _class_if_loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    sharded_tensor = _class_if_loaded("torch.distributed.tensor", "DTensor")
    for name, part in module.named_modules():
        if isinstance(part, nn.parallel.DistributedDataParallel):
            allowed = "the module inside, under no DDP of another; fedq.hooks.register(ddp, ...) is for DDP models"
            raise FieldError("module", _of(name, "DistributedDataParallel"), allowed)
        if isinstance(part, sharded_module):
            raise FieldError("module", _of(name, "FullyShardedDataParallel"), "a module that every rank holds whole")
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            raise FieldError("gradient", f"sparse, of {_of(name, 'weight')}", "dense gradients: sparse=False")
    for name, param in params.items():
        if is_lazy(param):
            raise FieldError("parameter", f"{name}, without values yet", "one batch through lazy modules first")
        if isinstance(param, sharded_tensor):
            found = f"{name}, a DTensor ({', '.join(map(str, param.placements))})"  # type: ignore[attr-defined]
            allowed = "plain tensors that every rank holds whole: neither FSDP2 and HSDP nor tensor parallel modules"
            raise FieldError("parameter", found, allowed)


def _class_if_loaded(module: str, name: str) -> type | tuple[()]:
    """Return a class for `isinstance`; nothing can be one whose module, slow to import, nobody has imported."""
    found: type | tuple[()] = getattr(sys.modules.get(module), name, ())
    return found


def _of(path: str, what: str) -> str:
    return f"{path}.{what}" if path else what


def check_bucket(buffer: Tensor, params: Iterable[Tensor], names: Sequence[str]) -> None:
    """Refuse one of DDP's buckets that is not its parameters' gradients one after another.

    Raises:
        FieldError: A sparse bucket, or one of another length.
    """
    if buffer.layout != torch.strided:
        raise FieldError("gradient", f"sparse, of {in_words(names)}", "dense gradients")
    numel = sum(as_real(param.detach()).numel() for param in params)
    if buffer.numel() != numel:
        raise FieldError("bucket", f"{buffer.numel()} numbers for {in_words(names)}", f"{numel}, one for each element")
