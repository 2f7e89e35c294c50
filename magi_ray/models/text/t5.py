"""The T5 text encoder: a caption → one embedding for each of its tokens (spec §2, §4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from magi_ray.errors import WeightsError
from magi_ray.models.text.tokens import T5_NAME, TOKENIZER_FILE

# A full T5 may lie in the folder; only its encoder is read.
_DECODER_KEYS = ("decoder.", "lm_head.")
# T5 adds 100 sentinels to the tokenizer's file and rounds up to a multiple of 128. A file that lacks more was cut off,
# which sentencepiece does not always notice.
_MAX_SPARE_TOKENS = 256


class TextEncoder:
    """T5's encoder and tokenizer. Keeps nothing between captions."""

    def __init__(self, model: Any, tokenizer: SentencePieceProcessor, *, device: str, max_length: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._device, self._max_length = device, max_length

    @property
    def width(self) -> int:
        """Channels of an embedding, which have to equal the DiT's caption_channels."""
        return int(self._model.config.d_model)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of cleaned captions (``prompt.clean_caption``).

        Returns: for each caption [n, width] on the CPU, 1 ≤ n ≤ max_length, in the encoder's dtype: what the
        published encoder gives at the unmasked positions of a caption padded to max_length. An empty caption has one
        token, the end of the text; only a tensor without tokens stands for the null caption.
        """
        # One at a time and without padding: a batch or padding would change the last bits of sums, and nothing else,
        # since masked tokens have weight 0 and T5 only uses distances between tokens.
        return [self._encode_one(caption) for caption in captions]

    def token_ids(self, caption: str) -> list[int]:
        """The tokens of a cleaned caption, cut to max_length; the last is the end of the text."""
        ids: list[int] = self._tokenizer.encode(caption)
        return [*ids[: self._max_length - 1], self._tokenizer.eos_id()]

    @torch.no_grad()
    def _encode_one(self, caption: str) -> Tensor:
        ids = torch.tensor([self.token_ids(caption)], device=self._device)
        embeddings: Tensor = self._model(input_ids=ids).last_hidden_state
        return embeddings[0].cpu()


def load_t5(folder: Path, *, device: str, dtype: torch.dtype = torch.float32, max_length: int = 800) -> TextEncoder:
    """The encoder in ``<folder>/t5-v1_1-xxl``, an ordinary transformers folder. Never downloads anything.

    Args:
        folder: t5_pretrained of the config.
        dtype: the published dtype is float32; others are approximations.
        max_length: caption_max_length of the model.

    Raises WeightsError: folder missing, files missing or damaged, weights that do not fit its config.
    """
    # Here, since transformers takes seconds to import and only the embedding task needs it.
    from transformers import T5EncoderModel

    path = folder / T5_NAME
    missing = [name for name in ("config.json", TOKENIZER_FILE) if not (path / name).is_file()]
    if missing:
        raise WeightsError(
            f"There is no text encoder in {path}: {' and '.join(missing)} missing.",
            remedy=f"Point t5_pretrained at the folder that holds {T5_NAME}/.",
        )
    remedy = f"Download {T5_NAME} again into {path}."
    try:
        # Read directly: transformers makes an empty tokenizer of a missing or cut-off file, and says nothing.
        tokenizer = SentencePieceProcessor(model_file=str(path / TOKENIZER_FILE))
        with _quiet_transformers():
            # eager: the one attention that every version of transformers and every device has.
            model, report = T5EncoderModel.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UnpicklingError) as exc:
        raise WeightsError(f"The text encoder in {path} cannot be loaded: {exc}", remedy=remedy) from exc
    absent = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(_DECODER_KEYS))
    if absent or unexpected:
        raise WeightsError(
            f"The weights in {path} do not fit its config.json: missing {absent or 'none'}, "
            f"unexpected {unexpected or 'none'}.",
            remedy=remedy,
        )
    spare = model.config.vocab_size - tokenizer.vocab_size()
    if tokenizer.eos_id() < 0 or not 0 <= spare <= _MAX_SPARE_TOKENS:
        raise WeightsError(
            f"{path / TOKENIZER_FILE} does not fit the encoder: it has {tokenizer.vocab_size()} tokens with end token "
            f"{tokenizer.eos_id()}, the encoder knows {model.config.vocab_size}.",
            remedy=remedy,
        )
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer, device=device, max_length=max_length)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and reports on stderr; what matters becomes a WeightsError."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
