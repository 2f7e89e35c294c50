"""Several machines: one is lost, one is rotten. Both are raylets on this machine, killed as a spot node is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from on_ray import processes_with, wait_until
from runs import MakeRun, contents

from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.scheduler import ROWS_FAILED_ON_BAD_NODE
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore

PROGRAM = Path(__file__).with_name("on_two_nodes.py")
ROWS: list[dict[str, Any]] = [
    {"job_id": name, "prompt": prompt, "num_chunks": 3}
    for name, prompt in {"a": "sea", "b": "storm", "c": "dusk", "d": "sails"}.items()
]


@pytest.fixture
def on_two_nodes(
    make_run: MakeRun, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]]:
    """Render rows there: how it ended, what they became, and what they become undisturbed."""

    def render(case: str, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]:
        undisturbed, store, mark = MemoryStore(), LocalStore(tmp_path / "store"), uuid.uuid4().hex
        render_locally(undisturbed, make_run(undisturbed, rows))
        run = make_run(store, rows)
        ended = subprocess.run(
            [sys.executable, str(PROGRAM), case, str(store.root), run.run_id, str(tmp_path)],
            env={**os.environ, "MAGI_RAY_TEST_MARK": mark},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        if case == "raylet":
            # Its worker may outlive it: it sees no death of its parent where orphans go to another than process 1.
            for process in processes_with("MAGI_RAY_TEST_MARK", mark, title="ray::"):
                process.kill()
        wait_until(lambda: not processes_with("MAGI_RAY_TEST_MARK", mark), "nothing of the cluster is left")
        return json.loads((tmp_path / "end.json").read_text()), contents(store, run), contents(undisturbed, run)

    return render


def attempts(folder: Path) -> list[tuple[str, str]]:
    """(row, node) of every attempt, in their order."""
    return [(row, node) for row, node in (line.split() for line in (folder / "attempts").read_text().splitlines())]


def test_a_node_that_is_lost_in_mid_stage_costs_no_byte(on_two_nodes: Callable[..., Any], tmp_path: Path) -> None:
    end, found, expected = on_two_nodes("raylet", ROWS[:1])
    assert end == {"published": ["a"], "failed": []}
    assert found == expected
    (_, first), (_, second) = attempts(tmp_path)
    assert first != second
    died, went_on = (float((tmp_path / name).read_text()) for name in ("died", "went-on"))
    print(f"lost node: work went on after {went_on - died:.1f} s")


def test_a_row_is_never_tried_twice_on_one_node(on_two_nodes: Callable[..., Any], tmp_path: Path) -> None:
    end, found, expected = on_two_nodes("node", ROWS)
    assert end == {"published": ["a", "b", "c", "d"], "failed": []}
    assert found == expected
    made = attempts(tmp_path)
    assert len(made) == len(set(made)), "a row was tried twice on one node"
    bad = (tmp_path / "bad-node").read_text()
    assert 1 <= len([row for row, node in made if node == bad]) <= ROWS_FAILED_ON_BAD_NODE
