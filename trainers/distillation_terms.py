"""The terms that the loss of an offline distillation is made of, by name: functions of logits, modules on features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hfkd.data.keyed_random import CONTRAST_STREAM, keyed_uniform
from hfkd.errors import InputError
from hfkd.losses.feature_distillation import (
    attention_transfer_loss,
    hierarchical_context_loss,
    hint_loss,
    relational_angle_loss,
    relational_distance_loss,
)
from hfkd.losses.logit_distillation import correlation_distillation, decoupled_kd, distillation_kl, standardised_kd
from hfkd.models.distillation_layers import ContrastiveMemory, FeatureRegressor, ReviewFusion
from hfkd.models.feature_discriminator import Shape
from hfkd.models.tapped_adapter import POOLED, TappedAdapter, paired

from .distributed import gather_with_gradients


if TYPE_CHECKING:
    from .distillation import OfflineDistillationConfig


class Seen(NamedTuple):
    """Features of one network, in full precision: `pooled` (N, D), and its tapped `layers`, (N, C, H, W) each."""

    pooled: Tensor
    layers: dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What a term is computed from, in full precision.

    Attributes:
        logits: the student's, (N, K).
        target: the teachers' joint logits, (N, K).
        student, teachers: what features there are of each.
        labels, index: (N,) classes and rows of the training data.
        seed, update: with the row, the key of what is drawn for an image.
    """

    logits: Tensor
    target: Tensor
    student: Seen
    teachers: list[Seen]
    labels: Tensor
    index: Tensor
    seed: int
    update: int

    def gathered(self) -> "Given":
        """The same of the images of all processes, with gradients; without layers, which no term relates."""
        gather = gather_with_gradients
        return Given(
            gather(self.logits),
            gather(self.target),
            Seen(gather(self.student.pooled), {}),
            [Seen(gather(teacher.pooled), {}) for teacher in self.teachers],
            gather(self.labels),
            gather(self.index),
            self.seed,
            self.update,
        )


@dataclass(frozen=True)
class Sides:
    """A student and one teacher, as a term of features sees them.

    Attributes:
        pairs: paths of the layers to compare, the student's and the teacher's, shallow first.
        shapes: (C, H, W) of each pair.
        widths: of the pooled features.
        labels: of all training images.
    """

    pairs: Sequence[tuple[str, str]]
    shapes: Sequence[tuple[Shape, Shape]]
    widths: tuple[int, int]
    labels: Tensor | None


class FeatureTerm(nn.Module):
    """A term on features, with what is trained for it; one for each teacher.

    Args:
        sides: the two networks.
        args: the run's settings.
    """

    def __init__(self, sides: Sides, args: "OfflineDistillationConfig") -> None:
        super().__init__()
        self.pairs, self.args = sides.pairs, args

    def forward(self, given: Given, teacher: int) -> Tensor:
        """The term against the teacher of this number, 0-dim."""
        raise NotImplementedError

    def maps(self, given: Given, teacher: int) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's map of each pair."""
        own, others = given.student.layers, given.teachers[teacher].layers
        return [(own[path], others[path_of_teacher]) for path, path_of_teacher in self.pairs]

    @staticmethod
    def pooled(given: Given, teacher: int) -> tuple[Tensor, Tensor]:
        """What the classifiers read, (N, D) and (N, D')."""
        return given.student.pooled, given.teachers[teacher].pooled


class HintTerm(FeatureTerm):
    """FitNets, trained jointly with the labels as in CRD's benchmark; the paper trains up to the hint first."""

    def __init__(self, sides: Sides, args: "OfflineDistillationConfig") -> None:
        super().__init__(sides, args)
        self.regressors = nn.ModuleList(FeatureRegressor(own[0], other[0]) for own, other in sides.shapes)

    def forward(self, given: Given, teacher: int) -> Tensor:
        pairs = zip(self.regressors, self.maps(given, teacher), strict=True)
        return torch.stack([hint_loss(regress(own), other) for regress, (own, other) in pairs]).sum()


class AttentionTerm(FeatureTerm):
    """Attention transfer: the sum over the pairs of layers, of which one at least has several positions."""

    def __init__(self, sides: Sides, args: "OfflineDistillationConfig") -> None:
        super().__init__(sides, args)
        # At a single position every map is as strong as it can be.
        if all(min(own[1], other[1]) * min(own[2], other[2]) == 1 for own, other in sides.shapes):
            pairs = ", ".join(f"{own} - {other}" for own, other in sides.pairs)
            raise InputError(
                f"loss=attention compares where maps are strong, and {pairs} have a single position: name layers "
                "with more by student_layers and teacher_layers"
            )

    def forward(self, given: Given, teacher: int) -> Tensor:
        return torch.stack([attention_transfer_loss(*pair) for pair in self.maps(given, teacher)]).sum()


class RelationalTerm(FeatureTerm):
    """RKD of the features that the classifier reads."""

    def forward(self, given: Given, teacher: int) -> Tensor:
        features, args = self.pooled(given, teacher), self.args
        distances = args.rkd_distance_weight * relational_distance_loss(*features)
        return distances + args.rkd_angle_weight * relational_angle_loss(*features)


class ContrastiveTerm(FeatureTerm):
    """CRD of the features that the classifier reads, against negatives that are a function of (seed, update, row)."""

    def __init__(self, sides: Sides, args: "OfflineDistillationConfig") -> None:
        super().__init__(sides, args)
        if sides.labels is None:
            raise InputError("train_dataset=None: loss=crd keeps a memory of the training images, so give them")
        try:
            self.memory = ContrastiveMemory(
                *sides.widths,
                sides.labels,
                embedding_size=args.crd_embedding_size,
                temperature=args.crd_temperature,
                momentum=args.crd_momentum,
            )
        except ValueError as error:
            raise InputError(f"loss=crd: {error}; choose data of several classes, or another loss") from error

    def forward(self, given: Given, teacher: int) -> Tensor:
        draws = keyed_uniform(given.seed, given.update, given.index, CONTRAST_STREAM, self.args.crd_negatives)
        negatives = self.memory.negatives(draws, given.labels)
        return self.memory(*self.pooled(given, teacher), given.index, negatives)


