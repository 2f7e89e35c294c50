"""The frozen values of settings. Every class or group of fields says what it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from magi_ray.errors import WeightsError
from magi_ray.timeline import FRAMES_PER_LATENT, LATENTS_PER_CHUNK, SIZE_MULTIPLE


class Frozen(BaseModel):
    """A pydantic model that is immutable and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Frozen):
    """``model_config`` of a published file (spec §1), field names included. The architecture: changes latents."""

    model_name: str = "videodit_ardf"
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1)
    kv_channels: int = Field(ge=1)
    layernorm_epsilon: float = 1e-6
    apply_layernorm_1p: bool = True
    x_rescale_factor: float = 1.0
    half_channel_vae: bool = False
    params_dtype: Literal["torch.float32", "torch.bfloat16", "torch.float16"] = "torch.bfloat16"
    patch_size: int = 2
    t_patch_size: int = 1
    in_channels: int = 16
    out_channels: int = 16
    cond_hidden_ratio: float = 0.25
    caption_channels: int = 4096
    caption_max_length: int = 800
    xattn_cond_hidden_ratio: float = 1.0
    cond_gating_ratio: float = 1.0
    gated_linear_unit: bool = False


class RuntimeConfig(Frozen):
    """``runtime_config`` of a published file (spec §1), field names included."""

    # These change latents.
    cfg_number: int = 3
    cfg_t_range: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_chunk_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    noise2clean_kvrange: tuple[int, ...] = (5, 4, 3, 2)
    clean_chunk_kvrange: int = 1
    clean_t: float = 0.9999
    # Defaults of rows. Seed, size and steps change latents; the number of frames only changes how many there are.
    seed: int = Field(default=1234, ge=0, le=2**63 - 1)
    num_frames: int = Field(default=96, ge=1)
    video_size_h: int = 720
    video_size_w: int = 720
    num_steps: int = Field(default=64, ge=1)
    # Changes latents.
    window_size: int = Field(default=4, ge=1)
    # Default of rows; changes how a clip to continue is resampled, and the finished video.
    fps: int = Field(default=24, ge=1, le=120)
    # The only width there is.
    chunk_width: int = 6
    # Folders and a device; the device changes embeddings.
    load: str = ""
    t5_pretrained: str = ""
    t5_device: str = "cpu"
    vae_pretrained: str = ""
    # Between latents and the VAE: changes latents of a prefix, and decoded frames.
    scale_factor: float = 0.18215
    temporal_downsample_factor: int = 4


class EngineConfig(Frozen):
    """``engine_config`` of a published file (spec §1, §7), field names included."""

    # These change nothing: the README says why.
    distributed_backend: str = "nccl"
    distributed_timeout_minutes: float = 10
    # These change latents: a sum that is split over ranks has other bits.
    pp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1)
    # No effect with one rank.
    cp_strategy: str = "none"
    ulysses_overlap_degree: int = 1
    # These change latents.
    fp8_quant: bool = False
    distill_nearly_clean_chunk_threshold: float = 0.3
    shortcut_mode: Literal["8,16,16", "16,16,8"] = "8,16,16"
    distill: bool = False
    # These change nothing.
    kv_offload: bool = False
    enable_cuda_graph: bool = False


class SpecialTokens(Frozen):
    """Which learned tokens stand before every caption (spec §4). The published scripts switch HQ and DURATION on.

    Changes latents.
    """

    hq: bool = True
    duration: bool = True
    static_first_frames: bool = False
    dynamic_first_frames: bool = False
    borderness: bool = False
    three_d_model: bool = False
    two_d_anime: bool = False


class TextSettings(Frozen):
    """How T5 computes; changes latents. The published scripts use float32; bfloat16 halves the memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class PrefixSettings(Frozen):
    """How a row's image or video becomes the clean start of its video. ``include`` changes the finished video alone,
    the other fields change latents.

    ``clip_end`` is called ``take`` in job files, in stored JSON and when the value is made. A published config sets it
    to "start", as the reference does.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    max_frames: int = Field(default=32, ge=1, description="frames of a video prefix, after resampling to fps")
    clip_end: Literal["start", "end"] = Field(
        default="end", alias="take", description="which end of the clip they come from"
    )
    fit: Literal["crop", "pad", "fit"] = Field(default="crop", description="how another aspect ratio is made to fit")
    include: bool = Field(default=False, description="whether the finished video begins with the clip's frames")


