"""What cannot fit is refused before weights are loaded; the estimate is an upper one, and not by far."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import MakeRun

from magi_ray.errors import SettingsError
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.memory import GIB, available, estimate, require
from magi_ray.settings import Settings, override, preset
from magi_ray.storage.memory import MemoryStore


@pytest.fixture
def plan(make_run: MakeRun) -> RowPlan:
    return make_run(MemoryStore(), [{"job_id": "a", "prompt": "sea", "num_chunks": 8}]).plans["a"]


def test_magi_tiny_fits_here(plan: RowPlan, settings: Settings) -> None:
    assert estimate(plan).total < GIB < available(settings)
    require([plan], available(settings))


def test_a_run_that_does_not_fit_is_told_with_both_numbers(plan: RowPlan) -> None:
    need = estimate(plan).total
    require([plan], need)
    with pytest.raises(SettingsError, match=r"Row 1 \(job a\), 32×32 .* needs some \d+\.\d GiB .* cpu has 0\.0 GiB"):
        require([plan], need - 1)


def test_the_estimate_does_not_grow_with_a_videos_length_but_with_its_size(plan: RowPlan, make_run: MakeRun) -> None:
    row = {"job_id": "a", "prompt": "sea", "num_chunks": 8}
    longer = make_run(MemoryStore(), [row | {"num_chunks": 500}]).plans["a"]
    larger = make_run(MemoryStore(), [row | {"width": 64}]).plans["a"]
    assert estimate(longer) == estimate(plan)
    assert estimate(larger).cache == 2 * estimate(plan).cache
    assert estimate(larger).forward == 2 * estimate(plan).forward


def test_the_24b_model_at_720p_needs_what_its_parameters_say(plan: RowPlan, settings: Settings) -> None:
    published = preset("24B", weights=_empty_download(settings))
    sized = plan.settings.model_copy(
        update={"model": published.model, "runtime": published.runtime, "engine": published.engine}
    )
    need = estimate(replace(plan, settings=sized, controls={}))
    assert 44 * GIB < need.dit < 52 * GIB  # 24 billion parameters in bfloat16, some in float32
    # spec §5: no more than one clean chunk is seen: 21,600 tokens of 48 layers, keys and values of 8 × 128 in bfloat16.
    assert need.cache == 21600 * 48 * 2 * 8 * 128 * 2
    with pytest.raises(SettingsError, match="DiT 4"):
        require([replace(plan, settings=sized, controls={})], 24 * GIB)


def _empty_download(settings: Settings) -> Path:
    return settings.weights.vae.parent


_MEASURE = """
import json
from pathlib import Path
import torch
from magi_ray.models.dit.model import DiT
from magi_ray.sampling.sampler import Sampler, drive
from magi_ray.sampling.state import WindowState
from magi_ray.settings import EngineConfig, ModelConfig, RuntimeConfig
from magi_ray.timeline import Timeline

torch.set_num_threads(1)
config = ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=8, num_query_groups=4,
                     kv_channels=32, params_dtype="torch.float32", caption_channels=16, x_rescale_factor=1.0)
runtime = RuntimeConfig(num_steps=4, video_size_h=256, video_size_w=256)
torch.manual_seed(0)
model = DiT(config, attention="sdpa").requires_grad_(False)
for p in model.parameters():
    p.normal_(std=0.02)
def peak(size):
    timeline = Timeline(num_chunks=5, window_size=4)
    sampler = Sampler(timeline=timeline, runtime=runtime, engine=EngineConfig(),
                      captions=lambda chunk: torch.zeros(4, 16), null_caption=torch.zeros(50, 16),
                      noise=lambda chunk: torch.randn(1, 16, 6, size, size))
    cache = model.new_cache(depth=sampler.cache_depth, height=size, width=size)
    assert not list(sampler.start(WindowState(stage=0, latents={}), {}))
    for stage in range(6):
        for _ in drive(sampler.run_stage(stage), lambda forward: model(forward, cache)):
            pass
    # Not ru_maxrss: that begins with what the parent had when it forked.
    [line] = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')]
    return int(line.split()[1]) * 1024
before = peak(4)
print(json.dumps(peak(32) - before))
"""


def test_a_forward_takes_no_more_than_estimated_and_no_less_than_a_third_of_it(plan: RowPlan) -> None:
    ended = subprocess.run([sys.executable, "-c", _MEASURE], check=True, capture_output=True, text=True, timeout=300)
    measured = json.loads(ended.stdout)
    model = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 1024, "num_query_groups": 4, "kv_channels": 32,
             "gated_linear_unit": False, "half_channel_vae": False, "in_channels": 16, "out_channels": 16}  # fmt: skip
    sized = override(plan.settings, {"model": model, "runtime": {"video_size_h": 256, "video_size_w": 256}})
    need = estimate(replace(plan, settings=sized))
    estimated = need.cache + need.forward
    assert estimated / 3 <= measured <= estimated, (measured / 2**20, estimated / 2**20)
