"""Text from anywhere as text that can be written into a file and looked at."""

import html

ENDS = "\n\t"


def escaped(text: str) -> str:
    """Text for HTML, between tags or in an attribute."""
    return html.escape(legible(text))


def legible(text: str) -> str:
    """Text without what no file or screen takes: control characters and halves of surrogate pairs become `·` and `�`."""
    sound = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() and _is_torn(text) else text
    if sound.isprintable():
        return sound
    return "".join(
        letter if letter.isprintable() or letter in ENDS or (letter.isspace() and letter > " ") else "·" for letter in sound
    )


def _is_torn(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
