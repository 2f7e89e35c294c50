from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from magi_ray.errors import WeightsError
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.settings import SpecialTokens

WIDTH = 2
ALL = SpecialTokens(
    static_first_frames=True, dynamic_first_frames=True, borderness=True, three_d_model=True, two_d_anime=True
)
NONE = SpecialTokens(hq=False, duration=False)


@pytest.fixture
def table() -> SpecialTokenTable:
    """Row i of other_tokens is filled with i, CAPTION with 100, LOGO with 101."""
    rows = torch.arange(102, dtype=torch.float16)[:, None].expand(-1, WIDTH)
    return SpecialTokenTable(other=rows[:100], caption=rows[100:101], logo=rows[101:])


def _firsts(caption: torch.Tensor, count: int) -> list[int]:
    return [int(value) for value in caption[:count, 0]]


def test_the_published_choice_puts_duration_before_hq_before_the_caption(table: SpecialTokenTable) -> None:
    caption = torch.full((3, WIDTH), -1.0)
    out = prepend_special_tokens(caption, table, chosen=SpecialTokens(), duration_index=1, max_length=800)
    assert _firsts(out, 5) == [7, 1, -1, -1, -1]
    assert out.dtype == torch.float32


def test_every_token_has_its_row_and_the_last_prepended_stands_first(table: SpecialTokenTable) -> None:
    caption = torch.full((1, WIDTH), -1.0)
    out = prepend_special_tokens(caption, table, chosen=ALL, duration_index=8, max_length=800)
    # DURATION_8, 2D, 3D, HQ, BORDERNESS, DYNAMIC, STATIC
    assert _firsts(out, 8) == [14, 16, 15, 1, 4, 3, 2, -1]


def test_nothing_chosen_changes_nothing(table: SpecialTokenTable) -> None:
    caption = torch.randn(3, WIDTH)
    assert torch.equal(prepend_special_tokens(caption, table, chosen=NONE, duration_index=1, max_length=800), caption)


def test_what_stands_beyond_the_maximum_is_cut_off_the_end(table: SpecialTokenTable) -> None:
    caption = torch.arange(10.0)[:, None].expand(-1, WIDTH)
    out = prepend_special_tokens(caption, table, chosen=SpecialTokens(), duration_index=3, max_length=10)
    assert _firsts(out, len(out)) == [9, 1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_no_tokens_at_all_stay_none_since_they_stand_for_the_null_caption(table: SpecialTokenTable) -> None:
    empty = torch.empty(0, WIDTH)
    assert len(prepend_special_tokens(empty, table, chosen=ALL, duration_index=1, max_length=800)) == 0


def test_the_null_caption_is_the_first_fifty_rows(table: SpecialTokenTable) -> None:
    embedding = torch.arange(800.0)[:, None].expand(-1, WIDTH)
    assert _firsts(null_caption(embedding), 800) == list(range(50))


def test_a_negative_prompt_displaces_the_end_of_the_null_caption(table: SpecialTokenTable) -> None:
    embedding = torch.arange(800.0)[:, None].expand(-1, WIDTH)
    out = null_caption(embedding, table, negative_prompt=True)
    # BORDERNESS, TRANS, LOGO, CAPTION
    assert _firsts(out, 800) == [4, 0, 101, 100, *range(46)]


def test_the_table_is_read_as_float16(tmp_path: Path) -> None:
    path = tmp_path / "special_tokens.npz"
    np.savez(path, caption_token=np.ones((1, 4)), logo_token=np.ones((1, 4)), other_tokens=np.full((100, 4), 1 / 3))
    table = SpecialTokenTable.load(path)
    assert table.width == 4
    assert table.other.dtype == torch.float16
    assert float(table.other[0, 0]) == float(np.float16(1 / 3))


@pytest.mark.parametrize("damage", ["missing", "not an npz", "cut off", "few rows", "an array missing", "objects"])
def test_a_damaged_table_is_a_weights_error_with_a_remedy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "special_tokens.npz"
    arrays = {"caption_token": np.ones((1, 4)), "logo_token": np.ones((1, 4)), "other_tokens": np.ones((100, 4))}
    match damage:
        case "few rows":
            arrays["other_tokens"] = np.ones((17, 4))
        case "an array missing":
            del arrays["caption_token"]
        case "objects":
            arrays["logo_token"] = np.array([[print]])
    if damage != "missing":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    if damage == "not an npz":
        path.write_bytes(b"no zip")
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsError) as raised:
        SpecialTokenTable.load(path)
    assert str(path) in raised.value.message
    assert raised.value.remedy
