"""Prompts that are longer than what is read of them."""

from __future__ import annotations

from collections.abc import Sequence

from magi_ray.manifest import Row
from magi_ray.models.text.tokens import T5_NAME, TOKENIZER_FILE, CaptionCounter, tokens_read
from magi_ray.settings import Settings

SHOWN = 10


def notes_on_prompts(rows: Sequence[Row], settings: Settings) -> list[str]:
    """A sentence for each prompt whose end is not read. The tokenizer is loaded only if a prompt may be that long."""
    limit = tokens_read(settings.model.caption_max_length, settings.special_tokens)
    # A token is a letter at least.
    long = [
        (row, place, caption.prompt)
        for row in rows
        for place, caption in enumerate(row.captions, 1)
        if len(caption.prompt) > limit
    ]
    if not long:
        return []
    try:
        counter = CaptionCounter(settings.weights.t5, limit=limit)
    except (OSError, ValueError, RuntimeError):
        path = settings.weights.t5 / T5_NAME / TOKENIZER_FILE
        return [f"Row {long[0][0].number} has a long prompt, of which {limit} tokens are read. There is no {path} here "
                "to count them with."]  # fmt: skip
    counted = {prompt: counter.cut(prompt) for _, _, prompt in long}
    notes = [
        f"Row {row.number}: {'its prompt' if len(row.captions) == 1 else f'the prompt of entry {place}'} has "
        f"{cut.tokens} tokens, {limit} are read; the last words read are “{cut.last_words}”."
        for row, place, prompt in long
        if (cut := counted[prompt]) is not None
    ]
    more = [f"{len(notes) - SHOWN} more prompts are cut at {limit} tokens."] if len(notes) > SHOWN else []
    return notes[:SHOWN] + more
