"""The base of methods that train a backbone without labels, on real images, on a frozen generator's, or on both.

A batch of B keys is split: int(B alpha) of them draw synthetic samples, the others are real images. Squeeze-and-Span
(Yang et al., NeurIPS 2022, arXiv 2211.03000) and the methods that it is compared with share all that is here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from hfkd.data import (
    Augmentation,
    ImageSource,
    KeyedDraws,
    MixedImages,
    Preprocessing,
    SyntheticDraws,
    ViewAugmentation,
)
from hfkd.errors import InputError
from hfkd.evaluation.collapse import collapse_warning, effective_rank, mean_standard_deviation
from hfkd.evaluation.inference import outputs_over
from hfkd.evaluation.knn import KNNSettings, knn_accuracy
from hfkd.model_cards import Picture
from hfkd.models.backbone import feature_size, pooled_features

from .cohort_checks import check_batches, check_images, common_precision
from .distributed import gather_with_gradients, world_size
from .encoder_checks import base_of
from .feature_maps import full_precision
from .frozen_generator import FrozenGenerator, Generated, check_generated
from .frozen_parents import FrozenParents
from .images import preprocessing_of
from .networks import TrainingNetworks
from .optimizers import build_main_optimizer, build_main_schedule
from .pictures import sample_picture
from .self_supervised_config import SelfSupervisedConfig


logger = logging.get_logger(__name__)

MAIN = "student"
KNN = KNNSettings(neighbours=200, temperature=0.1)


class SelfSupervisedTrainer(FrozenParents):
    """Trains a backbone; a method gives `build_heads` and `loss`.

    The backbone is saved, without a head. Heads (projector, squeeze module) are training-only, and the generator is in
    no checkpoint. Where evaluation images have labels, `evaluate()` gives `knn_accuracy` by the labelled training
    images, and always how spread out representations are: `representation_std` and `representation_rank`. Training
    logs these of the last batch, and warns once when they say that representations have collapsed.

    Args:
        student: any image model of transformers, or one with a head, which is left out.
        generator: of synthetic samples; frozen. None where `synthetic_share` is 0.
        args: the method's Config.
        train_dataset: real images. Where `synthetic_share` is 1 its length says how long an epoch is, and no image of
            it is read in training; without one the run is `max_steps` long.
        eval_dataset, processing_class, callbacks, dataset_name: as in `DistillationTrainer`.
        augmentation: of the views, both real and synthetic; by default that of `train_dataset`, and where that has
            none `ViewAugmentation()`.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.
    """

    _task = "image-feature-extraction"
    parent_role = "generator"
    evaluates_labels = False
    views = 2

    args: SelfSupervisedConfig
    train_dataset: Any

    def __init__(
        self,
        student: PreTrainedModel,
        generator: PreTrainedModel | None,
        args: SelfSupervisedConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        student = base_of(student)
        _check_what_is_needed(args, generator, train_dataset)
        teacher = None if generator is None else FrozenGenerator(generator)
        only_synthetic = args.synthetic_share == 1
        decoded = isinstance(train_dataset, ImageSource)  # it says how images are normalised
        if teacher is not None and only_synthetic and processing_class is None and not decoded:
            made = teacher.model.config
            processing_class = Preprocessing(made.image_size, made.num_channels).to_image_processor()
        preprocessing = preprocessing_of(train_dataset, processing_class, student.config)
        if processing_class is None and decoded:
            processing_class = preprocessing.to_image_processor()
        check_images([student], (), preprocessing)
        if augmentation is None:
            augmentation = getattr(train_dataset, "augmentation", None) or ViewAugmentation()
        self._check_views(augmentation, args)
        self.synthetic_augmentation = _for_generated(augmentation, args, preprocessing)
        if teacher is not None:
            cut = self.synthetic_augmentation is not None and self.synthetic_augmentation.crop is not None
            check_generated(teacher, preprocessing, resized=cut)
        dtype = common_precision([student] if teacher is None else [student, teacher.model])
        width = feature_size(student, preprocessing.image_size, preprocessing.num_channels)
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 1)
            heads = self.build_heads(args, width, teacher)
        teachers = [] if teacher is None else [teacher]
        networks = TrainingNetworks([student], {name: head.to(dtype) for name, head in heads.items()}, teachers)
        training: Any = _draws(args, train_dataset) if only_synthetic else train_dataset
        check_batches(training, args, [student], networks.training_only)
        super().__init__(
            networks,
            args,
            training,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=None if only_synthetic else dataset_name,
        )
        self.preprocessing = preprocessing
        self._bank: Any = train_dataset
        if not only_synthetic:
            self.train_dataset = MixedImages(self.train_dataset, args.synthetic_share)
        self._pool: tuple[int, Generated] | None = None
        self._watched: tuple[Tensor, float | Tensor] | None = None
        self._warned = False

    def _check_views(self, augmentation: Augmentation, args: SelfSupervisedConfig) -> None:
        if not augmentation and (args.augment_synthetic or (self.views > 1 and args.synthetic_share < 1)):
            raise InputError(
                "the augmentation changes nothing, and two views of an image are to differ: choose ssl or ssl_blur (a "
                "ViewAugmentation); synthetic images alone are left as they are by augment_synthetic=False"
            )

    # -- what a method defines ---------------------------------------------------------------------------------------

    def build_heads(self, args: Any, width: int, generator: FrozenGenerator | None) -> Mapping[str, nn.Module]:
        """Training-only networks on features of `width`; called before the trainer is set up."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, with its graph, and its parts.

        Args:
            batch: of the real images `pixel_values` and `pixel_values_2` (two views) and `index`, of the synthetic
                samples `synthetic_epoch` and `synthetic_index`. A kind without samples is missing, or empty.
        """
        raise NotImplementedError

    # -- parts of a loss ---------------------------------------------------------------------------------------------

    def generate(self, batch: dict[str, Tensor]) -> Generated:
        """The batch's synthetic samples, by one forward pass of the generator, or out of the epoch's pool."""
        epoch, index = batch["synthetic_epoch"], batch["synthetic_index"]
        if not self.args.generated_pool_size:
            return self._draw(epoch, index)
        number = int(epoch[0])
        if self._pool is None or self._pool[0] != number:
            self._pool = number, self._draw_pool(epoch[:1])
        return self._pool[1].rows(index % self.args.generated_pool_size)

    def synthetic_view(self, generated: Generated, batch: dict[str, Tensor], view: int = 0) -> Tensor:
        """Pixel values of the student's view of synthetic images, keyed by sample and view."""
        pixels = (generated.images + 1) * 127.5
        if self.synthetic_augmentation is not None:
            epoch, index = batch["synthetic_epoch"], batch["synthetic_index"]
            pixels = self.synthetic_augmentation(pixels, self.data_seed, epoch, index, view)
        return self.preprocessing.normalize(pixels, next(self.model.students.parameters()).dtype)

    def features(self, pixel_values: Tensor) -> Tensor:
        """The student's features (N, d), in full precision."""
        with self.autocast():
            return full_precision(pooled_features(self.model.students[0], pixel_values))

    def represent(self, pixel_values: Tensor) -> Tensor:
        """z (N, D), the projector's output of the student's features."""
        return self.project(self.features(pixel_values))

    def project(self, features: Tensor) -> Tensor:
        """z (N, D) of the student's features (N, d)."""
        with self.autocast():
            return full_precision(self.model.training_only["projector"](features))

    def gather(self, z: Tensor) -> Tensor:
        """Representations of all processes, where statistics are gathered; this process's own otherwise."""
        return gather_with_gradients(z) if self.args.gather_statistics else z

    def watch(self, z: Tensor, gamma: float | Tensor = 1.0) -> None:
        """Have the next log tell how spread out z (N, D) is; `gamma` is the deviation that it should have."""
        self._watched = z.detach(), gamma

    def _draw(self, epoch: Tensor, index: Tensor) -> Generated:
        teacher: Any = self.model.teachers[0]
        with self.autocast():
            return teacher.draw(self.data_seed, epoch, index)

    def _draw_pool(self, epoch: Tensor) -> Generated:
        index = torch.arange(self.args.generated_pool_size, device=epoch.device)
        parts = [self._draw(epoch.expand_as(some), some) for some in index.split(self.args.train_batch_size)]
        images, features, latents = zip(*parts, strict=True)
        return Generated(
            torch.cat(images), tuple(torch.cat(block) for block in zip(*features, strict=True)), torch.cat(latents)
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One over the student and the heads."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return {MAIN: build_main_optimizer(parameters, self.args)}

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {name: build_main_schedule(one, self.args, max_steps) for name, one in optimizers.items()}

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss, whose gradients reach student and heads in one backward pass."""
        loss, parts = self.loss(batch)
        self.optimizer.backward_once(loss)
        return loss.detach(), {name: value.detach() for name, value in parts.items()}

    def fingerprints(self) -> list[str]:
        return [teacher.fingerprint() for teacher in self.model.frozen()]

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        if self.args.sync_batchnorm and world_size() > 1:  # of the heads as well, as in the released code
            self.model.training_only = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.training_only)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._watched is not None:
            z, gamma = self._watched
            deviation, rank = mean_standard_deviation(z).item(), effective_rank(z).item()
            logs |= {"representation_std": deviation, "representation_rank": rank}
            most = min(z.shape[1], len(z) - 1)
            self._warn_of_collapse(collapse_warning(deviation, rank, most, float(gamma)))
        super().log(logs, start_time)

    def _warn_of_collapse(self, warning: str | None) -> None:
        if warning is not None and not self._warned and self.is_world_process_zero():
            self._warned = True
            logger.warning(f"step {self.state.global_step}: representations have collapsed: {warning}")

    # -- data --------------------------------------------------------------------------------------------------------

    def _image_source(self, dataset: Any, name: str, augmentation: Augmentation | None = None) -> Any:
        return dataset if isinstance(dataset, KeyedDraws) else super()._image_source(dataset, name, augmentation)

    def _eval_source(self, dataset: Any, name: str = "eval") -> ImageSource:
        return super()._eval_source(dataset, name).variant(views=1)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features (N, d) and representations (N, D)."""
        features = self.features(batch["pixel_values"])
        return {"features": features, "representations": self.project(features)}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`representation_std`, `representation_rank` and, with labels on both sides, `knn_accuracy`."""
        z = outputs["representations"]
        metrics = {
            "representation_std": mean_standard_deviation(z).item(),
            "representation_rank": effective_rank(z).item(),
        }
        bank = self._labelled_bank() if labels.dim() == 1 and (labels >= 0).all() else None
        if bank is not None:
            metrics["knn_accuracy"] = knn_accuracy(*bank, outputs["features"], labels, KNN)[0]
        return metrics

    def _labelled_bank(self) -> tuple[Tensor, Tensor] | None:
        """Features (N, d) and labels (N,) of labelled training images, un-augmented; None without such."""
        if self._bank is None:
            return None
        if not isinstance(self._bank, ImageSource):
            self._bank = self._eval_source(self._bank, "train")
        if self._bank.labels is None or self._bank.columns.multi_label:
            return None
        parameter = next(self.model.students.parameters())
        features, labels = outputs_over(
            self._bank,
            lambda pixel_values: self.features(pixel_values.to(parameter.dtype)),
            parameter.device,
            self.args.eval_batch_size,
            most=self.args.knn_bank_size,
        )
        assert labels is not None  # as the source has some
        return features, labels

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """The features (N, d) of the images."""
        return outputs["features"]

    # -- the card ----------------------------------------------------------------------------------------------------

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """Images of the generator, of the same latents in every card."""
        for teacher in self.model.frozen():
            yield replace(sample_picture(teacher.model, folder), caption="Synthetic images of the teacher")


def _check_what_is_needed(args: SelfSupervisedConfig, generator: Any, train_dataset: Any) -> None:
    share = args.synthetic_share
    if share > 0 and generator is None:
        raise InputError(f"synthetic_share={share} needs a generator: give one, or choose synthetic_share=0")
    if share == 0 and generator is not None:
        raise InputError("synthetic_share=0 leaves a generator without effect: leave it out, or raise the share")
    if share < 1 and train_dataset is None:
        raise InputError(f"synthetic_share={share} needs real images: give a train_dataset, or choose 1")
    if share == 1 and train_dataset is None:
        if args.max_steps < 1:
            raise InputError("a run without train_dataset is as long as max_steps: give max_steps of 1 or more")
        if args.generated_pool_size:
            raise InputError(
                f"generated_pool_size={args.generated_pool_size} is drawn anew in each epoch, and a run without "
                "train_dataset has one: give a train_dataset for its length, or leave the pool out"
            )


def _for_generated(
    augmentation: Augmentation, args: SelfSupervisedConfig, preprocessing: Preprocessing
) -> ViewAugmentation | None:
    """The augmentation of generated images; None where they are not augmented, or there are none."""
    if args.synthetic_share == 0 or not args.augment_synthetic:
        return None
    if not isinstance(augmentation, ViewAugmentation):
        raise InputError(
            f"the augmentation is a {type(augmentation).__name__}, which is not for generated images: pass a "
            "ViewAugmentation (augmentation ssl or ssl_blur)"
        )
    return augmentation.on_device(preprocessing.image_size, shared=args.shared_augmentation)


def _draws(args: SelfSupervisedConfig, train_dataset: Any) -> SyntheticDraws:
    """Keys of a run without real images: epochs as long as the dataset, of which nothing else is looked at."""
    if train_dataset is not None:
        return SyntheticDraws(len(train_dataset))
    return SyntheticDraws(args.max_steps * args.train_batch_size * args.world_size)
