"""The weights of a run: made ones, their digests, and where they lie on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.errors import WeightsError
from magi_ray.models.files import digest_files, published_folder, text_encoder_files, weight_files
from magi_ray.render.plans.identity import Digests
from magi_ray.settings import Settings, WeightPaths, cache_folder

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run


def make_weights(settings: Settings) -> None:
    """Make the weights of a preset that has made ones, unless they exist. Raises WeightsError."""
    if settings.weights.made_in is not None:
        # Imported here: planning with other weights needs no torch.
        from magi_ray.models.tiny import ensure_tiny

        ensure_tiny(settings.weights.made_in, settings)


def weight_digests(settings: Settings) -> Digests:
    """Digests of all weight files. Raises WeightsError."""
    weights, engine = settings.weights, settings.engine
    dit = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)

    def digest(files: list[Path]) -> str:
        return digest_files(files, cache=cache_folder() / "digests.json")

    return Digests(
        dit=digest(weight_files(dit)),
        vae=digest([weights.vae / "config.json", *weight_files(weights.vae)]),
        t5=digest(text_encoder_files(weights.t5)),
        special_tokens=digest([weights.special_tokens]),
    )


def require_same_weights(run: Run) -> None:
    """Raises WeightsError when the weights on this machine are not those ``run`` was submitted with."""
    make_weights(run.settings)
    found = asdict(weight_digests(run.settings))
    for network, submitted in asdict(run.record.digests).items():
        if found[network] != submitted:
            raise WeightsError(
                f"The files of {network} have digest {found[network][:12]}…, but run {run.run_id} was submitted with "
                f"{submitted[:12]}….",
                remedy="Bring back those files, or submit the manifest again to render it with these.",
            )


def local_weights(settings: Settings, folder: Path | None) -> WeightPaths:
    """Where the networks of ``settings`` lie on this machine.

    folder: of a download; None: as at submission, or, for made weights that are not there, in this machine's cache.
    Raises WeightsError if ``folder`` lacks a network.
    """
    weights, engine = settings.weights, settings.engine
    if folder is not None:
        size = "24B" if settings.model.gated_linear_unit else "4.5B"
        return WeightPaths.downloaded(folder, size=size, fp8=engine.fp8_quant, distill=engine.distill)
    if weights.made_in is not None and not weights.made_in.exists():
        return WeightPaths.under(cache_folder() / weights.made_in.name, made=True)
    return weights
