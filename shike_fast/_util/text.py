"""Bytes of files as messages show them."""


def printable(text: bytes) -> str:
    """Bytes as one line of a message: what is not UTF-8, or not visible, becomes an escape sequence."""
    shown = text.decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def quoted(text: bytes) -> str:
    """The beginning of some bytes in quotation marks."""
    return f"'{printable(text[:100])}'"
