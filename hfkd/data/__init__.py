"""Images and the random draws on them: loading, splitting, decoding, augmenting, ordering."""

from .arguments import DataArguments
from .augmentation import Augmentation, ResizedCrop, SquareCrop
from .build import ImageSources, augmentation_for, build_sources
from .columns import ImageColumns, find_columns, read_labels
from .draws import KeyedDraws, travelling_normal
from .keyed_random import keyed_generator, keyed_normal, keyed_permutation, keyed_uniform
from .loading import ImageDatasets, load_digits, load_image_datasets, split_image_datasets
from .mixed import MixedImages, SyntheticDraws, synthetic_count
from .preprocessing import STATISTICS, Preprocessing
from .sampler import DrawsDataset, KeyedSampler, collate, set_sampler_epoch
from .sources import ImageSource, ResidentImages, StreamedImages, make_source, view_name
from .views import ViewAugmentation


__all__ = [
    "STATISTICS",
    "Augmentation",
    "DataArguments",
    "DrawsDataset",
    "ImageColumns",
    "ImageDatasets",
    "ImageSource",
    "ImageSources",
    "KeyedDraws",
    "KeyedSampler",
    "MixedImages",
    "Preprocessing",
    "ResidentImages",
    "ResizedCrop",
    "SquareCrop",
    "StreamedImages",
    "SyntheticDraws",
    "ViewAugmentation",
    "augmentation_for",
    "build_sources",
    "collate",
    "find_columns",
    "keyed_generator",
    "keyed_normal",
    "keyed_permutation",
    "keyed_uniform",
    "load_digits",
    "load_image_datasets",
    "make_source",
    "read_labels",
    "set_sampler_epoch",
    "split_image_datasets",
    "synthetic_count",
    "travelling_normal",
    "view_name",
]
