"""Where settings come from. Later sources win: a preset or a published MAGI-1 config (JSON, unchanged), a job file
(``jobs/*.toml``), options of the command line.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from magi_ray.errors import SettingsError
from magi_ray.settings.environment import cache_folder
from magi_ray.settings.values import Settings, WeightPaths

TINY = ("magi-tiny", "magi-tiny-4.5b")
PUBLISHED = ("24B", "24B-distill", "24B-distill-fp8", "4.5B", "4.5B-distill", "4.5B-distill-fp8")
PRESETS = TINY + PUBLISHED


def preset(name: str, *, weights: Path | None = None) -> Settings:
    """The settings of a named preset. ``weights``: the folder of its networks. Without one magi-tiny generates them in
    the cache; the published variants need one, and a machine with CUDA.

    Raises SettingsError for an unknown name or a missing ``weights``, WeightsError for a folder without a network.
    """
    if name in TINY:
        return _tiny(name, weights)
    if name not in PUBLISHED:
        raise SettingsError(
            f"There is no preset {name!r}.",
            remedy=f"Known presets: {', '.join(PRESETS)}.{_suggest(name, PRESETS)}",
        )
    if weights is None:
        raise SettingsError(
            f"Preset {name} needs the folder that its networks were downloaded to.",
            remedy='Give it with --weights DIR, or as weights = "DIR" in Python and in a job file.',
        )
    return _variant(name, weights)


def _shape(*, like_24b: bool) -> dict[str, Any]:
    """What the two architectures differ in besides their sizes (spec §1)."""
    channels = 32 if like_24b else 16
    return {
        "x_rescale_factor": 0.1 if like_24b else 1.0,
        "half_channel_vae": like_24b,
        "in_channels": channels,
        "out_channels": channels,
        "gated_linear_unit": like_24b,
    }


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
                **_shape(like_24b=large),
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
                **_shape(like_24b=like_24b),
            },
            "runtime": {"num_steps": 16, "video_size_h": 64, "video_size_w": 64},
            "engine": {"distributed_backend": "gloo"},
            "weights": WeightPaths.under(weights or cache_folder() / name, made=weights is None).model_dump(),
        },
        source=f"preset {name}",
    )


def published(path: Path, *, special_tokens: Path | None = None, device: Literal["cpu", "cuda"] = "cpu") -> Settings:
    """Settings from a published config file, unchanged. Its ``load``, ``t5_pretrained`` and ``vae_pretrained`` are
    relative to the working directory, as in the reference. Special tokens are looked for beside the T5 folder, beside
    the config and where the reference keeps them (``example/assets``), unless they are given.

    device: where to compute, which published files do not say; "cpu" overrides a ``t5_device`` of "cuda".

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
    places = [folder / "special_tokens.npz" for folder in (t5.parent, path.parent, Path("example/assets"))]
    tokens = special_tokens or next((file for file in places if file.is_file()), places[0])
    values |= {
        "name": path.stem,
        "weights": {"dit": dit, "vae": vae, "t5": t5, "special_tokens": tokens.absolute()},
        "numeric": {"device": device},
        "prefix": {"take": "start"},
    }
    return _build(values, source=str(path))


def job(path: Path, *, weights: Path | None = None) -> Settings:
    """Settings from a job file: TOML that names a ``preset`` or a ``config`` (relative to the file) and overrides it
    in the tables model, runtime, engine, weights, special_tokens, text, prefix, tiles, encoder and numeric.

    ``weights = "DIR"`` (relative to the file) instead of a table gives the folder of a preset's networks; the argument
    wins over it. Raises as ``preset`` and ``published``.
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
        weights = weights or path.parent / content["weights"]
        del content["weights"]
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
    """``base`` with ``changes`` (nested as Settings is), checked again. Raises SettingsError."""
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
        message = f"{source} cannot be used: " + "; ".join(_explain(error) for error in exc.errors())
        raise SettingsError(message, remedy="Correct it and run the same command again.") from exc


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Settings
        if len(error["loc"]) > 1:
            section = Settings.model_fields[str(error["loc"][0])].annotation
        known = [field.alias or name for name, field in section.model_fields.items()]
        return f"unknown field {where}.{_suggest(str(error['loc'][-1]), known)}"
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return f"{where}: {message} (found {error['input']!r})" if where else message


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
