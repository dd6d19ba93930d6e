"""Settings of a training run as YAML and as `--section.name=value`, by jsonargparse, which knows types.

```yaml
init: Qwen/Qwen2.5-7B-Instruct
environment: {name: retrieval-qa, objectives: 2, questions: qa.jsonl, corpus: corpus.jsonl}
rollout: {max_turns: 6}
algorithm: {actor_lr: 1e-6}
```
The names are those of `TrainConfig`; `environment` has those of `mem1.envs.worlds` as well, `name`,
`objectives` and `tasks`, beside the keyword arguments of the world. What is not said has its default. A run's
own train.json is such a file, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mem1.checks import InputError, require
from mem1.config import TrainConfig
from mem1.named_objects import imported
from mem1.parsing.tags import FORMATS, TagFormat

Settings = dict[str, Any]  # nested, by section
_OPTIONS = ("environment", "device", "threads", "keep", "seed")  # of the command line, by the same names


def read(path: Path) -> Settings:
    """What a YAML file says. InputError for what is none, or no mapping."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a file of settings, got none: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: expected YAML, got other text: {' '.join(str(error).split())}") from None
    require(found is None or isinstance(found, dict), str(path), "a mapping of settings", found)
    return found or {}


def take_dotted(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """The `--section.name=value` (or `--section.name value`) of a command line as settings, and what is left
    of it. Values are YAML. Of names without a section, those that are no option's as well (`--init`).
    """
    settings: Settings = {}
    single = {name for name in setting_types() if "." not in name} - {*_OPTIONS}
    rest, given = [], iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or ("." not in name and name[2:] not in single):
            rest.append(argument)
            continue
        if not equals:
            found = next(given, None)
            if found is None:  # which the rest of the command line is refused for
                rest.append(argument)
                continue
            value = found
        *sections, last = name[2:].split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:  # a text such as "a: b: c"
            place[last] = value
    return settings, rest


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Nested settings; the later ones count. A section that a layer has as something else replaces it."""
    result: Settings = {}
    for layer in layers:
        for name, value in layer.items():
            known = result.get(name)
            both = isinstance(known, Mapping) and isinstance(value, Mapping)
            result[name] = merged(known, value) if both else value
    return result


def typed(settings: Mapping[str, Any]) -> Settings:
    """The same with values of the types of `TrainConfig`. InputError for names that it does not have, with
    the nearest one that it has, and for values that are of no such type.
    """
    known = setting_types()
    sections = {name.partition(".")[0] for name in known if "." in name}
    result: Settings = {}
    for name, value in settings.items():
        name = str(name)
        if name in sections and name not in known:
            require(isinstance(value, Mapping), name, "a section of settings", value)
            result[name] = {key: _typed(f"{name}.{key}", inner) for key, inner in value.items()}
        else:
            result[name] = _typed(name, value)
    return result


def _typed(name: str, value: Any) -> Any:
    known = setting_types()
    if name not in known:
        sections = {full.partition(".")[0]: full.partition(".")[0] for full in known}
        last = {full.rpartition(".")[2]: full for full in known} | {full: full for full in known} | sections
        near = get_close_matches(name, last, 1, 0.8) or get_close_matches(name.rpartition(".")[2], last, 1)
        nearest = f"; the nearest is {last[near[0]]}" if near else ""
        raise InputError(f"{name}: expected the name of a setting, got none that there is{nearest}")
    if name in _READ:
        try:
            return _READ[name](value)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    try:
        return _parser(name).parse_object({"value": value}).value
    except ArgumentError:
        raise InputError(f"{name}: expected {_told(known[name])}, got {value!r}") from None


def _told(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


@cache
def _parser(name: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=setting_types()[name])
    return parser


def tag_format(value: Any) -> TagFormat:
    """Of a name in `FORMATS`, a JSON or YAML file, or a table as these have. InputError for any other."""
    if isinstance(value, TagFormat):
        return value
    if isinstance(value, str) and value in FORMATS:
        return FORMATS[value]
    if isinstance(value, str):
        try:
            return TagFormat.from_dict(read(Path(value)))
        except InputError as error:
            raise InputError(f"expected one of {', '.join(FORMATS)} or a file, got {error}") from None
    return TagFormat.from_dict(value)


def prune_rule(value: Any) -> Any:
    """Of a number, the name of a rule, or MODULE:NAME; `RolloutConfig` says what is wrong with the rest."""
    if isinstance(value, str):
        return (
            imported(value)
            if ":" in value
            else int(value)
            if value.isascii() and value.isdecimal()
            else value
        )
    return value


def _environment(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"expected a section of settings, got {value!r}")
    found = dict(value)
    if isinstance(found.get("objectives"), list):
        found["objectives"] = tuple(found["objectives"])
    return found


# What more than one type can stand for.
_READ = {"rollout.format": tag_format, "rollout.prune": prune_rule, "environment": _environment}


@cache
def setting_types() -> dict[str, Any]:
    """The type of every setting, by its full name."""
    return dict(_each(TrainConfig, ""))


def _each(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint) and name not in _READ:
            yield from _each(hint, f"{name}.")
        else:
            yield name, hint


def made(settings: Mapping[str, Any]) -> TrainConfig:
    """Of typed settings. InputError for values that the dataclasses refuse."""
    hints = get_type_hints(TrainConfig)
    arguments = {
        name: hints[name](**value) if is_dataclass(hints[name]) else value for name, value in settings.items()
    }
    return TrainConfig(**arguments)


def to_yaml(config: TrainConfig) -> str:
    """Of which `made(typed(yaml))` makes the same config."""
    settings = config.to_dict()
    named = next((name for name, known in FORMATS.items() if known == config.rollout.format), None)
    if named is not None:
        settings["rollout"]["format"] = named
    return str(yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """With lists for tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value
