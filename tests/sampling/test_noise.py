from __future__ import annotations

import torch

from magi_ray.sampling.noise import chunk_noise

SHAPE = (1, 16, 6, 8, 8)


def test_the_noise_of_a_chunk_depends_on_seed_and_chunk_alone() -> None:
    first = chunk_noise(seed=7, chunk=3, shape=SHAPE)
    torch.randn(10)
    chunk_noise(seed=7, chunk=2, shape=SHAPE)
    assert torch.equal(chunk_noise(seed=7, chunk=3, shape=SHAPE), first)
    assert not torch.equal(chunk_noise(seed=7, chunk=4, shape=SHAPE), first)
    assert not torch.equal(chunk_noise(seed=8, chunk=3, shape=SHAPE), first)


def test_seeds_that_agree_in_32_bits_give_other_noise() -> None:
    assert not torch.equal(chunk_noise(seed=1, chunk=0, shape=SHAPE), chunk_noise(seed=1 + 2**32, chunk=0, shape=SHAPE))


def test_noise_is_standard_normal_float32() -> None:
    noise = chunk_noise(seed=1234, chunk=0, shape=(1, 16, 6, 90, 160))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.005
    assert abs(float(noise.std()) - 1) < 0.005


def test_the_noise_law_is_frozen() -> None:
    """Every identity names this law: other numbers under the same name would mix two videos into one."""
    noise = chunk_noise(seed=1234, chunk=5, shape=(4,))
    assert noise.tolist() == [-0.7169565558433533, 0.7794126868247986, -0.7180455327033997, -0.7386475801467896]
