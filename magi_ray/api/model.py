"""A model that is called like a diffusers pipeline: the same plans, tasks and numbers as a run."""

from __future__ import annotations

import difflib
import logging
import operator
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from magi_ray.errors import InputError, ManifestError, SettingsError
from magi_ray.media.arrays import Frames, clip_pixels, write_clip, write_picture
from magi_ray.settings import EncoderSettings, Settings, override
from magi_ray.system import temporary_folder
from magi_ray.timeline import FRAMES_PER_CHUNK

if TYPE_CHECKING:
    import torch

    from magi_ray.events import StepDone
    from magi_ray.models.dit.model import DiT
    from magi_ray.models.text.special_tokens import SpecialTokenTable
    from magi_ray.models.vae.model import VAE
    from magi_ray.render.plans.row_plan import RowPlan
    from magi_ray.storage.memory import MemoryStore

# Embeddings of captions that a model keeps; one of the published T5 takes some 16 kB for each token.
KEPT_TEXT_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video, and how to write it.

    frames: Frames (PIL images; as an array uint8 RGB [T, H, W, 3]); with output_type "np" float32 [T, H, W, 3] in 0…1,
    with "pt" a tensor, float32 [T, 3, H, W] in 0…1. Those of a clip to continue only with ``include_prefix``.
    fps: per second.  seed: of its noise.  encoder: of ``save``.  segments: frames of each part that is encoded alone.
    """

    frames: Frames | npt.NDArray[np.float32] | torch.Tensor
    fps: int
    seed: int
    encoder: EncoderSettings
    segments: tuple[int, ...]

    def save(self, path: str | Path) -> Path:
        """Write the video as mp4, with the bytes that a run would give it, and return the path.

        Raises InputError (no such folder, or not .mp4), MediaError (no ffmpeg), OutputError, WorkerLost.
        """
        from magi_ray.media.encoder import encode_segment, find_ffmpeg
        from magi_ray.media.joiner import join

        path = Path(path).expanduser()
        if path.suffix.lower() != ".mp4":
            raise InputError(f"{path} does not end in .mp4.", remedy="Only mp4 files are written.")
        if not path.absolute().parent.is_dir():
            raise InputError(f"There is no folder {path.parent}.", remedy="Make it, or write somewhere else.")
        ffmpeg, frames, first = find_ffmpeg(), clip_pixels(self.frames), 0
        with tempfile.TemporaryDirectory(prefix=".magi-ray-", dir=path.absolute().parent) as folder:
            parts = []
            for number, count in enumerate(self.segments):
                parts.append(Path(folder) / f"{number:08d}.mp4")
                encode_segment(
                    frames[first : first + count], ffmpeg=ffmpeg, fps=self.fps, frame_offset=first,
                    settings=self.encoder, out=parts[-1],
                )  # fmt: skip
                first += count
            whole = Path(folder) / "video.mp4"
            join(parts, out=whole, ffmpeg=ffmpeg)
            whole.replace(path)
        return path


class CallOptions(TypedDict, total=False):
    """What a call may say beside its prompt; left out or None, the settings' value counts.

    schedule: in place of a prompt, prompts over time: entries as in a manifest ({"start_chunk", "prompt"} with or
        without kv_range, text_scales, prev_chunk_scales).
    image: to begin from: a path, an s3:// address, a PIL image, an array or a tensor (see ``write_picture``).
    video: a clip to continue: a path, an s3:// address, or its frames at the call's fps: a Video, a list of PIL images,
        an array or a tensor (see ``write_clip``).
    prefix_from: which end of the clip.  prefix_frames: how many frames of it, ≥ 4.
    include_prefix: whether they come first.  fit: how an image or clip of another aspect ratio is made to fit.
    num_frames, num_chunks (of 24 frames) or seconds: the length of new video, rounded up to whole chunks; after a
    clip exact, to the frame.
    height, width: pixels, multiples of 16. Without them the video has the shape of its image or clip, and about as many
        pixels as the settings say.
    fps: 1…120.  num_inference_steps: a multiple of window_size.
    guidance_scale: the highest of the settings' text_scales; the others keep their proportion. Base models only.
    negative_prompt: True guides away from logos, captions and cuts; MAGI-1 knows no other. Base models only.
    seed: 0…2^63−1; or generator, whose initial seed is used.
    callback_on_step_end: called as (model, step, timestep, {}) after each denoising step, step counting from 0.
        timestep: where the oldest chunk in flight stood before it: 0 noise, 1 clean. What it returns is not used; to
        stop, raise an exception.
    """

    schedule: Sequence[Mapping[str, Any]] | None
    image: object
    video: object
    prefix_from: Literal["start", "end"] | None
    prefix_frames: int | None
    include_prefix: bool | None
    fit: Literal["crop", "pad", "fit"] | None
    num_frames: int | None
    num_chunks: int | None
    seconds: float | None
    height: int | None
    width: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: bool | None
    seed: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    callback_on_step_end: Callable[[Model, int, float, dict[str, Any]], object] | None


class Model:
    """Called like a diffusers pipeline. Keeps the DiT, the VAE and the embeddings of the captions it saw last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._networks: tuple[DiT, SpecialTokenTable] | None = None
        self._vae: VAE | None = None
        self._texts = _TextCache(KEPT_TEXT_BYTES)
        self._progress_bar: dict[str, Any] = {}

    @overload
    def __call__(
        self,
        prompt: str | None = None,
        *,
        num_videos_per_prompt: Literal[1] = 1,
        output_type: Literal["pil", "np", "pt"] = "pil",
        **options: Unpack[CallOptions],
    ) -> Video: ...
    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...] | str | None = None,
        *,
        num_videos_per_prompt: int = 1,
        output_type: Literal["pil", "np", "pt"] = "pil",
        **options: Unpack[CallOptions],
    ) -> list[Video]: ...
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_videos_per_prompt: int = 1,
        output_type: Literal["pil", "np", "pt"] = "pil",
        **options: Unpack[CallOptions],
    ) -> Video | list[Video]:
        """The whole video, with all frames in memory; a list of them for a list of prompts or several for each.

        num_videos_per_prompt: with the seeds seed, seed + 1, …; generator may be a list, one for each video.
        options: see ``CallOptions``.  Raises as ``stream``.
        """
        if output_type not in ("pil", "np", "pt"):
            raise SettingsError(f"output_type: {output_type!r} is none of pil, np, pt.", remedy="Leave it out for pil.")
        if not isinstance(prompt, str | Iterable | None):
            raise SettingsError(f"prompt: {prompt!r} is no text.", remedy="Give a text, or a list of texts.")
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
        call = self._call(prompts, num_videos_per_prompt, options)
        videos = []
        with self._bar(sum(plan.timeline.num_stages * plan.forwards_per_stage for plan in call.plans)) as advance:
            for plan in call.plans:
                chunks = list(self._render(call, plan, advance))
                video = Video(
                    frames=Frames(np.concatenate(chunks)), fps=plan.settings.runtime.fps,
                    seed=plan.settings.runtime.seed, encoder=plan.settings.encoder, segments=tuple(map(len, chunks)),
                )  # fmt: skip
                videos.append(_as_type(video, output_type))
        return videos[0] if len(videos) == 1 and isinstance(prompt, str | None) else videos

    def stream(self, prompt: str | None = None, **options: Unpack[CallOptions]) -> Generator[Frames]:
        """The video chunk by chunk, each of at most 24 frames as soon as it is clean, in constant memory.

        prompt: what the video shows.  options: see ``CallOptions``.
        Raises at once, before the first chunk is asked for: ManifestError (a value that a row may not have, or an image
        or clip that cannot be read), SettingsError, WeightsError, MediaError (pixels that mean nothing, or no ffmpeg).
        While it renders: NumericError, DeviceOutOfMemory.
        """
        if not isinstance(prompt, str | None):
            raise SettingsError("prompt: stream renders one video.", remedy="Call the model with a list of prompts.")
        call = self._call([prompt], 1, options)
        return (Frames(chunk) for chunk in self._render(call, call.plans[0], lambda: None))

    def to(self, device: object) -> Self:
        """Compute on "cpu" or "cuda" from now on. Raises SettingsError for anything else."""
        name = str(device).removesuffix(":0")
        if name not in ("cpu", "cuda"):
            raise SettingsError(
                f"to: {device} is neither cpu nor cuda.",
                remedy="Another GPU is chosen with CUDA_VISIBLE_DEVICES, the precision with "
                'magi_ray.load(…, settings={"model": {"params_dtype": …}}).',
            )
        if name != self.settings.numeric.device:
            self.settings = override(self.settings, {"numeric": {"device": name}}, source="to")
            self._networks = self._vae = None
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """How calls show their progress: arguments of tqdm, such as ``disable=True``."""
        self._progress_bar = config

    @contextmanager
    def _bar(self, steps: int) -> Iterator[Callable[[], object]]:
        """A progress bar; what it yields is called after each step."""
        from tqdm.auto import tqdm

        with tqdm(total=steps, **self._progress_bar) as bar:
            yield lambda: bar.update()

    def _call(self, prompts: Sequence[str | None], copies: int, options: CallOptions) -> _Call:
        """The videos of a call, in the order of the prompts. Raises as ``stream``."""
        from magi_ray.render.runs.media import MediaFiles
        from magi_ray.render.runs.shape import manifest_in_shape
        from magi_ray.render.runs.submission import create, prepare
        from magi_ray.storage.memory import MemoryStore

        options = _checked(options)
        if not prompts or copies < 1:
            raise SettingsError("There is nothing to render: no prompt, or no video for it.", remedy="Give at least 1.")
        settings = _with_guidance(self.settings, options)
        seeds = _seeds(options, settings, len(prompts), copies)
        store, files = MemoryStore(), MediaFiles()
        with temporary_folder() as folder, _naming_arguments(options):
            row = _row(options, settings, folder)
            rows = [
                row | {"job_id": f"video-{number}", "prompt": prompt, "seed": seed}
                for number, (prompt, seed) in enumerate(
                    zip((p for p in prompts for _ in range(copies)), seeds, strict=True)
                )
            ]
            manifest = manifest_in_shape(rows, settings, files, base=Path.cwd())
            run, files = prepare(manifest, name="call", settings=settings, files=files)
            create(store, run, files)
        for note in run.manifest.notes:
            logging.getLogger("magi_ray").warning(note)
        return _Call(plans=tuple(run.plans.values()), store=store, on_step=options.get("callback_on_step_end"))

    def _render(self, call: _Call, plan: RowPlan, advance: Callable[[], object]) -> Iterator[npt.NDArray[np.uint8]]:
        """The frames of ``plan``, a chunk at a time. advance: called after each step."""
        from magi_ray.render.artifacts.latents import torch_threads
        from magi_ray.render.artifacts.prefix import prefix_pixels

        if plan.timeline.included_frames:
            clip = prefix_pixels(call.store, plan)
            for first in range(0, len(clip), FRAMES_PER_CHUNK):
                yield clip[first : first + FRAMES_PER_CHUNK]
        with closing(self._chunks(call, plan, advance)) as chunks:
            while True:
                # Only while we compute: between two chunks the caller has its own number of threads.
                with torch_threads(self.settings.numeric.cpu_threads):
                    frames = next(chunks, None)
                if frames is None:
                    return
                yield frames

    def _chunks(self, call: _Call, plan: RowPlan, advance: Callable[[], object]) -> Generator[npt.NDArray[np.uint8]]:
        from magi_ray.events import StageCommitted, StepDone
        from magi_ray.models.vae.model import load_vae
        from magi_ray.render.artifacts.latents import load_clean_chunk
        from magi_ray.render.tasks.decode_network import decode_chunk
        from magi_ray.render.tasks.denoise_network import denoiser, load_networks
        from magi_ray.render.tasks.embed_network import load_embedder
        from magi_ray.storage import keys

        # T5 is not kept; its embeddings are.
        self._texts.lend(plan.caption_digests, call.store)
        list(load_embedder(self.settings, call.store).carry_out(plan))
        self._texts.keep(plan.caption_digests, call.store)
        numeric = self.settings.numeric
        self._networks = self._networks or load_networks(self.settings)
        self._vae = self._vae or load_vae(self.settings.weights.vae, device=numeric.device, attention=numeric.attention)
        for event in denoiser(self.settings, call.store, *self._networks).carry_out(plan, 0):
            match event:
                case StepDone():
                    advance()
                    if call.on_step is not None:
                        call.on_step(self, *_step_and_timestep(event, plan), {})
                case StageCommitted():
                    if event.chunk is not None:
                        latent = load_clean_chunk(call.store, plan, event.chunk)
                        yield decode_chunk(self._vae, latent, plan, event.chunk)
                    # Nobody resumes a call: its stages are deleted as it goes on.
                    for key in list(call.store.list(keys.commit_folder("stage", plan.stage_keys[event.stage]))):
                        call.store.delete(key)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """store: of this call alone, and gone with it: whatever becomes of a call, the model keeps nothing of it."""

    plans: tuple[RowPlan, ...]
    store: MemoryStore
    on_step: Callable[[Model, int, float, dict[str, Any]], object] | None


