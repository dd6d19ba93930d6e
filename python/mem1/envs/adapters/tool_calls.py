"""Python functions as tools: how they are described to the policy, and how its queries call them."""

from __future__ import annotations

import inspect
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from mem1.checks import InputError, has_type, require

Function = Callable[..., Any]
_SYNTAX = '{"name": ..., "arguments": {...}}'
_EMPTY = inspect.Parameter.empty
_FREE = (_EMPTY, Any)
_PLAIN = (str, int, float, bool, NoneType, list, dict)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class CallError(ValueError):
    """A query that calls no tool; the message is for the policy."""


class Call(NamedTuple):
    """A query as a call: `run()` gives what the function gives."""

    name: str
    run: Callable[[], Any]


class Toolbox:
    """Functions that queries can call.

    A lone function that takes a text, its other parameters having defaults, is called with the text of the
    query. All others are called by a query that is JSON, `{"name": ..., "arguments": {...}}`, whose arguments
    fit the types of the signature: str, int, float (an int is one, too), bool, None, list[...],
    dict[str, ...], Literal, unions of these, Any and no type at all. InputError for two functions of one
    name, a signature that cannot be read, parameters of other types or that cannot be given by name.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        sound = isinstance(functions, Sequence) and len(functions) > 0 and all(map(callable, functions))
        require(sound, "tools", "a list of at least one function", functions)
        self._signatures = {_name(function): (function, _signature(function)) for function in functions}
        names = [_name(function) for function in functions]
        require(len(self._signatures) == len(names), "tools", "functions with names of their own", names)
        lone, signature = self._signatures[names[0]]
        self._lone = lone if len(names) == 1 and _takes_text(signature) else None
        for name, (_, signature) in self._signatures.items() if self._lone is None else ():
            _check_parameters(name, signature)

    def read(self, query: str) -> Call:
        """The call that a query makes; CallError if it makes none."""
        if self._lone is not None:
            return Call(_name(self._lone), partial(self._lone, query))
        try:
            asked = json.loads(query)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict) or asked.keys() != {"name", "arguments"}:
            raise CallError(f"expected {_SYNTAX}, got {reprlib.repr(query)}")
        name, arguments = asked["name"], asked["arguments"]
        if not isinstance(name, str) or name not in self._signatures:
            raise CallError(f"name: expected one of {', '.join(self._signatures)}, got {reprlib.repr(name)}")
        function, signature = self._signatures[name]
        _check_arguments(name, signature, arguments)
        return Call(name, partial(function, **arguments))

    def describe(self) -> str:
        """What a prompt says of the tools: how a query calls them; each signature and docstring."""
        lines = [f"A query is JSON, {_SYNTAX}, that calls one of these functions:"]
        if self._lone is not None:
            lines = ["The text of a query is the first argument of this function:"]
        for name, (function, signature) in self._signatures.items():
            about = inspect.getdoc(_whole(function)) or ""
            lines += [f"{name}{signature}", *(f"    {line}".rstrip() for line in about.splitlines())]
        return "\n".join(lines)


def describe_tools(tools: Sequence[Function]) -> str:
    """A text for prompts: how queries call the tools, then the signature and docstring of each. InputError
    for what is no tool (`Toolbox`).
    """
    return Toolbox(tools).describe()


def _whole(function: Function) -> Function:
    """What has the name and the docstring of a function of which some arguments are given."""
    return _whole(function.func) if isinstance(function, partial) else function


def _name(function: Function) -> str:
    whole = _whole(function)
    return str(getattr(whole, "__name__", type(whole).__name__))


def _signature(function: Function) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError) as error:
        expected = "a function whose signature can be read"
        raise InputError(f"tools: {_name(function)}: expected {expected}, got {error}") from None


def _takes_text(signature: inspect.Signature) -> bool:
    """Whether a call with one text, given by place, is all that is needed."""
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in _BY_PLACE:
        return False
    optional = [one.default is not _EMPTY or one.kind in _VARIADIC for one in parameters[1:]]
    return parameters[0].annotation in (str, *_FREE) and all(optional)


def _check_parameters(name: str, signature: inspect.Signature) -> None:
    for parameter in signature.parameters.values():
        where = f"tools: {name}: {parameter.name}"
        require(parameter.kind in _BY_NAME, where, "a parameter that is given by name", str(parameter))
        require(_supported(parameter.annotation), where, "a type that JSON has", str(parameter))


def _supported(kind: Any) -> bool:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return all(type(value) in _PLAIN for value in arguments)
    if origin is Annotated:
        return _supported(arguments[0])
    if origin is dict and arguments:
        return arguments[0] is str and _supported(arguments[1])
    if origin in (list, Union, UnionType):
        return all(map(_supported, arguments))
    return origin in _FREE or origin in _PLAIN


def _check_arguments(name: str, signature: inspect.Signature, given: object) -> None:
    parameters = signature.parameters
    if not isinstance(given, Mapping):
        raise CallError(f"{name}: arguments: expected {{name: value}}, got {reprlib.repr(given)}")
    missing = [key for key, one in parameters.items() if one.default is _EMPTY and key not in given]
    if missing or not given.keys() <= parameters.keys():
        raise CallError(f"{name}: expected {name}{signature}, got {', '.join(given) or 'no arguments'}")
    for key, value in given.items():
        kind = parameters[key].annotation
        if kind is not _EMPTY and not (has_type(value, kind) and _is_finite(value)):
            expected = inspect.formatannotation(kind)
            raise CallError(f"{name}: {key}: expected {expected}, got {reprlib.repr(value)}")


def _is_finite(value: object) -> bool:
    """Python's JSON has NaN and infinity, and no other."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
