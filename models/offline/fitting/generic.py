"""A small corpus of everyday English of many kinds: harmless texts of no particular task."""

from importlib import resources


def generic_texts() -> list[str]:
    """Return about 400 texts of one word to a paragraph.

    They are replies, questions, headlines, reviews, messages to support, chat, instructions,
    statements and longer prose. They were written for this project and carry its licence.
    """
    content = (resources.files(__package__) / "generic.txt").read_text(encoding="utf-8")
    return content.splitlines()