class ReviewTerm(FeatureTerm):
    """ReviewKD: the student's maps are fused from deep to shallow, and each is compared at several scales."""

    def __init__(self, sides: Sides, args: "OfflineDistillationConfig") -> None:
        super().__init__(sides, args)
        self.fusion = ReviewFusion([own for own, _ in sides.shapes], [other for _, other in sides.shapes])

    def forward(self, given: Given, teacher: int) -> Tensor:
        own, others = zip(*self.maps(given, teacher), strict=True)
        pairs = zip(self.fusion(own), others, strict=True)
        return torch.stack([hierarchical_context_loss(*pair) for pair in pairs]).sum()


LogitTerm = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
Layers = Literal["middle", "all", "all and pooled"]


@dataclass(frozen=True)
class Kind:
    """A loss by name.

    Attributes:
        weight: that of released code, which `loss_weights` replaces.
        logits: of (logits (N, K), the teachers' joint logits (N, K), labels (N,), settings), for a loss on logits.
        features: for a loss on features.
        layers: the layers that are compared unless settings name others; None: those are none of its business.
        relates: it is no mean over independent images: it compares the images of a batch, or remembers them.
    """

    weight: float = 1.0
    logits: LogitTerm | None = None
    features: type[FeatureTerm] | None = None
    layers: Layers | None = None
    relates: bool = False


LOSSES: dict[str, Kind] = {
    "kd": Kind(logits=lambda z, t, y, args: distillation_kl(z, t, args.temperature)),
    "dkd": Kind(
        logits=lambda z, t, y, args: decoupled_kd(
            z, t, y, args.temperature, args.dkd_target_weight, args.dkd_nontarget_weight
        )
    ),
    "dist": Kind(
        logits=lambda z, t, y, args: correlation_distillation(
            z, t, args.temperature, args.dist_inter_weight, args.dist_intra_weight
        ),
        relates=True,
    ),
    "logit_standardised": Kind(9.0, logits=lambda z, t, y, args: standardised_kd(z, t, args.temperature)),
    "fitnets": Kind(100.0, features=HintTerm, layers="middle"),
    "attention": Kind(1000.0, features=AttentionTerm, layers="all"),
    "rkd": Kind(features=RelationalTerm, relates=True),
    "crd": Kind(0.8, features=ContrastiveTerm, relates=True),
    "review": Kind(features=ReviewTerm, layers="all and pooled"),
}


def build_feature_terms(
    adapters: Sequence[TappedAdapter],
    args: "OfflineDistillationConfig",
    image_sizes: Sequence[int],
    labels: Tensor | None,
) -> dict[str, nn.ModuleList]:
    """By the name of each loss on features its terms, one for each teacher; the adapters then give what they need.

    Args:
        adapters: the student's, then the teachers'.
        args: the run's settings.
        image_sizes: side of the images that each of them sees.
        labels: (M,) of all training images.

    Raises:
        InputError: a layer that does not exist, or does not fit its loss.
    """
    layered = [_Layered(adapter, side) for adapter, side in zip(adapters, image_sizes, strict=True)]
    student, *teachers = layered
    names = [name for name in args.loss if LOSSES[name].features is not None]
    pairs = {name: [_pairs(student, one, LOSSES[name], args) for one in teachers] for name in names}
    own = student.tap([path for of_loss in pairs.values() for of_teacher in of_loss for path, _ in of_teacher])
    terms: dict[str, nn.ModuleList] = {name: nn.ModuleList() for name in names}
    for k, teacher in enumerate(teachers):
        others = teacher.tap([path for of_loss in pairs.values() for _, path in of_loss[k]])
        for name in names:
            compared = pairs[name][k]
            shapes = [(own[path], others[path_of_teacher]) for path, path_of_teacher in compared]
            kind = LOSSES[name].features
            assert kind is not None  # as `names` has been chosen
            terms[name].append(kind(Sides(compared, shapes, (student.width, teacher.width), labels), args))
    return terms


@dataclass(frozen=True)
class _Layered:
    """A network and the size of its images, on which its stages and shapes depend."""

    adapter: TappedAdapter
    image_size: int

    @property
    def width(self) -> int:
        return self.adapter.classifier.in_features

    def path(self, layer: str) -> str:
        return self.adapter.path(layer, self.image_size)

    def stages(self) -> list[str]:
        return self.adapter.stages(self.image_size)

    def tap(self, paths: Sequence[str]) -> dict[str, Shape]:
        return self.adapter.tap_layers(paths, self.image_size)


def _pairs(
    student: _Layered, teacher: _Layered, kind: Kind, args: "OfflineDistillationConfig"
) -> list[tuple[str, str]]:
    """Paths of the layers that a loss compares: those that the settings name, else its own choice among the stages."""
    if kind.layers is None:
        return []
    if args.student_layers:
        named = zip(args.student_layers, args.teacher_layers, strict=True)
        return [(student.path(own), teacher.path(other)) for own, other in named]
    stages, stages_of_teacher = student.stages(), teacher.stages()
    pairs = [(stages[a - 1], stages_of_teacher[b - 1]) for a, b in paired(len(stages), len(stages_of_teacher))]
    if kind.layers == "middle":
        return [pairs[(len(pairs) - 1) // 2]]
    return pairs if kind.layers == "all" else [*pairs, (POOLED, POOLED)]
