"""What other programs do to a list of users when they save it: it is either understood, and reported, or refused.

Nothing is guessed silently. A cell that a spreadsheet or a database has changed looks like a value, and would be delivered as
one; so cells with their marks are refused, with advice.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Sequence

from worker.errors import CannotImport

#: Separators of columns besides a comma, and what people call them.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

_NO_LISTS = (
    (b"PK\x03\x04", "is a workbook or a zip archive: export the sheet as CSV, in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "is an Excel workbook: export the sheet as CSV, in UTF-8"),
    (b"\xff\xfe", "is UTF-16: save it as UTF-8, or convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8, or convert it with iconv -f UTF-16 -t UTF-8"),
    (b"BZh", "is compressed with bzip2: only gzip is read, so unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz: only gzip is read, so unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: only gzip is read, so unpack it first"),
    (b"%PDF", "is a PDF: export the list as CSV"),
)

#: What databases and programs print where there is no value, and spreadsheets for an error in a formula.
_NO_VALUES = {r"\n", "null", "(null)", "<null>", "nan", "undefined", "[object object]"}
_FORMULA_ERROR = re.compile(r"#(N/A|REF!|VALUE!|DIV/0!|NAME\?|NUM!|NULL!|SPILL!|CALC!|ERROR!)", re.IGNORECASE)
_ROUNDED = re.compile(r"[+-]?\d+([.,]\d+)?[eE][+-]?\d+")
_WITH_DECIMALS = re.compile(r"\d+[.,]0+")


def check_beginning(head: bytes) -> None:
    """Raise `CannotImport` if a file that begins like this is not a list in text. `head` may be cut anywhere."""
    head = head.removeprefix(codecs.BOM_UTF8)
    for magic, what in _NO_LISTS:
        if head.startswith(magic):
            raise CannotImport(f"the file {what}")
    if b"\0" in head:
        raise CannotImport("the file has zero bytes in it, like UTF-16 or a binary file: save it as UTF-8")
    if b"\r" in head and b"\n" not in head and b"\r" in head.strip():
        raise CannotImport(
            "the lines end with a carriage return alone, as on old Macs: "
            r"convert the file with tr '\r' '\n'"
        )
    if head.lstrip().startswith(b"["):
        raise CannotImport(
            "the file is one JSON array: write one object a line, for example with jq -c '.[]' FILE"
        )
    first = head.lstrip().partition(b"\n")[0].rstrip()
    if first == b"{":
        raise CannotImport(
            "the JSON is spread over several lines: write one object a line, for example with jq -c . FILE"
        )


def separator_of(header: str, user_column: str) -> str:
    """Return the separator of a header's columns: the one that yields a column of users; a comma if none does."""
    for separator in SEPARATORS:
        cells = [cell.strip().strip('"') for cell in header.rstrip("\r\n").split(separator)]
        if user_column in cells:
            return separator
    return ","


def no_user_column(header: Sequence[str], user_column: str) -> str:
    """Say why a header has no column of users; other cells may be data, which must not be shown."""
    rule = f"the first line is not a header with a column {user_column!r}, separated by commas"
    near = [
        cell.strip()
        for cell in header
        if cell.strip().lower() == user_column.lower()
        or difflib.get_close_matches(cell.strip().lower(), [user_column.lower()], 1, 0.7)
    ]
    return f"{rule}; did you mean --user-column {near[0]!r}?" if near else rule


def broken_user(user: str) -> str | None:
    """The rule that a cell with a user id breaks, if a program has changed it."""
    if user != user.strip():
        return "the user id has spaces around it"
    if _ROUNDED.fullmatch(user):
        return "the user id is a number that a spreadsheet has rounded: format the column as text and export again"
    if _WITH_DECIMALS.fullmatch(user):
        return "the user id is a number with decimals: export the column as text"
    if user.startswith(("'", '="')):
        return "the user id has a spreadsheet's mark for text before it: export the column as text"
    return None


def broken_value(name: str, value: str, null: str | None) -> str | None:
    """The rule that a cell with a value breaks, if a program has changed it. With a `null`, only that means no value."""
    if value != value.strip():
        return f"the value of {name!r} has spaces around it"
    if null is None and value.lower() in _NO_VALUES:
        return f"the value of {name!r} is what programs print for no value: leave it empty, or say --null {value}"
    if _FORMULA_ERROR.fullmatch(value):
        return f"the value of {name!r} is an error of a spreadsheet"
    if value.startswith('="'):
        return f"the value of {name!r} is a formula of a spreadsheet: export the column as text"
    if _ROUNDED.fullmatch(value):
        return f"the value of {name!r} is a number that a spreadsheet has rounded: export the column as text"
    return None
