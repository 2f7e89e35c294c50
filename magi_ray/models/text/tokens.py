"""T5's tokenizer: which words of a caption are read. Needs no torch and no weights, only its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from magi_ray.models.text.prompt import clean_caption
from magi_ray.settings import SpecialTokens

T5_NAME = "t5-v1_1-xxl"
TOKENIZER_FILE = "spiece.model"


def tokens_read(max_length: int, chosen: SpecialTokens) -> int:
    """How many tokens of a caption the DiT gets: the special ones before it count, and without any the end of the text
    does."""
    return max_length - max(1, sum(map(bool, chosen.model_dump().values())))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A caption that is too long. tokens: its own.  last_words: the last of what is read."""

    tokens: int
    last_words: str


class CaptionCounter:
    """Raises OSError, ValueError or RuntimeError when ``folder``, t5_pretrained of the config, has no tokenizer."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        path = folder / T5_NAME / TOKENIZER_FILE
        self._tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
        self._limit = limit

    def cut(self, prompt: str) -> Cut | None:
        """What is read of ``prompt``; None if all of it is."""
        ids: list[int] = self._tokenizer.encode(clean_caption(prompt))
        if len(ids) <= self._limit:
            return None
        words = str(self._tokenizer.decode(ids[: self._limit])).split()
        return Cut(tokens=len(ids), last_words=" ".join(words[-4:]))
