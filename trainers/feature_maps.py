"""AFD's half on feature maps: the transfer layers T_k, the discriminators D_k, and the losses that they serve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hfkd.errors import InputError
from hfkd.evaluation.similarity import discriminator_accuracy
from hfkd.losses.online_adversarial import alignment_loss, discriminator_loss, generator_loss, undecided_score
from hfkd.models.feature_discriminator import FeatureDiscriminator, Shape, TransferLayer, common_map_shape
from hfkd.models.probing import undisturbed


if TYPE_CHECKING:
    from .online_adversarial import OnlineAdversarialConfig


class FeatureMapTeaching(nn.Module):
    """What a cohort teaches each other through feature maps; training-only.

    Args:
        shapes: (C_k, H_k, W_k) of every network's map, those of frozen teachers last.
        sources: for each learner k, the index of the network that it learns from.
        args: the run's settings.

    Raises:
        InputError: a discriminator that cannot take maps of this size.
    """

    def __init__(self, shapes: Sequence[Shape], sources: Sequence[int], args: "OnlineAdversarialConfig") -> None:
        super().__init__()
        self.sources, self.args = list(sources), args
        count = len(sources)
        # A frozen teacher's map is taken as it is: nobody would train its transfer layer.
        channels, height, width = common_map_shape(shapes[count:] or shapes, args.transfer_channels)
        self.transfer = nn.ModuleList(
            TransferLayer(
                shape[0],
                channels,
                (height, width),
                activation=args.transfer_activation,
                always=args.transfer_always and k < count,
            )
            for k, shape in enumerate(shapes)
        )
        self.discriminators = nn.ModuleList(
            FeatureDiscriminator(
                channels,
                (height, width),
                hidden_channels=args.discriminator_channels,
                num_layers=args.discriminator_layers,
                norm=args.discriminator_norm,
                spectral_norm=args.discriminator_spectral_norm,
                patch=args.discriminator_patch,
                sigmoid=args.gan_loss == "lsgan_sigmoid",
            )
            for _ in range(count if args.feature_loss == "adversarial" else 0)
        )
        for discriminator in self.discriminators[:1]:
            _check_discriminator(discriminator, (channels, height, width), args)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """f_k = T_k(F_k) of all networks, of one shape (N, C*, H, W)."""
        return [layer(feature_map) for layer, feature_map in zip(self.transfer, feature_maps, strict=True)]

    def extractor_losses(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """L_G^k = (1 - D_k(f_k))^2 (paper, eq. 14), or the distance to f_prev(k), for each learner."""
        if self.discriminators:
            return [
                generator_loss(self._scores(k, maps[source].detach(), maps[k], fake_only=True)[1], self.args.gan_loss)
                for k, source in enumerate(self.sources)
            ]
        power = 1 if self.args.feature_loss == "l1" else 2
        maps = [full_precision(f) for f in maps]
        return [
            alignment_loss(maps[k], maps[source], power, self.args.feature_normalize)
            for k, source in enumerate(self.sources)
        ]

    def discriminator_losses(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """L_D^k = (1 - D_k(f_prev(k)))^2 + D_k(f_k)^2 (paper, eq. 14), on detached maps; and what to log of it."""
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for k, source in enumerate(self.sources):
            real, fake = self._scores(k, maps[source].detach(), maps[k].detach())
            losses.append(discriminator_loss(real, fake, self.args.gan_loss))
            judged = discriminator_accuracy(real, fake, undecided_score(self.args.gan_loss))
            parts |= {f"discriminator_{k}_loss": losses[-1], f"discriminator_{k}_accuracy": judged["accuracy"]}
        return losses, parts

    def judge(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """How right each D_k is about each image: `discriminator_<k>` (N,), in [0, 1]; NaN where N is 1."""
        if len(maps[0]) == 1:  # batch norm cannot judge a single map
            unknown = torch.full((1,), torch.nan, device=maps[0].device)
            return {f"discriminator_{k}": unknown for k in range(len(self.discriminators))}
        undecided = undecided_score(self.args.gan_loss)
        judged = {}
        for k, source in enumerate(self.sources[: len(self.discriminators)]):
            real, fake = self._scores(k, maps[source], maps[k])
            right = torch.stack([real > undecided, fake < undecided], dim=1).flatten(1)
            judged[f"discriminator_{k}"] = right.float().mean(dim=1)
        return judged

    def _scores(self, k: int, real: Tensor, fake: Tensor, fake_only: bool = False) -> tuple[Tensor, Tensor]:
        """D_k of the maps it learns from and of its own, in one pass or two: batch norm tells the difference."""
        discriminator = self.discriminators[k]
        if self.args.discriminator_batch == "joint":
            scores = discriminator(torch.cat([real, fake]))
            return scores[: len(real)], scores[len(real) :]
        own = discriminator(fake)
        return (own if fake_only else discriminator(real)), own


def _check_discriminator(discriminator: nn.Module, shape: Shape, args: "OnlineAdversarialConfig") -> None:
    try:
        with undisturbed(discriminator):
            discriminator(torch.zeros(2, *shape))
    except ValueError as error:  # instance norm of a single position
        raise InputError(
            f"discriminator_norm={args.discriminator_norm} cannot take maps of {shape[1]}x{shape[2]}, of which "
            f"discriminator_layers={args.discriminator_layers} leave one position: choose batch, none or fewer layers"
        ) from error


def full_precision(tensor: Tensor) -> Tensor:
    """At least float32: losses are not taken in the half precision of autocast."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
