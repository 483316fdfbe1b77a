"""What a story's text loses on its way in, and what it must not lose."""

import pytest

from hippocampus.data.story_text import clean_text

BOOK = """The Project Gutenberg EBook of Tales, by Nobody

{start}

Chapter 1

Once there was a <sly> fox & a hen; 3 < 5 > 1.


{end}

End of this file. Donate!
"""


@pytest.mark.parametrize(("start", "end"), [
    ("*** START OF THIS PROJECT GUTENBERG EBOOK TALES ***",
     "*** END OF THIS PROJECT GUTENBERG EBOOK TALES ***"),
    ("***START OF THE PROJECT GUTENBERG EBOOK TALES***",
     "End of the Project Gutenberg EBook of Tales"),
    ("*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
     "End of Project Gutenberg's Tales"),
])
def test_a_book_keeps_what_lies_between_gutenbergs_lines_and_its_signs(start, end):
    text = clean_text(BOOK.format(start=start, end=end))
    assert text == "Chapter 1\n\nOnce there was a <sly> fox & a hen; 3 < 5 > 1."


def test_a_web_page_keeps_its_text_alone():
    page = ("<!DOCTYPE html>\r\n<html><head><title>A script</title></head><body>\n"
            "<!-- hidden <p> --><script>var x = '<b>';</script><pre>\n<b>INT. HOUSE</b>   \n\n\n\n"
            "  Tom &amp; Ann&nbsp;sit.<br>He says:<p class='x'>No.</p></pre></body></html>")
    assert clean_text(page).replace("\n\n", "\n").split("\n") == [
        "INT. HOUSE", "  Tom & Ann sit.", "He says:", "No."]


def test_plain_text_keeps_everything_but_white_space():
    assert clean_text("\n\nHe said &amp; meant <it>.  \nYes.\n\n\n\nEnd.\n") == (
        "He said &amp; meant <it>.\nYes.\n\nEnd.")


def test_a_story_that_speaks_of_gutenbergs_end_early_is_not_cut_there():
    text = "END OF PROJECT GUTENBERG was the headline.\n" + "And so it went on. " * 20
    assert clean_text(text) == text.strip()
