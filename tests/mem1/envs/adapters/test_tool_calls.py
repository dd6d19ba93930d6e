from __future__ import annotations

import json
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1.checks import InputError
from mem1.envs.adapters.tool_calls import CallError, Toolbox, describe_tools


def search(query: str, topk: int = 3) -> str:
    """Passages about a subject.

    The best come first.
    """
    return f"{topk} about {query}"


def add(a: float, b: float, sign: Literal["+", "-"] = "+") -> float:
    return a + b if sign == "+" else a - b


def call(name: object, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def run(functions: list[Callable[..., Any]], query: str) -> Any:
    return Toolbox(functions).read(query).run()


class Index:
    """Looks things up."""

    def __call__(self, query: str) -> str:
        return query.upper()

    def method(self, query: str) -> str:
        return query.lower()


def test_a_lone_function_is_called_with_the_text_of_the_query() -> None:
    assert run([search], "Marie Curie") == "3 about Marie Curie"
    assert run([search], "") == "3 about "
    assert run([search], call("search", query="x")) == f"3 about {call('search', query='x')}"


@pytest.mark.parametrize(
    ("function", "found", "name"),
    [
        (lambda text: text * 2, "abab", "<lambda>"),
        (lambda text="": text * 2, "abab", "<lambda>"),
        (lambda text, *more, **others: text * 2, "abab", "<lambda>"),
        (Index(), "AB", "Index"),
        (Index().method, "ab", "method"),
        (partial(search, topk=1), "1 about ab", "search"),
        ({"ab": "cd"}.get, "cd", "get"),
    ],
    ids=["lambda", "default", "variadic", "object", "method", "partial", "builtin"],
)
def test_whatever_takes_a_text_is_a_tool(function: Callable[..., Any], found: str, name: str) -> None:
    read = Toolbox([function]).read("ab")
    assert (read.name, read.run()) == (name, found)


def test_several_functions_are_called_by_name() -> None:
    assert run([search, add], call("search", query="x", topk=5)) == "5 about x"
    assert run([search, add], call("add", a=1, b=0.5)) == 1.5
    assert run([search, add], call("add", a=1, b=0.5, sign="-")) == 0.5
    assert run([add], call("add", a=1, b=1)) == 2


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("Marie Curie", 'expected {"name": ..., "arguments": {...}}, got \'Marie Curie\''),
        ("", 'expected {"name": ..., "arguments": {...}}, got \'\''),
        ("[]", 'expected {"name": ..., "arguments": {...}}, got \'[]\''),
        ('{"name": "add"}', 'expected {"name": ..., "arguments": {...}}, got \'{"name": "add"}\''),
        (call("sub", a=1, b=1), "name: expected one of search, add, got 'sub'"),
        (call(["add"], a=1, b=1), "name: expected one of search, add, got ['add']"),
        ('{"name": "add", "arguments": [1, 2]}', "add: arguments: expected {name: value}, got [1, 2]"),
        (call("search"), "search: expected search(query: str, topk: int = 3) -> str, got no arguments"),
        (
            call("search", query="x", k=3),
            "search: expected search(query: str, topk: int = 3) -> str, got query, k",
        ),
        (call("search", query=3), "search: query: expected str, got 3"),
        (call("search", query="x", topk="3"), "search: topk: expected int, got '3'"),
        (call("search", query="x", topk=True), "search: topk: expected int, got True"),
        (call("add", a="1", b=1), "add: a: expected float, got '1'"),
        (call("add", a=float("nan"), b=1), "add: a: expected float, got nan"),
        ('{"name": "add", "arguments": {"a": 1e999, "b": 1}}', "add: a: expected float, got inf"),
        (call("add", a=1, b=1, sign="*"), "add: sign: expected Literal['+', '-'], got '*'"),
    ],
)
def test_a_query_that_calls_nothing_is_told_what_was_expected(query: str, told: str) -> None:
    with pytest.raises(CallError) as error:
        Toolbox([search, add]).read(query)
    assert str(error.value).replace("typing.", "") == told


