"""Text that may hold anything, as cells of a CSV table.

Spreadsheets run a cell as a formula if it begins with one of a few characters. An apostrophe in
front makes it text again, as guides to CSV injection advise. Numbers stay as they are.
"""

from __future__ import annotations

import re

_BEGINS_A_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"  # the last four are of full width
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def cell(text: str) -> str:
    """The text, behind an apostrophe if a spreadsheet could take it for a formula."""
    if text[:1] and text[0] in _BEGINS_A_FORMULA and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text
