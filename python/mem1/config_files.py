"""Settings of a training run as YAML and as `--section.name=value`, by jsonargparse, which knows types.

```yaml
init: Qwen/Qwen2.5-7B-Instruct
environment: {name: retrieval-qa, objectives: 2, questions: qa.jsonl, corpus: corpus.jsonl}
rollout: {max_turns: 6}
algorithm: {actor_lr: 1e-6}
```
The names are those of `TrainConfig`; `environment` has those of `mem1.envs.worlds` as well, `name`,
`objectives` and `tasks`, beside the keyword arguments of the world. What is not said is as in the file that
`base` names, beside this one, or has its default. A run's own train.json is such a file, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mem1.checks import InputError, has_type, require
from mem1.config import TrainConfig
from mem1.envs.worlds import DEFAULT, WORLDS
from mem1.named_objects import imported
from mem1.parsing.tags import FORMATS, TagFormat

Settings = dict[str, Any]  # nested, by section


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are what they look like: of YAML 1.1's, 010 is 8, 1:30 is 90, and "no" False.
    A key stands once in a mapping.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: set[Any] = set()
        for key, _ in node.value:
            name = key.value
            if name in found:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
            found.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _words, _first in (
    ("null", r"null|~|", "n~"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_words})$"),
        [*_first, *([""] if _tag == "null" else [])],
    )


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506


_BASE = "base"  # of a file: another one, whose settings it changes
_OPTIONS = ("environment", "device", "threads", "keep", "seed")  # of the command line, by the same names


def read(path: Path, above: tuple[Path, ...] = ()) -> Settings:
    """What a YAML file says, over what its `base` says; `section.name: value` is taken as it is on the
    command line. InputError for what is none, or no mapping.

    above: the files whose base it is.
    """
    try:
        found = _load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a file of settings, got none: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # of numbers that are too long, the last
        raise InputError(f"{path}: expected YAML, got other text: {' '.join(str(error).split())}") from None
    require(found is None or isinstance(found, dict), str(path), "a mapping of settings", found)
    settings = merged(*(_nested(str(name), value) for name, value in (found or {}).items()))
    if (base := settings.pop(_BASE, None)) is None:
        return settings
    require(isinstance(base, str), f"{path}: {_BASE}", "the name of a file", base)
    below, above = path.parent / base, (*above, path.resolve())
    require(below.resolve() not in above, f"{path}: {_BASE}", "a file that is not based on this one", base)
    return merged(read(below, above), settings)


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
        settings = merged(settings, _nested(name[2:], _value(name[2:], value)))
    return settings, rest


def _value(name: str, text: str) -> Any:
    """What a text on the command line stands for: what a setting may be as a text it is, as it is."""
    hint = setting_types().get(name, Any)
    if hint is not Any and name not in _READ and has_type(text, hint):
        return None if text == "null" and has_type(None, hint) else text
    try:
        return _load(text)
    except (yaml.YAMLError, RecursionError, ValueError):  # such as "a: b: c"
        return text


def _nested(name: str, value: Any) -> Settings:
    first, dot, rest = name.partition(".")
    return {first: _nested(rest, value) if dot else value}


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
    if isinstance(value, str) and not has_type(value, known[name]):
        value = _value("", value)  # as "1e-6", which YAML files of others have
    try:
        # It takes None for "not given", and texts for numbers as YAML 1.1 has them.
        readable = has_type(value, known[name]) or not isinstance(value, (str, NoneType))
        require(readable, name, _told(known[name]), value)
        return _parser(name).parse_object({"value": value}).value
    except (ArgumentError, OverflowError, ValueError):
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
    if isinstance(value, str) and ":" in value:
        return imported(value)
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


def _environment(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"expected a section of settings, got {value!r}")
    found = dict(value)
    for name in found:
        if not isinstance(name, str):
            raise InputError(f"expected names of settings, got {name!r}")
    named = found.get("name", DEFAULT)
    if not isinstance(named, str) or (":" not in named and named not in WORLDS):
        raise InputError(f"name: expected MODULE:NAME or one of {', '.join(WORLDS)}, got {named!r}")
    if "objectives" in found:
        try:
            found["objectives"] = interval(found["objectives"])
        except InputError as error:
            raise InputError(f"objectives: {error}") from None
    return found


def interval(value: Any) -> int | tuple[int, int] | None:
    """Of 2, "2", "1-4" or [1, 4]. InputError for anything else."""
    if isinstance(value, str):
        low, dash, high = value.partition("-")
        ends = [
            int(end) if end.isascii() and end.isdecimal() else end for end in ([low, high] if dash else [low])
        ]
        value = ends if dash else ends[0]
    if has_type(value, tuple[int, int]):
        return (value[0], value[1])
    if not has_type(value, int | None):
        raise InputError(f"expected a number or an interval such as 1-4, got {value!r}")
    return value  # type: ignore[no-any-return]


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
    arguments = dict(settings)
    for name, value in settings.items():
        if is_dataclass(hints[name]):
            try:
                arguments[name] = hints[name](**value)
            except InputError as error:
                raise InputError(f"{name}.{error}") from None
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
