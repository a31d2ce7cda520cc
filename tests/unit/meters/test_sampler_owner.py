"""A sampler's owner at the other end of a pipe."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lem.meters.sampler import PipeOwner

FOREVER_NS = 2**62


@dataclass
class Pipes:
    """Both ends of an owner's pipes."""

    orders: int
    wakeup: int
    owner: PipeOwner

    def write(self, data: bytes) -> None:
        os.write(self.orders, data)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    orders, orders_writer = os.pipe()
    wakeup, wakeup_writer = os.pipe()
    yield Pipes(orders_writer, wakeup_writer, PipeOwner(orders, wakeup))
    for descriptor in (orders, wakeup, orders_writer, wakeup_writer):
        os.close(descriptor)


def test_each_line_is_an_order(pipes: Pipes) -> None:
    pipes.write(b"interval 50\ninterval 20\n")
    assert pipes.owner.wait(FOREVER_NS) == ["interval 50", "interval 20"]


def test_a_line_that_comes_in_pieces_is_one_order(pipes: Pipes) -> None:
    pipes.write(b"interval 1")
    assert pipes.owner.wait(FOREVER_NS) == []
    pipes.write(b"00\ninter")
    assert pipes.owner.wait(FOREVER_NS) == ["interval 100"]
    pipes.write(b"val 7\n")
    assert pipes.owner.wait(FOREVER_NS) == ["interval 7"]


def test_without_an_order_the_wait_ends_at_its_time_and_not_before(pipes: Pipes) -> None:
    until_ns = time.monotonic_ns() + 20_000_000
    assert pipes.owner.wait(until_ns) == ()
    assert time.monotonic_ns() >= until_ns - 1_000_000  # select(2) counts in whole microseconds
    assert pipes.owner.wait(0) == ()  # long past


def test_bytes_that_are_no_text_are_an_order_that_nobody_understands(pipes: Pipes) -> None:
    pipes.write(b"\xff\n")
    assert pipes.owner.wait(FOREVER_NS) == ["\ufffd"]


def test_a_signal_ends_it_before_any_order(pipes: Pipes) -> None:
    pipes.write(b"interval 50\n")
    os.write(pipes.wakeup, b"\x0f")
    assert pipes.owner.wait(FOREVER_NS) is None


def test_the_end_of_the_pipe_ends_it(pipes: Pipes) -> None:
    pipes.write(b"interval 50\n")
    os.dup2(pipes.wakeup, pipes.orders)  # closes the only end that could write orders
    assert pipes.owner.wait(FOREVER_NS) == ["interval 50"]
    assert pipes.owner.wait(FOREVER_NS) is None
