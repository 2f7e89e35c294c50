"""The six published variants, tiny: each from a checkpoint in a published form, by a config in the published form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from click.testing import CliRunner
from runs import MakeRun
from torch import Tensor

from magi_ray.cli import cli
from magi_ray.manifest import write_manifest
from magi_ray.models.files import published_folder, weight_files
from magi_ray.models.tiny import make_tiny
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import open_run
from magi_ray.settings import override, published
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.store import Store

# The only values that differ from those of the published files, but for where the files lie.
SIZES = {
    "model_config": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4,
        "kv_channels": 16, "caption_channels": 64,
    },
    "runtime_config": {"num_frames": 48, "video_size_h": 32, "video_size_w": 48},
    "engine_config": {"pp_size": 1, "cp_size": 1},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published variant, and in which form its tiny checkpoint is stored."""

    large: bool
    distill: bool = False
    fp8: bool = False
    dtype: str = "torch.float32"
    shards: int = 1
    compress: bool = False

    @property
    def name(self) -> str:
        return ("24B" if self.large else "4.5B") + "_distill" * self.distill + "_quant" * self.fp8

    def config(self) -> dict[str, dict[str, Any]]:
        """The content of its published file, whole (spec §1)."""
        large = self.large
        return {
            "model_config": {
                "model_name": "videodit_ardf",
                "num_layers": 48 if large else 34,
                "hidden_size": 6144 if large else 3072,
                "ffn_hidden_size": 16384 if large else 12288,
                "num_attention_heads": 48 if large else 24,
                "num_query_groups": 8,
                "kv_channels": 128,
                "layernorm_epsilon": 1e-06,
                "apply_layernorm_1p": True,
                "x_rescale_factor": 0.1 if large else 1,
                "half_channel_vae": large,
                "params_dtype": "torch.bfloat16",
                "patch_size": 2,
                "t_patch_size": 1,
                "in_channels": 32 if large else 16,
                "out_channels": 32 if large else 16,
                "cond_hidden_ratio": 0.25,
                "caption_channels": 4096,
                "caption_max_length": 800,
                "xattn_cond_hidden_ratio": 1.0,
                "cond_gating_ratio": 1.0,
                "gated_linear_unit": large,
            },
            "runtime_config": {
                "cfg_number": 1 if self.distill else 3,
                "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
                "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
                "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
                "noise2clean_kvrange": [5, 4, 3, 2],
                "clean_chunk_kvrange": 1,
                "clean_t": 0.9999,
                "seed": 1234,
                "num_frames": 96,
                "video_size_h": 720,
                "video_size_w": 1280 if large else 720,
                "num_steps": (16 if self.distill else 32) if large else 64,
                "window_size": 4,
                "fps": 24,
                "chunk_width": 6,
                "load": f"./downloads/{self.name}",
                "t5_pretrained": "./downloads/t5_pretrained",
                "t5_device": "cuda" if large else "cpu",
                "vae_pretrained": "./downloads/vae",
                "scale_factor": 0.18215,
                "temporal_downsample_factor": 4,
            },
            "engine_config": {
                "distributed_backend": "nccl",
                "distributed_timeout_minutes": 15,
                "pp_size": 2 if self.fp8 and large else 1,
                "cp_size": (4 if self.fp8 else 8) if large else 1,
                "cp_strategy": "cp_shuffle_overlap" if large else "cp_ulysses",
                "ulysses_overlap_degree": 1,
                "fp8_quant": self.fp8,
                "distill_nearly_clean_chunk_threshold": 0.3,
                "shortcut_mode": "8,16,16",
                "distill": self.distill,
                "kv_offload": True,
                "enable_cuda_graph": False,
            },
        }


VARIANTS = [
    Variant(large=True, shards=3),
    Variant(large=True, distill=True, dtype="torch.bfloat16", shards=2, compress=True),
    Variant(large=True, distill=True, fp8=True, dtype="torch.bfloat16"),
    Variant(large=False, compress=True),
    Variant(large=False, distill=True, dtype="torch.bfloat16", shards=2),
    Variant(large=False, distill=True, fp8=True, shards=3, compress=True),
]

