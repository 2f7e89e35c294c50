"""Hundreds of runs under faults drawn from a seed; ``python -m tests.simulation`` runs more of them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from simulation.play import Result, simulate
from simulation.server import Server

from magi_ray.render.driving import session
from magi_ray.storage import leases, records, retrying
from magi_ray.storage.records import verified_commit

SEEDS, SEEDS_PER_TEST = 500, 25


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_every_promise_is_kept_whatever_goes_wrong(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        result = simulate(seed)
        assert not result.wrong, "\n".join([*result.trace[-40:], result.wrong])


def test_one_seed_gives_one_trace_in_any_process() -> None:
    here = [f"{seed} {simulate(seed).digest}" for seed in range(8)]
    assert here == [f"{seed} {simulate(seed).digest}" for seed in range(8)]
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-m", "tests.simulation", "--seeds", "8", "--digests"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert there.stdout.split("\n")[:-1] == here


def test_faults_of_every_kind_are_met() -> None:
    lines = "\n".join(line for seed in range(40) for line in simulate(seed).trace)
    for fate in (
        "refused",
        "lost",
        "late",
        "torn",
        "stalls",
        "dies",
        "takes over",
        "pause",
        "is struck by",
        "gives up",
    ):
        assert fate in lines, fate


# A simulation that cannot fail shows nothing ------------------------------------------------------------------------


def first_violation(within: int = 400) -> Result:
    for seed in range(within):
        result = simulate(seed)
        if result.wrong:
            return result
    pytest.fail(f"{within} seeds, and nothing was noticed")


def test_it_notices_commits_that_are_replaced() -> None:
    def put_anyway(self: Server, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True

    with patch.object(Server, "put_if_absent", put_anyway):
        assert first_violation().wrong


def test_it_notices_an_inventory_that_is_off_by_one() -> None:
    whole = session.take_inventory_of_run

    def one_less(*args: Any, **named: Any) -> Any:
        return [replace(row, stages_done=max(0, row.stages_done - 1)) for row in whole(*args, **named)]

    with patch.object(session, "take_inventory_of_run", one_less):
        assert "inventory" in first_violation().wrong


def test_it_notices_a_writer_that_mistakes_its_own_commit_for_anothers() -> None:
    def never_ours(self: retrying.RetryingStore, key: str, data: bytes) -> bool:
        return self._retried(lambda: self.inner.put_if_absent(key, data))

    def somebodys(*args: Any) -> Any:
        found = verified_commit(*args)
        return found and found.model_copy(update={"write_id": "somebody's"})

    with (
        patch.object(retrying.RetryingStore, "put_if_absent", never_ours),
        patch.object(records, "verified_commit", somebodys),
    ):
        assert "deletes" in first_violation().wrong


def test_it_notices_leases_that_are_taken_too_early() -> None:
    with patch.object(leases, "TTL_S", 1.5):
        assert first_violation().wrong
