from __future__ import annotations

import subprocess
import sys

import pytest

from magi_ray.models.text.prompt import clean_caption


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("notes.txt", "notes. txt"),  # Beautiful Soup warns of text that looks like a file name; warnings are errors
        ("https://example.com/a", ""),
        ("see www:cats now", "see ats now"),
        ("<![cat dog", "<! cat dog"),  # not markup, though it begins like it
        ("<?xml cat?>a dog", "a dog"),
        ("a<!-- hidden -->b <script>run()</script>c", "ab c"),
        ("one-two_three-four", "one-two_three-four"),
        ("one-two_three-four-five", "one two three four five"),
        ("ＡＢＣ ﬁsh", "abc fish"),
        ("'single' and ``odd''", "single' and \"odd"),
        (".hidden", ""),
    ],
)
def test_odd_captions_are_cleaned_by_the_rules(raw: str, cleaned: str) -> None:
    assert clean_caption(raw) == cleaned


def test_cleaning_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, magi_ray.models.text.prompt; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
