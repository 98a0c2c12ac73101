"""The networks of a run in one module: students, training-only modules, and frozen teachers."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.data import Preprocessing
from hfkd.errors import InputError
from hfkd.hub.remote_code import cohort_folders


class FrozenTeacher(nn.Module):
    """A teacher: in no optimizer, pinned to `eval()` also under `.train()`, and always run without gradients.

    It re-normalises its input where its statistics differ from the student's, the most common silent error of
    distillation code.

    Args:
        model: any model.
        renormalize: maps the students' pixel values to the teacher's, see `teacher_input`; None where they agree.
    """

    def __init__(self, model: nn.Module, renormalize: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.renormalize = renormalize or nn.Identity()
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def fingerprint(self) -> str:
        """See `state_fingerprint`."""
        return state_fingerprint(self)

    # Not inference_mode: its tensors could not enter a trainable layer.
    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return self.model(self.renormalize(pixel_values), **kwargs)


class Renormalize(nn.Module):
    """From pixel values normalised with one mean and standard deviation to those of another.

    Args:
        mean, std: per channel, of the values that come in.
        new_mean, new_std: per channel, of the values that go out.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], new_mean: Sequence[float], new_std: Sequence[float]
    ) -> None:
        super().__init__()
        old_mean, old_std, mean_, std_ = (
            torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1) for x in (mean, std, new_mean, new_std)
        )
        self.register_buffer("scale", (old_std / std_).float())
        self.register_buffer("shift", ((old_mean - mean_) / std_).float())

    @classmethod
    def for_teacher(cls, students: Preprocessing, processor: Any) -> "Renormalize | None":
        """From the students' statistics to those of a teacher's processor; None where they agree or it is None."""
        if processor is None:
            return None
        teachers = Preprocessing.from_image_processor(processor, students.image_size, students.num_channels)
        if (students.mean, students.std) == (teachers.mean, teachers.std):
            return None
        return cls(students.mean, students.std, teachers.mean, teachers.std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values * self.scale.to(pixel_values.dtype) + self.shift.to(pixel_values.dtype)


class Resize(nn.Module):
    """Bilinear interpolation (averaging where it makes smaller) of pixel values (N, C, H, W) to (N, C, side, side)."""

    side: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.size = (side, side)
        self.register_buffer("side", torch.tensor(side))  # part of a fingerprint

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.interpolate(pixel_values, self.size, mode="bilinear", antialias=True)


def teacher_input(students: Preprocessing, processor: Any, image_size: int | None = None) -> nn.Module | None:
    """From the students' pixel values to those of a teacher with this processor; None where they agree.

    Statistics are the processor's, where there is one; the size is changed to `image_size` and never unasked.
    """
    renormalize = Renormalize.for_teacher(students, processor)
    if image_size is None or image_size == students.image_size:
        return renormalize
    return nn.Sequential(*([] if renormalize is None else [renormalize]), Resize(image_size))


def processor_of_each(teachers: Sequence[nn.Module], given: Sequence[Any]) -> list[Any]:
    """The image processors in the order of the teachers, None for those that come after the last one given.

    Raises:
        InputError: no list, or more processors than teachers.
    """
    if not isinstance(given, Sequence):
        raise InputError(f"teacher_processing_classes={type(given).__name__}: pass a list, one for each teacher")
    if len(given) > len(teachers):
        raise InputError(f"{len(given)} image processors for {len(teachers)} teacher(s): pass one for each, or None")
    return [*given, *[None] * (len(teachers) - len(given))]


class TrainingNetworks(nn.Module):
    """What Trainer moves, trains and calls "the model".

    Args:
        students: the networks to be saved, student 0 first.
        training_only: modules beside the students, never in them: discriminators, transfer layers, projectors.
        teachers: frozen networks; never saved.
        folders: where in a checkpoint each student lies, the first at its root (""); by default as in a cohort.
    """

    students: nn.ModuleList

    def __init__(
        self,
        students: Sequence[PreTrainedModel],
        training_only: Mapping[str, nn.Module] | None = None,
        teachers: Sequence[nn.Module] = (),
        folders: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.folders = list(folders) if folders is not None else cohort_folders(len(students))
        self.students = nn.ModuleList(students)
        self.training_only = nn.ModuleDict(dict(training_only or {}))
        self.teachers = nn.ModuleList(teachers)

    def frozen(self) -> list[FrozenTeacher]:
        return [teacher for teacher in self.teachers if isinstance(teacher, FrozenTeacher)]

    # Trainer reads these two of its model.
    accepts_loss_kwargs = False

    @property
    def config(self) -> Any:
        """A copy of student 0's: Trainer writes text-generation settings into its model's."""
        return copy.deepcopy(self.students[0].config)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Student 0's forward: what the run's model predicts."""
        return self.students[0](pixel_values, **kwargs)


def state_fingerprint(module: nn.Module) -> str:
    """sha256 of all parameters and buffers of a module, with their names."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm in train mode normalises by the batch but leaves its running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