class ChunkControl(Frozen):
    """A chunk's own values in place of the run's; None: the run's.

    kv_range: like noise2clean_kvrange, each ≥ 1.  text_scales, prev_chunk_scales: one for each value of cfg_t_range.
    """

    kv_range: tuple[int, ...] | None = None
    text_scales: tuple[float, ...] | None = None
    prev_chunk_scales: tuple[float, ...] | None = None


AS_THE_RUN = ChunkControl()


class EncoderSettings(Frozen):
    """H.264; changes segments. ``threads`` is pinned: x264 gives other bytes with another thread count."""

    crf: int = Field(default=18, ge=0, le=51)
    preset: Literal["ultrafast", "veryfast", "faster", "fast", "medium", "slow"] = "medium"
    threads: int = Field(default=1, ge=1)


class TileSettings(Frozen):
    """The VAE's tiles (spec §6): pixels, frames, and the share that neighbours overlap. Changes latents of a prefix,
    and decoded frames.

    The published depth is fps // 2 = 12 frames, two tiles to a chunk. A tile of a single latent frame decodes to one
    frame instead of four, so depths that would leave one over are refused.
    """

    height: int = Field(default=256, ge=64, multiple_of=32)
    width: int = Field(default=256, ge=64, multiple_of=32)
    frames: Literal[8, 12, 16, 24] = 12
    overlap: float = Field(default=0.25, ge=0, le=0.5)


class NumericProfile(Frozen):
    """Where and how numbers are computed: every field can change the bits of every result."""

    device: Literal["cpu", "cuda"] = "cpu"
    attention: Literal["plain", "sdpa"] = "sdpa"
    cpu_threads: int = Field(default=1, ge=1, description="threads of one worker; sums are split by it")


class WeightPaths(Frozen):
    """Folders and files of the four networks, in the published layout (spec §2).

    Relative paths are made absolute where settings are read: a run may be resumed from another folder.
    """

    dit: Path
    vae: Path
    t5: Path
    special_tokens: Path
    made_in: Path | None = Field(default=None, description="folder to generate weights in; None: files are given")

    @classmethod
    def under(cls, root: Path, *, made: bool) -> Self:
        """All networks in one folder, laid out as ``magi_ray.models.tiny`` does. ``made``: it may write them there."""
        root = root.absolute()
        return cls(
            dit=root / "magi",
            vae=root / "vae",
            t5=root / "t5",
            special_tokens=root / "special_tokens.npz",
            made_in=root if made else None,
        )

    @classmethod
    def downloaded(cls, root: Path, *, size: str, fp8: bool, distill: bool) -> Self:
        """The networks of a download: laid out as ``under`` does, as the published repository
        (``ckpt/magi/<release>``) or as its example configs (``<release>``, ``t5_pretrained``). ``root`` may also be the
        ``ckpt`` in it.

        Raises WeightsError with every place that was looked at for what is missing.
        """
        root, tokens = root.absolute(), "special_tokens.npz"
        release = size + "_" + ("distill" if distill else "base") + "_quant" * fp8
        places = {  # network: (folders, what must be in them)
            "dit": (("magi", f"ckpt/magi/{release}", f"magi/{release}", release, "."),
                    inference_folder(fp8=fp8, distill=distill)),
            "vae": (("vae", "ckpt/vae"), "config.json"),
            "t5": (("t5", "ckpt/t5", "t5_pretrained"), "t5-v1_1-xxl"),
            "special_tokens": ((".", "t5", "ckpt", "ckpt/t5", "t5_pretrained", "example/assets"), tokens),
        }  # fmt: skip
        found: dict[str, Path] = {}
        missing: list[str] = []
        for network, (folders, inside) in places.items():
            there = [root / folder for folder in folders if (root / folder / inside).exists()]
            if there:
                found[network] = there[0] / tokens if network == "special_tokens" else there[0]
            else:
                looked = ", ".join(str(Path(folder, inside)) for folder in folders)
                missing.append(f"{network}: {looked}")
        if missing:
            raise WeightsError(
                f"{root} lacks {len(missing)} of the 4 networks. Looked there for\n  " + "\n  ".join(missing),
                remedy="Download them there, or name the folder that holds them.",
            )
        return cls(**found)


