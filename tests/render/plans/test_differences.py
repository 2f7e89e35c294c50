"""In what two videos differ, in words that a person understands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.plans.differences import segment_changes, stage_changes, stages_shared
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import Media, RowPlan, plan_row
from magi_ray.settings import Settings, override

DIGESTS = Digests(dit="d" * 64, vae="e" * 64, t5="f" * 64, special_tokens="a" * 64)
SCHEDULE = [{"start_chunk": 0, "prompt": "a boat"}, {"start_chunk": 7, "prompt": "a storm"}]
CLIP = Media(kind="video", sha256="1" * 64, latents=8)
KNOWS = "(the last chunks of a video know how much is left)"


def plan(settings: Settings, *takes: int, media: Media | None = None, **columns: object) -> RowPlan:
    row = {"job_id": "a", "schedule": SCHEDULE, "num_chunks": 10} | columns
    if media is not None:
        row |= {media.kind: str(Path(__file__))}
    [checked] = manifest_of([row], Defaults.of(settings), base=Path("/")).rows
    return plan_row(checked, settings, DIGESTS, media, takes)


def changes(before: RowPlan, after: RowPlan) -> list[str]:
    return stage_changes(before, after, stages_shared(before, after))


def scheduled(*entries: tuple[int, str], **control: object) -> dict[str, Any]:
    schedule: list[dict[str, object]] = [{"start_chunk": chunk, "prompt": prompt} for chunk, prompt in entries]
    schedule[-1] |= control
    return {"schedule": schedule}


# What a manifest says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (scheduled((0, "a boat"), (7, "calm again")), ['prompt of chunks 7 to 9: "a storm" → "calm again"']),
        (scheduled((0, "a boat"), (7, "calm"), (8, "a storm")), ['prompt of chunk 7: "a storm" → "calm"']),
        (
            scheduled((0, "a boat"), (5, "rain"), (6, "a boat"), (9, "sun")),
            [
                'prompt of chunk 5: "a boat" → "rain"',
                'prompt of chunks 7 to 8: "a storm" → "a boat"',
                'prompt of chunk 9: "a storm" → "sun"',
            ],
        ),
        (scheduled((0, "a boat"), (7, "a storm"), kv_range=[1, 4, 3, 2]),
         ["kv_range of chunks 7 to 9: as the run → [1, 4, 3, 2]"]),
        (scheduled((0, "a boat"), (7, "a storm"), text_scales=[9, 9, 9, 9, 0], prev_chunk_scales=[1] * 5),
         ["text_scales of chunks 7 to 9: as the run → [9.0, 9.0, 9.0, 9.0, 0.0]",
          "prev_chunk_scales of chunks 7 to 9: as the run → [1.0, 1.0, 1.0, 1.0, 1.0]"]),
        ({"seed": 2}, ["seed 1234 → 2"]),
        ({"width": 96, "height": 64}, ["size 32×32 → 96×64"]),
        ({"num_steps": 16}, ["num_steps 8 → 16"]),
        ({"num_chunks": 12}, [f"longer: 10 → 12 chunks {KNOWS}"]),
        ({"num_chunks": 8}, [f"shorter: 10 → 8 chunks {KNOWS}"]),
        ({"seed": 2, "num_chunks": 11}, ["seed 1234 → 2", f"longer: 10 → 11 chunks {KNOWS}"]),
    ],
)  # fmt: skip
def test_an_edited_row_is_told_in_the_words_of_its_manifest(
    columns: dict[str, Any], told: list[str], settings: Settings
) -> None:
    assert changes(plan(settings), plan(settings, **columns)) == told


def test_an_override_taken_back_is_told_too(settings: Settings) -> None:
    before = plan(settings, **scheduled((0, "a boat"), (7, "a storm"), kv_range=[1, 4, 3, 2]))
    assert changes(before, plan(settings)) == ["kv_range of chunks 7 to 9: [1, 4, 3, 2] → as the run"]


def test_without_duration_tokens_a_longer_video_differs_by_its_new_chunks_alone(settings: Settings) -> None:
    plain = override(settings, {"special_tokens": {"duration": False}})
    short, long = plan(plain), plan(plain, num_chunks=11)
    assert stages_shared(short, long) == 10
    assert changes(short, long) == ["longer: 10 → 11 chunks"]
    assert changes(long, short) == ["shorter: 11 → 10 chunks"]
    # With a window of 1 the longer one holds every stage of the shorter.
    plain = override(plain, {"runtime": {"window_size": 1}})
    short, long = plan(plain), plan(plain, num_chunks=11)
    assert changes(short, long) == ["longer: 10 → 11 chunks"]
    assert changes(long, short) == ["shorter: 11 → 10 chunks"]


def test_takes_are_told_with_the_chunk_they_begin_from(settings: Settings) -> None:
    assert changes(plan(settings), plan(settings, 3)) == ["take 2 from chunk 3 on was asked for"]
    assert changes(plan(settings, 3), plan(settings, 3, 5)) == ["take 3 from chunk 5 on was asked for"]
    assert changes(plan(settings, 5), plan(settings, 5, 3)) == ["take 3 from chunk 3 on was asked for"]


def test_of_long_prompts_the_first_difference_is_shown(settings: Settings) -> None:
    long = "a boat on calm water under a wide sky, seen from the shore, "
    old, new = (
        long + "with a red sail and two men at the oars in the evening",
        long + "with a blue sail and nobody on it",
    )
    before, after = (plan(settings, schedule=[{"start_chunk": 0, "prompt": prompt}]) for prompt in (old, new))
    [told] = changes(before, after)
    assert told == (
        'prompt of chunks 0 to 9: "…the shore, with a red sail and two men at the oa…" → '
        '"…the shore, with a blue sail and nobody on it"'
    )


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, CLIP, "began with text alone, now with the video of sha256 11111111…"),
        (CLIP, None, "began with the video of sha256 11111111…, now with text alone"),
        (CLIP, Media(kind="image", sha256="2" * 64, latents=1),
         "began with the video of sha256 11111111…, now with the image of sha256 22222222…"),
        (CLIP, replace(CLIP, sha256="2" * 64), "video: sha256 11111111… → 22222222…"),
    ],
)  # fmt: skip
def test_what_a_video_begins_from_is_told_by_its_content(
    before: Media | None, after: Media | None, told: str, settings: Settings
) -> None:
    assert changes(plan(settings, media=before), plan(settings, media=after)) == [told]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prefix_from": "start"}, ["prefix.take end → start"]),
        ({"prefix_frames": 48}, ["prefix.max_frames 32 → 48"]),
        ({"fit": "pad"}, ["prefix.fit crop → pad"]),
        ({"fps": 30}, ["fps 24 → 30"]),
    ],
)
def test_how_a_clip_is_taken_is_told(columns: dict[str, Any], told: list[str], settings: Settings) -> None:
    assert changes(plan(settings, media=CLIP), plan(settings, media=CLIP, **columns)) == told
    seen = replace(CLIP, pixels="a" * 64)
    assert changes(plan(settings, media=seen), plan(settings, media=replace(seen, pixels="b" * 64), **columns)) == told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"pixels": "a" * 64}, "video: known by its file before, by its pixels now"),
        ({"pixels": "a" * 64}, {"pixels": "b" * 64, "sha256": "2" * 64}, "video: pixels aaaaaaaa… → bbbbbbbb…"),
        ({"pixels": "a" * 64}, {"pixels": "b" * 64}, "video: pixels aaaaaaaa… → bbbbbbbb…"),
    ],
)
def test_other_pixels_are_told(before: dict[str, str], after: dict[str, str], told: str, settings: Settings) -> None:
    media = [replace(CLIP, **fields) for fields in (before, after)]
    assert changes(*(plan(settings, media=medium) for medium in media)) == [told]


# Every field of the pre-images ------------------------------------------------------------------------------------


def leaves(image: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in image.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple | list):
        return value[:-1]
    return value + 1 if isinstance(value, int | float) else f"{value}-x"


def spoken(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_every_field_that_a_stage_is_a_function_of_has_its_sentence(settings: Settings) -> None:
    before = plan(settings)
    told: set[str] = set()

    def differs(name: str, sentence: str, **fields: object) -> None:
        after = replace(before, **fields)
        assert before.pre_image(0) != after.pre_image(0), name
        assert stage_changes(before, after, 0) == [sentence]
        told.add(name)

    sections = {"model": "model", "special_tokens": "special_tokens", "numeric": "numeric"}
    fields = [(f"{shown}.{name}", section, name) for shown, section in sections.items()
              for name in before.pre_image(0)[shown]]  # fmt: skip
    for name in before.pre_image(0)["sampling"]:
        fields.append((f"sampling.{name}", "engine" if hasattr(settings.engine, name) else "runtime", name))
    for path, section, name in fields:
        values = getattr(settings, section)
        old, new = getattr(values, name), other(getattr(values, name))
        sentence = f"{path.removeprefix('sampling.')} {spoken(old)} → {spoken(new)}"
        changed = settings.model_copy(update={section: values.model_copy(update={name: new})})
        differs(path, sentence, settings=changed)

    runtime = settings.runtime
    differs("negative_prompt", "negative_prompt false → true",
            settings=settings.model_copy(update={"negative_prompt": True}))  # fmt: skip
    for name, sentence, changed in (
        ("size", "size 32×32 → 48×32", runtime.model_copy(update={"video_size_w": 48})),
        ("noise.seed", "seed 1234 → 5", runtime.model_copy(update={"seed": 5})),
    ):
        differs(name, sentence, settings=settings.model_copy(update={"runtime": changed}))
    differs("weights", "weights of the DiT dddddddd… → 99999999…", digests=replace(DIGESTS, dit="9" * 64))
    differs("special_token_table", "file of the special tokens aaaaaaaa… → 99999999…",
            digests=replace(DIGESTS, special_tokens="9" * 64))  # fmt: skip
    differs("prefix", "began with text alone, now with the video of sha256 11111111…",
            media=CLIP, prefix_digest="p")  # fmt: skip

    class Older(RowPlan):
        """As a version of magi-ray would have planned it that wrote identities differently."""

        def pre_image(self, stage: int) -> dict[str, Any]:
            image = super().pre_image(stage)
            return image | {"format": 0, "noise": image["noise"] | {"law": "torch"}}

    assert stage_changes(Older(**vars(before)), before, 0) == [
        "format of identities 0 → 1", "noise torch → magi-ray/noise/v1",
    ]  # fmt: skip
    told |= {"format", "noise.law"}

    # Its place in the chain, which does not differ where stages are compared; what enters is told chunk by chunk.
    place = {"kind", "stage", "previous"}
    entering = {"entering.chunk", "entering.caption", "entering.duration"}
    assert set(leaves(before.pre_image(0))) == told | place | entering


def test_every_field_that_an_embedding_is_a_function_of_has_its_sentence(settings: Settings) -> None:
    runtime = settings.runtime
    on_cuda = settings.model_copy(update={"runtime": runtime.model_copy(update={"t5_device": "cuda"})})
    bfloat16 = override(settings, {"text": {"dtype": "bfloat16"}})
    assert stage_changes(plan(settings), plan(bfloat16), 0) == ["text.dtype float32 → bfloat16"]
    assert stage_changes(plan(settings), plan(on_cuda), 0) == ["t5_device cpu → cuda"]
    other_t5 = replace(plan(settings), digests=replace(DIGESTS, t5="9" * 64))
    assert stage_changes(plan(settings), other_t5, 0) == ["weights of T5 ffffffff… → 99999999…"]


def test_every_field_that_a_segment_is_a_function_of_has_its_sentence(settings: Settings) -> None:
    before = plan(settings, media=CLIP)
    encoder, tiles = settings.encoder, settings.tiles
    cases = [
        (plan(settings, media=CLIP, fps=30), "fps 24 → 30"),
        (plan(settings, media=CLIP, include_prefix=True), "frames of the clip in front 0 → 32"),
        (plan(override(settings, {"runtime": {"scale_factor": 0.5}}), media=CLIP), "scale_factor 0.18215 → 0.5"),
        (replace(before, digests=replace(DIGESTS, vae="9" * 64)), "weights of the VAE eeeeeeee… → 99999999…"),
        *(
            (replace(before, settings=settings.model_copy(update={"encoder": encoder.model_copy(update={name: 3})})),
             f"encoder.{name} {old} → 3")
            for name, old in encoder
        ),
        *(
            (replace(before, settings=settings.model_copy(update={"tiles": tiles.model_copy(update={name: old * 2})})),
             f"tiles.{name} {old} → {old * 2}")
            for name, old in tiles
        ),
    ]  # fmt: skip
    for after, told in cases:
        assert segment_changes(before, after, ("ffmpeg 7", "ffmpeg 7")) == [told]
    assert segment_changes(before, before, ("ffmpeg 7", "ffmpeg 8")) == ["encoder ffmpeg 7 → ffmpeg 8"]
    assert segment_changes(before, before, ("ffmpeg 7", "ffmpeg 7")) == []
