"""The lookout: output is shipped while it is written, and one attempt's trouble stays its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import anyio
import pytest

from flowagent.daemon.lookout import Lookout, rest
from flowagent.daemon.shipping import Shipper
from flowagent.errors import LeaseLostError

pytestmark = pytest.mark.anyio


class FakeShipper:
    """Has ``left`` pieces to ship, each of which takes ``seconds``."""

    def __init__(self, left: int = 0, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.left, self.seconds, self.error = left, seconds, error
        self.shipped: list[float] = []
        self.under_way = 0

    def behind(self) -> bool:
        return self.left > 0

    async def pump(self) -> bool:
        self.under_way += 1
        assert self.under_way == 1
        await anyio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.left -= 1
        self.shipped.append(time.monotonic())
        self.under_way -= 1
        return True


def shipper(*arguments: object) -> tuple[FakeShipper, Shipper]:
    fake = FakeShipper(*arguments)  # type: ignore[arg-type]
    return fake, cast(Shipper, fake)


@asynccontextmanager
async def running() -> AsyncIterator[Lookout]:
    lookout = Lookout()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lookout.run)
        await anyio.sleep(0.3)  # it has nothing to look at, and sleeps
        yield lookout
        tasks.cancel_scope.cancel()


async def test_output_is_shipped_while_it_is_written() -> None:
    fake, real = shipper(3)
    async with running() as lookout:
        with anyio.fail_after(5), lookout.watching(real) as watched:
            began = time.monotonic()
            while fake.left:
                await anyio.sleep(0.001)
            assert fake.shipped[0] - began < 0.2  # not at the end of a long pause
            await anyio.sleep(0.5)
            assert len(fake.shipped) == 3
            fake.left = 1  # after a silence
            while fake.left:
                await anyio.sleep(0.001)
        await rest(watched)
        fake.left = 1
        await anyio.sleep(0.4)
        assert fake.left == 1  # it is watched no longer


async def test_slow_shipping_keeps_nobody_else_waiting() -> None:
    slow, real_slow = shipper(1, 0.5)
    quick, real_quick = shipper(2)
    async with running() as lookout:
        with lookout.watching(real_slow) as watched, lookout.watching(real_quick):
            with anyio.fail_after(5):
                while quick.left:
                    await anyio.sleep(0.001)
            assert slow.shipped == []
        await rest(watched)
        assert slow.left == 0  # what was under way has been waited for


@pytest.mark.parametrize("error", [LeaseLostError("lost"), ZeroDivisionError()])
async def test_what_goes_wrong_ends_the_watching_of_that_attempt_only(error: Exception) -> None:
    _, real_broken = shipper(1, 0.0, error)
    good, real_good = shipper(1)
    async with running() as lookout:
        with anyio.fail_after(5):
            with lookout.watching(real_broken) as watched:
                await anyio.sleep_forever()
            with pytest.raises(type(error)):
                await rest(watched)
            with lookout.watching(real_good):
                while good.left:
                    await anyio.sleep(0.001)
