"""`hfkd convert stylegan2-ada FILE.pkl FOLDER`: the networks of a StyleGAN2-ADA pickle as a folder of this package.

The folder holds the averaged generator, its discriminator in `discriminator`, and a card. Nothing in the pickle is
executed.
"""

from pathlib import Path
from typing import Any

from hfkd.errors import InputError, RunError
from hfkd.evaluation.image_grid import image_grid
from hfkd.hub.manifest import atomic_folder, file_sha256
from hfkd.hub.remote_code import write_code
from hfkd.model_cards import CardData, Method, Parent, Picture, Student, write_card
from hfkd.models import build_image_processor
from hfkd.models.stylegan2_checkpoint import StyleGan2Networks, read_stylegan2_ada

from .parser import Parser


DISCRIMINATOR = "discriminator"
SIDE = 512  # of the card's picture, in pixels
STYLEGAN2_ADA = Method(
    name="StyleGAN2-ADA",
    paper_title="Training Generative Adversarial Networks with Limited Data",
    arxiv_id="2006.06676",
    citation="""@inproceedings{karras2020training,
  title     = {Training Generative Adversarial Networks with Limited Data},
  author    = {Karras, Tero and Aittala, Miika and Hellsten, Janne and Laine, Samuli and Lehtinen, Jaakko and
               Aila, Timo},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}""",
    tags=("stylegan2", "gan"),
    template="stylegan2_ada.md",
    task="unconditional-image-generation",
)


def run(argv: list[str]) -> int:
    parser = Parser("convert", __doc__)
    parser.add_argument("format", choices=["stylegan2-ada"], help="of the file: NVlabs' PyTorch code of StyleGAN2-ADA")
    parser.add_argument("file", type=Path, help="the pickle, such as network-snapshot-025000.pkl")
    parser.add_argument("folder", type=Path, help="where the networks go; must not exist, or be empty")
    arguments = parser.parse_args(argv)
    print(convert(arguments.file.expanduser(), arguments.folder.expanduser()))
    return 0


def convert(file: Path, folder: Path) -> str:
    """Read the pickle, write the folder as a whole or not at all, and say what it holds.

    Raises:
        InputError: the folder has content, or the file no networks that can be read.
        RunError: the folder cannot be written.
    """
    try:
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise InputError(f"{folder}: cannot be looked into ({error.strerror or error}): name another one") from error
    if taken:
        raise InputError(f"{folder}: is there already and not an empty folder: name a new one, nothing is overwritten")
    networks = read_stylegan2_ada(file)
    try:
        with atomic_folder(folder.resolve()) as new:  # a link stays one, and `.` has a name
            _save(networks, file, new, str(folder))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from error
    config = networks.generator.config
    classes = f", of {config.num_classes} classes" if config.num_classes else ""
    return f"{folder}: generator of {config.image_size}x{config.image_size} pixels{classes}, and its discriminator"


def _save(networks: StyleGan2Networks, file: Path, folder: Path, location: str) -> None:
    generator, discriminator = networks.generator, networks.discriminator
    generator.save_pretrained(folder)
    discriminator.save_pretrained(folder / DISCRIMINATOR)
    write_code([generator, discriminator], folder, ["", DISCRIMINATOR])
    config = generator.config
    if config.num_channels in (1, 3):
        half = [0.5] * config.num_channels  # pixels in [-1, 1]
        processor = build_image_processor(config.image_size, config.num_channels, half, half)
        processor.save_pretrained(folder / DISCRIMINATOR)
    data = CardData(
        method=STYLEGAN2_ADA,
        location=location,
        students=(Student.of(generator), Student.of(discriminator, folder=DISCRIMINATOR)),
        parents=(Parent("converted from", file.name, weights_sha256={file.name: file_sha256(file)}),),
        license="other",
        pictures=(_picture(generator, folder),) if config.num_channels in (1, 3) else (),
    )
    write_card(data, folder)


def _picture(generator: Any, folder: Path) -> Picture:
    count = min(64, max(1, SIDE // generator.config.image_size) ** 2)
    image_grid(generator.sample(count, seed=0)).save(folder / "samples.png")
    return Picture("samples.png", f"{count} images drawn at random" if count > 1 else "An image drawn at random")
