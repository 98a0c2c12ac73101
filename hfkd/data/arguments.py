"""What a user can say about the data, as command line and YAML fields."""

from dataclasses import dataclass, field
from typing import Literal

from hfkd.errors import InputError


@dataclass
class DataArguments:
    """Which images to train and measure on, and how training images are varied.

    `--train_split 'train[:45000]' --test_split 'test+train[45000:]' --validation_size 0` trains on the first rows of
    CIFAR-10 and measures on the rest; `--dataset_name digits --test_size 1597 --validation_size 0` keeps 200 labelled
    digits for training.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "'digits' (1,797 grey 8x8 images that come with scikit-learn), a Hub dataset id, or a local "
            "folder of images in one folder per class or of parquet files."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset that has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset; its main branch by default."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; found by its type when there is only one."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the labels; found by its type when there is only one."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as 'train[:45000]' are understood."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split for best-model and early stopping; by default 'validation' where the dataset has one that "
            "shares no row with the splits named, else validation_size of the training rows."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split for the reported metrics, such as 'test+train[45000:]'; by default 'test' where the "
            "dataset has one that shares no row with the splits named, else test_size of the training rows."
        },
    )
    validation_size: float = field(
        default=0.1,
        metadata={
            "help": "Fraction (below 1) or number of training rows held out, stratified by class, where there is no "
            "validation split; 0 holds nothing out."
        },
    )
    test_size: float | None = field(
        default=None,
        metadata={
            "help": "Fraction (below 1) or number of training rows held out, stratified by class, where there is no "
            "test split; by default a fifth of the digits, and nothing of other data."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many of the training rows, stratified by class."}
    )
    train_per_class: int | None = field(
        default=None, metadata={"help": "Train on exactly this many of the training rows of each class."}
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the held-out rows, apart from the training seed so that runs compare."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the square images; by default the processor's, else that of the first image."},
    )
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "Channel means and deviations: 'cifar10', 'cifar100', 'imagenet', 'digits', 'symmetric' (pixels "
            "in [-1, 1], as generators need them), or 'train' to measure the training images; by default those of "
            "the dataset's name, else measured (small data) or imagenet."
        },
    )
    augmentation: Literal["none", "crop", "resized_crop", "ssl", "ssl_blur"] | None = field(
        default=None,
        metadata={
            "help": "'crop': pad and crop back; 'resized_crop': a random part of the image, resized; 'ssl': a random "
            "part, colour jitter and grey versions, for self-supervised learning; 'ssl_blur': blur, too; by default "
            "'crop' for images of up to 96 pixels and 'resized_crop' for larger ones."
        },
    )
    crop_padding: int | None = field(
        default=None, metadata={"help": "Pixels padded on each side for 'crop'; by default an eighth of the side."}
    )
    padding_mode: Literal["reflect", "zeros"] = field(
        default="reflect", metadata={"help": "What 'crop' pads with: the mirrored image, or black."}
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={"help": "Flip half of the training images; by default yes, except for pictures of digits."},
    )

    def __post_init__(self) -> None:
        for name in ("validation_size", "test_size"):
            size = getattr(self, name)
            if size is not None and (size < 0 or (size > 1 and size != int(size))):
                raise InputError(f"{name} {size} is neither a fraction below 1 nor a number of rows")
        if self.train_per_class is not None and self.max_train_samples is not None:
            raise InputError(
                f"train_per_class {self.train_per_class} and max_train_samples {self.max_train_samples} both choose "
                "the training rows: give one of them"
            )
        least_values = {"max_train_samples": 1, "train_per_class": 1, "image_size": 1, "crop_padding": 0}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} {value} is too small: give at least {least}")
        for name, choices in (
            ("augmentation", (None, "none", "crop", "resized_crop", "ssl", "ssl_blur")),
            ("padding_mode", ("reflect", "zeros")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown: choose one of {choices}")