Written = Callable[[Variant], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The config file of a variant, reduced, beside its checkpoint."""
    root = tmp_path_factory.mktemp("variants")

    def write(variant: Variant) -> Path:
        path, weights = root / f"{variant.name}_config.json", root / variant.name
        if not path.is_file():
            content = {section: values | SIZES[section] for section, values in variant.config().items()}
            content["model_config"]["params_dtype"] = variant.dtype
            content["runtime_config"] |= {
                "load": str(weights / "magi"),
                "vae_pretrained": str(weights / "vae"),
                "t5_pretrained": str(weights / "t5"),
            }
            path.write_text(json.dumps(content, indent=4))
            make_tiny(weights, published(path), shards=variant.shards, compress=variant.compress)
        return path

    return write


def clean_latents(store: Store, run_id: str) -> Tensor:
    """Of the only video of a run: [1, 16, T, h, w] float32."""
    (plan,) = open_run(store, run_id).plans.values()
    chunks = range(plan.timeline.num_chunks)
    return torch.cat([load_clean_chunk(store, plan, chunk) for chunk in chunks], dim=2)


def frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_published_variant_is_submitted_with_its_config_altered_only_in_sizes(
    variant: Variant, written: Written, tmp_path: Path
) -> None:
    config = written(variant)
    write_manifest([{"job_id": "sea", "prompt": "waves at night"}], tmp_path / "m.parquet")
    words = ["submit", str(tmp_path / "m.parquet"), "--config", str(config), "--store", str(tmp_path / "store")]

    result = CliRunner().invoke(cli, [*words, "--local"])

    assert result.exit_code == 0, result.output
    (video,) = (tmp_path / "store").rglob("sea.mp4")
    assert frames(video) == 48
    latents = clean_latents(LocalStore(tmp_path / "store"), video.parents[1].name)
    assert latents.shape[2] == 12
    assert latents.isfinite().all()
    assert 0.1 < latents.std() < 10


def test_the_checkpoints_of_these_tests_have_every_published_form(written: Written) -> None:
    names = set()
    for variant in VARIANTS:
        dit = published(written(variant)).weights.dit
        names |= {f.name for f in weight_files(published_folder(dit, fp8=variant.fp8, distill=variant.distill))}
    assert {"model.safetensors", "model.safetensors.zst"} <= names
    assert {"model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors.zst"} <= names


@pytest.mark.parametrize("num_steps", [8, 12])
@pytest.mark.parametrize("shortcut_mode", ["8,16,16", "16,16,8"])
@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[5]], ids=lambda variant: variant.name)
def test_a_distilled_model_needs_few_steps(
    variant: Variant, num_steps: int, shortcut_mode: str, written: Written, make_run: MakeRun
) -> None:
    changes = {"runtime": {"num_steps": num_steps}, "engine": {"shortcut_mode": shortcut_mode}}
    settings = override(published(written(variant)), changes)
    store = MemoryStore()
    run = make_run(store, [{"job_id": "sea", "prompt": "waves"}], settings=settings)

    assert render_locally(store, run).published == ("sea",)
    assert clean_latents(store, run.run_id).isfinite().all()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |a − b| / max |b|."""
    return float((found - expected).abs().max() / expected.abs().max())


# bfloat16 keeps 8 bits, so each rounding moves a value by up to 2⁻⁹ ≈ 0.002 of itself. A step adds v · (t_next − t) to
# float32 latents, so the roundings of the forwards (four layers, three branches whose differences guidance multiplies
# by up to 7.5) average out over the steps rather than pile up: 0.006 to 0.018 was found over both architectures, base
# and distilled, and two seeds. The bound is twice that.
BFLOAT16_DISTANCE = 0.036
# e4m3 keeps 4 bits: up to 2⁻⁴ ≈ 0.06 of each input and weight of every inner layer. Found: 0.11 to 0.14; twice that.
FP8_DISTANCE = 0.28


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3]], ids=lambda variant: variant.name)
def test_a_bfloat16_run_stays_close_to_float32(variant: Variant, written: Written, make_run: MakeRun) -> None:
    settings = published(written(variant))
    latents = []
    for dtype in ("torch.float32", "torch.bfloat16"):
        store = MemoryStore()
        run = make_run(
            store,
            [{"job_id": "sea", "prompt": "waves at night", "num_chunks": 3}],
            settings=override(settings, {"model": {"params_dtype": dtype}}),
        )
        render_locally(store, run)
        latents.append(clean_latents(store, run.run_id))

    assert 1e-4 < relative_error(latents[1], latents[0]) < BFLOAT16_DISTANCE


@pytest.mark.parametrize("large", [True, False], ids=["24B", "4.5B"])
def test_an_fp8_checkpoint_renders_nearly_what_the_weights_it_was_made_of_do(
    large: bool, written: Written, make_run: MakeRun, tmp_path: Path
) -> None:
    fp8 = override(
        published(written(Variant(large=large, distill=True, fp8=True))), {"model": {"params_dtype": "torch.float32"}}
    )
    float32 = override(fp8, {"engine": {"fp8_quant": False}, "weights": {"dit": tmp_path / "tiny" / "magi"}})
    make_tiny(tmp_path / "tiny", float32)
    latents = []
    for settings in (float32, fp8):
        store = MemoryStore()
        run = make_run(store, [{"job_id": "sea", "prompt": "waves", "num_chunks": 3}], settings=settings)
        render_locally(store, run)
        latents.append(clean_latents(store, run.run_id))

    assert 1e-3 < relative_error(latents[1], latents[0]) < FP8_DISTANCE
