"""What a video's stages are a function of, and what they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render import identity
from magi_ray.render.identity import Digests
from magi_ray.render.plan import Media, RowPlan, plan_row
from magi_ray.sampling.noise import NOISE_LAW
from magi_ray.settings import Settings, override

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


def test_the_encoder_concerns_segments_alone(settings: Settings) -> None:
    other = override(settings, {"encoder": {"crf": 40}})
    assert plan(settings).stage_keys == plan(other).stage_keys
    images = [
        identity.segment_pre_image("c", 0, s, DIGESTS, encoder, 24)
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
