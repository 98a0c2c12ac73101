"""Training-only layers of feature distillation: FitNets' regressor, CRD's memory, ReviewKD's fusion.

None of them is part of a student.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.losses.feature_distillation import contrastive_loss
from hfkd.models.feature_discriminator import Shape


class FeatureRegressor(nn.Sequential):
    """Conv1x1 and batch norm, (N, C, H, W) to (N, C', H, W): brings a student's map to its teacher's width.

    No activation follows, so that a teacher's map of either sign can be met (inferred: FitNets' regressor has the
    kernel that the sizes of the maps ask for, and that of CRD's benchmark ends in a ReLU).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


class ContrastiveMemory(nn.Module):
    """CRD: embeds both networks' features on a sphere and contrasts them with a memory of all training images.

    Tian et al., ICLR 2020 (arXiv 1910.10699), section 3, with the normalisation of the public code: similarities are
    e^(a.b / T) / Z, where Z is estimated on the first batch and kept. The memory holds an embedding of every image by
    each network; it follows with a momentum. Everything that changes is a buffer, and so part of a checkpoint.

    Args:
        student_size, teacher_size: widths of the features.
        labels: (M,) class numbers of all training images, by row. Negatives are images of other classes.
        embedding_size: width of the embeddings.
        temperature: T > 0.
        momentum: of the memory, in [0, 1].

    Raises:
        ValueError: all images are of one class.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    log_normalisers: Tensor
    started: Tensor
    by_class: Tensor
    class_starts: Tensor
    class_sizes: Tensor

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        labels: Tensor,
        *,
        embedding_size: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = labels.bincount()
        if int(sizes.max()) == len(labels):
            raise ValueError(f"all {len(labels)} images are of one class: there is nothing to contrast them with")
        self.temperature, self.momentum = temperature, momentum
        self.embed_student = nn.Linear(student_size, embedding_size)
        self.embed_teacher = nn.Linear(teacher_size, embedding_size)
        bound = math.sqrt(3 / embedding_size)  # rows of length about 1
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(len(labels), embedding_size).uniform_(-bound, bound))
        self.register_buffer("log_normalisers", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # Of the data, not of the run: they are in no checkpoint.
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("class_sizes", sizes, persistent=False)

    def negatives(self, draws: Tensor, labels: Tensor) -> Tensor:
        """Rows of images of other classes, int64 (N, k), drawn with replacement.

        Args:
            draws: (N, k), uniform in [0, 1).
            labels: (N,) classes to stay away from.
        """
        start, size = self.class_starts[labels, None], self.class_sizes[labels, None]
        place = (draws * (len(self.by_class) - size)).long()
        return self.by_class[place + size * (place >= start)]

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The loss, from either side as the anchor; in training the memory then takes the batch in.

        Args:
            student, teacher: (N, D) and (N, D'); no gradient reaches the teacher, one reaches its embedding.
            index: (N,) rows of the images.
            negatives: (N, k) rows to contrast each with.
        """
        own = F.normalize(self.embed_student(student), dim=1)
        others = F.normalize(self.embed_teacher(teacher.detach()), dim=1)
        rows = torch.cat([index[:, None], negatives], dim=1)
        pairs = ((own, self.memory_teacher), (others, self.memory_student))
        # All similarities, then those that are wanted: gathering the rows of the memory would take 1 GB per batch.
        scores = torch.stack([(a @ memory.T).gather(1, rows) / self.temperature for a, memory in pairs])
        mean = scores.detach().flatten(1).logsumexp(dim=1) - math.log(rows.numel())
        normalisers = self.log_normalisers.where(self.started, mean + math.log(len(self.by_class)))
        if self.training:
            self._remember(index, own.detach(), others.detach(), normalisers)
        losses = (scores - normalisers[:, None, None]).unbind()
        return contrastive_loss(losses[0], len(self.by_class)) + contrastive_loss(losses[1], len(self.by_class))

    def _remember(self, index: Tensor, own: Tensor, others: Tensor, normalisers: Tensor) -> None:
        # New tensors: the graph of this batch still holds the old ones.
        self.memory_student = self._moved(self.memory_student, index, own)
        self.memory_teacher = self._moved(self.memory_teacher, index, others)
        self.log_normalisers, self.started = normalisers, torch.ones_like(self.started)

    def _moved(self, memory: Tensor, index: Tensor, embeddings: Tensor) -> Tensor:
        rows = torch.lerp(embeddings, memory[index], self.momentum)
        return memory.index_copy(0, index, F.normalize(rows, dim=1))


class AttentionFusion(nn.Module):
    """ABF: a student's map, mixed by attention with what deeper maps left, gives one like the teacher's (ReviewKD).

    Chen et al., CVPR 2021 (arXiv 2104.09044), section 3.3; layers and initialisation are the released code's.

    Args:
        channels: of the student's map.
        width: of the maps that are handed on.
        out_channels: of the teacher's map.
        fuses: False for the deepest map, which nothing was left for.
    """

    def __init__(self, channels: int, width: int, out_channels: int, *, fuses: bool) -> None:
        super().__init__()
        reduce = nn.Conv2d(channels, width, 1, bias=False)
        expand = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(width))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(out_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, feature_map: Tensor, left: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A map like the teacher's, (N, C_t, *size), and what the next shallower one is left, (N, width, *size)."""
        mixed = self.reduce(feature_map)
        if self.attention is not None:
            assert left is not None
            left = F.interpolate(left, mixed.shape[2:])
            weights = self.attention(torch.cat([mixed, left], dim=1))
            mixed = mixed * weights[:, :1] + left * weights[:, 1:]
        mixed = F.interpolate(mixed, tuple(size))
        return self.expand(mixed), mixed


class ReviewFusion(nn.Module):
    """The student's maps, fused from deep to shallow into one for each map of the teacher (ReviewKD, section 3.2).

    Args:
        shapes: (C, H, W) of the student's maps, shallow first.
        teacher_shapes: of the teacher's, as many.
        largest_width: of the maps that are handed on, else the deepest map's (released code: 512).
    """

    def __init__(self, shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], largest_width: int = 512) -> None:
        super().__init__()
        width = min(largest_width, shapes[-1][0])
        self.sizes = [shape[1:] for shape in teacher_shapes]
        self.fusions = nn.ModuleList(
            AttentionFusion(own[0], width, teacher[0], fuses=depth + 1 < len(shapes))
            for depth, (own, teacher) in enumerate(zip(shapes, teacher_shapes, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the teacher's shapes, shallow first, from the student's."""
        fused: list[Tensor] = []
        left = None
        for fusion, own, size in zip(self.fusions[::-1], maps[::-1], self.sizes[::-1], strict=True):
            out, left = fusion(own, left, size)
            fused.insert(0, out)
        return fused
