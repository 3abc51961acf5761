"""Settings of earlier versions: flags and keys that are options of a spec now, still read, with the form to write.

Files, command lines, checkpoints and servers of an earlier version have them; `modern` is the one place that knows what
became of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedq.federated.local_optimizer import LOCAL_OPTIMIZERS
from fedq.feedback import FEEDBACK
from fedq.specs import with_options

OLD: dict[str, tuple[str, type]] = {
    "momentum": ("optimizer", float),
    "weight_decay": ("optimizer", float),
    "max_update_norm": ("norm_limit", float),
    "norm_rule": ("norm_limit", str),
    "residual_memory": ("feedback", float),
}
"""Settings of earlier versions: for each the setting that has taken it over, and its own type."""


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the old ones, which have become options of others among them.

    Args:
        values: Settings by name, of a whole job or of one group, with those that took the old ones over. An old one
            that has no effect (momentum with adam, a rule without a limit) is dropped, as it was then.

    Raises:
        FieldError: A value is outside its range.
    """
    new = {name: value for name, value in values.items() if name not in OLD}
    options = {name: values[name] for name in ("momentum", "weight_decay") if name in values}
    if options:
        new["optimizer"] = with_options("optimizer", values.get("optimizer", "sgd"), LOCAL_OPTIMIZERS, **options)
    if values.get("residual_memory", 1.0) != 1.0:
        memory = {"memory": values["residual_memory"]}
        new["feedback"] = with_options("feedback", values.get("feedback", "auto"), FEEDBACK, **memory)
    if "max_update_norm" in values or "norm_rule" in values:
        rule, _, multiple = values.get("norm_limit", "none").partition(":")
        rule = values.get("norm_rule", "clip" if rule == "none" else rule)
        multiple = values.get("max_update_norm", multiple or None)
        new["norm_limit"] = "none" if multiple is None else f"{rule}:{float(multiple):g}"
    return new


def told(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the line that says what to write instead of old settings.

    Args:
        where: Place where the old settings were found: a file, or the command line.
        old: Values of the old settings that were given, by name.
        new: The settings that `modern` made of them.
    """
    forms = {target: new[target] for name in old if (target := OLD[name][0]) in new}
    return f"{where}: write {', '.join(f'{k} {v}' for k, v in forms.items())} instead of {', '.join(old)}"
