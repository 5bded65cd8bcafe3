"""Few links for many peers: never over the limit, first come first served, nobody starves."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transfer_endpoint import WAIT_SECONDS

from tandem.transfer import LinkBudget


class Link:
    """Gives its place back as soon as it is asked, if it is willing."""

    def __init__(self, budget: LinkBudget, willing: bool = True) -> None:
        self.asked = threading.Event()
        self._budget, self._willing = budget, willing

    def give_way(self) -> None:
        self.asked.set()
        if self._willing:
            self._budget.release(self)


def acquire_in_thread(
    budget: LinkBudget, link: Link, wanted: Callable[[], bool] = lambda: True
) -> tuple[threading.Thread, list[bool]]:
    """A thread that waits for a place, and, once it has ended, what it was told."""
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(budget.acquire(link, wanted)))
    thread.start()
    return thread, answer


def test_the_link_that_has_been_idle_longest_gives_way() -> None:
    budget = LinkBudget(3)
    links = [Link(budget) for _ in range(3)]
    for link in links:
        assert budget.acquire(link, lambda: True)
    for index in (1, 0, 2):
        budget.set_idle(links[index], True)
    budget.set_idle(links[1], False)
    assert budget.acquire(Link(budget), lambda: True)
    assert [link.asked.is_set() for link in links] == [True, False, False]
    assert budget.num_open == 3


def test_a_busy_link_is_asked_only_after_its_turn_and_an_idle_one_is_preferred() -> None:
    budget = LinkBudget(1, turn_seconds=1000)
    busy = Link(budget)
    assert budget.acquire(busy, lambda: True)
    thread, answer = acquire_in_thread(budget, Link(budget))
    assert not busy.asked.is_set()
    budget.set_idle(busy, True)
    thread.join(WAIT_SECONDS)
    assert busy.asked.is_set()
    assert answer == [True]


def test_a_busy_link_whose_turn_is_over_gives_way() -> None:
    budget = LinkBudget(1, turn_seconds=0.01)
    busy = Link(budget)
    assert budget.acquire(busy, lambda: True)
    assert budget.acquire(Link(budget), lambda: True)
    assert busy.asked.is_set()


def test_who_no_longer_wants_a_place_stops_waiting_and_lets_the_next_one_have_it() -> None:
    budget = LinkBudget(1, turn_seconds=1000)
    holder = Link(budget, willing=False)
    assert budget.acquire(holder, lambda: True)
    waiting, gone = threading.Event(), threading.Event()

    def wanted() -> bool:
        waiting.set()
        return not gone.is_set()

    first, first_answer = acquire_in_thread(budget, Link(budget), wanted)
    assert waiting.wait(WAIT_SECONDS)
    second, second_answer = acquire_in_thread(budget, Link(budget))
    gone.set()
    budget.wake()
    first.join(WAIT_SECONDS)
    assert first_answer == [False]
    budget.release(holder)
    second.join(WAIT_SECONDS)
    assert second_answer == [True]
    assert (budget.num_open, budget.num_waiting) == (1, 0)
