"""Wrapping and replacing functions of another program, here of a module made up for it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from engines.host import seams

NAME = "a_program_of_somebody_else"


@pytest.fixture
def program() -> Iterator[Any]:
    class Thing:
        def double(self, number: int) -> int:
            if number < 0:
                raise ValueError
            return 2 * number

        async def wait(self, number: int) -> int:
            return number

    module = types.ModuleType(NAME)
    module.Thing = Thing  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    yield module
    del sys.modules[NAME]


def test_what_is_missing_is_named(program: Any) -> None:
    wanted = ((NAME, "Thing.double"), (NAME, "Thing.triple"), (NAME, "Nothing.at.all"), ("no_such_module", "x"))
    assert seams.missing(wanted) == (f"{NAME}.Thing.triple", f"{NAME}.Nothing.at.all", "no_such_module.x")


def test_actions_come_before_and_after_with_the_same_arguments(program: Any) -> None:
    heard: list[tuple[str, int]] = []
    seams.before((NAME, "Thing.double"), lambda _self, number: heard.append(("before", number)))
    seams.after((NAME, "Thing.double"), lambda _self, number: heard.append(("after", number)))
    assert program.Thing().double(4) == 8
    assert heard == [("before", 4), ("after", 4)]


def test_nothing_comes_after_a_failure(program: Any) -> None:
    heard: list[int] = []
    seams.after((NAME, "Thing.double"), lambda _self, number: heard.append(number))
    with pytest.raises(ValueError):
        program.Thing().double(-1)
    assert heard == []


async def test_after_a_coroutine_means_when_it_has_returned(program: Any) -> None:
    heard: list[int] = []
    seams.after_await((NAME, "Thing.wait"), lambda _self, number: heard.append(number))
    waiting = program.Thing().wait(7)
    assert heard == []
    assert await waiting == 7
    assert heard == [7]


def test_a_substitute_takes_the_place_of_a_method_or_of_a_whole_attribute(program: Any) -> None:
    seams.replace((NAME, "Thing.double"), lambda _self, number: number)
    assert program.Thing().double(4) == 4
    seams.replace((NAME, "Thing"), 5)
    assert program.Thing == 5
