"""MAGI-1 from Python, without a manifest: the same plans, tasks and numbers as a run.

import magi_ray

model = magi_ray.load("4.5B-distill", weights="~/MAGI-1")
frames = model(prompt="a boat on calm water", num_frames=96, seed=7).frames
for chunk in model.stream(prompt="a boat on calm water", num_frames=2400):
    show(chunk)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from magi_ray.errors import MediaError, SettingsError, WeightsError
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.settings import PRESETS, PUBLISHED, Settings, device_here, job, override, preset, published
from magi_ray.system import temporary_folder
from magi_ray.timeline import FRAMES_PER_CHUNK

if TYPE_CHECKING:
    import torch

    from magi_ray.models.vae.model import VAE
    from magi_ray.render.plans.row_plan import RowPlan
    from magi_ray.render.tasks.denoise import Denoiser

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Video:
    """frames: uint8 RGB [T, H, W, 3], with those of a clip to continue only if ``include_prefix``.  fps: per second."""

    frames: Frames
    fps: int


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
    return Model(override(base, changes, source="settings") if changes else base)


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


class Model:
    """Called like a diffusers pipeline. Keeps the DiT, the VAE and the embeddings of the captions it has seen."""

    def __init__(self, settings: Settings) -> None:
        from magi_ray.storage.memory import MemoryStore

        self.settings = settings
        self._store = MemoryStore()
        self._denoiser: Denoiser | None = None
        self._vae: VAE | None = None

    def __call__(
        self,
        prompt: str | None = None,
        *,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        image: str | Path | npt.ArrayLike | None = None,
        video: str | Path | None = None,
        prefix_from: Literal["start", "end"] | None = None,
        prefix_frames: int | None = None,
        include_prefix: bool | None = None,
        fit: Literal["crop", "pad", "fit"] | None = None,
        num_frames: int | None = None,
        num_chunks: int | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Video:
        """The whole video, with all frames in memory. Parameters and errors as for ``stream``."""
        chunks = self.stream(
            prompt, schedule=schedule, image=image, video=video, prefix_from=prefix_from, prefix_frames=prefix_frames,
            include_prefix=include_prefix, fit=fit, num_frames=num_frames, num_chunks=num_chunks, seconds=seconds,
            height=height, width=width, fps=fps, num_inference_steps=num_inference_steps, seed=seed,
            generator=generator,
        )  # fmt: skip
        return Video(frames=np.concatenate(list(chunks)), fps=fps or self.settings.runtime.fps)

    def stream(
        self,
        prompt: str | None = None,
        *,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        image: str | Path | npt.ArrayLike | None = None,
        video: str | Path | None = None,
        prefix_from: Literal["start", "end"] | None = None,
        prefix_frames: int | None = None,
        include_prefix: bool | None = None,
        fit: Literal["crop", "pad", "fit"] | None = None,
        num_frames: int | None = None,
        num_chunks: int | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Frames]:
        """The video chunk by chunk, each uint8 RGB [T ≤ 24, H, W, 3] as soon as it is clean, in constant memory.

        prompt: what the video shows; or schedule: prompts over time, entries as in a manifest
        ({"start_chunk", "prompt"} with or without kv_range, text_scales, prev_chunk_scales).
        image: to begin from: a path, or uint8 RGB [H, W, 3], an array or anything that numpy reads as one.
        video: path of a clip to continue.  prefix_from: which end of it.  prefix_frames: how many frames of it, ≥ 4.
        include_prefix: whether they come first.  fit: how an image or clip of another aspect ratio is made to fit.
        num_frames, num_chunks (of 24 frames) or seconds: the least length of new video, rounded up to whole chunks.
        height, width: pixels, multiples of 16.  fps: 1…120.  num_inference_steps: a multiple of window_size.
        seed: 0…2^63−1; or generator, whose initial seed is used.
        None stands for the settings' value.

        Raises at once, before the first chunk is asked for: ManifestError (a value that a row may not have, or an image
        or clip that cannot be read), SettingsError, WeightsError, MediaError (image is not uint8 RGB, or no ffmpeg).
        While it renders: NumericError, DeviceOutOfMemory.
        """
        _at_most_one(num_frames=num_frames, num_chunks=num_chunks, seconds=seconds)
        _at_most_one(seed=seed, generator=generator)
        if num_frames is not None:
            seconds = num_frames / (fps or self.settings.runtime.fps)
        if generator is not None:
            seed = generator.initial_seed() % 2**63
        row = {
            "job_id": "video", "prompt": prompt,
            "schedule": None if schedule is None else [dict(entry) for entry in schedule],
            "video": None if video is None else str(video), "prefix_from": prefix_from, "prefix_frames": prefix_frames,
            "include_prefix": include_prefix, "fit": fit, "num_chunks": num_chunks, "seconds": seconds,
            "height": height, "width": width, "fps": fps, "num_steps": num_inference_steps, "seed": seed,
        }  # fmt: skip
        return self._render(self._plan(row, image))

    def _plan(self, row: dict[str, Any], image: str | Path | npt.ArrayLike | None) -> RowPlan:
        """The plan of ``row``, which begins from ``image`` if there is one."""
        from magi_ray.media.preview import write_png
        from magi_ray.render.runs.submission import create, prepare

        with temporary_folder() as folder:
            if image is not None and not isinstance(image, str | Path):
                write_png(folder / "image.png", _pixels(image))
                image = folder / "image.png"
            if image is not None:
                row = row | {"image": str(image)}
            manifest = manifest_of([row], Defaults.of(self.settings), base=Path.cwd(), name="the call")
            run, files = prepare(manifest, name="call", settings=self.settings)
            create(self._store, run, files)
        return run.plans["video"]

    def _render(self, plan: RowPlan) -> Iterator[Frames]:
        from magi_ray.render.artifacts.latents import torch_threads
        from magi_ray.render.artifacts.prefix import prefix_pixels

        if plan.timeline.included_frames:
            clip = prefix_pixels(self._store, plan)
            for first in range(0, len(clip), FRAMES_PER_CHUNK):
                yield clip[first : first + FRAMES_PER_CHUNK]
        chunks = self._chunks(plan)
        while True:
            # Only while we compute: between two chunks the caller has its own number of threads.
            with torch_threads(self.settings.numeric.cpu_threads):
                frames = next(chunks, None)
            if frames is None:
                return
            yield frames

    def _chunks(self, plan: RowPlan) -> Iterator[Frames]:
        from magi_ray.events import StageCommitted
        from magi_ray.models.vae.model import load_vae
        from magi_ray.render.artifacts.latents import load_clean_chunk
        from magi_ray.render.tasks.decode_network import decode_chunk
        from magi_ray.render.tasks.denoise_network import load_denoiser
        from magi_ray.render.tasks.embed_network import load_embedder
        from magi_ray.storage import keys

        # T5 is not kept; its embeddings stay in the store.
        list(load_embedder(self.settings, self._store).carry_out(plan))
        numeric = self.settings.numeric
        self._denoiser = self._denoiser or load_denoiser(self.settings, self._store)
        self._vae = self._vae or load_vae(self.settings.weights.vae, device=numeric.device, attention=numeric.attention)
        for event in self._denoiser.carry_out(plan, 0):
            if not isinstance(event, StageCommitted):
                continue
            if event.chunk is not None:
                latent = load_clean_chunk(self._store, plan, event.chunk)
                yield decode_chunk(self._vae, latent, plan, event.chunk)
            # Nobody resumes a stream: its stages are deleted as it goes on.
            for key in list(self._store.list(keys.commit_folder("stage", plan.stage_keys[event.stage]))):
                self._store.delete(key)


def _at_most_one(**options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise SettingsError(f"{' stands beside '.join(given[:2])}.", remedy="Give one of them.")


def _pixels(image: npt.ArrayLike) -> Frames:
    """uint8 [H, W, 3]. Raises MediaError with what was found instead."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise MediaError(
            f"The image is {pixels.dtype} {list(pixels.shape)}, but must be uint8 [height, width, 3].",
            remedy="Convert it to RGB with values 0 to 255.",
        )
    return np.ascontiguousarray(pixels)
