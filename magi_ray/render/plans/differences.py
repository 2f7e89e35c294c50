"""Why two plans do not give the same stages or segments, in sentences. No store, no tensors.

Compares pre-images, from which keys are made: so it names everything that changes a pixel, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import Media, RowPlan, prefix_pre_image
from magi_ray.render.plans.takes import BackTo, take_in_use, take_of_chunk
from magi_ray.settings import AS_THE_RUN, ChunkControl

SHOWN = 48  # characters of a prompt; of longer ones, those around the first difference

# Fields of pre-images that people know by another name.
_NAMES = {
    "format": "format of identities",
    "weights": "weights of the DiT",
    "vae": "weights of the VAE",
    "text_encoder": "weights of T5",
    "special_token_table": "file of the special tokens",
    "noise.law": "noise",
    "noise.seed": "seed",
    "max_length": "model.caption_max_length",
    "dtype": "text.dtype",
    "encoder.binary": "encoder",
    "first_frame": "frames of the clip in front",
}


def stages_shared(a: RowPlan, b: RowPlan) -> int:
    """How many stages, from the first on, are the same."""
    return _shared(a.stage_keys, b.stage_keys)


def stage_changes(before: RowPlan, after: RowPlan, stage: int) -> list[str]:
    """Why ``stage``, the first that is not as in ``before``, and the later ones differ: a sentence for each reason."""
    changes: list[str] = []
    if stage < min(len(before.stage_keys), len(after.stage_keys)):
        # Without its place in the chain, and what is compared below.
        skip = {"kind", "stage", "previous", "entering", "prefix"}
        changes += _value_changes(before.pre_image(stage), after.pre_image(stage), skip=skip)
    if before.prefix_digest != after.prefix_digest:
        changes += _prefix_changes(before, after)
    changes += _value_changes(_text_pre_image(before), _text_pre_image(after), skip={"kind", "caption"})
    changes += _chunk_changes(before, after, stage)
    return list(dict.fromkeys(changes))


def segment_changes(before: RowPlan, after: RowPlan, encoders: tuple[str, str]) -> list[str]:
    """Why segments of the same frames differ. ``encoders``: ``media.encoder.encoder_identity``, before and after."""
    pre_images = [
        identity.segment_pre_image(
            "",
            plan.settings,
            plan.digests,
            encoder,
            dropped_frames=0,
            trimmed_frames=0,
            first_frame=plan.timeline.included_frames,
        )
        for plan, encoder in zip((before, after), encoders, strict=True)
    ]
    return _value_changes(*pre_images, skip={"kind", "chunk", "dropped_frames"})


def _prefix_changes(before: RowPlan, after: RowPlan) -> list[str]:
    old, new = before.media, after.media
    if old is None or new is None or old.kind != new.kind:
        return [f"began with {_beginning(old)}, now with {_beginning(new)}"]
    if new.pixels is None and old.sha256 != new.sha256:
        return [f"{new.kind}: sha256 {_text(old.sha256)} → {_text(new.sha256)}"]
    pre_images = [
        _how_taken(plan) | prefix_pre_image(media, plan.settings, plan.digests)
        for plan, media in ((before, old), (after, new))
    ]
    changes = _value_changes(*pre_images, skip={"kind", "media", "pixels", "left_over"})
    if old.pixels is None and new.pixels is not None:
        changes.append(f"{new.kind}: known by its file before, by its pixels now")
    elif old.pixels != new.pixels and (old.sha256 != new.sha256 or not changes):
        changes.append(f"{new.kind}: pixels {_text(old.pixels)} → {_text(new.pixels)}")
    return changes


def _how_taken(plan: RowPlan) -> dict[str, Any]:
    """How the pixels of ``plan``'s image or clip are taken from the file, under the names of the settings."""
    runtime, prefix = plan.settings.runtime, plan.settings.prefix
    taken: dict[str, Any] = {"size": [runtime.video_size_h, runtime.video_size_w], "prefix": {"fit": prefix.fit}}
    if plan.media is not None and plan.media.kind == "video":
        taken |= {"fps": runtime.fps, "prefix": prefix.model_dump(mode="json", exclude={"include"})}
    return taken


