"""What the settings of clients' own models may be: checks before any work, and what their texts stand for.

Settings come as plain mappings by flag name, because the tree they come from, `fedq.config`, stands above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedq.errors import Check, FieldError, check_all, one_of
from fedq.lowbit.centres import MAX_CENTRE_BITS
from fedq.models import MODELS, is_own
from fedq.personalize.own_models import FLOAT_BITS

SHARED = ("fedavg", "fedbat")
"""Algorithms with one model for all."""
_QUANTIZED = ("qupel", "quped")
_OWNERS: dict[str, tuple[str, ...]] = {
    "client_bits": _QUANTIZED,
    "client_models": ("quped", "mutual", "local"),
    "regularizer": _QUANTIZED,
    "regularizer_weight": _QUANTIZED,
    "centres": _QUANTIZED,
    "centre_lr": _QUANTIZED,
    "centre_sign": _QUANTIZED,
    "freeze_at": _QUANTIZED,
    "distill_weight": ("quped", "qupel", "mutual"),
    "temperature": ("quped", "mutual"),
    "global_loss": ("quped",),
    "personal_lr": ("local", "perfedavg", "pfedme", "mutual", *_QUANTIZED),
    "personal_steps": ("perfedavg", "pfedme"),
    "attachment": ("pfedme",),
}
"""Algorithms that know a setting, by its name."""

_OF_EXCHANGE = (
    "client_models",
    "distill_weight",
    "temperature",
    "global_loss",
    "personal_lr",
    "personal_steps",
    "personal_test",
    "attachment",
)
"""Settings that do nothing where clients do not learn from each other."""


def parse_client_bits(spec: str, num_clients: int) -> list[int]:
    """Return each client's bits: those of the spec, dealt in turn.

    Args:
        spec: For example ``2`` or ``1,2,32``; 32 is a float model.
        num_clients: Number of clients.

    Raises:
        FieldError: A client's bits are not 1 to 8 or 32.
    """
    texts = [text.strip() for text in spec.split(",")]
    allowed = {str(bits): bits for bits in (*range(1, MAX_CENTRE_BITS + 1), FLOAT_BITS)}
    if not all(text in allowed for text in texts):
        words = f"1 to {MAX_CENTRE_BITS}, or {FLOAT_BITS} for float, separated by commas"
        raise FieldError("client_bits", spec, words)
    return [allowed[texts[client % len(texts)]] for client in range(num_clients)]


def parse_client_models(spec: str, model: str, num_clients: int) -> list[str]:
    """Return each client's network: those of the spec, dealt in turn; an empty one is ``model`` for all.

    Raises:
        FieldError: A network is unknown.
    """
    names = [name.strip() for name in spec.split(",")] if spec else [model]
    for name in names:
        if name not in MODELS and not is_own(name):
            words = f"names separated by commas: {one_of(MODELS, name)}, or package.module:function"
            raise FieldError("client_models", spec, words)
    return [names[client % len(names)] for client in range(num_clients)]


def is_personal(personal: Mapping[str, Any]) -> bool:
    """Whether clients are tested on their own classes."""
    return personal["algorithm"] not in SHARED or bool(personal["personal_test"])


def check_personal(
    personal: Mapping[str, Any],
    local: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    exchange: str,
    weights: str,
) -> None:
    """Check the settings of clients' own models in federated rounds.

    Args:
        personal: Settings of clients' own models.
        local: Settings of local training.
        defaults: Default values of the settings in ``personal``.
        exchange: Value of the setting ``exchange``.
        weights: Value of the setting ``weights``.

    Raises:
        FieldError: A setting cannot be used, or the algorithm does not know it; the error names the first one.
    """
    algorithm = personal["algorithm"]
    for name, owners in _OWNERS.items():
        if personal[name] != defaults[name] and algorithm not in owners:
            words = f"{defaults[name]!r} with --algorithm {algorithm}; {name} is of {', '.join(owners)}"
            raise FieldError(name, personal[name], words)
    if not is_personal(personal):
        if personal["warm_start"] is not None:
            raise FieldError(
                "warm_start", str(personal["warm_start"]), "left out, unless clients have models of their own"
            )
        return
    if exchange != "round":
        words = "round with --algorithm " + algorithm if algorithm != "fedavg" else "round with --personal-test"
        raise FieldError("exchange", exchange, words)
    if algorithm not in SHARED:
        _check_own_models(personal, local, weights)
    check_warm_start(personal["warm_start"])


def _check_own_models(personal: Mapping[str, Any], local: Mapping[str, Any], weights: str) -> None:
    algorithm = personal["algorithm"]
    bits = set(parse_client_bits(personal["client_bits"], 1 + personal["client_bits"].count(",")))
    parse_client_models(personal["client_models"], local["model"], 1)
    own = _checks(personal, local, bits, weights) if algorithm in _QUANTIZED else _plain_checks(local, weights)
    check_all(
        (name, value, is_allowed, allowed.replace("--algorithm quped", f"--algorithm {algorithm}"))
        for name, value, is_allowed, allowed in (*own, *_rates(personal, local))
    )


def _plain_checks(local: Mapping[str, Any], weights: str) -> Iterator[Check]:
    words = "with --algorithm quped, which has a loss of its own"
    yield "weights", weights, weights == "float", f"float {words}"
    yield "prox_mu", local["prox_mu"], local["prox_mu"] == 0, f"0 {words}"


def _rates(personal: Mapping[str, Any], local: Mapping[str, Any]) -> Iterator[Check]:
    words = "1 where clients have models of their own, which are trained one by one"
    yield "side_by_side", local["side_by_side"], local["side_by_side"] == 1, words
    weight, temperature, rate = (personal[name] for name in ("distill_weight", "temperature", "personal_lr"))
    yield "distill_weight", weight, 0 <= weight <= 1, "0 to 1"
    yield "temperature", temperature, 0 < temperature < math.inf, "above 0"
    yield "personal_lr", rate, rate is None or 0 < rate < math.inf, "above 0"
    yield "personal_steps", personal["personal_steps"], personal["personal_steps"] >= 1, "1 or more"
    attachment = personal["attachment"]
    fits = personal["algorithm"] != "pfedme" or 0 < attachment <= 1 / local["lr"]
    yield "attachment", attachment, fits, f"above 0 and at most 1 / lr = {1 / local['lr']:g}: a step must not overshoot"


def check_quped(
    personal: Mapping[str, Any], local: Mapping[str, Any], defaults: Mapping[str, Any], *, weights: str
) -> None:
    """Check the settings of QuPeD's Algorithm 1 (``--algorithm quped --exchange none``).

    Args:
        personal: Settings of clients' own models.
        local: Settings of local training.
        defaults: Default values of the settings in ``personal``.
        weights: Value of the setting ``weights``.

    Raises:
        FieldError: A setting cannot be used; the error names the first one.
    """
    bits = set(parse_client_bits(personal["client_bits"], 1 + personal["client_bits"].count(",")))
    check_all(_checks(personal, local, bits, weights))
    for name in _OF_EXCHANGE:
        if personal[name] != defaults[name]:
            words = f"{defaults[name]!r} with --exchange none, where clients do not learn from each other"
            raise FieldError(name, personal[name], words)
    check_warm_start(personal["warm_start"])


def check_warm_start(path: Path | None) -> None:
    """Check that the file to start from is there.

    Raises:
        FieldError: The file does not exist.
    """
    if path is not None and not path.is_file():
        raise FieldError("warm_start", str(path), "a model.safetensors that exists")


def _checks(personal: Mapping[str, Any], local: Mapping[str, Any], bits: set[int], weights: str) -> Iterator[Check]:
    """Yield name, value, whether it is allowed, and what is; a NaN fails every comparison, as it should."""
    fits = personal["centres"] == "learned" or bits <= {1, FLOAT_BITS}
    yield "client_bits", personal["client_bits"], fits, "1 or 32 with --centres fixed, which are -1 and +1"
    yield "weights", weights, weights == "float", "float with --algorithm quped, whose weights have learned centres"
    share = personal["freeze_at"]
    yield "freeze_at", share, 0 < share <= 1, "above 0 and at most 1"
    for name in ("regularizer_weight", "centre_lr"):
        yield name, personal[name], 0 <= personal[name] < math.inf, "0 or more"
    words = "with --algorithm quped, whose weights are pulled to their centres"
    yield "prox_mu", local["prox_mu"], local["prox_mu"] == 0, f"0 {words}"
    words = "with --algorithm quped, whose second gradient is not scaled against underflow"
    yield "precision", local["precision"], local["precision"] != "fp16", f"auto, fp32 or bf16 {words}"
