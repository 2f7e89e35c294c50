"""MAGI-1 from Python.

import magi_ray

model = magi_ray.load("4.5B-distill", weights="~/MAGI-1")
model(prompt="a boat on calm water", num_frames=96, seed=7).save("boat.mp4")
for chunk in model.stream(prompt="a boat on calm water", num_frames=2400):
    show(chunk)

run = magi_ray.submit("rows.parquet", "4.5B-distill", weights="~/MAGI-1", store="films")
run.wait()
run.videos()
"""

from magi_ray.api.loading import load
from magi_ray.api.model import CallOptions, Model, Video
from magi_ray.api.runs import SubmittedRun, submit

__all__ = ["CallOptions", "Model", "SubmittedRun", "Video", "load", "submit"]
