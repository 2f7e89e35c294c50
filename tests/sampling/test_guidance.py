from __future__ import annotations

import pytest

from magi_ray.sampling.guidance import BranchShares, branch_shares
from magi_ray.sampling.schedule import time_grid
from magi_ray.settings import RuntimeConfig

RUNTIME = RuntimeConfig()
EARLY = BranchShares(text=7.5, previous=-6.0, alone=-0.5)
LATE = BranchShares(text=0.0, previous=1.0, alone=0.0)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, EARLY), (4, EARLY), (8, EARLY), (11, EARLY), (12, LATE), (15, LATE)]
)
def test_text_and_lonely_branches_end_at_t_0_3(step: int, expected: BranchShares) -> None:
    assert branch_shares(time_grid(16)[step].item(), RUNTIME) == expected


def test_a_t_on_an_edge_belongs_to_the_upper_interval() -> None:
    runtime = RuntimeConfig(cfg_t_range=(0.0, 0.1), prev_chunk_scales=(2.0, 3.0), text_scales=(4.0, 5.0))
    on_the_edge = time_grid(16)[8].item()  # the float32 nearest to 0.1
    just_below = 0.0999999
    assert branch_shares(on_the_edge, runtime) == BranchShares(text=5.0, previous=-2.0, alone=-2.0)
    assert branch_shares(just_below, runtime) == BranchShares(text=4.0, previous=-2.0, alone=-1.0)
