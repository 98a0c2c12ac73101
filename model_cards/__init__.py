"""Model cards: a trainer fills a `CardData`, `write_card` renders it with its method's template."""

from .card import render_card, write_card
from .curve import plot_history
from .data import (
    CardData,
    DataUsed,
    Measurement,
    Method,
    Parent,
    Picture,
    Student,
    changed_settings,
    hub_id_or_none,
    measurements_of,
)


__all__ = [
    "CardData",
    "DataUsed",
    "Measurement",
    "Method",
    "Parent",
    "Picture",
    "Student",
    "changed_settings",
    "hub_id_or_none",
    "measurements_of",
    "plot_history",
    "render_card",
    "write_card",
]
