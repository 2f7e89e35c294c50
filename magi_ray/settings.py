"""Settings: what a run is made of, read once at the door and passed down as frozen values.

Three sources, later ones win: a preset or a published MAGI-1 config (JSON, unchanged), a job file (``jobs/*.toml``),
options of the command line. Environment variables are read here and nowhere else.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from magi_ray.errors import SettingsError, WeightsError
from magi_ray.timeline import SIZE_MULTIPLE

TINY = ("magi-tiny", "magi-tiny-4.5b")
PUBLISHED = ("24B", "24B-distill", "24B-distill-fp8", "4.5B", "4.5B-distill", "4.5B-distill-fp8")
PRESETS = TINY + PUBLISHED


class Frozen(BaseModel):
    """A value: cannot be changed, refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Frozen):
    """``model_config`` of a published file (spec §1). Field names are the published ones."""

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
    """``runtime_config`` of a published file (spec §1)."""

    cfg_number: int = 3
    cfg_t_range: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_chunk_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    noise2clean_kvrange: tuple[int, ...] = (5, 4, 3, 2)
    clean_chunk_kvrange: int = 1
    clean_t: float = 0.9999
    seed: int = Field(default=1234, ge=0, le=2**63 - 1)
    num_frames: int = Field(default=96, ge=1)
    video_size_h: int = 720
    video_size_w: int = 720
    num_steps: int = Field(default=64, ge=1)
    window_size: int = Field(default=4, ge=1)
    fps: int = Field(default=24, ge=1, le=120)
    chunk_width: int = 6
    load: str = ""
    t5_pretrained: str = ""
    t5_device: str = "cpu"
    vae_pretrained: str = ""
    scale_factor: float = 0.18215
    temporal_downsample_factor: int = 4


class EngineConfig(Frozen):
    """``engine_config`` of a published file (spec §1, §7)."""

    distributed_backend: str = "nccl"
    distributed_timeout_minutes: float = 10
    pp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1)
    cp_strategy: str = "none"
    ulysses_overlap_degree: int = 1
    fp8_quant: bool = False
    distill_nearly_clean_chunk_threshold: float = 0.3
    shortcut_mode: Literal["8,16,16", "16,16,8"] = "8,16,16"
    distill: bool = False
    kv_offload: bool = False
    enable_cuda_graph: bool = False


class SpecialTokens(Frozen):
    """Which learned tokens stand before every caption (spec §4). The published scripts switch HQ and DURATION on."""

    hq: bool = True
    duration: bool = True
    static_first_frames: bool = False
    dynamic_first_frames: bool = False
    borderness: bool = False
    three_d_model: bool = False
    two_d_anime: bool = False


class TextSettings(Frozen):
    """How T5 computes. The published scripts use float32; bfloat16 halves its memory and gives other embeddings."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class PrefixSettings(Frozen):
    """How a row's image or video becomes the clean start of its video."""

    max_frames: int = Field(default=32, ge=1, description="frames of a video prefix, after resampling to fps")
    take: Literal["start", "end"] = Field(default="start", description="which end of the clip they come from")
    fit: Literal["crop", "pad", "fit"] = Field(default="crop", description="how another aspect ratio is made to fit")
    include: bool = Field(default=False, description="whether the finished video begins with the clip's frames")


class ChunkControl(Frozen):
    """What a chunk does otherwise than its run; None: as the run does.

    kv_range: like noise2clean_kvrange, each ≥ 1.  text_scales, prev_chunk_scales: one for each value of cfg_t_range.
    """

    kv_range: tuple[int, ...] | None = None
    text_scales: tuple[float, ...] | None = None
    prev_chunk_scales: tuple[float, ...] | None = None


AS_THE_RUN = ChunkControl()


class EncoderSettings(Frozen):
    """H.264 settings. ``threads`` is pinned: x264 gives other bytes with another thread count."""

    crf: int = Field(default=18, ge=0, le=51)
    preset: Literal["ultrafast", "veryfast", "faster", "fast", "medium", "slow"] = "medium"
    threads: int = Field(default=1, ge=1)


