"""Tokens and routing decisions in words."""

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4_lab.analysis.routing import Routing

NO_NUMBERS = "edits make logits that are no numbers"
"""Begins what is said where there is nothing to compare."""
_CONTROLS = {chr(code): chr(0x2400 + code) for code in range(32)}  # Unicode's own pictures
_INVISIBLE = str.maketrans({"·": " ", "↵": "\n", "→": "\t"})
_VISIBLE = str.maketrans(_CONTROLS | {" ": "·", "\n": "↵", "\t": "→"})


def visible(token: str) -> str:
    r"""Give white space and control characters a visible sign, one character for one.

    >>> visible("):\n  ")
    '):↵··'
    """
    return token.translate(_VISIBLE)


def token_id(tokenizer: Any, word: str) -> int:
    """Return the id of a word that is one token; `visible` signs of white space are understood.

    Raises:
        ValueError: no tokenizer, or a text of several tokens.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: words cannot be given")
    ids = tokenizer.encode(word.translate(_INVISIBLE), special=True)
    if len(ids) != 1:
        parts = ", ".join(f"‘{visible(tokenizer.token_text(i))}’" for i in ids)
        raise ValueError(f"‘{word}’ is {len(ids)} tokens here ({parts}): give one of them")
    return ids[0]


def word_of(tokenizer: Any, idx: int) -> str:
    """Show the token of an id; without a tokenizer, the id."""
    return str(idx) if tokenizer is None else visible(tokenizer.token_text(idx))


def counted(count: int, what: str) -> str:
    """Name a number of things.

    >>> counted(1, "token"), counted(1200, "token")
    ('1 token', '1,200 tokens')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def short(text: str, most: int) -> str:
    """Cut what is longer than so many characters.

    >>> short("seven times", 6), short("seven", 6)
    ('seven…', 'seven')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def number(value: float, form: str) -> str:
    """Format a number with a minus sign, not a hyphen, and no sign before zero.

    >>> number(-0.25, ".2f"), number(-0.0001, ".3f"), number(0.25, "+.2f")
    ('−0.25', '0.000', '+0.25')
    """
    text = format(value, form).replace("-", "−")
    return text if any(digit in text for digit in "123456789") else text.lstrip("+−")


def decimals(value: float) -> str:
    """Write two decimals as a browser does: ties, which bfloat16 makes often, go away from zero.

    >>> decimals(4.125), f"{4.125:.2f}"
    ('4.13', '4.12')
    """
    if not math.isfinite(value):
        return "–"
    return str(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))


def describe(routing: "Routing", layer: int, token: int, clean: "Routing | None" = None) -> str:
    """Say in one sentence which expert a token chose, how strongly, and over which other one.

    Of an edited run, also what it chose in the `clean` one.
    """
    row = routing.row(layer)
    sentence = f"layer {layer}, token {token} ‘{visible(routing.tokens[token])}’: "
    sentence += _chosen(routing, row, token)
    if (runner_up := routing.runner_up[row, token]) >= 0:
        margin = decimals(float(routing.margin[row, token]))
        sentence += f", margin {margin} logits over expert {runner_up}"
    return sentence if clean is None else f"{sentence}; clean: {_chosen(clean, row, token)}"


def _chosen(routing: "Routing", row: int, token: int) -> str:
    experts, scores = (each[row, token].tolist() for each in (routing.expert, routing.score))
    return " and ".join(
        f"expert {expert} with score {decimals(score)}"
        for expert, score in zip(experts, scores, strict=True)
        if expert >= 0
    )
