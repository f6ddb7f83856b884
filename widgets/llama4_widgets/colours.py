"""The colours of experts and of scales, for colour-blind eyes too.

An expert's number stands beside its colour everywhere.
"""

from PIL import ImageColor

PALETTE = (
    *("#6c9cfc", "#fccc18", "#a83c00", "#3cf0fc", "#909c00", "#fc909c", "#6c3ca8", "#0c7878"),
    *("#b46cb4", "#00c0d8", "#b4e49c", "#cc786c", "#a86c00", "#6c6cd8", "#c0b454", "#c03c6c"),
)
"""Found by search: any two differ in OKLab by at least 0.06, any two of the first eight by 0.11,
to normal eyes and under simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009)."""

SCALES = {
    "sequential": ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"),  # cividis
    "diverging": ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"),
    "dark": ("#87b3ff", "#5d7dcb", "#384d81", "#262626", "#783d27", "#be6343", "#ff9064"),
}
"""The colours from the low end of a scale to the high one; dark: a diverging one on dark pages."""


def colour(expert: int) -> str:
    """Return an expert's colour; they repeat after sixteen, the numbers do not."""
    return PALETTE[expert % len(PALETTE)]


def ink(background: str) -> str:
    """Return black or white, whichever contrasts more with a ``#rrggbb`` background.

    >>> ink("#fccc18"), ink("#6c3ca8")
    ('#000000', '#ffffff')
    """
    red, green, blue = (_linear(channel / 255) for channel in ImageColor.getrgb(background))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # WCAG 2, relative luminance
    return "#000000" if luminance > 0.179 else "#ffffff"


def _linear(channel: float) -> float:
    """Undo the gamma of sRGB."""
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