class TileSettings(Frozen):
    """Tiles the VAE works in (spec §6): pixels, frames, and the share that neighbours have in common.

    The published depth is fps // 2 = 12 frames, two tiles to a chunk. A tile of a single latent frame decodes to one
    frame instead of four, so depths that would leave one over are refused.
    """

    height: int = Field(default=256, ge=64, multiple_of=32)
    width: int = Field(default=256, ge=64, multiple_of=32)
    frames: Literal[8, 12, 16, 24] = 12
    overlap: float = Field(default=0.25, ge=0, le=0.5)


class NumericProfile(Frozen):
    """Where and how numbers are computed; part of every identity, since each field can change bits."""

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
    made_in: Path | None = Field(default=None, description="folder to make random weights in; None: files are given")

    @classmethod
    def under(cls, root: Path, *, made: bool) -> Self:
        """Everything below one folder, as ``magi_ray.models.tiny`` writes it. ``made``: it may write it."""
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
        """The networks of a download: laid out as ``under`` does, as the published repository (``ckpt/magi/<release>``)
        or as its example configs (``<release>``, ``t5_pretrained``). ``root`` may also be the ``ckpt`` in it.

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


class Settings(Frozen):
    """One complete run: the network, how it samples, where it computes, how the result is encoded."""

    name: str
    model: ModelConfig
    runtime: RuntimeConfig
    engine: EngineConfig = EngineConfig()
    weights: WeightPaths
    special_tokens: SpecialTokens = SpecialTokens()
    negative_prompt: bool = False
    text: TextSettings = TextSettings()
    prefix: PrefixSettings = PrefixSettings()
    tiles: TileSettings = TileSettings()
    encoder: EncoderSettings = EncoderSettings()
    numeric: NumericProfile = NumericProfile()
    decoders: int = Field(default=1, ge=1, description="decode workers of a run on Ray; changes no pixel")
    black_frames: Literal["fail", "allow"] = Field(
        default="fail", description="whether a frame that is 0 in every pixel fails its row; changes no pixel"
    )

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
        lengths = {len(runtime.cfg_t_range), len(runtime.prev_chunk_scales), len(runtime.text_scales)}
        if len(lengths) != 1:
            raise ValueError(
                "cfg_t_range, prev_chunk_scales and text_scales need one length, but have "
                f"{len(runtime.cfg_t_range)}, {len(runtime.prev_chunk_scales)} and {len(runtime.text_scales)}"
            )
        for problem in step_problems(runtime.num_steps, runtime):
            raise ValueError(f"num_steps is {runtime.num_steps}, but {problem.rule}; {problem.remedy}")
        for axis, size in (("video_size_h", runtime.video_size_h), ("video_size_w", runtime.video_size_w)):
            if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
                raise ValueError(f"{axis} is {size}, but must be a multiple of {SIZE_MULTIPLE}; {nearest(size)}")
        if self.model.num_attention_heads % self.model.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.model.num_attention_heads} is not divisible by "
                f"num_query_groups {self.model.num_query_groups}"
            )
        fixed = {
            "chunk_width": (runtime.chunk_width, 6),
            "temporal_downsample_factor": (runtime.temporal_downsample_factor, 4),
        }
        for field, (found, only) in fixed.items():
            if found != only:
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
            yield StepProblem(rule=f"must be divisible by {name}", remedy=f"use {_round_up(num_steps, divisor)}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------
# Sources


def inference_folder(*, fp8: bool, distill: bool) -> str:
    """The published name of the folder with the DiT's weights (spec §2)."""
    return "inference_weight" + ".fp8" * fp8 + ".distill" * distill


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where made weights and file digests are kept: $MAGI_RAY_CACHE, $XDG_CACHE_HOME/magi-ray or ~/.cache/magi-ray."""
    if environ.get("MAGI_RAY_CACHE"):
        return Path(environ["MAGI_RAY_CACHE"])
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "magi-ray"


def preset(name: str, *, weights: Path | None = None) -> Settings:
    """The settings of a named preset. ``weights``: the folder that holds its networks. magi-tiny makes them below the
    cache if none is given; the published variants need one, on a machine with CUDA.

    Raises SettingsError for a name that does not exist or a folder that is not given, WeightsError for one that lacks
    a network.
    """
    if name in TINY:
        return _tiny(name, weights)
    if name not in PUBLISHED:
        raise SettingsError(
            f"There is no preset {name!r}.",
            remedy=f"Known presets: {', '.join(PRESETS)}.{_suggest(name, PRESETS)}",
            next_command="magi-ray submit --help",
        )
    if weights is None:
        raise SettingsError(
            f"Preset {name} needs the folder that its networks were downloaded to.",
            remedy='Give it with --weights DIR, or as weights = "DIR" in a job file.',
            next_command=f"magi-ray submit manifest.parquet --preset {name} --weights DIR",
        )
    return _variant(name, weights)


def _variant(name: str, weights: Path) -> Settings:
    """One of the published variants (spec §1)."""
    size, *kind = name.split("-")
    distill, fp8, large = "distill" in kind, "fp8" in kind, size == "24B"
    return _build(
        {
            "name": name,
            "model": {
                "num_layers": 48 if large else 34,
                "hidden_size": 6144 if large else 3072,
                "ffn_hidden_size": 16384 if large else 12288,
                "num_attention_heads": 48 if large else 24,
                "num_query_groups": 8,
                "kv_channels": 128,
                "x_rescale_factor": 0.1 if large else 1.0,
                "half_channel_vae": large,
                "in_channels": 32 if large else 16,
                "out_channels": 32 if large else 16,
                "gated_linear_unit": large,
            },
            "runtime": {
                "cfg_number": 1 if distill else 3,
                "video_size_h": 720,
                "video_size_w": 1280 if large else 720,
                "num_steps": (16 if distill else 32) if large else 64,
            },
            "engine": {"fp8_quant": fp8, "distill": distill},
            "numeric": {"device": "cuda"},
            "weights": WeightPaths.downloaded(weights, size=size, fp8=fp8, distill=distill).model_dump(),
        },
        source=f"preset {name}",
    )


def _tiny(name: str, weights: Path | None) -> Settings:
    like_24b = name == "magi-tiny"
    return _build(
        {
            "name": name,
            "model": {
                "num_layers": 4,
                "hidden_size": 128,
                "ffn_hidden_size": 256 if like_24b else 384,
                "num_attention_heads": 8,
                "num_query_groups": 4,
                "kv_channels": 16,
                "caption_channels": 64,
                "params_dtype": "torch.float32",
                "x_rescale_factor": 0.1 if like_24b else 1.0,
                "half_channel_vae": like_24b,
                "in_channels": 32 if like_24b else 16,
                "out_channels": 32 if like_24b else 16,
                "gated_linear_unit": like_24b,
            },
            "runtime": {"num_steps": 16, "video_size_h": 64, "video_size_w": 64},
            "engine": {"distributed_backend": "gloo"},
            "weights": WeightPaths.under(weights or cache_folder() / name, made=weights is None).model_dump(),
        },
        source=f"preset {name}",
    )


def published(path: Path, *, special_tokens: Path | None = None, device: Literal["cpu", "cuda"] = "cpu") -> Settings:
    """Settings from a published config file, unchanged. Its ``load``, ``t5_pretrained`` and ``vae_pretrained`` are
    taken relative to the working directory, as the reference does; the special tokens, unless given, lie beside the
    T5 folder, beside the config, or where the reference keeps them (``example/assets``).

    device: where to compute, which the published files leave to the machine; ``t5_device`` "cuda" means this device.

    Raises SettingsError: unreadable, not the three published objects, an unknown field, a value that cannot work.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as exc:
        raise SettingsError(
            f"There is no config file {path}.", remedy="Give the path of a published JSON config."
        ) from exc
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise SettingsError(f"{path} is not readable as JSON: {exc}", remedy="Give a published MAGI-1 config.") from exc
    sections = {"model_config": "model", "runtime_config": "runtime", "engine_config": "engine"}
    if not isinstance(content, dict) or set(content) != set(sections):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise SettingsError(
            f"{path} holds {found or 'nothing'}, but a published config holds {', '.join(sections)}.",
            remedy="Use a config in the published form.",
        )
    values: dict[str, Any] = {}
    for theirs, ours in sections.items():
        if not isinstance(content[theirs], dict):
            raise SettingsError(
                f"{theirs} of {path} is {type(content[theirs]).__name__}, but must be an object.",
                remedy="Use a config in the published form.",
            )
        values[ours] = dict(content[theirs])
    runtime = values["runtime"]
    if device == "cpu" and "t5_device" in runtime:
        runtime["t5_device"] = "cpu"
    dit, vae, t5 = (Path(str(runtime.get(key, ""))).absolute() for key in ("load", "vae_pretrained", "t5_pretrained"))
    tokens = [folder / "special_tokens.npz" for folder in (t5.parent, path.parent, Path("example/assets"))]
    values |= {
        "name": path.stem,
        "weights": {
            "dit": dit,
            "vae": vae,
            "t5": t5,
            "special_tokens": (
                special_tokens or next((file for file in tokens if file.is_file()), tokens[0])
            ).absolute(),
        },
        "numeric": {"device": device},
    }
    return _build(values, source=str(path))