class PixelSettings(Frozen):
    """What can change a pixel. All of it is part of a run's identity; the key of a single result covers what that
    result depends on (``render.plans.identity``)."""

    model: ModelConfig
    runtime: RuntimeConfig
    engine: EngineConfig = EngineConfig()
    special_tokens: SpecialTokens = SpecialTokens()
    negative_prompt: bool = Field(
        default=False, description="guide away from logos, captions and cuts: changes latents"
    )
    text: TextSettings = TextSettings()
    prefix: PrefixSettings = PrefixSettings()
    tiles: TileSettings = TileSettings()
    encoder: EncoderSettings = EncoderSettings()
    numeric: NumericProfile = NumericProfile()


class RunSettings(Frozen):
    """What changes no pixel: names, places, numbers of workers, and what counts as a failure."""

    name: str = Field(description="of the preset, config or job file")
    weights: WeightPaths = Field(description="where the networks lie; what they hold is known by their digests")
    decoders: int = Field(default=1, ge=1, description="decode workers of a run on Ray")
    black_frames: Literal["fail", "allow"] = Field(
        default="fail", description="whether a frame that is 0 in every pixel fails its row"
    )


class Settings(PixelSettings, RunSettings):
    """One complete run: the network, how it samples, where it computes, how the result is encoded."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        runtime, engine = self.runtime, self.engine
        expected_cfg = 1 if engine.distill or engine.fp8_quant else 3
        if runtime.cfg_number != expected_cfg:
            kind = "distilled or fp8" if expected_cfg == 1 else "base"
            raise ValueError(
                f"cfg_number is {runtime.cfg_number}, but a {kind} model needs {expected_cfg}; "
                f"set cfg_number = {expected_cfg}"
            )
        edges, previous, text = (len(x) for x in (runtime.cfg_t_range, runtime.prev_chunk_scales, runtime.text_scales))
        if not edges == previous == text:
            raise ValueError(
                "cfg_t_range, prev_chunk_scales and text_scales need one length, but have "
                f"{edges}, {previous} and {text}"
            )
        for problem in step_problems(runtime.num_steps, runtime):
            raise ValueError(f"num_steps is {runtime.num_steps}, but {problem.rule}; {problem.remedy}")
        for field in ("video_size_h", "video_size_w"):
            size = getattr(runtime, field)
            if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
                raise ValueError(f"{field} is {size}, but must be a multiple of {SIZE_MULTIPLE}; {nearest(size)}")
        if self.model.num_attention_heads % self.model.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.model.num_attention_heads} is not divisible by "
                f"num_query_groups {self.model.num_query_groups}"
            )
        for field, only in (("chunk_width", LATENTS_PER_CHUNK), ("temporal_downsample_factor", FRAMES_PER_LATENT)):
            if (found := getattr(runtime, field)) != only:
                raise ValueError(f"{field} is {found}, but the published networks only work with {only}")
        return self


def nearest(size: int) -> str:
    """Advice for a size that is not a multiple of 16."""
    low = max(size, 0) // SIZE_MULTIPLE * SIZE_MULTIPLE
    high = low + SIZE_MULTIPLE
    return f"use {low} or {high}" if low else f"use {high}"


@dataclass(frozen=True, kw_only=True)
class StepProblem:
    """Why a number of steps cannot be used: "num_steps is 10, but ``rule``; ``remedy``"."""

    rule: str
    remedy: str


def step_problems(num_steps: int, runtime: RuntimeConfig) -> Iterable[StepProblem]:
    """Why ``num_steps`` cannot be used with this window and these KV ranges."""
    divisors = [(runtime.window_size, f"window_size {runtime.window_size}")]
    if ranges := len(runtime.noise2clean_kvrange):
        divisors.append((ranges, f"the {ranges} values of noise2clean_kvrange"))
    for divisor, name in divisors:
        if num_steps % divisor:
            rounded_up = -(-num_steps // divisor) * divisor
            yield StepProblem(rule=f"must be divisible by {name}", remedy=f"use {rounded_up}")


def inference_folder(*, fp8: bool, distill: bool) -> str:
    """The published name of the folder with the DiT's weights (spec §2)."""
    return "inference_weight" + ".fp8" * fp8 + ".distill" * distill
