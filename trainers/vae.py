"""VAE: encoder and decoder that maximise the evidence lower bound, with the networks of ACAI (arXiv 1807.07543).

The encoder is the second base network of the gradient-features paper (arXiv 2004.05529, section 4.3), which follows
Berthelot et al.: this is the VAE of their public code. `hfkd.losses.vae` has the two terms of the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfkd.data import Augmentation, Preprocessing, keyed_normal
from hfkd.data.keyed_random import EVALUATION, NOISE_STREAM
from hfkd.errors import InputError
from hfkd.losses.vae import bernoulli_nll, gaussian_kl, reconstruction
from hfkd.models.vae_parts import GaussianCodes, VaeDecoder

from .base import DistillationTrainer
from .cohort_checks import check_batches, common_precision
from .config import DistillationConfig, check_range
from .encoder_checks import base_of, check_encoder
from .feature_maps import full_precision
from .images import preprocessing_of
from .networks import TrainingNetworks
from .optimizers import build_main_optimizer, build_main_schedule


MAIN = "autoencoder"


@dataclass
class VaeConfig(DistillationConfig):
    """Settings of the VAE. The defaults are those of ACAI's public code."""

    _lower_is_better: ClassVar = ("reconstruction_error", "nll", "kl")

    num_train_epochs: float = field(
        default=335.5, metadata={"help": "Epochs (ACAI: 2^24 images, which is 335.5 epochs of CIFAR-10)."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device (ACAI: 64)."})
    optim: str = field(default="adam", metadata={"help": "Optimizer (ACAI: adam)."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of encoder and decoder (ACAI: 1e-4)."})

    latent_channels: int = field(
        default=16, metadata={"help": "Channels of the code's map, which is as large as the encoder's (ACAI: 16, 64)."}
    )
    beta: float = field(default=1.0, metadata={"help": "Weight of the KL term (ACAI: 1, the evidence lower bound)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("latent_channels", self.latent_channels, 1)
        check_range("beta", self.beta, 0)


class VaeTrainer(DistillationTrainer):
    """Trains an encoder as half of a variational autoencoder, without labels.

    The encoder is what is saved; its latent layers and the decoder are training-only.

    Args:
        encoder: of the family `hfkd_vae_encoder`, or one with the same fields in its configuration; of a classifier
            the head is left out.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`; labels are not looked at. Pixel values lie in [-1, 1] (mean and std 0.5).

    Raises:
        InputError: for an encoder that does not fit the images.
    """

    _name = "Variational autoencoder (VAE)"
    _paper: ClassVar = {
        "title": "Auto-Encoding Variational Bayes",
        "id": "1312.6114",
        "citation": (
            "@inproceedings{kingma2014vae,\n"
            "  title     = {Auto-Encoding Variational Bayes},\n"
            "  author    = {Kingma, Diederik P. and Welling, Max},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = {2014}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "vae", "autoencoder", "unsupervised"]
    _template_file = "vae.md"
    _task = "image-feature-extraction"
    evaluates_labels = False

    args: VaeConfig

    def __init__(
        self,
        encoder: PreTrainedModel,
        args: VaeConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        args = args or VaeConfig()
        encoder = base_of(encoder)
        preprocessing = preprocessing_of(train_dataset, processing_class, encoder.config)
        check_encoder(encoder, ("depth", "scales", "negative_slope"), "vae_encoder", preprocessing)
        map_size = _map_size(encoder, preprocessing)
        dtype = common_precision([encoder])
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 1)
            codes = GaussianCodes(encoder.config, args.latent_channels, map_size)
            decoder = VaeDecoder(encoder.config, args.latent_channels)
        networks = TrainingNetworks([encoder], {"codes": codes.to(dtype), "decoder": decoder.to(dtype)})
        check_batches(train_dataset, args, [encoder], networks.training_only)
        super().__init__(
            networks,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
        )

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One optimizer over encoder, latent layers and decoder."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return {MAIN: build_main_optimizer(parameters, self.args)}

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {MAIN: build_main_schedule(optimizers[MAIN], self.args, max_steps)}

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """-log p(x | z) + beta KL, in nats per image."""
        nll, kl = (term.mean() for term in self._bound(batch, self.state.global_step))
        loss = nll + self.args.beta * kl
        self.optimizer.backward(MAIN, share * loss)
        return loss.detach(), {"nll": nll.detach(), "kl": kl.detach()}

    def _bound(self, batch: dict[str, Tensor], update: int) -> tuple[Tensor, Tensor]:
        """Both terms (N,), by one draw of z for each image, keyed by update and image."""
        mean, log_variance = self._posterior(batch["pixel_values"])
        draws = keyed_normal(self.data_seed, update, batch["index"], NOISE_STREAM, mean[0].numel())
        codes = mean + (0.5 * log_variance).exp() * draws.view_as(mean).to(mean.dtype)
        return bernoulli_nll(self._decode(codes), batch["pixel_values"]), gaussian_kl(mean, log_variance)

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            feature_map = self.model.students[0](images, return_dict=True).last_hidden_state
            mean, log_variance = self.model.training_only["codes"](feature_map)
        return full_precision(mean), full_precision(log_variance)

    def _decode(self, codes: Tensor) -> Tensor:
        with self.autocast():
            logits = self.model.training_only["decoder"](codes)
        return full_precision(logits)

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes (the mean of q(z | x)), both terms of the bound, and the error of x -> z -> x in squared pixels."""
        nll, kl = self._bound(batch, EVALUATION)
        mean, _ = self._posterior(batch["pixel_values"])
        error = (reconstruction(self._decode(mean)) - batch["pixel_values"]).square().flatten(1).mean(dim=1)
        return {"codes": mean.flatten(1), "nll": nll, "kl": kl, "error": error}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`loss` is that of training; `elbo` in nats per image; the mean `reconstruction_error` on [-1, 1]."""
        nll, kl, error = (outputs[name].mean().item() for name in ("nll", "kl", "error"))
        return {
            "loss": nll + self.args.beta * kl,
            "elbo": -nll - kl,
            "nll": nll,
            "kl": kl,
            "reconstruction_error": error,
        }

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        """The codes (N, L) of the images."""
        return outputs["codes"]


def _map_size(encoder: PreTrainedModel, preprocessing: Preprocessing) -> int:
    """Side of the encoder's map. Raises InputError where upsampling it would not give the image's size back."""
    stride = 2**encoder.config.scales
    if preprocessing.image_size % stride:
        raise InputError(
            f"images of {preprocessing.image_size} pixels cannot be halved {encoder.config.scales} times without a "
            f"rest: choose image_size as a multiple of {stride}, or an encoder with fewer scales"
        )
    return preprocessing.image_size // stride
