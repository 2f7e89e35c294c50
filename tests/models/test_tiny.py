from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from magi_ray.errors import SettingsError, WeightsError
from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable
from magi_ray.models.text.t5 import load_t5
from magi_ray.models.tiny import ensure_tiny, make_tiny
from magi_ray.models.vae.model import load_vae
from magi_ray.settings import TINY, Settings, WeightPaths, override, preset


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", TINY)
def test_every_network_of_a_made_folder_loads(tmp_path: Path, name: str) -> None:
    settings = preset(name, weights=tmp_path / name)
    make_tiny(tmp_path / name, settings)
    paths = settings.weights
    dit = published_folder(paths.dit, fp8=False, distill=False)
    load_dit(settings.model, dit, attention=settings.numeric.attention)
    load_vae(paths.vae, device="cpu", attention=settings.numeric.attention)
    assert load_t5(paths.t5, device="cpu").width == settings.model.caption_channels
    assert SpecialTokenTable.load(paths.special_tokens).width == settings.model.caption_channels
    assert sum(path.stat().st_size for path in (tmp_path / name).rglob("*")) < 8 * 2**20


def test_the_same_seed_gives_the_same_bytes_in_another_process(tiny_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    code = (
        "import sys; from pathlib import Path; from magi_ray.models.tiny import make_tiny; "
        "from magi_ray.settings import preset; make_tiny(Path(sys.argv[1]), preset('magi-tiny'))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert _digests(folder) == _digests(tiny_weights)


def test_another_seed_gives_other_weights_of_every_network(tiny_weights: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "tiny", preset("magi-tiny"), seed=1)
    ours, theirs = _digests(tmp_path / "tiny"), _digests(tiny_weights)
    assert ours.keys() == theirs.keys()
    same = {name for name in ours if ours[name] == theirs[name]}
    assert same == {"vae/config.json", "t5/t5-v1_1-xxl/config.json", "t5/t5-v1_1-xxl/spiece.model"}


def test_two_that_make_it_at_once_end_with_one_whole_folder_and_leave_nothing_else(tmp_path: Path) -> None:
    folder, settings = tmp_path / "tiny", preset("magi-tiny")
    failures: list[BaseException] = []

    def make() -> None:
        try:
            ensure_tiny(folder, settings)
        except BaseException as error:  # noqa: BLE001 (to be seen by the test)
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    load_vae(WeightPaths.under(folder, made=False).vae, device="cpu", attention="sdpa")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder, settings = tmp_path / "tiny", preset("magi-tiny")
    ensure_tiny(folder, settings)
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    ensure_tiny(folder, settings)
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == before


def test_a_folder_for_another_model_is_made_again(tmp_path: Path) -> None:
    folder, settings = tmp_path / "tiny", preset("magi-tiny")
    ensure_tiny(folder, settings)
    more_layers = override(settings, {"model": {"num_layers": 5}})
    ensure_tiny(folder, more_layers)
    dit = published_folder(WeightPaths.under(folder, made=False).dit, fp8=False, distill=False)
    load_dit(more_layers.model, dit, attention="plain")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_somebody_elses_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="not made by magi-ray"):
        ensure_tiny(tmp_path, preset("magi-tiny"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_too_small_for_these_weights_is_refused(tmp_path: Path) -> None:
    narrow = override(preset("magi-tiny"), {"model": {"kv_channels": 8}})
    with pytest.raises(SettingsError, match="kv_channels is 8, but has to be at least 16"):
        make_tiny(tmp_path / "tiny", narrow)


def test_the_tiny_vae_gives_back_a_recognisable_picture(tiny_weights: Path, settings: Settings) -> None:
    vae = load_vae(tiny_weights / "vae", device="cpu", attention="sdpa")
    down = torch.linspace(-0.6, 0.9, 64)[:, None].expand(64, 64)
    picture = torch.stack([down, -down, down.T])[None, :, None]
    latent = vae.encode(picture)
    assert 0.1 < (latent * settings.runtime.scale_factor).std() < 2
    assert (vae.decode(latent) - picture).abs().mean() < 0.05
