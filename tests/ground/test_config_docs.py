"""The README names every field of a published config, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from magi_ray.settings import EngineConfig, Frozen, ModelConfig, RuntimeConfig

PAGE = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("section", "fields"),
    [("model_config", ModelConfig), ("runtime_config", RuntimeConfig), ("engine_config", EngineConfig)],
)
def test_each_field_of_a_published_config_is_explained(section: str, fields: type[Frozen]) -> None:
    [table] = re.findall(rf"^#### {section}\n(.*?)(?=^#|^</details>)", PAGE.read_text(), flags=re.M | re.S)
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, flags=re.M)
    assert [name for name, _ in rows] == list(fields.model_fields)
    assert all(len(what) > 10 for _, what in rows)
