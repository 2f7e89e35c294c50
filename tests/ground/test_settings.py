"""Settings: three sources, one frozen value, and what is said of a wrong one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pydantic
import pytest

from magi_ray.errors import SettingsError, WeightsError
from magi_ray.settings import (
    PRESETS,
    PUBLISHED,
    TINY,
    PixelSettings,
    RunSettings,
    RuntimeConfig,
    Settings,
    WeightPaths,
    cache_folder,
    job,
    nearest,
    override,
    preset,
    published,
    step_problems,
)
from magi_ray.settings.environment import set_defaults

JOBS = Path(__file__).parents[2] / "jobs"


def official(folder: Path, **changes: dict[str, Any]) -> Path:
    """A config in the published form, of the size of a preset."""
    base = preset("magi-tiny")
    content = {
        "model_config": base.model.model_dump(),
        "runtime_config": base.runtime.model_dump()
        | {"load": "w/dit", "t5_pretrained": "w/t5", "vae_pretrained": "w/vae"},
        "engine_config": base.engine.model_dump(),
    }
    for section, values in changes.items():
        content[section] |= values
    path = folder / "24B_config.json"
    path.write_text(json.dumps(content))
    return path


RELEASES = ("24B_base", "24B_distill", "24B_distill_quant", "4.5B_base", "4.5B_distill", "4.5B_distill_quant")
FOLDERS = ("inference_weight", "inference_weight.distill", "inference_weight.fp8.distill") * 2


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """The published repository, downloaded: every release, but nothing in the files."""
    ckpt = tmp_path / "downloads" / "ckpt"
    for release, folder in zip(RELEASES, FOLDERS, strict=True):
        (ckpt / "magi" / release / folder).mkdir(parents=True)
    (ckpt / "t5" / "t5-v1_1-xxl").mkdir(parents=True)
    (ckpt / "vae").mkdir()
    (ckpt / "vae" / "config.json").touch()
    (ckpt.parent / "special_tokens.npz").touch()
    return ckpt.parent


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_job_that_ships_writes_out_what_its_preset_holds(path: Path, download: Path) -> None:
    name = path.stem.split("_")[0]
    weights = None if name in TINY else download
    settings = job(path, weights=weights)

    assert settings.name == path.stem
    assert settings.model_copy(update={"name": name}) == preset(name, weights=weights)


def test_there_is_a_job_for_each_preset() -> None:
    assert {path.stem.split("_")[0] for path in JOBS.glob("*.toml")} == set(PRESETS)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_preset_is_a_whole_run_of_its_architecture(name: str, tmp_path: Path) -> None:
    settings = preset(name, weights=tmp_path)
    like_24b = name == "magi-tiny"

    assert settings.model.half_channel_vae is settings.model.gated_linear_unit is like_24b
    assert settings.weights.dit == tmp_path / "magi"


@pytest.mark.parametrize(("name", "release", "steps", "size"), [
    ("24B", "24B_base", 32, (720, 1280)),
    ("24B-distill", "24B_distill", 16, (720, 1280)),
    ("24B-distill-fp8", "24B_distill_quant", 16, (720, 1280)),
    ("4.5B", "4.5B_base", 64, (720, 720)),
    ("4.5B-distill", "4.5B_distill", 64, (720, 720)),
    ("4.5B-distill-fp8", "4.5B_distill_quant", 64, (720, 720)),
])  # fmt: skip
def test_a_published_variant_needs_only_the_folder_of_its_download(
    name: str, release: str, steps: int, size: tuple[int, int], download: Path
) -> None:
    settings = preset(name, weights=download)
    model, runtime, engine = settings.model, settings.runtime, settings.engine

    assert settings.weights.dit == download / "ckpt" / "magi" / release
    assert (settings.weights.vae, settings.weights.t5) == (download / "ckpt" / "vae", download / "ckpt" / "t5")
    assert settings.weights.made_in is None
    assert (runtime.num_steps, (runtime.video_size_h, runtime.video_size_w)) == (steps, size)
    assert (engine.distill, engine.fp8_quant) == ("distill" in name, "fp8" in name)
    assert runtime.cfg_number == (1 if engine.distill else 3)
    assert (model.params_dtype, settings.numeric.device) == ("torch.bfloat16", "cuda")
    large = {"num_layers": 48, "hidden_size": 6144, "ffn_hidden_size": 16384, "num_attention_heads": 48,
             "num_query_groups": 8, "kv_channels": 128, "half_channel_vae": True, "in_channels": 32,
             "out_channels": 32, "x_rescale_factor": 0.1, "gated_linear_unit": True}  # fmt: skip
    small = {"num_layers": 34, "hidden_size": 3072, "ffn_hidden_size": 12288, "num_attention_heads": 24,
             "num_query_groups": 8, "kv_channels": 128, "half_channel_vae": False, "in_channels": 16,
             "out_channels": 16, "x_rescale_factor": 1.0, "gated_linear_unit": False}  # fmt: skip
    expected = large if name.startswith("24B") else small
    assert {field: getattr(model, field) for field in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_may_also_lie_as_ours_do(name: str, tmp_path: Path) -> None:
    paths = WeightPaths.under(tmp_path, made=False)
    (paths.dit / dict(zip(PUBLISHED, FOLDERS, strict=True))[name]).mkdir(parents=True)
    (paths.t5 / "t5-v1_1-xxl").mkdir(parents=True)
    paths.vae.mkdir()
    (paths.vae / "config.json").touch()
    paths.special_tokens.touch()

    assert preset(name, weights=tmp_path).weights == paths


def test_the_folder_in_a_download_that_holds_the_networks_is_enough(download: Path) -> None:
    (download / "special_tokens.npz").rename(download / "ckpt" / "special_tokens.npz")
    settings = preset("24B", weights=download / "ckpt")

    assert settings.weights.dit == download / "ckpt" / "magi" / "24B_base"


def test_a_folder_without_a_network_is_answered_with_every_place_looked_at(download: Path) -> None:
    (download / "ckpt" / "magi" / "4.5B_base" / "inference_weight").rmdir()
    (download / "special_tokens.npz").unlink()
    with pytest.raises(WeightsError) as caught:
        preset("4.5B", weights=download)

    message = str(caught.value)
    assert f"{download} lacks 2 of the 4 networks" in message
    assert "dit: magi/inference_weight, ckpt/magi/4.5B_base/inference_weight, " in message
    assert "special_tokens: special_tokens.npz, " in message
    assert "vae:" not in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_variant_asks_for_its_folder(name: str) -> None:
    with pytest.raises(SettingsError, match="--weights DIR"):
        preset(name)


def test_a_job_may_name_the_folder_of_the_networks(download: Path) -> None:
    path = download.parent / "mine.toml"
    path.write_text('preset = "24B"\nweights = "downloads"\n[numeric]\ndevice = "cpu"\n')
    settings = job(path)

    assert settings.weights == preset("24B", weights=download).weights
    assert settings.numeric.device == "cpu"


def test_a_folder_of_networks_does_not_stand_beside_a_config(tmp_path: Path) -> None:
    official(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('config = "24B_config.json"\nweights = "w"\n')
    with pytest.raises(SettingsError, match="begins with a config"):
        job(path)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        preset("magi-tiny").name = "other"


def test_a_misspelt_preset_is_answered_with_the_right_one() -> None:
    with pytest.raises(SettingsError, match="Did you mean magi-tiny") as caught:
        preset("magi-tinny")
    assert caught.value.exit_code == 2


def test_a_published_config_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = published(official(tmp_path, runtime_config={"num_steps": 64, "fps": 12}))

    assert settings.name == "24B_config"
    assert (settings.runtime.num_steps, settings.runtime.fps) == (64, 12)
    assert (settings.weights.dit, settings.weights.t5, settings.weights.vae) == (
        tmp_path / "w/dit",
        tmp_path / "w/t5",
        tmp_path / "w/vae",
    )
    assert settings.weights.special_tokens == tmp_path / "w/special_tokens.npz"


def test_a_job_lays_its_tables_over_a_published_config_beside_it(tmp_path: Path) -> None:
    official(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('config = "24B_config.json"\n[runtime]\nfps = 12\n[encoder]\ncrf = 30\n')

    settings = job(path)

    assert (settings.name, settings.runtime.fps, settings.encoder.crf) == ("mine", 12, 30)
    assert settings.runtime.num_steps == preset("magi-tiny").runtime.num_steps


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "names neither preset nor config"),
        ('preset = "magi-tiny"\nconfig = "x.json"', "names preset and config"),
        ("preset =", "is not readable as TOML"),
        ('preset = "nothing"', "There is no preset 'nothing'"),
        ('config = "x.json"', "There is no config file"),
        ('preset = "magi-tiny"\n[runtime]\nnum_stepps = 8', "runtime.num_stepps. Did you mean num_steps?"),
        ('preset = "magi-tiny"\n[encodr]\ncrf = 8', "unknown field encodr. Did you mean encoder?"),
        ('preset = "magi-tiny"\n[runtime]\nnum_steps = 10', "must be divisible by window_size 4; use 12"),
        ('preset = "magi-tiny"\n[runtime]\nvideo_size_w = 100', "must be a multiple of 16; use 96 or 112"),
        ('preset = "magi-tiny"\n[runtime]\ncfg_number = 1', "cfg_number is 1, but a base model needs 3"),
        ('preset = "magi-tiny"\n[runtime]\ntext_scales = [7.5]', "text_scales"),
        ('preset = "magi-tiny"\n[encoder]\ncrf = 99', "encoder.crf"),
    ],
)  # fmt: skip
def test_a_wrong_job_says_what_is_wrong_with_it(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)

    with pytest.raises(SettingsError) as caught:
        job(path)

    assert words in str(caught.value)
    assert caught.value.remedy


def test_a_missing_job_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There is no job file"):
        job(tmp_path / "none.toml")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_config": {}}', "\xff"])
def test_another_json_is_not_taken_for_a_config(content: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content.encode("latin-1"))

    with pytest.raises(SettingsError):
        published(path)


@pytest.mark.parametrize(("section", "field", "words"), [
    ("model_config", "num_layer", "unknown field model.num_layer. Did you mean num_layers?"),
    ("runtime_config", "windw_size", "unknown field runtime.windw_size. Did you mean window_size?"),
    ("engine_config", "fp8_quantize", "unknown field engine.fp8_quantize. Did you mean fp8_quant?"),
])  # fmt: skip
def test_an_unknown_field_of_any_section_of_a_config_is_named(
    section: str, field: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        published(official(tmp_path, **{section: {field: 3}}))
    assert words in str(caught.value)


def test_a_published_config_computes_where_it_is_told_and_the_text_encoder_with_it(tmp_path: Path) -> None:
    path = official(tmp_path, runtime_config={"t5_device": "cuda"})

    here, there = published(path), published(path, device="cuda")
    assert (here.numeric.device, here.runtime.t5_device) == ("cpu", "cpu")
    assert (there.numeric.device, there.runtime.t5_device) == ("cuda", "cuda")


def test_the_special_tokens_of_a_config_may_lie_beside_it(tmp_path: Path) -> None:
    path = official(tmp_path)
    (tmp_path / "special_tokens.npz").touch()

    assert published(path).weights.special_tokens == tmp_path / "special_tokens.npz"


def test_a_section_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"model_config": [], "runtime_config": {}, "engine_config": {}}')
    with pytest.raises(SettingsError, match=r"model_config of .* is list"):
        published(path)


def test_an_override_is_checked_like_everything_else() -> None:
    base = preset("magi-tiny")

    assert override(base, {"runtime": {"fps": 12}}).runtime.fps == 12
    assert override(base, {}) == base
    with pytest.raises(SettingsError, match="fps"):
        override(base, {"runtime": {"fps": 0}})


def test_settings_survive_json() -> None:
    base = preset("magi-tiny")

    assert Settings.model_validate_json(base.model_dump_json()) == base


def test_which_end_of_a_clip_is_called_take_wherever_people_and_records_name_it() -> None:
    base = preset("magi-tiny")
    changed = override(base, {"prefix": {"take": "start"}})

    assert (base.prefix.clip_end, changed.prefix.clip_end) == ("end", "start")
    assert changed.model_dump(mode="json")["prefix"]["take"] == "start"
    assert Settings.model_validate_json(changed.model_dump_json()) == changed
    assert override(base, changed.model_dump()) == changed
    for wrong, words in (({"tak": "end"}, "Did you mean take?"), ({"clip_end": "end"}, "unknown field")):
        with pytest.raises(SettingsError, match=re.escape(words)):
            override(base, {"prefix": wrong})


def test_a_clip_is_continued_from_its_end_but_from_its_start_with_a_published_config(tmp_path: Path) -> None:
    config = official(tmp_path)
    of_preset, of_config = tmp_path / "preset.toml", tmp_path / "config.toml"
    of_preset.write_text('preset = "magi-tiny"')
    of_config.write_text(f'config = "{config.name}"')
    chosen = [settings.prefix.clip_end for settings in (preset("magi-tiny"), job(of_preset), published(config))]
    assert chosen == ["end", "end", "start"]
    assert job(of_config).prefix.clip_end == "start"
    of_config.write_text(f'config = "{config.name}"\n[prefix]\ntake = "end"')
    assert job(of_config).prefix.clip_end == "end"


def test_every_setting_changes_pixels_or_does_not() -> None:
    assert not PixelSettings.model_fields.keys() & RunSettings.model_fields.keys()
    assert PixelSettings.model_fields.keys() | RunSettings.model_fields.keys() == Settings.model_fields.keys()
    assert RunSettings.model_fields.keys() == {"name", "weights", "decoders", "black_frames"}


def test_a_variable_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_A": "mine"})
    set_defaults({"RAY_A": "ours", "RAY_B": "ours"})

    assert os.environ == {"RAY_A": "mine", "RAY_B": "ours"}


def test_steps_must_fit_window_and_ranges() -> None:
    runtime = RuntimeConfig(window_size=4, noise2clean_kvrange=(5, 4, 3))

    assert list(step_problems(12, runtime)) == []
    assert [problem.remedy for problem in step_problems(10, runtime)] == ["use 12", "use 12"]
    assert list(step_problems(8, runtime.model_copy(update={"noise2clean_kvrange": ()}))) == []


def test_the_sizes_on_both_sides_are_named() -> None:
    assert nearest(100) == "use 96 or 112"
    assert nearest(8) == "use 16"


def test_the_cache_lies_where_the_environment_says() -> None:
    assert cache_folder({"MAGI_RAY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/magi-ray")
    assert cache_folder({}) == Path.home() / ".cache" / "magi-ray"


def test_a_run_can_be_resumed_from_another_folder_than_its_weights_were_named_in(
    download: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(download.parent)
    for name, weights in (("24B", "downloads"), ("magi-tiny", "tiny")):
        paths = preset(name, weights=Path(weights)).weights
        assert paths.dit.is_absolute()
        assert paths.special_tokens.is_absolute()
