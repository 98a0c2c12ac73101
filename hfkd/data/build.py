"""Everything a training script needs of the data in one call."""

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import datasets

from hfkd.errors import InputError

from .arguments import DataArguments
from .augmentation import Augmentation, ResizedCrop
from .loading import ImageDatasets
from .preprocessing import STATISTICS, Preprocessing, decode_image
from .sources import RESIDENT_LIMIT_BYTES, ImageSource, ResidentImages, first_record, make_source
from .views import ViewAugmentation


# The largest images that are padded and cropped by default, and the share of the centre crop of larger ones.
_SMALL_IMAGE = 96
_CENTRE_CROP = 0.875
_DIGIT_PICTURES = {"digits", "mnist", "emnist", "kmnist", "qmnist", "usps", "svhn", "svhn_cropped"}


@dataclass
class ImageSources:
    """The sources of a run: `train` augmented, `validation` and `test` not, and the preprocessing they share."""

    train: ImageSource
    validation: ImageSource | None
    test: ImageSource | None
    preprocessing: Preprocessing


def build_sources(
    data: ImageDatasets,
    args: DataArguments,
    *,
    seed: int = 0,
    views: int = 1,
    processor: Any = None,
    num_channels: int | None = None,
    resident_limit: int = RESIDENT_LIMIT_BYTES,
) -> ImageSources:
    """Decodes or prepares the images of every part.

    Args:
        data: from `load_image_datasets`.
        args: its size, normalisation and augmentation fields.
        seed: of the augmentation.
        views: augmented versions of each training image.
        processor: image processor whose size and statistics hold, unless `args` say otherwise.
        num_channels: of the model; by default that of the first training image.
        resident_limit: see `make_source`.

    Raises:
        InputError: image size unknown or unfit, corrupt image, unknown normalisation.
    """
    preprocessing, measure = _preprocessing(data, args, processor, num_channels)
    augmentation = augmentation_for(args, data.name, preprocessing.image_size)
    made: dict[str, ImageSource] = {}
    for name in ("train", "validation", "test"):
        dataset: datasets.Dataset | None = getattr(data, name)
        if dataset is None:
            continue
        settings: dict[str, Any] = {}
        if name == "train":
            settings = {"augmentation": augmentation, "views": views, "seed": seed}
        source = make_source(
            dataset, data.columns, preprocessing, resident_limit=resident_limit, name=name, **settings
        )
        if name == "train" and measure and isinstance(source, ResidentImages):
            preprocessing = preprocessing.with_statistics_of(source.images)
            source = source.variant(preprocessing=preprocessing)
        elif name == "train" and args.normalization == "train":
            raise InputError("normalization 'train' measures images held in memory, and these are streamed: name one")
        made[name] = source
    return ImageSources(made["train"], made.get("validation"), made.get("test"), preprocessing)


def augmentation_for(args: DataArguments, dataset_name: str, image_size: int) -> Augmentation:
    """The training augmentation that the arguments ask for, with the defaults that they describe."""
    kind = args.augmentation or ("crop" if image_size <= _SMALL_IMAGE else "resized_crop")
    if kind == "none":
        return Augmentation()
    flip = args.horizontal_flip
    if flip is None:
        flip = PurePath(dataset_name).name.lower() not in _DIGIT_PICTURES
    if kind in ("ssl", "ssl_blur"):
        views = ViewAugmentation(horizontal_flip=flip, blur_probability=0.5 if kind == "ssl_blur" else 0.0)
        # Of large images the parts are cut while they are whole.
        return views if image_size <= _SMALL_IMAGE else replace(views, crop=None, resized_crop=views.crop)
    if kind == "resized_crop":
        return Augmentation(horizontal_flip=flip, resized_crop=ResizedCrop())
    padding = image_size // 8 if args.crop_padding is None else args.crop_padding
    if args.padding_mode == "reflect" and padding >= image_size:
        raise InputError(f"crop_padding {padding} is too large to reflect images of {image_size} pixels: give less")
    return Augmentation(padding, args.padding_mode, flip)


def _preprocessing(
    data: ImageDatasets, args: DataArguments, processor: Any, num_channels: int | None
) -> tuple[Preprocessing, bool]:
    """The preprocessing, and whether its statistics are still to be measured."""
    first = decode_image(first_record(data.train, data.columns), num_channels, "row 0 of the train images")
    channels = len(first.getbands())
    if processor is not None:
        preprocessing = Preprocessing.from_image_processor(processor, args.image_size, channels)
    else:
        size = args.image_size or first.width
        if args.image_size is None and first.width != first.height:
            raise InputError(f"images of {first.width}x{first.height} pixels are not square: give --image_size")
        crop_fraction = _CENTRE_CROP if size > _SMALL_IMAGE else None
        preprocessing = Preprocessing(size, channels, *STATISTICS["imagenet"], crop_fraction=crop_fraction)
    if args.normalization == "train":
        return preprocessing, True
    own = PurePath(data.name).name.lower()
    name = args.normalization or (own if processor is None and own in STATISTICS else None)
    if name is None:
        return preprocessing, processor is None
    known = Preprocessing.from_statistics(name, preprocessing.image_size, channels)
    return replace(preprocessing, mean=known.mean, std=known.std), False
