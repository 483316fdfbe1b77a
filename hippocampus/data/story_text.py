"""Story texts as they lie on the web, made plain: `clean_text`."""

from __future__ import annotations

import html
import re

CLEANING = 1
"""Version of `clean_text`: what is cached depends on it."""

_IS_HTML = re.compile(r"<(?:!doctype|html|head|body|pre|title|script|table|div|font|p|br|b|i)\b"
                      r"[^<>]*>", re.IGNORECASE)
_UNSEEN = re.compile(r"<!--.*?-->|<(script|style|head)\b[^<>]*>.*?</\1\s*>",
                     re.IGNORECASE | re.DOTALL)
_NEW_LINE = re.compile(r"<(?:br|hr|/?(?:p|div|h[1-6]|tr|li|table|blockquote|pre))\b[^<>]*>",
                       re.IGNORECASE)
_TAG = re.compile(r"<[a-z/!][^<>]*>", re.IGNORECASE)

# Of the last lines that open a book, and the first that close one.
_BOOK_STARTS = re.compile(
    r"^\W*START OF (?:THIS |THE )?PROJECT GUTENBERG.*$|^.*\*END\*\s*THE SMALL PRINT.*$|"
    r"^\W*END.{0,3}THE SMALL PRINT.*$", re.IGNORECASE | re.MULTILINE)
_BOOK_ENDS = re.compile(
    r"^\W*END OF (?:THIS |THE )?PROJECT GUTENBERG.*$", re.IGNORECASE | re.MULTILINE)

_LINE_TAIL = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """Take away HTML, Project Gutenberg's lines around a book, and surplus blank lines.

    Tags are taken away only from what has one that a web page has; their text stays, other than
    that of scripts, styles and heads. What is plain text keeps its `<` and `&`.

    Args:
        text: a book or a script as it was downloaded.

    Returns:
        Its text, without white space at both ends.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _IS_HTML.search(text):
        text = _TAG.sub("", _NEW_LINE.sub("\n", _UNSEEN.sub("", text)))
        text = html.unescape(text).replace("\xa0", " ")
    starts = [match.end() for match in _BOOK_STARTS.finditer(text, 0, len(text) // 2)]
    text = text[starts[-1]:] if starts else text
    # A text that is no book may speak of one.
    if end := _BOOK_ENDS.search(text, 0 if starts else len(text) // 2):
        text = text[:end.start()]
    return _BLANK_LINES.sub("\n\n", _LINE_TAIL.sub("", text)).strip()