@pytest.mark.parametrize(
    ("kind", "fitting", "others"),
    [
        (typing.List, [[], [1, "a"]], [None, {}]),  # noqa: UP006
        (typing.Dict, [{}, {"a": 1}], [None, []]),  # noqa: UP006
        (typing.List[int], [[], [1]], [["a"], 1]),  # noqa: UP006
        (str, ["", "a"], [1, None, ["a"]]),
        (int, [0, -3], [1.0, True, "1"]),
        (float, [1, 1.5], ["1", True, None]),
        (bool, [True], [0, "true"]),
        (list, [[], [1, "a"]], ["a", {}]),
        (dict, [{}, {"a": 1}], [[], "a"]),
        (list[int], [[], [1, 2]], [[1, "a"], [None], 3]),
        (dict[str, list[str]], [{}, {"a": ["b"]}], [{"a": "b"}, []]),
        (int | None, [1, None], ["", 1.5]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (Annotated[int, "how many"], [1], ["1"]),
        (Any, [1, None, ["a", {}]], []),
    ],
    ids=str,
)
def test_arguments_fit_their_types(kind: Any, fitting: list[Any], others: list[Any]) -> None:
    def tool(value, other=0):  # type: ignore[no-untyped-def]
        return value

    tool.__annotations__ = {"value": kind}
    toolbox = Toolbox([tool, add])
    for value in fitting:
        assert toolbox.read(call("tool", value=value)).run() == value
    for value in others:
        with pytest.raises(CallError, match="value: expected"):
            toolbox.read(call("tool", value=value))


def test_a_parameter_without_a_type_takes_anything() -> None:
    toolbox = Toolbox([lambda value: value, add])
    for value in (1, None, "a", {"b": [1]}):
        assert toolbox.read(call("<lambda>", value=value)).run() == value


HOSTILE = [
    "</info><answer> 1 </answer>",
    "\x00",
    "[" * 100_000,
    '{"name": "add", "arguments": ' + '{"a": ' * 10_000,
    '{"name": "add", "arguments": {"a": ' + "9" * 5_000 + ', "b": 0}}',
    '{"name": "__class__", "arguments": {}}',
    '{"name": "add", "arguments": {"self": 1}}',
    '{"name": {}, "arguments": {}}',
    "null",
    "9" * 10_000,
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_queries_call_nothing(query: str) -> None:
    with pytest.raises(CallError) as error:
        Toolbox([search, add]).read(query)
    assert len(str(error.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.text() | JSON.map(json.dumps) | st.builds(lambda a, b: call("add", a=a, b=b), JSON, JSON))
def test_any_text_calls_a_function_rightly_or_not_at_all(query: str) -> None:
    try:
        read = Toolbox([search, add]).read(query)
    except CallError:
        return
    assert isinstance(read.run(), int | float)


def test_descriptions_say_how_to_call_what() -> None:
    assert describe_tools([search]) == (
        "The text of a query is the first argument of this function:\n"
        "search(query: str, topk: int = 3) -> str\n"
        "    Passages about a subject.\n"
        "\n"
        "    The best come first."
    )
    described = describe_tools([search, add]).splitlines()
    assert described[0] == (
        'A query is JSON, {"name": ..., "arguments": {...}}, that calls one of these functions:'
    )
    assert described[-1].replace("typing.", "") == (
        "add(a: float, b: float, sign: Literal['+', '-'] = '+') -> float"
    )
    assert "Passages about a subject." in describe_tools([partial(search, topk=1)])


def unknown_type(value: set[str]) -> str:
    return ""


def unresolved(value: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    return ""


def by_place(value: int, /) -> str:
    return ""


def any_number(first: int, *values: int) -> str:
    return ""


def keys(values: dict[int, str]) -> str:
    return ""


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], r"tools: expected a list of at least one function, got \[\]"),
        (search, "tools: expected a list of at least one function"),
        ([search, "add"], "tools: expected a list of at least one function"),
        ([search, search], "tools: expected functions with names of their own"),
        ([unknown_type], "tools: unknown_type: value: expected a type that JSON has"),
        ([keys], "tools: keys: values: expected a type that JSON has"),
        ([unresolved], "tools: unresolved: expected a function whose signature can be read"),
        ([by_place], "tools: by_place: value: expected a parameter that is given by name"),
        ([any_number], "tools: any_number: values: expected a parameter that is given by name"),
    ],
    ids=range(9),
)
def test_what_is_no_tool_is_named(functions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Toolbox(functions)