class _TextCache:
    """Embeddings of captions, those used last, of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, dict[str, bytes]] = OrderedDict()

    def lend(self, digests: Sequence[str], store: MemoryStore) -> None:
        """Put those of ``digests`` that are here into ``store``."""
        for digest in set(digests) & self._kept.keys():
            for key, data in self._kept[digest].items():
                store.put(key, data)

    def keep(self, digests: Sequence[str], store: MemoryStore) -> None:
        """Those of ``digests`` are in ``store``, and were used now."""
        from magi_ray.storage import keys

        for digest in dict.fromkeys(digests):
            if digest not in self._kept:
                folder = keys.commit_folder("text", digest)
                self._kept[digest] = {key: store.get(key) for key in store.list(folder)}
                self._size += _bytes_of(self._kept[digest])
            self._kept.move_to_end(digest)
        while self._size > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._size -= _bytes_of(oldest)


def _bytes_of(objects: Mapping[str, bytes]) -> int:
    return sum(map(len, objects.values()))


# Arguments of a call whose columns have other names.
_ARGUMENTS = {"num_steps": "num_inference_steps"}
_WHOLE = ("prefix_frames", "num_frames", "num_chunks", "height", "width", "fps", "num_inference_steps", "seed")


def _checked(options: CallOptions) -> CallOptions:
    """Those that are given. Raises SettingsError for one that does not exist, or that contradicts another."""
    known = CallOptions.__annotations__.keys() | {"prompt", "num_videos_per_prompt", "output_type"}
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {near[0]}?" if near else "help(magi_ray.api.CallOptions) names those there are."
        raise SettingsError(f"There is no argument {name}.", remedy=remedy)
    given: CallOptions = {name: value for name, value in options.items() if value is not None}  # type: ignore[assignment]
    for names in (("num_frames", "num_chunks", "seconds"), ("seed", "generator"), ("image", "video")):
        beside = [name for name in names if name in given]
        if len(beside) > 1:
            raise SettingsError(f"{beside[0]} stands beside {beside[1]}.", remedy="Give one of them.")
    for name in _WHOLE:
        if hasattr(value := given.get(name), "__index__") and not isinstance(value, bool):
            given[name] = operator.index(value)  # type: ignore[literal-required]
    if not isinstance(frames := given.get("num_frames", 1), int):
        raise SettingsError(f"num_frames: {frames!r} is not a whole number.", remedy="Or give seconds.")
    if frames < 1:
        raise SettingsError(f"num_frames: {frames} is not a length.", remedy="Give a whole number from 1 on.")
    return given


def _with_guidance(settings: Settings, options: CallOptions) -> Settings:
    """The settings of a call. Raises SettingsError."""
    scale, negative = options.get("guidance_scale"), options.get("negative_prompt", "") or False
    if not isinstance(negative, bool):
        raise SettingsError(
            "negative_prompt: MAGI-1 cannot be guided away from a text.",
            remedy="True guides away from logos, captions and cuts.",
        )
    asked = [name for name, given in (("guidance_scale", scale is not None), ("negative_prompt", negative)) if given]
    runtime = settings.runtime
    if asked and runtime.cfg_number == 1:
        raise SettingsError(
            f"{asked[0]}: {settings.name} has no guidance.", remedy="Leave it out, or load a base model."
        )
    changes: dict[str, Any] = {}
    if "negative_prompt" in options:
        changes["negative_prompt"] = negative
    if scale is not None:
        highest = max(runtime.text_scales)
        if not 0 <= scale < float("inf") or not highest:
            raise SettingsError(f"guidance_scale: {scale} is not a number from 0 on.", remedy="7.5 is usual.")
        changes["runtime"] = {"text_scales": tuple(scale * share / highest for share in runtime.text_scales)}
    return override(settings, changes, source="the call") if changes else settings


def _seeds(options: CallOptions, settings: Settings, prompts: int, copies: int) -> list[int]:
    """A seed for each video. Raises SettingsError."""
    generator = options.get("generator")
    if not isinstance(generator, list | tuple):
        seed = options.get("seed") if generator is None else _seed_of(generator)
        first = settings.runtime.seed if seed is None else seed
        if not isinstance(first, int):
            raise SettingsError(f"seed: {first!r} is not a whole number.", remedy="Use one from 0 to 2^63 - 1.")
        return [first + copy for _ in range(prompts) for copy in range(copies)]
    if len(generator) != prompts * copies:
        raise SettingsError(
            f"generator: {len(generator)} for {prompts * copies} videos.", remedy="Give one for each video, or one."
        )
    return [_seed_of(each) for each in generator]


def _seed_of(generator: Any) -> int:
    if not hasattr(generator, "initial_seed"):
        raise SettingsError(f"generator: {generator!r} is not a torch.Generator.", remedy="Or give a seed.")
    return int(generator.initial_seed()) % 2**63


def _row(options: CallOptions, settings: Settings, folder: Path) -> dict[str, Any]:
    """What the rows of a call have in common. Pictures and clips given as values are written into ``folder``."""
    schedule, frames = options.get("schedule"), options.get("num_frames")
    row: dict[str, Any] = {
        name: options.get(name)
        for name in ("prefix_from", "prefix_frames", "include_prefix", "fit", "num_chunks", "seconds", "height",
                     "width", "fps")
    }  # fmt: skip
    row |= {"num_steps": options.get("num_inference_steps"), "schedule": schedule}
    if schedule is not None:
        row["schedule"] = [dict(entry) for entry in schedule]
    fps = row["fps"] or settings.runtime.fps
    if frames is not None:
        row["seconds"] = frames / fps
    for name, write in (("image", write_picture), ("video", lambda clip, path: write_clip(clip, path, fps=fps))):
        medium = options.get(name)
        if isinstance(medium, str | Path):
            row[name] = str(Path(medium).expanduser()) if str(medium).startswith("~") else str(medium)
        elif medium is not None:
            medium = medium.frames if isinstance(medium, Video) else medium
            row[name] = str(write(medium, folder / name))
    return row


@contextmanager
def _naming_arguments(options: CallOptions) -> Iterator[None]:
    """Errors in the rows of a call name the arguments that they were made of, each once."""
    try:
        yield
    except ManifestError as exc:
        problems = []
        for problem in exc.problems:
            column, value = _ARGUMENTS.get(problem.column, problem.column), problem.value
            if column == "seconds" and "num_frames" in options:
                column, value = "num_frames", str(options["num_frames"])
            if column in ("image", "video") and not isinstance(options.get(column), str | Path):
                value = "what was given"
            problems.append(replace(problem, row=0, job_id="", column=column, value=value))
        problems = list(dict.fromkeys(problems))
        lines = [
            f"{problem.column}: {f'{problem.value} {problem.rule}'.strip()}; {problem.remedy}" for problem in problems
        ]
        raise ManifestError("\n".join(lines), problems) from exc


def _step_and_timestep(event: StepDone, plan: RowPlan) -> tuple[int, float]:
    """Which of the video's steps was done, from 0; and where the oldest chunk in flight stood before it, 0…1."""
    from magi_ray.sampling.schedule import time_grid

    runtime, per_stage = plan.settings.runtime, plan.forwards_per_stage
    grid = time_grid(runtime.num_steps, shortcut_mode=plan.settings.engine.shortcut_mode)
    behind = event.stage - plan.timeline.window(event.stage)[0]
    return event.stage * per_stage + event.step - 1, float(grid[behind * per_stage + event.step - 1])


def _as_type(video: Video, output_type: Literal["pil", "np", "pt"]) -> Video:
    if output_type == "pil":
        return video
    values: npt.NDArray[np.float32] = np.asarray(video.frames).astype(np.float32) / np.float32(255)
    if output_type == "np":
        return replace(video, frames=values)
    import torch

    return replace(video, frames=torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2))))
