"""Weight folders for the presets `magi-tiny` and `magi-tiny-4.5b`, made from a seed in the published layout (spec §2),
and so loaded as the published checkpoints are. ``tiny_weights`` makes their contents.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor

from magi_ray.errors import SettingsError, WeightsError
from magi_ray.models.dit.model import DiT
from magi_ray.models.files import COMPRESSED, INDEX, SINGLE, published_folder
from magi_ray.models.fp8 import E4M3, E4M3_MAX
from magi_ray.models.text.special_tokens import OTHER_TOKENS
from magi_ray.models.text.tokens import T5_NAME, TOKENIZER_FILE
from magi_ray.models.tiny_text import t5_config, t5_weights, train_tokenizer
from magi_ray.models.tiny_weights import VAE_CONFIG, Array, Draw, dit_weights, unfit, vae_config_json, vae_weights
from magi_ray.models.vae.model import VAE, WEIGHTS_FILE
from magi_ray.settings import Settings, WeightPaths

RECIPE = 2
"""Raised with every change to what is written: a folder of another recipe is made again."""

_RECIPE_FILE = "recipe.json"
_INPUT_SCALE = 1 / 16  # of fp8 layers: inputs up to 28 fit, and what falls out of e4m3 at the other end is below 1e-4


def ensure_tiny(folder: Path, settings: Settings, *, seed: int = 0) -> None:
    """Make the weight folder, unless it is there already for this recipe, model and seed.

    Raises as ``make_tiny``.
    """
    if not _is_made(folder, _recipe(settings, seed)):
        make_tiny(folder, settings, seed=seed)


def make_tiny(folder: Path, settings: Settings, *, seed: int = 0, shards: int = 1, compress: bool = False) -> None:
    """Write a whole weight folder, laid out as ``WeightPaths.under(folder)`` says. Same arguments, same bytes.

    shards: files the DiT is spread over, with an index if several.  compress: they are stored as ``.zst``.
    It appears at once or not at all: processes that make it at the same time all end with the same whole folder. One
    made by another recipe, for another model or seed is replaced.

    Raises WeightsError if something else lies there, SettingsError if the model is too small for these weights.
    """
    if reason := unfit(settings.model):
        message = f"No tiny weights can be made for {settings.name}: {reason}."
        raise SettingsError(message, remedy="Use a preset as it is.")
    recipe = _recipe(settings, seed, shards=shards, compress=compress)
    if folder.exists() and not (folder / _RECIPE_FILE).is_file() and any(folder.iterdir()):
        remedy = "Move it away, or name another folder."
        raise WeightsError(f"{folder} exists, but was not made by magi-ray.", remedy=remedy)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        _write(WeightPaths.under(new, made=False), settings, seed, shards=shards, compress=compress)
        (new / _RECIPE_FILE).write_text(recipe)
        while not _is_made(folder, recipe):
            try:
                new.rename(folder)
            except OSError:
                # Another recipe's folder stands there, and only an empty one can be renamed onto.
                if not folder.is_dir():
                    raise
                with suppress(FileNotFoundError):  # another process was quicker
                    shutil.rmtree(folder.rename(work / "old"))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_made(folder: Path, recipe: str) -> bool:
    try:
        return (folder / _RECIPE_FILE).read_text() == recipe
    except OSError:
        return False


def _recipe(settings: Settings, seed: int, *, shards: int = 1, compress: bool = False) -> str:
    content = {
        "recipe": RECIPE, "seed": seed, "model": settings.model.model_dump(), "shards": shards, "compress": compress,
        "fp8_quant": settings.engine.fp8_quant, "distill": settings.engine.distill,
    }  # fmt: skip
    return json.dumps(content, indent=1, sort_keys=True)


def _write(paths: WeightPaths, settings: Settings, seed: int, *, shards: int, compress: bool) -> None:
    draw = Draw(seed)
    dit = published_folder(paths.dit, fp8=settings.engine.fp8_quant, distill=settings.engine.distill)
    t5 = paths.t5 / T5_NAME
    for folder in (dit, paths.vae, t5):
        folder.mkdir(parents=True)
    with torch.device("meta"):
        float_dit = DiT(settings.model).state_dict()
        stored_dit = DiT(settings.model, fp8=settings.engine.fp8_quant).state_dict()
        vae = VAE(VAE_CONFIG, attention="plain").state_dict()
    weights = _as_stored(_tensors(dit_weights(_shapes(float_dit), settings.model, draw)), stored_dit)
    _save_shards(dit, weights, shards=shards, compress=compress)
    _save(paths.vae / WEIGHTS_FILE, _tensors(vae_weights(_shapes(vae), draw)))
    (paths.vae / "config.json").write_text(json.dumps(vae_config_json(), indent=1, sort_keys=True))

    width = settings.model.caption_channels
    (t5 / TOKENIZER_FILE).write_bytes(train_tokenizer())
    (t5 / "config.json").write_text(json.dumps(t5_config(width), indent=1, sort_keys=True))
    _save(t5 / SINGLE[0], _tensors(t5_weights(width, draw)))
    counts = {"caption_token": 1, "logo_token": 1, "other_tokens": OTHER_TOKENS}
    tokens: dict[str, Any] = {name: draw(name, (n, width)).astype(np.float16) for name, n in counts.items()}
    np.savez(paths.special_tokens, **tokens)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _as_stored(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float ``weights`` as a checkpoint of the names, shapes and dtypes of ``stored`` holds them.

    An fp8 weight's largest value becomes the largest e4m3; its inputs are all scaled alike.
    """
    result = {}
    for name, want in stored.items():
        layer, _, field = name.rpartition(".")
        match field:
            case "weight_scale":
                result[name] = (weights[f"{layer}.weight"].abs().amax() / E4M3_MAX).reshape(want.shape)
            case "input_scale" | "smooth_scale":
                result[name] = torch.full(want.shape, _INPUT_SCALE)
            case "weight" if want.dtype == E4M3:
                weight = weights[name]
                result[name] = (weight / (weight.abs().amax() / E4M3_MAX)).to(E4M3).reshape(want.shape)
            case _:
                result[name] = weights[name].to(want.dtype)
    return result


def _save_shards(folder: Path, weights: Mapping[str, Tensor], *, shards: int, compress: bool) -> None:
    if shards == 1:
        _save(folder / SINGLE[0], weights, compress=compress)
        return
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    weight_map = {name: names[i * shards // len(weights)] for i, name in enumerate(sorted(weights))}
    for file in names:
        part = {name: weights[name] for name, its in weight_map.items() if its == file}
        _save(folder / file, part, compress=compress)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))


def _save(path: Path, weights: Mapping[str, Tensor], *, compress: bool = False) -> None:
    # transformers wants to be told the format.
    save_file(dict(weights), path, metadata={"format": "pt"})
    if compress:
        packed = path.with_name(path.name + COMPRESSED)
        packed.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
        path.unlink()
