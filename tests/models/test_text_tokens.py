"""How much of a caption is read: told from the tokenizer's file as the encoder and the special tokens have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from magi_ray.models.text.prompt import clean_caption
from magi_ray.models.text.special_tokens import SpecialTokenTable, prepend_special_tokens
from magi_ray.models.text.t5 import load_t5
from magi_ray.models.text.tokens import CaptionCounter, tokens_read
from magi_ray.settings import SpecialTokens

WORDS = "a red fox walks through the deep snow while the wind blows and the old man looks at the bright window"


@pytest.mark.parametrize("chosen", [{}, {"hq": False}, {"hq": False, "duration": False}, {"two_d_anime": True}])
def test_the_tokens_counted_are_those_that_the_dit_gets(chosen: dict[str, Any], tiny_weights: Path) -> None:
    max_length, special = 20, SpecialTokens(**chosen)
    table = SpecialTokenTable.load(tiny_weights / "special_tokens.npz")
    encoder = load_t5(tiny_weights / "t5", device="cpu", max_length=max_length)
    limit = tokens_read(max_length, special)
    counter = CaptionCounter(tiny_weights / "t5", limit=limit)
    tokenizer = counter._tokenizer
    lengths = set()
    for count in range(1, len(WORDS)):
        prompt = WORDS[:count]
        ids = tokenizer.encode(clean_caption(prompt))
        # Numbers in place of embeddings, so that it shows which of them are left.
        tokens = torch.tensor(encoder.token_ids(clean_caption(prompt)), dtype=torch.float16)[:, None]
        given = prepend_special_tokens(
            tokens.expand(-1, table.width), table, chosen=special, duration_index=1, max_length=max_length
        )
        read = given[sum(special.model_dump().values()) :, 0].int().tolist()
        whole = read[: len(ids)] == ids
        cut = counter.cut(prompt)
        assert (cut is None) == whole, prompt
        if cut is not None:
            assert cut.tokens == len(ids)
            assert tokenizer.decode(read[:limit]).strip().endswith(cut.last_words)
        lengths.add(len(ids))
    assert {limit, limit + 1} <= lengths
