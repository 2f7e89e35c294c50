"""The text side of a tiny weight folder: a T5 encoder and a real sentencepiece tokenizer, both small."""

from __future__ import annotations

import itertools
from io import BytesIO
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer

from magi_ray.models.tiny_weights import Array, Draw

VOCABULARY = 256
_PIECES = 144

_SUBJECTS = [
    "a cat", "the old man", "a red fox", "two children", "a sailing boat", "the orange balloon", "a small robot",
    "the camera", "a woman in a blue coat", "an astronaut",
]  # fmt: skip
_VERBS = [
    "walks through", "looks at", "slowly drifts over", "dances in", "runs across", "zooms towards", "sings beside",
    "flies above", "is playing with", "turns away from",
]  # fmt: skip
_PLACES = [
    "a green field", "the snowy mountains", "a busy street at night", "the quiet sea", "a field of yellow flowers",
    "a dark forest", "the bright window", "an empty room", "the river under a stone bridge", "clouds at sunset",
]  # fmt: skip
_STYLES = [
    "in warm golden light.", "with a wide lens, 35mm film!", "in slow motion; very detailed.",
    "as rain begins to fall", "while the wind blows: a close-up shot?", '"cinematic" and soft, it\'s spring.',
]  # fmt: skip
_CHARACTERS = "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ' \" - + = % $ < >"


def train_tokenizer() -> bytes:
    """The bytes of a ``spiece.model``: a unigram model of captions, with T5's control tokens. Always the same bytes."""
    parts = itertools.product(_SUBJECTS, _VERBS, _PLACES)
    sentences = [" ".join((*words, _STYLES[i % len(_STYLES)])) for i, words in enumerate(parts)]
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, _CHARACTERS]), model_writer=model, vocab_size=_PIECES,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def t5_config(width: int) -> dict[str, Any]:
    """A ``config.json`` in the form of t5-v1_1: gated GELU, embeddings of ``width`` channels."""
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5",
        "vocab_size": VOCABULARY, "d_model": width, "d_kv": 16, "d_ff": 2 * width,
        "num_layers": 2, "num_heads": width // 16, "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "dropout_rate": 0.0, "layer_norm_epsilon": 1e-06,
        "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def t5_weights(width: int, draw: Draw) -> dict[str, Array]:
    """Random weights at the scales T5 itself starts from, so that embeddings tell captions apart."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        state = T5EncoderModel(T5Config(**t5_config(width))).state_dict()
    weights = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name.endswith("layer_norm.weight"):
            weights[name] = 1 + draw(name, shape, scale=0.05)
        elif name == "shared.weight":
            weights[name] = draw(name, shape)
        elif name != "encoder.embed_tokens.weight":  # the same tensor as shared.weight
            # Attention in T5 is not divided by sqrt(d_kv); the queries carry that.
            inner = shape[-1] * (16 if name.endswith("SelfAttention.q.weight") else 1)
            weights[name] = draw(name, shape, scale=inner**-0.5)
    return weights
