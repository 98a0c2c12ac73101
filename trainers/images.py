"""The data of a run: image sources, loaders whose order is a function of (seed, epoch), batches on the device."""

from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hfkd.data import (
    Augmentation,
    ImageSource,
    KeyedDraws,
    KeyedSampler,
    Preprocessing,
    find_columns,
    make_source,
    view_name,
)
from hfkd.errors import InputError

from .config import DistillationConfig
from .networks import TrainingNetworks


class ImageLoading(Trainer):
    """The part of the base trainer that turns datasets into batches."""

    args: DistillationConfig
    model: TrainingNetworks
    views: int = 1  # differently augmented versions of each training image
    data_seed: int
    preprocessing: Preprocessing

    def _image_source(self, dataset: Any, name: str, augmentation: Augmentation | None = None) -> ImageSource:
        """An image source that draws by this run's seed; a `datasets.Dataset` is decoded as the processor says."""
        if isinstance(dataset, ImageSource):
            return dataset.variant(seed=self.data_seed, views=self.views, augmentation=augmentation)
        if not isinstance(dataset, datasets.Dataset):
            hint = "pass one of its splits" if isinstance(dataset, datasets.DatasetDict) else "pass a datasets.Dataset"
            raise InputError(f"the {name} dataset is a {type(dataset).__name__}: {hint}, or an ImageSource")
        if self.processing_class is None:
            raise InputError("processing_class=None: a datasets.Dataset needs an image processor to be decoded")
        dataset = dataset.with_format(None)  # a transform of the user's would come before the decoding
        return make_source(
            dataset,
            find_columns(dataset.features, require_labels=False),
            self.preprocessing,
            augmentation=augmentation,
            seed=self.data_seed,
            views=self.views,
            name=name,
        )

    def _eval_source(self, dataset: Any, name: str = "eval") -> ImageSource:
        """Evaluation sees images as they are, also those of a source that is augmented for training."""
        return self._image_source(dataset, name, Augmentation())

    def _eval_sources(self, dataset: Any) -> Any:
        if not isinstance(dataset, dict) or isinstance(dataset, datasets.DatasetDict):
            return None if dataset is None else self._eval_source(dataset)
        sources = {name: self._eval_source(part, name) for name, part in dataset.items()}
        for name, source in sources.items():
            source.name = name  # what the card calls it; two parts may come from sources of one name
        return sources

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise InputError("train_dataset=None: training needs a dataset")
        return self._loader(self.train_dataset, self._train_batch_size, train=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("eval_dataset=None: evaluation needs a dataset")
        return self._loader(self._eval_source(dataset), self.args.eval_batch_size, train=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, source: ImageSource | KeyedDraws, batch_size: int, *, train: bool) -> DataLoader:
        workers = self.args.dataloader_num_workers
        shuffle = train and isinstance(source, ImageSource)  # draws have no order
        loader = DataLoader(
            source,
            batch_size=batch_size,
            sampler=KeyedSampler(len(source), seed=self.data_seed, shuffle=shuffle),
            collate_fn=self.data_collator,
            num_workers=workers,
            drop_last=train and self.args.dataloader_drop_last,
            generator=torch.Generator(),  # each iterator draws its workers' seed, which no data depends on
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
        )
        return self.accelerator.prepare(loader)

    def _materialise(self, source: ImageSource | KeyedDraws, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Small images are gathered and augmented here, on the device and as one batch."""
        parameter = next(self.model.students.parameters())
        batch = source.materialise(inputs, device=parameter.device, dtype=parameter.dtype)
        if self.args.channels_last:
            for view in range(source.views):
                name = view_name("pixel_values", view)
                if batch[name].dim() == 4:  # cached activations may be tokens
                    batch[name] = batch[name].contiguous(memory_format=torch.channels_last)
        return batch


def preprocessing_of(dataset: Any, processing_class: Any, config: Any) -> Preprocessing:
    """Size, channels and statistics of the images that a run will see, decided once.

    Raises:
        InputError: an `ImageSource` and a processor that disagree: what is saved would not be what was trained on.
    """
    channels = getattr(config, "num_channels", 3)
    if not isinstance(dataset, ImageSource):
        if processing_class is not None:
            return Preprocessing.from_image_processor(processing_class, num_channels=channels)
        return Preprocessing(int(getattr(config, "image_size", None) or 224), channels)
    own = dataset.preprocessing
    if processing_class is not None:
        given = Preprocessing.from_image_processor(processing_class, num_channels=own.num_channels)
        for name in ("image_size", "mean", "std"):
            ours, theirs = (torch.tensor(getattr(p, name), dtype=torch.float64) for p in (own, given))
            if not torch.allclose(ours, theirs, atol=1e-4):
                raise InputError(
                    f"processing_class has {name}={getattr(given, name)} and the training images were made with "
                    f"{getattr(own, name)}: leave processing_class out, or build the source with it"
                )
    return own
