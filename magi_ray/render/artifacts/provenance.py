"""Where, when and with which versions a result was computed. Stored beside it, never part of its identity."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from magi_ray.system import System


def provenance(*, seconds: float, system: System, **about: str) -> dict[str, Any]:
    """Of a computation that ends now and took ``seconds``. ``about``: run_id, job_id, device, where they are known."""
    return {
        "magi_ray": _version("magi-ray"),
        "torch": _version("torch"),
        "host": platform.node(),
        "finished_unix": round(system.unix_time(), 3),
        "seconds": round(seconds, 3),
        **{name: value for name, value in about.items() if value},
    }


@cache  # a driver of the GPU may take a while, and every plan and worker asks
def device_name(device: str) -> str:
    """What computes as ``device`` ("cpu", "cuda", "cuda:0") on this machine, for people and to compare speeds:
    "NVIDIA H200", "Intel(R) Xeon(R) …"."""
    if device.startswith("cuda"):
        import torch  # here: most commands need no torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@cache  # reading a package's metadata takes a millisecond, and every commit asks
def _version(package: str) -> str:
    return version(package)
