"""Settings in a YAML file, a mapping of groups as the `config.yaml` that every run writes, or in a DeepSpeed file.

Reading is strict: a key or a type that the tree in `fedq.config` does not have is an error, never ignored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from fedq.config import Config
from fedq.engines.deepspeed_config import DeepSpeedFile
from fedq.errors import FieldError, one_of
from fedq.old_settings import OLD, modern, told
from fedq.runfolder import SCHEMA_VERSION

C = TypeVar("C", bound=Config)

_log = logging.getLogger(__name__)

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (in quotes)", Path: "a path"}


def load_config(path: Path, defaults: C) -> C:
    """Read settings from a YAML file; what the file leaves out keeps its default.

    Args:
        path: A YAML file, nested by group (`data`, `clients`, `local`, `exchange`, `run`).
        defaults: The settings that the file changes.

    Returns:
        A new tree; no value is checked beyond its type.

    Raises:
        FieldError: The file cannot be read, or has an unknown key, a key twice or a value of a wrong type; the message
            names `file: group.key`.
    """
    tree = _mapping(_read(path), str(path))
    version = tree.pop("schema_version", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise FieldError(f"{path}: schema_version", version, f"{SCHEMA_VERSION}, the version this program writes")
    hints = get_type_hints(type(defaults))
    groups = {}
    for name, values in tree.items():
        if name not in hints:
            raise FieldError(f"{path}: key", name, one_of([*hints, "schema_version"], name))
        place = f"{path}: {name}"
        given = {key: (f"{place}.{key}", value) for key, value in _mapping(values, place).items()}
        groups[name] = _group(getattr(defaults, name), given, place)
    return replace(defaults, **groups)


def load_deepspeed_config(path: Path, defaults: C) -> C:
    """Read settings from a DeepSpeed file: what its own keys say, and its section `fedq`.

    Args:
        path: A DeepSpeed JSON file; the settings name it, so that an engine reads the rest.
        defaults: The settings that the file changes.

    Raises:
        FieldError: The file cannot be used, or has two values for a setting.
    """
    file = DeepSpeedFile.read(path)
    implied = {name: (f"{path}: {key}", value) for name, (key, value) in file.implied.items()}
    for name, (key, value) in file.implied.items():
        if file.fedq.get(name, value) != value:
            raise FieldError(f"{path}: fedq.{name}", file.fedq[name], f"{value!r}, as {key} says, or left out")
        if name in OLD and (heir := OLD[name][0]) in file.fedq:
            raise FieldError(f"{path}: fedq.{heir}", file.fedq[heir], f"left out, because {key} says it")
    config = _with_values(defaults, implied, where="")  # DeepSpeed's own keys are not to be written otherwise
    ours = {name: (f"{path}: fedq.{name}", value) for name, value in file.fedq.items()}
    config = _with_values(config, ours, where=f"{path}: fedq")
    return replace(config, run=replace(config.run, deepspeed_config=path))


def with_settings(config: C, values: Mapping[str, Any]) -> C:
    """Return the settings with some changed, by the names of their flags."""
    return _with_values(config, {name: (name, value) for name, value in values.items()}, where="settings")


def with_old_flags(config: C, texts: Mapping[str, str]) -> C:
    """Return the settings with flags of earlier versions put into those that have taken them over.

    Args:
        config: The settings that the other flags made.
        texts: Values of old flags, by the names of their settings.

    Raises:
        FieldError: A text is no value of its setting.
    """
    given = {}
    for name, text in texts.items():
        kind = OLD[name][1]
        try:
            given[name] = (name, kind(text))
        except ValueError:
            raise FieldError(name, text, _WORDS[kind]) from None
    return _with_values(config, given, where="flags")


def config_dict(config: Config) -> dict[str, Any]:
    """Return the settings as nested plain values, complete, such that `load_config` reads the same tree back."""
    return {
        group: {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        for group, values in asdict(config).items()
    }


class _Loader(yaml.SafeLoader):
    """Plain data in which `off` stays a word and a key that is given twice is an error.

    PyYAML reads YAML 1.1, where `feedback: off` would be a boolean, and keeps the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping of unique keys."""
        keys = [key.value for key, _ in node.value]
        for (key, _), text in zip(node.value, keys, strict=True):
            if keys.count(text) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {text!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _read(path: Path) -> Any:
    try:
        # Not safe_load: the loader is a SafeLoader of our own.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise FieldError("config", str(path), f"a YAML file that can be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise FieldError("config", str(path), f"a YAML file; {' '.join(str(error).split())}") from None


def _mapping(value: Any, place: str) -> dict[Any, Any]:
    if value is None:  # a group whose lines are all commented out
        return {}
    if not isinstance(value, Mapping):
        raise FieldError(place, value, "a mapping of keys to values")
    return dict(value)


def _with_values(config: C, given: Mapping[str, tuple[str, Any]], *, where: str) -> C:
    """Return the settings with some changed, whatever their groups.

    Args:
        config: The settings that are changed.
        given: Place, for errors, and value of each setting, by name; all at once, because old ones belong together.
        where: What has the settings, for the line that names new forms; empty: no line is said.
    """
    owners = {
        key: group for group in get_type_hints(type(config)) for key in get_type_hints(type(getattr(config, group)))
    }
    allowed = owners.keys() - {"resume", "resume_changed", "deepspeed_config"}
    groups: dict[str, dict[str, tuple[str, Any]]] = {}
    for name, (place, value) in given.items():
        target = OLD[name][0] if name in OLD else name
        if target not in allowed:
            raise FieldError(place, value, f"only the keys {one_of(allowed, name)}")
        groups.setdefault(owners[target], {})[name] = (place, value)
    return replace(config, **{name: _group(getattr(config, name), values, where) for name, values in groups.items()})


def _group(section: Any, given: Mapping[str, tuple[str, Any]], where: str) -> Any:
    """Return a group with some settings changed, and old ones put into those that have taken them over."""
    hints = get_type_hints(type(section))
    changes: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name, (place, value) in given.items():
        if name in hints:
            changes[name] = _typed(hints[name], value, place)
        elif name in OLD and OLD[name][0] in hints:
            old[name] = _typed(OLD[name][1] | None, value, place)
        else:
            raise FieldError(place, value, f"only the keys {one_of(hints, name)}")
    if not old:
        return replace(section, **changes)
    before = {**{OLD[name][0]: getattr(section, OLD[name][0]) for name in old}, **changes}
    new = modern({**before, **{name: value for name, value in old.items() if value is not None}})
    if where and any(new[name] != before[name] for name in before):
        _tell(told(where, old, new))
    return replace(section, **new)


@cache
def _tell(line: str) -> None:
    """Say a line once a process, however often a file is read."""
    _log.warning("%s", line)


def _typed(hint: Any, value: Any, place: str) -> Any:
    """Return the value as the field's type, or raise; the one conversion of numbers is from whole to float."""
    choices = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise FieldError(place, value, "a list")
        return tuple(_typed(choices[0], one, place) for one in value)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise FieldError(place, value, one_of(choices, value))
        return value
    if NoneType in choices:
        if value is None:
            return None
        hint = next(choice for choice in choices if choice is not NoneType)
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 5e-4, which has no dot, as text
    accepted = {float: (int, float), Path: (str,)}.get(hint, (hint,))
    if type(value) not in accepted:
        raise FieldError(place, value, _WORDS[hint] + (" or null" if NoneType in choices else ""))
    return hint(value)
