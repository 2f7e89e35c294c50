"""Caption cleaning: the text the encoder was trained on (spec §4, the DeepFloyd-IF rules). Needs no torch.

The rules are odd in places (a caption ".word" vanishes, a size such as 3x4 vanishes). They are kept exactly, since the
network was trained on their output. So is their order: one rule often leaves what the next one looks for.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(**rules: tuple[str, str]) -> Rules:
    """Named rules (verbose pattern, what takes its place), applied one after the other."""
    return tuple((re.compile(pattern, re.VERBOSE), replacement) for pattern, replacement in rules.values())


def _any_of(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


# Addresses, seen in lower case only.
_SCHEME_END = ": (?: /{1,3} | [a-z0-9%] )"
_SITE = rf"[a-z0-9.-]+ \. {_any_of('co com edu gov it net org ru')}"
_SITE_PATH = r"[\w/-]* \b /? (?!@)"
_ADDRESSES = _rules(
    http_or_site=(rf"\b (?: https? {_SCHEME_END} | {_SITE} {_SITE_PATH} )", ""),
    www_or_site=(rf"\b (?: www {_SCHEME_END} | {_SITE} {_SITE_PATH} )", ""),  # sites that the first one put together
)

# Punctuation as a typewriter has it: every dash of Unicode 12, and quotes.
_DASHES = (
    "\N{ARMENIAN HYPHEN}\N{HEBREW PUNCTUATION MAQAF}\N{CANADIAN SYLLABICS HYPHEN}\N{MONGOLIAN TODO SOFT HYPHEN}"
    "\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{EM DASH}\N{HORIZONTAL BAR}\N{DOUBLE OBLIQUE HYPHEN}"
    "\N{HYPHEN WITH DIAERESIS}\N{TWO-EM DASH}\N{THREE-EM DASH}\N{DOUBLE HYPHEN}\N{WAVE DASH}\N{WAVY DASH}"
    "\N{KATAKANA-HIRAGANA DOUBLE HYPHEN}\N{PRESENTATION FORM FOR VERTICAL EM DASH}"
    "\N{PRESENTATION FORM FOR VERTICAL EN DASH}\N{SMALL EM DASH}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
)
_TYPEWRITER = str.maketrans(dict.fromkeys(_DASHES, "-") | dict.fromkeys("“”«»´`¨", '"') | dict.fromkeys("‘’", "'"))

_FILE_KINDS = _any_of("apk bmp eps jpeg jpg mp4 pdf png webp")
_SYMBOLS = re.escape("&@#§~*|/\\()[]{}¿¡•·º½¾®©™")
_MARKS = _rules(
    # Names, scripts, what the parser left of entities.
    nickname=(r"@\w+", ""),
    cjk=("[\N{CJK STROKE T}-\u9fff]+", ""),  # strokes, enclosed letters, ideographs
    hyphens=("-+", "-"),
    quote_entity=("&quot ;?", ""),
    ampersand_entity=("&amp", ""),
    # Numbers, file names.
    network_address=(r"\.".join([r"\d{1,3}"] * 4), " "),
    time_at_the_end=(r"\d : \d\d \s+ \Z", ""),  # only with white space behind it
    written_line_break=(r"\\n", " "),
    long_number=(r"\# (?: \d{1,3} | \d{5,} ) \b | \b \d{6,} \b", ""),  # a # with four digits stays
    file_name=(rf"\S+ \. {_FILE_KINDS}", ""),
    # Punctuation.
    quotes=("""["']{2,}""", '"'),
    dots_and_symbols=(rf"\.{{2,}} | [{_SYMBOLS}]+", " "),
    lone_dot=(r"\s+ \. \s+", " "),
)

# Codes: letters are ASCII, digits of any script.
_WORD, _LETTERS, _DIGITS = re.compile(r"\w+"), re.compile("[a-zA-Z]+"), re.compile(r"\d+")
_SHORT_CODE = re.compile(r"[a-zA-Z]{1,3}\d{3,15}")

_SHOP_PHRASES = _rules(
    shipping=(r"(?: worldwide \s+ )? (?: free \s+ )? shipping", ""),
    download=(r"(?: free \s )? download (?: \s free )?", ""),
    click=(r"\b click \s (?: for | on ) \s \w+", ""),
    file_kind=(rf"\b {_FILE_KINDS} (?: \s images? )?", ""),
    page=(r"\b page \s+ \d+ \b", ""),
)

_NUMBER = r"\d+ \.? \d*"
_SPACING = _rules(
    size=(rf"\b {_NUMBER} [x\N{{CYRILLIC SMALL LETTER HA}}\N{{MULTIPLICATION SIGN}}] {_NUMBER} \b", ""),
    lone_colon=(r"(?<=\w) \s+ : \s+", ": "),
    after_a_mark=(r"(?<= \D [,./] ) (?=\w)", " "),  # a.b becomes a. b; 3.5 stays
    run=(r"\s+", " "),
)

_QUOTES, _LOOSE_AT_START, _LOOSE_AT_END = tuple("\"'"), tuple("',:;-_"), tuple("',:+-_")
_DOT_WORD = re.compile(r"\.\S+")


def clean_caption(caption: str) -> str:
    """The caption for T5: cleaned twice, as in training. May be empty."""
    return _clean_once(_clean_once(caption))


def _clean_once(text: str) -> str:
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _without_markup(_apply(_ADDRESSES, text))
    text = _apply(_MARKS, text.translate(_TYPEWRITER))
    if text.count("-") + text.count("_") > 3:  # a-file-name-like-this
        text = text.replace("-", " ").replace("_", " ")
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _WORD.sub(lambda word: "" if _is_article_number(word[0]) else word[0], text)
    text = _apply(_SHOP_PHRASES, text)
    text = _WORD.sub(lambda word: " " if _is_serial_number(word[0]) else word[0], text)
    text = _apply(_SPACING, text)
    return _without_loose_ends(text).strip()


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


def _shape(word: str) -> str:
    """Each run of digits as 1, each run of letters as a: "abc123" has the shape "a1"."""
    return _LETTERS.sub("a", _DIGITS.sub("1", word))


def _is_article_number(word: str) -> bool:
    return _shape(word) in ("a1a", "1a1") or _SHORT_CODE.fullmatch(word) is not None


def _is_serial_number(word: str) -> bool:
    shape = _shape(word)
    return "a1a1" in shape and set(shape) == {"a", "1"}


def _without_loose_ends(text: str) -> str:
    if len(text) > 2 and text.startswith(_QUOTES) and text.endswith(_QUOTES):
        text = text[1:-1]
    if text.startswith(_LOOSE_AT_START):
        text = text[1:]
    if text.endswith(_LOOSE_AT_END):
        text = text[:-1]
    return "" if _DOT_WORD.fullmatch(text) else text
