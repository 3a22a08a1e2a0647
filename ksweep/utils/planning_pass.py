"""Remember answers within one planning pass: every cell of a sweep asks the same questions of the same files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_answers: ContextVar[dict[Any, Any] | None] = ContextVar("answers", default=None)


@contextmanager
def planning_pass() -> Iterator[None]:
    """Call functions marked `once_per_pass` once for each set of arguments. Outside of a pass they read their files every time.

    A pass inside another shares its answers.
    """
    token = _answers.set({} if (outer := _answers.get()) is None else outer)
    try:
        yield
    finally:
        _answers.reset(token)


def once_per_pass(function: _Function) -> _Function:
    """Mark a function of hashable arguments that reads files; an exception is not remembered."""

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        answers = _answers.get()
        if answers is None:
            return function(*args, **kwargs)
        question = (function, args, tuple(sorted(kwargs.items())))
        if question not in answers:
            answers[question] = function(*args, **kwargs)
        return answers[question]

    return answer  # type: ignore[return-value]
