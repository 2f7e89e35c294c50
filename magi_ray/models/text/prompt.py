"""Caption cleaning: the text the encoder was trained on (spec §4, the DeepFloyd-IF rules). Needs no torch.

The rules are odd in places (a final dot-word vanishes, a ratio of numbers vanishes). They are kept exactly, since the
network never saw anything else.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup

_DOMAIN = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_KIND = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# Order matters within and between the groups.
_BEFORE_HTML = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed letters, ideographs
    (rf"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # a time at the end
    (r"\\n", " "),  # a line break written as backslash n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE_KIND}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_WORD_JOINERS = re.compile("[-_]")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: abc123, a1b, 1a2
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_KIND}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080, with a Latin x, a Cyrillic х or a times sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """The caption as T5 gets it: cleaned twice, as in training. May become empty."""
    return _clean_once(_clean_once(caption))


def _clean_once(text: str) -> str:
    text = unquote_plus(text).strip().lower()
    text = _apply(_BEFORE_HTML, text)
    text = _without_markup(text)
    text = _apply(_CHARACTERS, text)
    if len(_WORD_JOINERS.findall(text)) > 3:  # a-file-name-like-this
        text = _WORD_JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _apply(_WORDS, text)
    return _apply(_ENDS, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    # The empty tag in front adds no text. It keeps Beautiful Soup from warning of captions that look like a file name.
    try:
        return str(BeautifulSoup("<wbr>" + text, features="html.parser").text)
    except ParserRejectedMarkup:
        return text  # such as "<![cat": no markup after all
