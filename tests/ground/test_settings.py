"""Settings: three sources, one frozen value, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from magi_ray.errors import SettingsError
from magi_ray.settings import (
    PRESETS,
    RuntimeConfig,
    Settings,
    cache_folder,
    job,
    nearest,
    override,
    preset,
    published,
    step_problems,
)

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


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_job_that_ships_writes_out_what_its_preset_holds(path: Path) -> None:
    settings = job(path)

    assert settings.name == path.stem
    assert settings.model_copy(update={"name": ""}) == preset(path.stem.split("_")[0]).model_copy(update={"name": ""})


def test_there_is_a_job_for_each_preset() -> None:
    assert {path.stem.split("_")[0] for path in JOBS.glob("*.toml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_run_of_its_variant(name: str, tmp_path: Path) -> None:
    settings = preset(name, weights=tmp_path)
    like_24b = name == "magi-tiny"

    assert settings.model.half_channel_vae is settings.model.gated_linear_unit is like_24b
    assert settings.weights.dit == tmp_path / "magi"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        preset("magi-tiny").name = "other"


def test_a_misspelt_preset_is_answered_with_the_right_one() -> None:
    with pytest.raises(SettingsError, match="Did you mean magi-tiny") as caught:
        preset("magi-tinny")
    assert caught.value.exit_code == 2


def test_a_published_config_is_read_as_it_is(tmp_path: Path) -> None:
    settings = published(official(tmp_path, runtime_config={"num_steps": 64, "fps": 12}))

    assert settings.name == "24B_config"
    assert (settings.runtime.num_steps, settings.runtime.fps) == (64, 12)
    assert (settings.weights.dit, settings.weights.t5, settings.weights.vae) == (
        Path("w/dit"),
        Path("w/t5"),
        Path("w/vae"),
    )
    assert settings.weights.special_tokens == Path("w/special_tokens.npz")


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


def test_an_unknown_field_of_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"unknown field model\.num_layer\. Did you mean num_layers\?"):
        published(official(tmp_path, model_config={"num_layer": 3}))


def test_an_override_is_checked_like_everything_else() -> None:
    base = preset("magi-tiny")

    assert override(base, {"runtime": {"fps": 12}}).runtime.fps == 12
    assert override(base, {}) == base
    with pytest.raises(SettingsError, match="fps"):
        override(base, {"runtime": {"fps": 0}})


def test_settings_survive_json() -> None:
    base = preset("magi-tiny")

    assert Settings.model_validate_json(base.model_dump_json()) == base


def test_steps_must_fit_window_and_ranges() -> None:
    runtime = RuntimeConfig(window_size=4, noise2clean_kvrange=(5, 4, 3))

    assert list(step_problems(12, runtime)) == []
    assert [problem.split("; ")[1] for problem in step_problems(10, runtime)] == ["use 12", "use 12"]
    assert list(step_problems(8, runtime.model_copy(update={"noise2clean_kvrange": ()}))) == []


def test_the_sizes_on_both_sides_are_named() -> None:
    assert nearest(100) == "use 96 or 112"
    assert nearest(8) == "use 16"


def test_the_cache_lies_where_the_environment_says() -> None:
    assert cache_folder({"MAGI_RAY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/magi-ray")
    assert cache_folder({}) == Path.home() / ".cache" / "magi-ray"
