"""What `hfkd evaluate --protocol generation` has measured, put into the generator's card."""

from pathlib import Path
from typing import Any

from hfkd.errors import InputError
from hfkd.model_cards.markdown import bullet_list, table
from hfkd.model_cards.section import put_section

from .results import write_atomically


PICTURE = "nearest.png"  # beside the card
TITLE, FOLLOWING_SECTION = "Beside real images", "Training"


def card_of(name: str) -> Path:
    """The card in the folder `name`.

    Raises:
        InputError: there is none.
    """
    card = Path(name) / "README.md"
    if not card.is_file():
        raise InputError(
            f"--update_card: {name!r} is no folder with a card: give that of a trained generator, or leave it out"
        )
    return card


def update_card(card: Path, result: dict[str, Any], columns: dict[str, str], pictured: str) -> None:
    """Put the figures and the picture beside `card` into it, in place of those that it has.

    Args:
        result: of `evaluate_generation`.
        columns: headings of the metrics' kinds of images.
        pictured: what the picture's rows are.
    """
    kinds = result["metrics"]
    header = ["", *(columns[kind] for kind in kinds)]
    rows = [
        [name.replace("_", " "), *(f"{found[name]:.4f}" if name in found else "" for found in kinds.values())]
        for name in kinds["generator"]
    ]
    body = "\n\n".join(
        [
            "Measured by `hfkd evaluate --protocol generation`; sqrt stationarity and Fréchet distances are better "
            "where they are smaller.",
            table(header, rows),
            bullet_list(f"{setting}: {value}" for setting, value in result["settings"].items()),
            f"![{pictured}]({PICTURE})",
            f"{pictured}. These are real images: share the picture only where you may share them.",
        ]
    )
    text = card.read_text(encoding="utf-8")
    write_atomically(card, put_section(text, TITLE, body, before=FOLLOWING_SECTION))
