"""Settings of a run: read once at the start, passed down as frozen values."""

from magi_ray.settings.environment import cache_folder, chosen_store, device_here
from magi_ray.settings.sources import PRESETS, PUBLISHED, TINY, job, override, preset, published
from magi_ray.settings.values import (
    AS_THE_RUN,
    ChunkControl,
    EncoderSettings,
    EngineConfig,
    Frozen,
    ModelConfig,
    NumericProfile,
    PixelSettings,
    PrefixSettings,
    RunSettings,
    RuntimeConfig,
    Settings,
    SpecialTokens,
    StepProblem,
    TextSettings,
    TileSettings,
    WeightPaths,
    inference_folder,
    nearest,
    step_problems,
)

__all__ = [
    "AS_THE_RUN", "PRESETS", "PUBLISHED", "TINY", "ChunkControl", "EncoderSettings", "EngineConfig", "Frozen",
    "ModelConfig", "NumericProfile", "PixelSettings", "PrefixSettings", "RunSettings", "RuntimeConfig", "Settings",
    "SpecialTokens", "StepProblem", "TextSettings", "TileSettings", "WeightPaths", "cache_folder", "chosen_store",
    "device_here", "inference_folder", "job", "nearest", "override", "preset", "published", "step_problems",
]  # fmt: skip
