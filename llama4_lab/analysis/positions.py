"""Positions of a prompt, counted from either end."""

from operator import index


def from_start(position: int, count: int, what: str = "token") -> int:
    """Return a position among `count` tokens as counted from the start; -1 is the last one.

    >>> from_start(-1, 5), from_start(3, 5)
    (4, 3)

    Raises:
        ValueError: a position outside the prompt, which the sentence calls `what`.
    """
    position = index(position)
    if not -count <= position < count:
        raise ValueError(
            f"{what} {position} is out of range: this prompt has {count} tokens (0 to {count - 1})"
        )
    return position % count


def refuse_words(*options: object) -> None:
    """Refuse texts where token ids or experts are asked for.

    Raises:
        TypeError: a text.
    """
    for option in options:
        if isinstance(option, str):
            raise TypeError(
                f"{option!r} is a text: give a number (model.tokenizer.encode tells a token's)"
            )
