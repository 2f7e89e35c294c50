"""Videos without a manifest: ``magi_ray.load(…)`` gives an object that is called like a diffusers pipeline.

    model = magi_ray.load("magi-tiny")
    video = model("a boat leaves the harbour", num_frames=96, seed=7)   # video.frames: uint8 [T, H, W, 3]
    for frames in model.stream(image="hills.png", prompt="dusk falls"):   # a chunk's frames as soon as it is clean
        ...

What runs is what ``magi-ray submit`` runs: a call is a manifest of one row, with the same checks, plan, embeddings,
stages and decoding, so the frames are those that a submitted row encodes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch

from magi_ray.errors import InputError, MediaError, SettingsError
from magi_ray.manifest import MAX_SEED, Defaults, manifest_of
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.render.decode import decode_chunk
from magi_ray.render.denoise import Denoiser
from magi_ray.render.embed import Embedder
from magi_ray.render.inventory import stages_done
from magi_ray.render.latents import load_clean_chunk, use_threads
from magi_ray.render.pixels import Frames
from magi_ray.render.plan import RowPlan
from magi_ray.render.prefix import prefix_pixels
from magi_ray.render.run import prepare
from magi_ray.render.scheduler import StageCommitted
from magi_ray.settings import PRESETS, Settings, WeightPaths, job, override, preset, published
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.store import Store, check_store

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Video:
    """frames: uint8 RGB [T, H, W, 3], before encoding; T counts whole chunks.  fps, seed: what it was made with."""

    frames: Frames
    fps: int
    seed: int


def load(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    store: str | Path | None = None,
    device: Device | None = None,
    **changes: Any,
) -> Model:
    """A model to call. Networks are loaded at the first call and stay, T5 excepted.

    source: the name of a preset; a published config (.json) or job file (.toml); or a folder that holds one published
    config and the networks, laid out as a download.
    weights: the folder of a preset's networks.  store: a folder; then what was rendered is kept there, an interrupted
    call goes on where it stopped, and prompts embedded once stay so. Without it embeddings are kept in memory, some
    13 MB a prompt at the published sizes, and everything else is dropped as soon as it is not needed.
    device: where to compute; default: as the preset or job says, the CPU for a config.
    changes: tables laid over the settings as in a job file, e.g. ``runtime={"window_size": 1}, negative_prompt=True``.

    Raises SettingsError, WeightsError, StoreError.
    """
    settings = _settings(source, weights=weights, device=device)
    if changes:
        settings = override(settings, changes, source="load()")
    kept = None if store is None else LocalStore(Path(store))
    if kept is not None:
        check_store(kept)
    return Model(settings, store=kept)


def _settings(source: str | Path, *, weights: str | Path | None, device: Device | None) -> Settings:
    path = Path(source)
    folder = None if weights is None else Path(weights)
    if source in PRESETS:
        return _on(preset(str(source), weights=folder), device)
    if path.suffix == ".toml":
        return _on(job(path, weights=folder), device)
    if folder is not None:
        raise SettingsError(
            f"{source} is no preset, but weights = {folder} is given too.",
            remedy=f"Known presets: {', '.join(PRESETS)}. A config or folder says itself where its networks are.",
        )
    if path.suffix == ".json":
        return published(path, device=device or "cpu")
    configs = [file for file in sorted(path.glob("*.json")) if b'"engine_config"' in file.read_bytes()]
    if len(configs) != 1:
        found = ", ".join(file.name for file in configs) if configs else "no published config"
        raise SettingsError(
            f"{path} holds {found}, but must hold exactly one." if path.is_dir() else f"There is no {source}.",
            remedy=f"Give a folder with one, the config itself, or a preset: {', '.join(PRESETS)}.",
        )
    settings = published(configs[0], device=device or "cpu")
    engine, release = settings.engine, configs[0].stem.removesuffix("_config")
    found_weights = WeightPaths.downloaded(path, release=release, fp8=engine.fp8_quant, distill=engine.distill)
    return override(settings, {"weights": found_weights.model_dump()}, source=str(configs[0]))


def _on(settings: Settings, device: Device | None) -> Settings:
    return settings if device is None else override(settings, {"numeric": {"device": device}}, source="device")


class Model:
    """What ``load`` gives.

    A call computes with ``numeric.cpu_threads`` threads, since sums depend on it; between chunks the caller's own
    number is back. Several calls at once need a model each.
    """

    def __init__(self, settings: Settings, *, store: Store | None) -> None:
        self.settings = settings
        self._keeps = store is not None
        self._store: Store = MemoryStore() if store is None else store
        self._denoiser: Denoiser | None = None
        self._vae: VAE | None = None

    def __call__(self, prompt: str | None = None, **arguments: Any) -> Video:
        """The whole video at once; arguments as for ``stream``."""
        plan = self._plan(prompt, **arguments)
        runtime = plan.settings.runtime
        return Video(frames=np.concatenate(list(self._stream(plan))), fps=runtime.fps, seed=runtime.seed)

    def stream(self, prompt: str | None = None, **arguments: Any) -> Iterator[Frames]:
        """Each chunk's frames as soon as it is clean: uint8 [t, H, W, 3], t is 24, less in a chunk that begins with
        frames of a clip. Memory does not grow with the video's length.

        prompt, or schedule: a list of ``{"start_chunk": …, "prompt": …}`` as in a manifest.
        image, video: what to begin from: a path, or uint8 RGB, [H, W, 3] or [T, H, W, 3] at ``fps``, as a numpy array
        or anything that numpy makes one of (a PIL image).
        num_frames: new frames, rounded up to whole chunks; default: the settings'.  height, width: multiples of 16.
        num_inference_steps: denoising steps of a chunk.  seed, or generator: its ``initial_seed()``; default: the
        settings'.  Any other column of a manifest's row (fps, prefix_from, prefix_frames, fit, include_prefix).

        Raises at once, before weights are loaded: ManifestError (a value that cannot be), SettingsError, WeightsError,
        MediaError; later NumericError, DeviceOutOfMemory.
        """
        return self._stream(self._plan(prompt, **arguments))

    def _plan(
        self,
        prompt: str | None,
        *,
        image: Any = None,
        video: Any = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **columns: Any,
    ) -> RowPlan:
        if generator is not None:
            if seed is not None:
                raise InputError(
                    f"Both seed {seed} and a generator are given, but a video has one seed.", remedy="Give one of them."
                )
            seed = generator.initial_seed() & MAX_SEED
        defaults = Defaults.of(self.settings)
        seconds = None
        if num_frames is not None:
            seconds = num_frames / columns.get("fps", defaults.fps)
        row = columns | {
            "job_id": "call", "prompt": prompt, "seconds": seconds, "num_steps": num_inference_steps, "seed": seed
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="magi-ray-") as folder:
            fps = columns.get("fps", defaults.fps)
            row["image"] = _file(image, Path(folder) / "image.png", dimensions=3, fps=fps)
            row["video"] = _file(video, Path(folder) / "video.mov", dimensions=4, fps=fps)
            row = {column: value for column, value in row.items() if value is not None}
            manifest = manifest_of([row], defaults, base=Path.cwd(), name="the call")
            run, files = prepare(manifest.parquet(), name="the call", base=Path.cwd(), settings=self.settings)
            for sha256, path in files.items():
                if not self._store.exists(keys.media(sha256)):
                    self._store.put_file(keys.media(sha256), path)
        [plan] = run.plans.values()
        return plan

    def _stream(self, plan: RowPlan) -> Iterator[Frames]:
        chunks = self._chunks(plan)
        while True:
            with _threads(plan.settings.numeric.cpu_threads):
                frames = next(chunks, None)
            if frames is None:
                return
            yield frames

    def _chunks(self, plan: RowPlan) -> Iterator[Frames]:
        timeline, store = plan.timeline, self._store
        Embedder(self.settings, store).embed(plan)
        if timeline.included_frames:
            yield prefix_pixels(store, plan)
        done = stages_done(store, plan)
        for stage in range(done):
            yield from self._decoded(plan, timeline.finished(stage))
        if done == timeline.num_stages:
            return
        if self._denoiser is None:
            self._denoiser = Denoiser(self.settings, store)
        for event in self._denoiser.render(plan, done):
            if isinstance(event, StageCommitted):
                yield from self._decoded(plan, event.chunk)
                if not self._keeps:
                    _forget(store, keys.commit_folder("stage", plan.stage_keys[event.stage]))

    def _decoded(self, plan: RowPlan, chunk: int | None) -> Iterator[Frames]:
        if chunk is None:
            return
        if self._vae is None:
            numeric = self.settings.numeric
            self._vae = load_vae(self.settings.weights.vae, device=numeric.device, attention=numeric.attention)
        yield decode_chunk(self._vae, load_clean_chunk(self._store, plan, chunk), plan, chunk)


def _forget(store: Store, prefix: str) -> None:
    for key in store.list(prefix):
        store.delete(key)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def _file(given: Any, path: Path, *, dimensions: int, fps: int) -> str | None:
    """Where the image or clip lies; pixels are written to ``path`` first, without loss. Raises MediaError."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        return str(given)
    pixels = np.asarray(given)
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-1] != 3 or not pixels.size:
        kind, wanted = ("image", "[H, W, 3]") if dimensions == 3 else ("video", "[T, H, W, 3]")
        raise MediaError(
            f"The {kind} is {pixels.dtype} {list(pixels.shape)}, but must be uint8 {wanted}.",
            remedy="Convert it to RGB with 8 bits a channel, or give a path.",
        )
    _write(pixels if dimensions == 4 else pixels[None], path, fps=fps)
    return str(path)


def _write(frames: Sequence[Frames] | Frames, path: Path, *, fps: int) -> None:
    options: Mapping[str, str] = {"update": "1"} if path.suffix == ".png" else {}
    with av.open(str(path), "w", format="image2" if options else None, options=dict(options)) as container:
        stream = container.add_stream("png", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
