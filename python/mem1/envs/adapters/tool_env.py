"""Plain Python functions as an environment: a prompt, tools that answer queries, a grade for the answer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from mem1.checks import require
from mem1.envs.adapters.session import attempt, readable
from mem1.envs.adapters.tool_calls import CallError, Function, Toolbox
from mem1.envs.base import Action, Step, require_running

Prompt = Callable[[int, Any], str | Awaitable[str]]
Grader = Callable[[str, Any], Any]
# Words of the toy's vocabulary, so that its models can read it.
MALFORMED = "malformed ; write a lookup or the answer"
MAX_MESSAGE = 200  # characters of a tool's error that are recorded


class ToolEnvironment:
    """Queries call tools, and the answer ends the episode.

        def search(query: str) -> str:
            "Passages about a subject."
            ...

        ToolEnvironment(lambda seed, task: task["question"], [search],
                        grade=lambda answer, task: float(answer == task["answer"]))

    prompt: a text, or a function of the seed and the task. tools: functions; how queries call them says
    `Toolbox`, and to the policy `describe_tools`, in a prompt. What they give is shown, as JSON if it is no
    text. grade: a function of the answer and the task that gives the reward, or a mapping with a "reward" and
    more for the last info, of which numbers must be named in `metrics`: they are 0 in the infos before.
    Without it the reward is 0. All functions may be coroutines.

    Errors of tools are told to the policy, "error: ...", and listed in the infos, in `tool_errors`: those of
    the episode so far, each with its tool, type and message. told: which are; others are raised. retryable:
    which say nothing of what the policy wrote; they are raised, and the loop makes the call again, so a tool
    that raises one must have changed nothing. A query that calls no tool is answered with what was expected,
    and counted as invalid.

    answer: what the policy has answered, None before that.
    """

    def __init__(
        self,
        prompt: str | Prompt,
        tools: Sequence[Function],
        grade: Grader | None = None,
        *,
        metrics: Sequence[str] = (),
        told: tuple[type[Exception], ...] = (Exception,),
        retryable: tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
    ) -> None:
        self._prompt, self._toolbox, self._grade = prompt, Toolbox(tools), grade
        self._unanswered = dict.fromkeys(metrics, 0.0)
        self._told, self.retryable = told, retryable
        self.answer: str | None = None
        self._task: Any = None
        self._running = False

    def reset(self, seed: int, task: Any = None) -> str | Awaitable[str]:
        self._task, self.answer, self._running = task, None, True
        self._tool_errors: list[dict[str, str]] = []
        prompt = self._prompt
        return prompt if isinstance(prompt, str) else prompt(seed, task)

    def step(self, action: Action) -> Step | Awaitable[Step]:
        require_running(self._running)
        if action.kind == "answer":
            self.answer = action.text
            grade = self._grade or (lambda answer, task: 0.0)
            return attempt(lambda: grade(action.text, self._task), self._graded)
        if action.kind == "malformed":
            return self._said(MALFORMED, invalid_action=True)
        try:
            call = self._toolbox.read(action.text)
        except CallError as error:
            return self._said(f"error: {error}", invalid_action=True)

        def failed(error: BaseException) -> Step:
            if isinstance(error, self.retryable):
                raise error
            told = {"tool": call.name, "type": type(error).__name__, "message": str(error)[:MAX_MESSAGE]}
            self._tool_errors.append({name: readable(text, name) for name, text in told.items()})
            return self._said(f"error: {call.name}: {told['type']}: {error}")

        return attempt(call.run, lambda found: self._said(_text(found)), self._told, failed)

    def _said(self, text: str, **info: Any) -> Step:
        return Step(readable(text, "tool"), info=self._info(info))

    def _info(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return self._unanswered | {"tool_errors": [*self._tool_errors]} | dict(more)

    def _graded(self, given: Any) -> Step:
        more = dict(given) if isinstance(given, Mapping) else {"reward": given}
        require("reward" in more, "grade", "a reward, or a mapping with one", given)
        reward = more.pop("reward")
        unnamed = [name for name, value in more.items() if isinstance(value, Real)]
        unnamed = [name for name in unnamed if name not in self._unanswered]
        require(not unnamed, "metrics", "a name for each number of the grade", unnamed)
        self._running = False
        return Step("", float(reward), terminated=True, info=self._info(more))


def _text(found: object) -> str:
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
