"""Checks before anything is written: the networks against the config, this machine against the settings.

Reads headers and small files only; no weights are loaded.
"""

from __future__ import annotations

import torch

from magi_ray.errors import SettingsError, WeightsError
from magi_ray.media.encoder import find_ffmpeg
from magi_ray.models.dit.model import DiT
from magi_ray.models.files import published_folder, text_encoder_sizes, weight_files
from magi_ray.models.text.special_tokens import SpecialTokenTable
from magi_ray.models.vae.config import VAEConfig
from magi_ray.models.vae.model import VAE
from magi_ray.models.weights import check_fit
from magi_ray.settings import Settings


def check(settings: Settings) -> None:
    """Raises SettingsError, WeightsError or MediaError for the first thing that would stop every row in mid-run."""
    _check_machine(settings)
    find_ffmpeg()
    weights, engine, numeric = settings.weights, settings.engine, settings.numeric
    with torch.device("meta"):
        dit = DiT(settings.model, attention=numeric.attention, fp8=engine.fp8_quant)
    check_fit(dit, weight_files(published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)))
    with torch.device("meta"):
        vae = VAE(VAEConfig.load(weights.vae / "config.json"), attention=numeric.attention)
    check_fit(vae, weight_files(weights.vae))
    _check_width("The special tokens", SpecialTokenTable.load(weights.special_tokens).width, settings)
    _check_width("The text encoder's embeddings", text_encoder_sizes(weights.t5)["d_model"], settings)


def _check_machine(settings: Settings) -> None:
    engine = settings.engine
    if engine.cp_size * engine.pp_size != 1:
        raise SettingsError(
            f"cp_size {engine.cp_size} × pp_size {engine.pp_size} asks for {engine.cp_size * engine.pp_size} ranks, "
            "but a group has 1 in this version.",
            remedy="Set cp_size and pp_size to 1: the video is the same. Without editing the file: a job file with "
            'config = "FILE.json" and, under [engine], cp_size = 1 and pp_size = 1.',
        )
    wanted = {settings.numeric.device, settings.runtime.t5_device.split(":")[0]}
    if "cuda" in wanted and not torch.cuda.is_available():
        raise SettingsError(
            "The settings compute on cuda, but torch finds no CUDA device here.",
            remedy='Choose the CPU: --device cpu, in Python device="cpu", in a job file device = "cpu" in the table '
            '[numeric] and t5_device = "cpu" in [runtime]. Or install CUDA.',
        )


def _check_width(what: str, found: int, settings: Settings) -> None:
    if found != settings.model.caption_channels:
        raise WeightsError(
            f"{what} are {found} wide, but caption_channels is {settings.model.caption_channels}.",
            remedy="Use the files that were published together.",
        )
