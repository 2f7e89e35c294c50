"""Learned embeddings that go before a caption, and the null caption (spec §2, §4).

Shapes: n tokens · d caption_channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from magi_ray.errors import WeightsError
from magi_ray.settings import SpecialTokens

NULL_CAPTION_LENGTH = 50
OTHER_TOKENS = 100

# Rows of other_tokens. DURATION_n is row 6 + n, n in 1…8.
_TRANS, _BORDERNESS, _BEFORE_DURATION = 0, 4, 6
# The field of settings.SpecialTokens and the row of other_tokens, in the order of prepending: the last stands first.
_CHOICES = (
    ("static_first_frames", 2),
    ("dynamic_first_frames", 3),
    ("borderness", _BORDERNESS),
    ("hq", 1),
    ("three_d_model", 15),
    ("two_d_anime", 16),
)


@dataclass(frozen=True, kw_only=True)
class SpecialTokenTable:
    """The content of ``special_tokens.npz``, float16 on the CPU."""

    caption: Tensor  # [1, d]
    logo: Tensor  # [1, d]
    other: Tensor  # [100, d]

    @property
    def width(self) -> int:
        """d, which must equal the DiT's caption_channels."""
        return self.caption.shape[1]

    @classmethod
    def load(cls, path: Path) -> SpecialTokenTable:
        """Reads an npz with ``caption_token`` [1, d], ``logo_token`` [1, d] and ``other_tokens`` [100, d].

        Raises WeightsError: missing, damaged, or other arrays than these.
        """
        remedy = "Use the special_tokens.npz that was published with MAGI-1."
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name].astype(np.float16) for name in file.files}
        except FileNotFoundError as exc:
            raise WeightsError(f"There is no special tokens file {path}.", remedy=remedy) from exc
        except (OSError, ValueError, EOFError, BadZipFile, TypeError) as exc:
            raise WeightsError(f"{path} is not a readable npz file: {exc}", remedy=remedy) from exc
        rows = {"caption_token": 1, "logo_token": 1, "other_tokens": OTHER_TOKENS}
        width = arrays["caption_token"].shape[-1] if "caption_token" in arrays else 0
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != (expected := {name: (count, width) for name, count in rows.items()}):
            raise WeightsError(f"{path} holds {shapes}, but needs {expected}.", remedy=remedy)
        caption, logo, other = (torch.from_numpy(arrays[name]) for name in rows)
        return cls(caption=caption, logo=logo, other=other)


def prepend_special_tokens(
    caption: Tensor, tokens: SpecialTokenTable, *, chosen: SpecialTokens, duration_index: int, max_length: int
) -> Tensor:
    """The caption of one chunk as the DiT gets it.

    Args:
        caption: [n, d], the unmasked tokens of the text encoder.
        chosen: which tokens to prepend; they go in front one by one, DURATION last, so it comes first.
        duration_index: 1…8, chunks that remain after this one (at most 7) plus one: ``Timeline.duration_index``.
        max_length: caption_max_length of the model; the rest is cut off.

    Returns: [min(n + number of tokens, max_length), d] in the caption's dtype and device. A caption without tokens
    stays empty: it stands for the null caption.
    """
    assert 1 <= duration_index <= 8, duration_index
    if not len(caption):
        return caption
    prepended = [_row(tokens, row) for field, row in _CHOICES if getattr(chosen, field)]
    if chosen.duration:
        prepended.append(_row(tokens, _BEFORE_DURATION + duration_index))
    return _prepend(caption, prepended)[:max_length]


def null_caption(
    null_caption_embedding: Tensor, tokens: SpecialTokenTable | None = None, *, negative_prompt: bool = False
) -> Tensor:
    """The unmasked tokens of the null caption, [50, d], in the embedding's dtype and device.

    Args:
        null_caption_embedding: [caption_max_length, d], ``y_embedder.null_caption_embedding`` of the DiT.
        tokens: needed with ``negative_prompt`` only.
        negative_prompt: prepend CAPTION, LOGO, TRANS and BORDERNESS; the length stays, so the last four drop out.
    """
    null = null_caption_embedding
    if negative_prompt:
        assert tokens is not None
        null = _prepend(null, [tokens.caption, tokens.logo, _row(tokens, _TRANS), _row(tokens, _BORDERNESS)])
    return null[:NULL_CAPTION_LENGTH]


def _row(tokens: SpecialTokenTable, row: int) -> Tensor:
    return tokens.other[row : row + 1]


def _prepend(caption: Tensor, one_by_one: list[Tensor]) -> Tensor:
    return torch.cat([*(token.to(caption) for token in reversed(one_by_one)), caption])
