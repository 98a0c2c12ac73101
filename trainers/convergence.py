"""A trained classifier's side of GBC: what its weights demand of the images that they were trained on.

The idea is Yu and Wang's (arXiv 2312.02470), the formulas are ours: see `hfkd.losses.generator_from_classifier`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.losses.generator_from_classifier import (
    closed_form_scale,
    cross_entropy_multipliers,
    cross_entropy_potential,
    gradients_of,
    margins,
    stationarity_loss,
    symmetric_duality,
    walls_duality,
    weighted_margin_potential,
)
from hfkd.models.probing import image_errors, probe_pixels, undisturbed
from hfkd.models.smooth_relu import smooth_relu_gates

from .feature_maps import full_precision
from .networks import Renormalize, frozen_running_statistics, state_fingerprint
from .stationarity_sets import choose_sets
from .training_facts import margin_scale_of


if TYPE_CHECKING:
    from .generator_from_classifier import GeneratorFromClassifierConfig


# Of the margin's scale: what the temperature is at least, where all logits of a batch are alike (a dead start).
LEAST_TEMPERATURE = 1e-3
LARGEST_UNIT = 60.0  # natural logarithm; single precision ends at 88


class Convergence(NamedTuple):
    """How far a batch of N images is from what the weights demand.

    stationarity: L_st (0-dim), >= 0; 1 explains nothing. None where it was not asked for.
    duality: U (N,), >= 0.
    margins: m (N,), above 0 where the classifier agrees with the label.
    """

    stationarity: Tensor | None
    duality: Tensor
    margins: Tensor

    @property
    def agreement(self) -> Tensor:
        """(N,) 1 where the classifier agrees with the label, else 0."""
        return (self.margins > 0).to(self.duality.dtype)


class ConvergenceConditions(nn.Module):
    """The conditions of one classifier, as a differentiable function of images.

    The classifier is frozen, pinned to evaluation mode, and always computes in its own precision.

    Args:
        classifier: whose weights are theta; any model with `logits`.
        processor: its stock image processor, whose mean and deviation its input is normalised with; None where it
            takes values in [-1, 1] as they are.
        args: the run's settings.
        image_size, num_channels: of the images that are to come.
        name: of the classifier, for messages.

    Raises:
        InputError: a classifier that does not take such images, a layer for which no scaling exponents can be found
            (only where the stationarity set needs them), or a custom set that names nothing.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        processor: Any,
        args: "GeneratorFromClassifierConfig",
        image_size: int,
        num_channels: int,
        name: str = "the classifier",
    ) -> None:
        super().__init__()
        self.args = args
        self.classifier = classifier.requires_grad_(False)
        self.normalize = _normalizer(processor, image_size, num_channels, name)
        pixels = probe_pixels(classifier, image_size, num_channels)
        with undisturbed(classifier), image_errors(classifier, pixels):
            self.num_labels = classifier(pixel_values=pixels).logits.shape[1]
        self.stationary, self.forceless = choose_sets(classifier, pixels, args)
        self.margin_scale = margin_scale_of(classifier.config, self.num_labels, args.margin_scale, name)
        self.eval()

    def train(self, mode: bool = True) -> "ConvergenceConditions":
        return super().train(False)

    def fingerprint(self) -> str:
        """sha256 of all parameters and buffers of the classifier, and of how its input is normalised."""
        return state_fingerprint(self)

    def logits(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """z (N, C) of images in [-1, 1], with `parameters` in the place of those of these names."""
        pixel_values = self.normalize(full_precision(images))
        # No half precision, whose gradients of gradients would be noise.
        exact = torch.autocast(images.device.type, enabled=False)
        with exact, self._statistics(), smooth_relu_gates(self.args.gate_sharpness or None):
            return functional_call(self.classifier, parameters or {}, (), {"pixel_values": pixel_values}).logits

    def forward(
        self, images: Tensor, labels: Tensor, multipliers: Tensor | None = None, *, stationarity: bool = True
    ) -> Convergence:
        """Measure a batch of generated, or of real, images.

        Args:
            images: (N, C, H, W) in [-1, 1].
            labels: (N,) int64.
            multipliers: mu (N,) > 0 of a network or constant; None: those of cross-entropy, at a scale of their own.
            stationarity: whether to measure it, which is most of the work.
        """
        theta = self._leaves() if stationarity else {}
        exact = torch.autocast(images.device.type, enabled=False)
        with exact, torch.set_grad_enabled(stationarity or torch.is_grad_enabled()):
            logits = self.logits(images, theta)
            found = margins(logits, labels)
            ratio = found / self.margin_scale
            if self.args.duality == "symmetric":
                duality = symmetric_duality(ratio)
            else:
                weights = multipliers
                if weights is None:
                    weights = cross_entropy_multipliers(logits, labels, self._temperature(logits))
                duality = walls_duality(ratio, weights)
            loss = self._stationarity(theta, logits, labels, multipliers) if stationarity else None
        return Convergence(loss, duality, found)

    # -- stationarity ------------------------------------------------------------------------------------------------

    def _stationarity(
        self, theta: dict[str, Tensor], logits: Tensor, labels: Tensor, multipliers: Tensor | None
    ) -> Tensor:
        gradients = self.expected_gradients(theta, logits, labels, multipliers)
        stationary = {name: theta[name] for name in self.stationary}
        per_group = self.args.per_group
        if multipliers is None:
            scale = closed_form_scale(stationary, gradients, per_group=per_group)
            gradients = {name: scale * gradient for name, gradient in gradients.items()}
        return stationarity_loss(
            stationary,
            gradients,
            per_group=per_group,
            zero_gradients=[gradients[name] for name in self.forceless],
            zero_weight=self.args.zero_weight,
        )

    def expected_gradients(
        self, theta: dict[str, Tensor], logits: Tensor, labels: Tensor, multipliers: Tensor | None
    ) -> dict[str, Tensor]:
        """G by name, before its scale: the estimate, from a batch, of a mean over the generated distribution.

        Everything that knows only a sample of that distribution passes through here: an estimate of less variance
        would take its place.
        """
        if multipliers is None:
            temperature = self._temperature(logits)
            potential = cross_entropy_potential(logits, labels, temperature) * self._unit(temperature)
        else:
            potential = weighted_margin_potential(logits, labels, multipliers)
        return gradients_of(potential, theta)

    def _leaves(self) -> dict[str, Tensor]:
        """The parameters that are differentiated by, as leaves that share the classifier's memory."""
        wanted = {*self.stationary, *self.forceless}
        named = self.classifier.named_parameters()
        return {name: parameter.detach().requires_grad_() for name, parameter in named if name in wanted}

    def _temperature(self, logits: Tensor) -> float | Tensor:
        if self.args.temperature == "exact":
            return 1.0
        if self.args.temperature == "margin":
            return self.margin_scale / self.args.margin_temperature
        return logits.detach().std().clamp_min(LEAST_TEMPERATURE * self.margin_scale)

    def _unit(self, temperature: float | Tensor) -> Tensor:
        """About what the multiplier of an image on the margin has to be taken times to be 1 (0-dim).

        The scale of G takes it out again. Without it multipliers of far margins are so small, and that scale so large,
        that gradients of the loss overflow in single precision.
        """
        return torch.as_tensor(self.margin_scale / temperature).clamp(max=LARGEST_UNIT).exp()

    @contextmanager
    def _statistics(self) -> Iterator[None]:
        """Batch norm by the checkpoint's statistics, or by those of the batch, which leave no trace."""
        if self.args.batchnorm_statistics == "running":
            yield
            return
        norms = [m for m in self.classifier.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.training = True
        try:
            with frozen_running_statistics(self.classifier):
                yield
        finally:
            for norm in norms:
                norm.training = False


def _normalizer(processor: Any, image_size: int, num_channels: int, name: str) -> nn.Module:
    """From values in [-1, 1] to a classifier's input."""
    if processor is None:
        return nn.Identity()
    generated = Preprocessing(image_size, num_channels)
    wanted = Preprocessing.from_image_processor(processor, num_channels=num_channels).image_size
    if wanted != image_size:
        raise InputError(
            f"{name} takes images of {wanted} pixels, by its processor, and the generator makes {image_size}: build a "
            f"generator with image_size={wanted}"
        )
    return Renormalize.for_teacher(generated, processor) or nn.Identity()
