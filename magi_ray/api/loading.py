"""The settings that a name stands for, and the model with them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from magi_ray.api.model import Model
from magi_ray.errors import SettingsError, WeightsError
from magi_ray.settings import PRESETS, PUBLISHED, Settings, device_here, job, override, preset, published


def load(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """A model, named by a preset, a published config (.json), a job file (.toml), or the folder of a download.

    weights: the folder of a preset's or job file's networks.  device: None: as the settings say.
    settings: override those of ``name``; nested as ``magi_ray.settings.Settings`` is.
    Networks are loaded when they are first needed, and stay loaded. Raises SettingsError, WeightsError.
    """
    return Model(settings_of(name, weights=weights, device=device, settings=settings))


def settings_of(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of ``load``. Raises as it does."""
    folder = None if weights is None else Path(weights).expanduser()
    path = Path(name).expanduser()
    if str(name) in PRESETS:
        base = preset(str(name), weights=folder)
    elif path.suffix == ".json":
        base = published(path, device=device_here())
    elif path.suffix == ".toml":
        base = job(path, weights=folder)
    elif path.is_dir():
        base = _downloaded(path)
    else:
        base = preset(str(name))  # raises, naming those that exist
    changes = dict(settings or {})
    if device is not None:
        changes["numeric"] = {**changes.get("numeric", {}), "device": device}
    return override(base, changes, source="settings") if changes else base


def _downloaded(folder: Path) -> Settings:
    """The settings of the one published variant in ``folder``."""
    found: list[Settings] = []
    for name in PUBLISHED:
        with suppress(WeightsError):  # not this one
            found.append(preset(name, weights=folder))
    if len(found) == 1:
        return found[0]
    names = ", ".join(settings.name for settings in found) or "no whole variant"
    raise SettingsError(
        f"{folder} holds {names}, but load needs to know which one.",
        remedy=f'Name it: magi_ray.load("{found[0].name if found else PUBLISHED[0]}", weights="{folder}").',
    )