def _beginning(media: Media | None) -> str:
    return "text alone" if media is None else f"the {media.kind} of sha256 {_text(media.sha256)}"


def _text_pre_image(plan: RowPlan) -> dict[str, Any]:
    """What embeddings depend on beside their captions, under the names of the settings."""
    pre_image = {"dtype": "float32"} | identity.text_pre_image("", plan.settings, plan.digests)
    numeric = pre_image.pop("numeric")
    return pre_image | {"t5_device": numeric["device"], "numeric": {"cpu_threads": numeric["cpu_threads"]}}


def _chunk_changes(before: RowPlan, after: RowPlan, stage: int) -> Iterator[str]:
    """Differences of the chunks that enter from ``stage`` on, and of their number."""
    lengths = before.timeline.num_chunks, after.timeline.num_chunks
    chunks = range(stage, min(lengths))
    for where, old, new in _spans(chunks, before.captions, after.captions):
        yield f"prompt of {where}: {_quoted(old, new)}"
    for name in ChunkControl.model_fields:
        for where, old, new in _spans(chunks, _controls(before, name), _controls(after, name)):
            yield f"{name} of {where}: {old} → {new}"
    for chunk in chunks:
        if take_of_chunk(before.takes, chunk) != take_of_chunk(after.takes, chunk):
            asked = "brought back" if after.takes and isinstance(after.takes[-1], BackTo) else "asked for"
            yield f"take {take_in_use(after.takes)} from chunk {chunk} on was {asked}"
            break
    if lengths[0] != lengths[1]:
        knows = " (the last chunks of a video know how much is left)" if after.settings.special_tokens.duration else ""
        yield f"{'longer' if lengths[0] < lengths[1] else 'shorter'}: {lengths[0]} → {lengths[1]} chunks{knows}"


def _controls(plan: RowPlan, name: str) -> list[str]:
    """One field of ChunkControl, for each chunk."""
    values = [getattr(plan.controls.get(chunk, AS_THE_RUN), name) for chunk in range(plan.timeline.num_chunks)]
    return ["as the run" if value is None else str(list(value)) for value in values]


def _spans(chunks: range, before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Neighbouring chunks with the same change: which they are, the value before, the value after."""
    for (old, new), group in groupby(chunks, key=lambda chunk: (before[chunk], after[chunk])):
        first, *others = group
        if old != new:
            yield f"chunks {first} to {others[-1]}" if others else f"chunk {first}", old, new


def _value_changes(before: Mapping[str, Any], after: Mapping[str, Any], *, skip: set[str]) -> list[str]:
    """A sentence for each value that differs."""
    old_values, new_values = ({k: image[k] for k in image if k not in skip} for image in (before, after))
    return [
        f"{_NAMES.get(name, name.removeprefix('sampling.'))} {_text(old, name)} → {_text(new, name)}"
        for name, old, new in _differing(old_values, new_values)
    ]


def _differing(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value before and value after of each difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _differing(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield name, before, after


def _text(value: Any, name: str = "") -> str:
    if name == "size":
        height, width = value
        return f"{width}×{height}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:8]}…"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _quoted(old: str, new: str) -> str:
    """Two prompts in quotation marks; long ones cut at the same place, so that the first difference can be seen."""
    start = 0
    if max(len(old), len(new)) > SHOWN:
        start = max(0, _shared(old, new) - SHOWN // 3)
        start = old.rfind(" ", 0, start) + 1
    pieces = [f"{'…' * (start > 0)}{t[start : start + SHOWN]}{'…' * (len(t) > start + SHOWN)}" for t in (old, new)]
    return f'"{pieces[0]}" → "{pieces[1]}"'


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many items, from the first on, are the same."""
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
