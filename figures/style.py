"""One look for every figure, in print and for the colour-blind, and one way to a file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.text import Text

from cil.files import atomically

BLUE, ORANGE, GREEN, VERMILION = sns.color_palette("colorblind", 4)
REFERENCE = "0.35"  # grey of the lines that measurements are held against
SEQUENTIAL = "viridis"  # equal steps in lightness, so it survives a grey print; its hues stand out from a grey photo

STYLE = {
    **sns.axes_style("ticks"),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlepad": 3,
    "axes.labelpad": 3,
    "figure.titlesize": 9,
    "figure.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "0.2",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.hashsalt": "locality-probe",  # otherwise element ids are drawn at random
}

# What would tell one minute or one matplotlib from the next: left out of the file.
METADATA = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Our style over matplotlib's defaults, whatever the user's settings are: a context, or `@look()` on a function."""
    with style.context(STYLE, after_reset=True):
        yield


def room(figure: Figure, texts: Sequence[str]) -> np.ndarray:
    """[width, height] in inches, with a little air, of the largest of `texts` in `figure`; 0 where there is none."""
    drawn = [figure.text(0, 0, text, weight="bold", parse_math=False) for text in texts if text]
    boxes = [np.asarray(text.get_window_extent().size) / figure.dpi + 0.08 for text in drawn]
    for text in drawn:
        text.remove()
    return np.max(boxes, axis=0) if boxes else np.zeros(2)


D_LOC, LAMBDA = r"$D_\mathrm{loc}$", r"$\lambda$"
# The mathematics in our own labels, and in those that matplotlib gives the ticks of logarithmic axes.
OURS = re.compile("|".join([re.escape(D_LOC), re.escape(LAMBDA), r"\$\\mathdefault\{[^$]*\}\$"]))


def literal(figure: Figure) -> None:
    """Have a $ in any text be a dollar, as in the name of a run, but for OURS."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in OURS.sub("", text.get_text()):
            text.set_parse_math(False)


def check_suffix(path: str | Path) -> str:
    """The suffix of `path` in small letters. Raises ValueError where `save` cannot write it: ask before long work."""
    suffix = Path(path).suffix.lower()
    if suffix not in METADATA:
        raise ValueError(f"cannot draw {Path(path).name!r}: the name of a figure ends in {', '.join(METADATA)}")
    return suffix


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` as PNG, SVG or PDF by the suffix of `path`, making its folder, and close it where pyplot holds it.

    The same data give the same bytes; a reader sees the old file or the new one. Raises ValueError for another suffix.
    """
    path = Path(path)
    suffix = check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    literal(figure)
    try:
        with look():
            return atomically(path, lambda part: figure.savefig(part, format=suffix[1:], metadata=METADATA[suffix]))
    finally:
        plt.close(figure)
