"""Strings in CSV files, which spreadsheets must not execute."""

FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""Spreadsheets execute cells that start with one of these, in some languages the full-width ones
too. Senders choose the texts, and an upstream its labels."""


def guarded(text: str) -> str:
    """Return a text as a cell that no spreadsheet executes: with a ' in front, if it needs one."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def without_guard(cell: str) -> str:
    """Return the text of which `guarded` made a cell."""
    return cell.removeprefix("'") if cell.lstrip("'").startswith(FORMULA) else cell
