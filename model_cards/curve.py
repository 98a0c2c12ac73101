"""The picture of a training run: losses and scores over time, one panel for each kind."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

# Title of each panel, and the log keys it shows: the group is the curve's label, "" stands for the whole.
PANELS = (
    ("Training loss", r"(student_\d+_ce)|()loss"),
    ("Discriminator loss", r"discriminator_(\d+)_loss|(discriminator)_loss"),
    ("Accuracy on evaluation data", r"eval_(student_\d+|ensemble|)_?accuracy"),
    ("Mean average precision on evaluation data", r"eval_(student_\d+|ensemble|)_?mean_average_precision"),
)
# Okabe and Ito's colours, which people with any colour vision tell apart. The whole, or the ensemble, is black.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_GREY = "#5f6368"
_MARKERS_UP_TO = 25

Curve = tuple[list[float], list[float]]


def plot_history(log_history: Sequence[Mapping[str, Any]], path: Path | str) -> Path | None:
    """Draw `trainer.state.log_history` to a PNG with up to one panel for each of `PANELS`, over epochs (or steps).

    Returns the path, or None, without a file, when there is nothing to draw or matplotlib is not installed.
    """
    panels = [(title, curves) for title, pattern in PANELS if (curves := _curves(log_history, pattern))]
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        logger.warning("no training curve is drawn without matplotlib: pip install 'hfkd[plots]'")
        return None

    figure = Figure(figsize=(4.2 * len(panels), 3.2), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, title, curves)
        axes.set_xlabel("Epoch" if _x_key(log_history) == "epoch" else "Step", fontsize=9, color=_GREY)
    figure.savefig(path)
    return Path(path)


def _x_key(log_history: Sequence[Mapping[str, Any]]) -> str:
    return "epoch" if all("epoch" in entry for entry in log_history) else "step"


def _curves(log_history: Sequence[Mapping[str, Any]], pattern: str) -> dict[str, Curve]:
    """Label -> (x, y) of every matching key with two values or more, sorted by label with the whole last."""
    x_key, regex = _x_key(log_history), re.compile(pattern)
    curves: dict[str, Curve] = {}
    for entry in log_history:
        for key, value in entry.items():
            match = regex.fullmatch(key)
            if match and isinstance(value, int | float) and x_key in entry:
                label = next(group for group in match.groups() if group is not None)
                x, y = curves.setdefault(label, ([], []))
                x.append(entry[x_key])
                y.append(value)
    several = {label: curve for label, curve in curves.items() if len(curve[0]) > 1}
    return dict(sorted(several.items(), key=lambda item: (item[0] in ("", "ensemble"), item[0])))


def _draw(axes: "Axes", title: str, curves: Mapping[str, Curve]) -> None:
    parts = [label for label in curves if label not in ("", "ensemble")]
    for label, (x, y) in curves.items():
        colour = _COLOURS[parts.index(label) % len(_COLOURS)] if label in parts else "black"
        marker = "o" if len(x) <= _MARKERS_UP_TO else None
        name = _name(label)
        axes.plot(x, y, color=colour, label=name, linewidth=1.6, marker=marker, markersize=3.5, clip_on=False)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)


def _name(label: str) -> str:
    if label == "":
        return "total"
    return f"of student {label}" if label.isdigit() else label.replace("_ce", " cross-entropy").replace("_", " ")
