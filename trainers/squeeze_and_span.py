"""Squeeze-and-Span: a GAN's generator as a teacher of representations (Yang et al., NeurIPS 2022, arXiv 2211.03000).

A synthetic image's generator features h are squeezed to z_g = T(h); the student sees the augmented image alone and is
to give the same, z_f = S(a(x)): that makes T keep what the student can know, and S learn it. Real images span the
student to their domain: two views of one are to have one representation. The terms that keep representations from
collapsing are `hfkd.losses.squeeze_and_span`'s. Formulas are the paper's, settings and sizes those of its public code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hfkd.errors import InputError
from hfkd.evaluation.collapse import mean_standard_deviation
from hfkd.losses.squeeze_and_span import span_loss, squeeze_loss
from hfkd.models.squeeze_module import Projector, SqueezeModule

from .config import check_range
from .feature_maps import full_precision
from .frozen_generator import FrozenGenerator, Generated, feature_channels, features_of
from .self_supervised import SelfSupervisedTrainer
from .self_supervised_config import VarianceCovarianceConfig


# The defaults are the paper's (its equation 11 and one augmentation for each sample). The released code leaves the
# teacher's statistics out of the loss, draws one augmentation for a whole batch of synthetic images, and takes
# statistics within each process.
CODE_PRESET: Mapping[str, Any] = MappingProxyType(
    {"regularize_teacher": False, "shared_augmentation": True, "gather_statistics": False}
)


@dataclass
class SqueezeAndSpanConfig(VarianceCovarianceConfig):
    """Settings of Squeeze-and-Span. The defaults are the paper's; `CODE_PRESET` has what its released code does else.

    The rows a to f of the paper's Table 5 are `synthetic_share=1` with, for a and b, `squeeze_depth=0,
    variance_weight=0, covariance_weight=0` (a: and `augment_synthetic=False`); for c both weights 0; for d
    `covariance_weight=0`; e as it is; and f with `synthetic_share=0.5`.
    """

    teacher_features: Literal["generator", "latent"] = field(
        default="generator",
        metadata={"help": "What is distilled: features of the generator's blocks, or its latent (w, else z)."},
    )
    squeeze_depth: int = field(
        default=3,
        metadata={
            "help": "Linear layers of the squeeze module's MLP (code: 3). 0: no module, the student learns the pooled "
            "features as they are (vanilla distillation), and representation_size is theirs."
        },
    )
    squeeze_hidden_size: int = field(default=2048, metadata={"help": "Width of the squeeze module (code: 2048)."})
    regularize_teacher: bool = field(
        default=True,
        metadata={
            "help": "The squeeze module's outputs have the terms of variance and covariance too (paper, equation 11: "
            "yes; released code: no). Without a squeeze module there is nothing that they could move."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("squeeze_depth", self.squeeze_depth, 0)
        check_range("squeeze_hidden_size", self.squeeze_hidden_size, 1)
        if not self.synthetic_share:
            raise InputError(
                "synthetic_share=0 leaves no synthetic sample to squeeze: choose a share above 0, or method vicreg, "
                "which is what would be left"
            )
        if self.squeeze_depth == 0:
            self.refuse_changed(("representation_size", "squeeze_hidden_size"), "squeeze_depth=0")


class SqueezeAndSpanTrainer(SelfSupervisedTrainer):
    """Trains a student backbone to know what a generator knows of its images, and to know it of real ones.

    The squeeze module and the projector are training-only. One forward pass of the generator makes an update's images
    and features. The student sees synthetic images, first views and second views in three passes, so that batch norm
    never mixes the two domains, as in the released code.

    Args:
        student, generator, args, train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name:
            as in `SelfSupervisedTrainer`.

    Raises:
        InputError: for networks that do not fit each other, the images, or the settings.
    """

    _name = "Squeeze-and-Span"
    _paper: ClassVar = {
        "title": "Distilling Representations from GAN Generator via Squeeze and Span",
        "id": "2211.03000",
        "citation": (
            "@inproceedings{yang2022squeeze,\n"
            "  title     = {Distilling Representations from {GAN} Generator via Squeeze and Span},\n"
            "  author    = {Yang, Yu and Cheng, Xiaotian and Liu, Chang and Bilen, Hakan and Ji, Xiangyang},\n"
            "  booktitle = {Advances in Neural Information Processing Systems},\n"
            "  year      = {2022}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "squeeze-and-span", "self-supervised", "knowledge-distillation", "gan"]
    _template_file = "squeeze_and_span.md"

    args: SqueezeAndSpanConfig

    def __init__(
        self,
        student: Any,
        generator: Any,
        args: SqueezeAndSpanConfig | None = None,
        *parts: Any,
        **named_parts: Any,
    ) -> None:
        super().__init__(student, generator, args or SqueezeAndSpanConfig(), *parts, **named_parts)

    def build_heads(
        self, args: SqueezeAndSpanConfig, width: int, generator: FrozenGenerator | None
    ) -> Mapping[str, nn.Module]:
        """T, and the student's projector to T's outputs."""
        assert generator is not None  # as synthetic_share is above 0
        channels = feature_channels(generator, args.teacher_features)
        squeeze = SqueezeModule(channels, args.representation_size, args.squeeze_hidden_size, args.squeeze_depth)
        return {"squeeze": squeeze, "projector": Projector(width, squeeze.out_features, args.projector_layers)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha L_squeeze + (1 - alpha) L_span (the paper's objective); L_squeeze alone where alpha is 1."""
        alpha, weights = self.args.synthetic_share, self.args.loss_weights
        generated = self.generate(batch)
        z_g = self.gather(self.squeeze(generated))
        z_f = self.gather(self.represent(self.synthetic_view(generated, batch)))
        trains_teacher = self.args.regularize_teacher and self.args.squeeze_depth > 0
        loss, parts = squeeze_loss(z_g, z_f, weights, regularize_teacher=trains_teacher)
        # Without a squeeze module the student is to be as spread out as the features are.
        self.watch(z_f, 1.0 if self.args.squeeze_depth else mean_standard_deviation(z_g))
        parts["squeeze_loss"] = loss
        if alpha < 1:
            z, other = (self.gather(self.represent(batch[name])) for name in ("pixel_values", "pixel_values_2"))
            spanned, of_span = span_loss(z, other, weights)
            parts |= {f"real_{name}": value for name, value in of_span.items()} | {"span_loss": spanned}
            loss = alpha * loss + (1 - alpha) * spanned
        return loss, parts

    def squeeze(self, generated: Generated) -> Tensor:
        """z_g (N, D) = T(h) of synthetic samples; the features have no gradient, T has."""
        with self.autocast():
            z_g = self.model.training_only["squeeze"](features_of(generated, self.args.teacher_features))
        return full_precision(z_g)
