"""`hfkd sample GENERATOR`: images of a saved generator as one picture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hfkd.errors import InputError, RunError
from hfkd.evaluation.image_grid import class_grid, image_grid
from hfkd.evaluation.sampling import balanced_labels, class_names, draw_images
from hfkd.trainers.config import check_range

from .generators import load_generator
from .options import build, read_options


@dataclass
class SampleArguments:
    """What is drawn, and where the picture goes."""

    num_images: int = field(default=64, metadata={"help": "Images, >= 1, the classes in turn."})
    output: str = field(default="samples.png", metadata={"help": "Picture to write, a row for each class."})
    labels: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of the classes to draw, such as 0 1 2; by default all."}
    )
    seed: int = field(default=0, metadata={"help": "Of the latents: one seed gives the same images everywhere."})
    classifier_index: int = field(
        default=0, metadata={"help": "Whose classes, of a generator born from several classifiers."}
    )
    batch_size: int = field(default=256, metadata={"help": "Images per forward pass."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub generator."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the generator run its own Python code."})

    def __post_init__(self) -> None:
        check_range("num_images", self.num_images, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("seed", self.seed, 0)


def run(argv: list[str]) -> int:
    name = argv[0] if argv and not argv[0].startswith("-") else None
    values = read_options([SampleArguments], argv[1:] if name else argv, "hfkd sample GENERATOR")
    if name is None:
        raise InputError("hfkd sample needs a generator first: hfkd sample FOLDER_OR_HUB_ID [--option value ...]")
    (arguments,) = build([SampleArguments], values)
    path = picture_path(arguments.output)
    print(sample(name, arguments, path))
    return 0


def sample(name: str, arguments: SampleArguments, path: Path) -> str:
    """Draws the images, writes the picture, and says what it shows.

    Raises:
        InputError: no generator, or labels that it does not know.
        RunError: the picture cannot be written.
    """
    generator, _ = load_generator(name, trust_remote_code=arguments.trust_remote_code, revision=arguments.revision)
    names = class_names(generator, arguments.classifier_index)
    classes = _classes(arguments.labels, names)
    labels = balanced_labels(arguments.num_images, classes) if classes else None
    images = draw_images(
        generator,
        arguments.num_images,
        labels=labels,
        seed=arguments.seed,
        classifier_index=arguments.classifier_index,
        batch_size=arguments.batch_size,
    )
    if images.shape[1] not in (1, 3):
        raise InputError(f"{name!r} makes images of {images.shape[1]} channels: only grey and RGB make a picture")
    save_picture(image_grid(images) if labels is None else class_grid(images, labels), path)
    text = f"{path}: {len(images):,} images of {name}, seed {arguments.seed}"
    if labels is None or names is None:
        return text
    return f"{text}; rows from the top: {', '.join(names[number] for number in labels.unique().tolist())}"


def _classes(wanted: list[int], names: list[str] | None) -> list[int]:
    """The class numbers to draw, each once; none of a generator without classes."""
    if names is None:
        if wanted:
            raise InputError(f"labels {wanted}: this generator knows no classes: leave --labels out")
        return []
    unknown = [label for label in wanted if not 0 <= label < len(names)]
    if unknown:
        raise InputError(f"label {unknown[0]}: the generator knows {len(names)} classes: use 0 to {len(names) - 1}")
    return sorted(set(wanted)) or list(range(len(names)))


def picture_path(output: str) -> Path:
    """Where the picture goes, checked before anything is drawn."""
    path = Path(output).expanduser()
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"output {output!r}: pictures of this ending are not known: use .png")
    if not path.parent.is_dir():
        raise InputError(f"output {output!r}: there is no folder {str(path.parent)!r}: make it first")
    return path


def save_picture(picture: Any, path: Path) -> None:
    """Writes a Pillow image. Raises `RunError` where that fails."""
    try:
        picture.save(path)
    except OSError as error:
        raise RunError(f"{path}: the picture cannot be written ({error.strerror or error})") from error