def job(path: Path, *, weights: Path | None = None) -> Settings:
    """Settings from a job file: TOML that names a ``preset`` or a ``config`` (relative to the file) and overrides it
    in the tables model, runtime, engine, weights, special_tokens, text, prefix, tiles, encoder and numeric.

    ``weights = "DIR"`` (relative to the file) instead of a table, or the argument, which wins, is the folder of the
    preset's networks. Raises as ``preset`` and ``published``.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as exc:
        raise SettingsError(f"There is no job file {path}.", remedy="The ones that ship are in jobs/.") from exc
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise SettingsError(f"{path} is not readable as TOML: {exc}", remedy="Copy one of jobs/*.toml.") from exc
    chosen = [key for key in ("preset", "config") if key in content]
    if len(chosen) != 1:
        raise SettingsError(
            f"{path} names {' and '.join(chosen) or 'neither preset nor config'}, but needs exactly one of them.",
            remedy='Begin the file with preset = "magi-tiny" or config = "24B_base_config.json".',
        )
    if isinstance(content.get("weights"), str):
        folder = path.parent / content.pop("weights")
        weights = weights or folder
    if "preset" in content:
        base = preset(content.pop("preset"), weights=weights)
    elif weights is not None:
        raise SettingsError(
            f"{path} begins with a config, which names the folders of the networks, but {weights} is given too.",
            remedy="Leave the folder out, or name dit, vae, t5 and special_tokens in a table [weights].",
        )
    else:
        base = published(path.parent / content.pop("config"))
    return override(base, {"name": path.stem} | content, source=str(path))


def override(base: Settings, changes: Mapping[str, Any], *, source: str = "options") -> Settings:
    """``base`` with ``changes`` (nested as Settings is) laid over it and checked again. Raises SettingsError."""
    return _build(_merge(base.model_dump(), changes), source=source)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _build(values: Mapping[str, Any], *, source: str) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        lines = [_explain(error) for error in exc.errors()]
        raise SettingsError(
            f"{source} cannot be used: " + "; ".join(lines), remedy="Correct it and run the same command again."
        ) from exc


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner: Any = Settings
        if len(error["loc"]) > 1:
            owner = Settings.model_fields[str(error["loc"][0])].annotation
        return f"unknown field {where}.{_suggest(str(error['loc'][-1]), owner.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message} (found {error['input']!r})" if where else message


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def device_here() -> Literal["cpu", "cuda"]:
    """Where this machine computes: "cuda" if it has NVIDIA's driver. Asks no library, so it costs nothing."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def prepare_ray_environment() -> None:
    """What Ray reads from the environment when it starts. What the user has set stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU still see what the machine has
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # a worker's death is told by us, in one line
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run magi-ray` must not wrap every worker in `uv run`
    }.items():
        os.environ.setdefault(name, value)
