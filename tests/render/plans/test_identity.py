"""What a video's stages are a function of, and what they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.artifacts.commits import commit, segment_pre_image
from magi_ray.render.plans import identity
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import Media, RowPlan, plan_row
from magi_ray.sampling.noise import NOISE_LAW
from magi_ray.settings import Settings, override
from magi_ray.storage.memory import MemoryStore

DIGESTS = Digests(dit="d", vae="v", t5="t", special_tokens="s")
SCHEDULE = [{"start_chunk": 0, "prompt": "a boat"}, {"start_chunk": 7, "prompt": "a storm"}]


def plan(settings: Settings, *, digests: Digests = DIGESTS, media: Media | None = None, **columns: object) -> RowPlan:
    row = {"job_id": "a", "schedule": SCHEDULE, "num_chunks": 10} | columns
    [checked] = manifest_of([row], Defaults.of(settings), base=Path("/")).rows
    return plan_row(checked, settings, digests, media)


def shared(a: RowPlan, b: RowPlan) -> int:
    """How many stages from the first on are the same."""
    same = 0
    for x, y in zip(a.stage_keys, b.stage_keys, strict=False):
        if x != y:
            break
        same += 1
    return same


def test_a_prompt_changed_from_chunk_7_on_keeps_the_stages_before_it(settings: Settings) -> None:
    edited = [SCHEDULE[0], {"start_chunk": 7, "prompt": "calm again"}]
    assert shared(plan(settings), plan(settings, schedule=edited)) == 7


def test_a_longer_video_shares_its_beginning(settings: Settings) -> None:
    # The DURATION token of chunk i tells how many follow, up to 7: of 10 chunks the first 2 have 7 or more after them.
    assert shared(plan(settings), plan(settings, num_chunks=20)) == 3
    plain = override(settings, {"special_tokens": {"duration": False}})
    assert shared(plan(plain), plan(plain, num_chunks=20)) == 10


def test_stages_after_the_last_chunk_entered_differ_when_another_chunk_enters(settings: Settings) -> None:
    plain = override(settings, {"special_tokens": {"duration": False}})
    shorter, longer = plan(plain), plan(plain, num_chunks=11)
    assert shared(shorter, longer) == 10
    assert not set(shorter.stage_keys[10:]) & set(longer.stage_keys[10:])


@pytest.mark.parametrize("column", [{"priority": 9}, {"tags": {"shot": "12"}}, {"job_id": "b"}, {"fps": 30}])
def test_what_changes_no_pixel_of_a_latent_is_not_in_the_identity(settings: Settings, column: dict) -> None:
    assert plan(settings).stage_keys == plan(settings, **column).stage_keys


@pytest.mark.parametrize("column", [{"seed": 2}, {"num_steps": 16}, {"width": 64}])
def test_what_changes_pixels_changes_every_stage(settings: Settings, column: dict) -> None:
    assert shared(plan(settings), plan(settings, **column)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": {"window_size": 2}},
        {"runtime": {"text_scales": [5.0, 5.0, 5.0, 0.0, 0.0]}},
        {"runtime": {"noise2clean_kvrange": [4, 4, 3, 2]}},
        {"special_tokens": {"hq": False}},
        {"negative_prompt": True},
        {"numeric": {"attention": "plain"}},
        {"numeric": {"cpu_threads": 2}},
    ],
)
def test_settings_that_change_pixels_change_every_stage(settings: Settings, change: dict) -> None:
    assert shared(plan(settings), plan(override(settings, change))) == 0


@pytest.mark.parametrize("network", ["dit", "t5", "special_tokens"])
def test_other_weights_are_another_video(settings: Settings, network: str) -> None:
    other = Digests(**{**vars(DIGESTS), network: "x"})
    assert shared(plan(settings), plan(settings, digests=other)) == 0


def test_the_vae_concerns_latents_only_through_a_prefix(settings: Settings) -> None:
    other = Digests(**{**vars(DIGESTS), "vae": "x"})
    assert shared(plan(settings), plan(settings, digests=other)) == 13
    image = Media(kind="image", sha256="0" * 64, latents=1)
    assert shared(plan(settings, media=image), plan(settings, media=image, digests=other)) == 0


def test_t5_in_bfloat16_is_another_embedding_and_float32_keeps_its_key(settings: Settings) -> None:
    bfloat16 = override(settings, {"text": {"dtype": "bfloat16"}})
    assert shared(plan(settings), plan(bfloat16)) == 0
    assert "dtype" not in identity.text_pre_image("sea", settings, DIGESTS)


def test_the_encoder_concerns_segments_alone(settings: Settings) -> None:
    other = override(settings, {"encoder": {"crf": 40}})
    assert plan(settings).stage_keys == plan(other).stage_keys
    images = [
        identity.segment_pre_image("c", s, DIGESTS, encoder, dropped_frames=0, trimmed_frames=0, first_frame=24)
        for s, encoder in ((settings, "x"), (other, "x"), (settings, "y"))
    ]
    assert images[0] != images[1]
    assert images[0] != images[2]


def test_the_pre_image_of_a_stage_names_the_stage_before(settings: Settings) -> None:
    made = plan(settings)
    image = made.pre_image(3)
    assert image["previous"] == made.stage_keys[2]
    assert image["noise"] == {"law": NOISE_LAW, "seed": settings.runtime.seed}
    assert made.captions[6:8] == ("a boat", "a storm")


# What entries of a schedule may bring, and what must not change because they may


def controlled(**control: object) -> list[dict[str, object]]:
    return [SCHEDULE[0], SCHEDULE[1] | control]


def test_keys_of_what_was_rendered_before_entries_could_bring_more_are_as_they_were(settings: Settings) -> None:
    assert plan(settings).stage_keys[9] == "672af35d2570594a274cd9e5c2d5b43e4f577d60a094c98cdc82fb1482bdfb46"
    clip = Media(kind="video", sha256="0" * 64, latents=8)
    made = plan(settings, media=clip, video=str(Path(__file__)), prefix_from="start")
    assert made.prefix_digest == "3a8bef382f4bc10d3e67cc7ce036207c627fe3e4114b8b33e9fcdc9a2e86cff1"
    assert made.stage_keys[9] == "f0f343e03b94cbebe0bea903772f3c082bc7075ff0eddbf73a25d47393a7a6bc"


@pytest.mark.parametrize(
    "control", [{"kv_range": [1, 4, 3, 2]}, {"text_scales": [5] * 5}, {"prev_chunk_scales": [1] * 5}]
)
def test_what_holds_from_chunk_7_on_keeps_the_stages_before_it(settings: Settings, control: dict) -> None:
    changed = plan(settings, schedule=controlled(**control))
    assert shared(plan(settings), changed) == 7
    assert list(changed.controls) == [7, 8, 9]
    assert changed.pre_image(7)["entering"] | control == changed.pre_image(7)["entering"]


def test_saying_what_the_run_does_anyway_is_no_other_video(settings: Settings) -> None:
    runtime = settings.runtime
    control = {"kv_range": list(runtime.noise2clean_kvrange), "text_scales": list(runtime.text_scales)}
    assert plan(settings, schedule=controlled(**control)) == plan(settings)


HOW = [{"prefix_from": "start"}, {"prefix_frames": 48}, {"fit": "pad"}]


@pytest.mark.parametrize("column", HOW)
def test_how_a_clip_was_taken_is_in_the_identity_of_a_prefix_that_is_known_by_its_file(
    settings: Settings, column: dict
) -> None:
    video = {"video": str(Path(__file__)), "media": Media(kind="video", sha256="0" * 64, latents=8)}
    assert plan(settings, **video).prefix_digest != plan(settings, **video, **column).prefix_digest


@pytest.mark.parametrize("column", [*HOW, {"fps": 30}])
def test_a_prefix_is_known_by_its_pixels_however_they_were_taken_and_from_whatever_file(
    settings: Settings, column: dict
) -> None:
    clip = Media(kind="video", sha256="0" * 64, latents=8, pixels="a" * 64, clip_frames=72)
    made = plan(settings, media=clip, video=str(Path(__file__)))
    other = replace(clip, sha256="1" * 64, clip_frames=90)
    assert plan(settings, media=other, video=str(Path(__file__)), **column).stage_keys == made.stage_keys
    assert identity.run_digest("m", {"a": clip.identity}, settings, DIGESTS) == identity.run_digest(
        "m", {"a": other.identity}, settings, DIGESTS
    )
    changed = plan(settings, media=replace(clip, pixels="b" * 64), video=str(Path(__file__)))
    assert shared(made, changed) == 0


def test_what_is_heard_of_a_clip_makes_another_run_and_no_other_stage(settings: Settings) -> None:
    clip = Media(kind="video", sha256="0" * 64, latents=8, pixels="a" * 64, clip_frames=72)
    loud = replace(clip, sound="c" * 64)
    assert len({identity.run_digest("m", {"a": medium.identity}, settings, DIGESTS) for medium in (clip, loud)}) == 2
    keys = [plan(settings, media=medium, video=str(Path(__file__))).stage_keys for medium in (clip, loud)]
    assert keys[0] == keys[1]


def test_which_end_of_a_clip_is_meant_makes_another_run_only_of_rows_that_begin_from_something(
    settings: Settings,
) -> None:
    start = override(settings, {"prefix": {"take": "start"}})
    for media, runs in (({}, 1), ({"a": "x"}, 2)):
        assert len({identity.run_digest("m", media, s, DIGESTS) for s in (settings, start)}) == runs


def test_exact_lengths_change_no_stage_and_only_the_segment_of_a_last_chunk_that_is_cut(settings: Settings) -> None:
    store = MemoryStore()
    clip = Media(kind="video", sha256="0" * 64, latents=8, pixels="a" * 64, clip_frames=72)
    whole, exact, even = (
        plan(settings, media=replace(clip, latents=latents, exact_length=exact), video=str(Path(__file__)), **length)
        for latents, exact, length in (
            (8, False, {"num_chunks": 11}), (8, True, {"num_chunks": 10}), (6, True, {"num_chunks": 10}),
        )
    )  # fmt: skip
    assert whole.stage_keys == exact.stage_keys
    frames = [made.timeline.num_frames for made in (whole, exact, even)]
    assert frames == [11 * 24 - 8, 240, 240]
    for made in (whole, even):
        for stage in range(made.timeline.window_size - 1, made.timeline.num_stages):
            commit(store, "stage", made.pre_image(stage), {"state": b"", "chunk": b"%d" % stage}, seconds=1.0)
    images = [[segment_pre_image(store, made, chunk, "x") for chunk in range(11)] for made in (whole, exact)]
    assert images[0][:10] == images[1][:10]
    assert images[1][10] == images[0][10] | {"trimmed_frames": 16}
    assert "trimmed_frames" not in segment_pre_image(store, even, 9, "x")


def test_including_the_prefix_renders_no_stage_again(settings: Settings) -> None:
    video = {"video": str(Path(__file__)), "media": Media(kind="video", sha256="0" * 64, latents=8)}
    included = plan(settings, **video, include_prefix=True)
    assert included.stage_keys == plan(settings, **video).stage_keys
    assert included.timeline.num_frames == plan(settings, **video).timeline.num_frames + 32
