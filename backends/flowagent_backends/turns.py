"""Equal questions of many, asked once, and never answered with what was on its way before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


@dataclass
class _Turn(Generic[T]):
    """A question that is being asked. Without an answer and an error at its end, nobody knows yet."""

    number: int
    ended: anyio.Event = field(default_factory=lambda: anyio.Event())
    answers: list[T] = field(default_factory=list)
    error: Exception | None = None


class Turns(Generic[T]):
    """Who asks while the same question is under way waits for the next turn, together with all others that
    do: a hundred runs that begin at once ask twice, and each learns what was true after it began."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, _Turn[T]] = {}
        self._number = 0

    async def ask(self, question: Hashable, find: Callable[[], Awaitable[T]]) -> T:
        """What ``find`` returns or raises, here or for another that asked the same."""
        self._number += 1
        asked = self._number
        while (turn := self._under_way.get(question)) is not None:
            await turn.ended.wait()
            if turn.number > asked:
                if turn.error is not None:
                    raise turn.error
                if turn.answers:
                    return turn.answers[0]
        return await self._lead(question, find)

    async def _lead(self, question: Hashable, find: Callable[[], Awaitable[T]]) -> T:
        self._number += 1
        turn = self._under_way[question] = _Turn[T](self._number)
        try:
            turn.answers.append(await find())
        except Exception as error:
            turn.error = error
            raise
        finally:
            del self._under_way[question]
            turn.ended.set()
        return turn.answers[0]
