"""Pictures for the cards of trainers that make a generator."""

from pathlib import Path
from typing import Any

from hfkd.evaluation.image_grid import image_grid
from hfkd.model_cards import Picture


SAMPLES = 64


def sample_picture(generator: Any, folder: Path) -> Picture:
    """Save a grid of samples of a generator without classes, always of the same latents, into `folder`."""
    image_grid(generator.sample(SAMPLES, seed=0)).save(folder / "samples.png")
    return Picture("samples.png", f"{SAMPLES} images drawn at random")
