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
        groups[name] = _group(getattr(defaults, name), values, f"{path}: {name}")
    return replace(defaults, **groups)


def load_deepspeed_config(path: Path, defaults: C) -> C:
    """Read settings from a DeepSpeed file: what its own keys say, and its section `fedq`.

    Args:
        path: A DeepSpeed JSON file; the settings name it, so that an engine reads the rest.
        defaults: The settings that the file changes.

    Raises:
        FieldError: The file cannot be used, or has two values for a setting.
    """
    file, config = DeepSpeedFile.read(path), defaults
    for name, (key, value) in file.implied.items():
        if file.fedq.get(name, value) != value:
            raise FieldError(f"{path}: fedq.{name}", file.fedq[name], f"{value!r}, as {key} says, or left out")
        if name in OLD and (ours := OLD[name][0]) in file.fedq:
            raise FieldError(f"{path}: fedq.{ours}", file.fedq[ours], f"left out, because {key} says it")
        config = _with_setting(config, name, value, f"{path}: {key}", is_ours=False)
    for name, value in file.fedq.items():
        config = _with_setting(config, name, value, f"{path}: fedq.{name}")
    return replace(config, run=replace(config.run, deepspeed_config=path))


def with_settings(config: C, values: Mapping[str, Any]) -> C:
    """Return the settings with some changed, by the names of their flags."""
    for name, value in values.items():
        config = _with_setting(config, name, value, name)
    return config


def with_old_flags(config: C, texts: Mapping[str, str]) -> C:
    """Return the settings with flags of earlier versions put into those that have taken them over.

    Args:
        config: The settings that the other flags made.
        texts: Values of old flags, by the names of their settings.

    Raises:
        FieldError: A text is no value of its setting.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, text in texts.items():
        target, kind = OLD[name]
        try:
            value = kind(text)
        except ValueError:
            raise FieldError(name, text, _WORDS[kind]) from None
        groups.setdefault(_group_of(config, target), {})[name] = value
    changes = {group: _changed(getattr(config, group), {}, old, "flags") for group, old in groups.items()}
    return replace(config, **changes)


def _group_of(config: Config, name: str) -> str:
    return next(group for group in get_type_hints(type(config)) if hasattr(getattr(config, group), name))


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


def _group(defaults: Any, values: Any, place: str) -> Any:
    hints = get_type_hints(type(defaults))
    changes: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for key, value in _mapping(values, place).items():
        if key not in hints and not _is_old(key, hints):
            raise FieldError(f"{place}.{key}", value, f"only the keys {one_of(hints, key)}")
        kind = hints[key] if key in hints else OLD[key][1] | None
        (changes if key in hints else old)[key] = _typed(kind, value, f"{place}.{key}")
    return _changed(defaults, changes, old, place)


def _changed(section: Any, changes: Mapping[str, Any], old: Mapping[str, Any], place: str) -> Any:
    """Return a group with some settings changed, and old ones put into those that have taken them over.

    What to write instead is said, unless there is no place where they were written.
    """
    if not old:
        return replace(section, **changes)
    before = {**{OLD[name][0]: getattr(section, OLD[name][0]) for name in old}, **changes}
    new = modern(before | {name: value for name, value in old.items() if value is not None})
    if place and any(new[name] != before[name] for name in before):
        _tell(told(place, old, new))
    return replace(section, **new)


@cache
def _tell(line: str) -> None:
    """Say a line once a process, however often a file is read."""
    _log.warning("%s", line)


def _is_old(name: str, hints: Mapping[str, Any]) -> bool:
    """Whether a setting was one of a group's in an earlier version."""
    return name in OLD and OLD[name][0] in hints


def _with_setting(config: C, name: str, value: Any, place: str, *, is_ours: bool = True) -> C:
    """Return the settings with one changed, whatever its group; what is not ours is not told how to be written."""
    groups = {
        key: group for group in get_type_hints(type(config)) for key in get_type_hints(type(getattr(config, group)))
    }
    allowed = groups.keys() - {"resume", "resume_changed", "deepspeed_config"}
    if name in OLD:
        group = _group_of(config, OLD[name][0])
        old = {name: _typed(OLD[name][1] | None, value, place)}
        return replace(config, **{group: _changed(getattr(config, group), {}, old, place if is_ours else "")})
    if name not in allowed:
        raise FieldError(place, value, f"only the keys {one_of(allowed, name)}")
    section = getattr(config, groups[name])
    typed = _typed(get_type_hints(type(section))[name], value, place)
    return replace(config, **{groups[name]: replace(section, **{name: typed})})


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
