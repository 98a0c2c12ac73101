"""How students compare with the teachers they come from: what was kept, and what it costs to use them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hfkd.data import ImageSource, Preprocessing
from hfkd.errors import InputError
from hfkd.models.probing import undisturbed

from .calibration import expected_calibration_error
from .cohort import accuracy
from .compute_cost import forward_flops, forward_seconds, parameter_count
from .inference import outputs_over


THROUGHPUT_BATCH = 64
ROUNDS = 7


@dataclass(frozen=True)
class NetworkReport:
    """One network.

    Attributes:
        accuracy: in [0, 1].
        calibration_error: expected calibration error in 15 bins, in [0, 1].
        parameters: how many.
        flops: floating-point operations of one image, two for each multiply-add, see `forward_flops`.
        latency_s: median seconds of a forward pass of one image.
        images_per_second: median throughput in batches of 64.
    """

    accuracy: float
    calibration_error: float
    parameters: int
    flops: int
    latency_s: float
    images_per_second: float


@dataclass(frozen=True)
class TeacherReport:
    """Students and teachers on the same images and on the same machine.

    Attributes:
        split: name of the images' split.
        images: how many there were.
        students, teachers: in their order.
        agreement: of each student with each teacher, the share of images in which their first choices agree.
    """

    split: str
    images: int
    students: tuple[NetworkReport, ...]
    teachers: tuple[NetworkReport, ...]
    agreement: tuple[tuple[float, ...], ...]

    def save(self, path: Path | str) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def teacher_report(
    students: Sequence[nn.Module],
    teachers: Sequence[nn.Module],
    source: ImageSource,
    *,
    batch_size: int = 256,
    rounds: int = ROUNDS,
) -> TeacherReport:
    """Measure students and teachers on all images of `source`, unaugmented; times are taken in turn in one run.

    Networks run as they are called here: under autocast, for one, where the call stands under it.

    Args:
        students, teachers: from pixel values (N, C, H, W) as `source` makes them to an output with `logits` (N, K),
            all on one device; a teacher of other statistics re-normalises by itself.
        source: with one label for each image.
        batch_size: images that accuracy is measured on at a time.
        rounds: that each time is the median of.

    Raises:
        InputError: no student or no teacher, or images without labels or with several.
    """
    if not students or not teachers:
        raise InputError(f"{len(students)} student(s) and {len(teachers)} teacher(s): pass one or more of each")
    if source.labels is None or source.columns.multi_label:
        found = "no labels" if source.labels is None else "several labels"
        raise InputError(f"the {source.name} images have {found}: choose images with one label each")
    parameter = next(students[0].parameters())
    pixel_values = _noise(source.preprocessing).to(parameter)
    networks = {f"student {k}": one for k, one in enumerate(students)}
    networks |= {f"teacher {k}": one for k, one in enumerate(teachers)}
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(undisturbed(network))
        logits = _logits_over(networks, source, parameter, batch_size)
        reports = _reports(networks, logits, source.labels, pixel_values, rounds)
    choices = {name: one.argmax(dim=-1) for name, one in logits.items()}
    return TeacherReport(
        split=source.name,
        images=len(source),
        students=tuple(reports[f"student {k}"] for k in range(len(students))),
        teachers=tuple(reports[f"teacher {k}"] for k in range(len(teachers))),
        agreement=tuple(
            tuple(_share(choices[f"student {k}"] == choices[f"teacher {j}"]) for j in range(len(teachers)))
            for k in range(len(students))
        ),
    )


def _logits_over(
    networks: Mapping[str, nn.Module], source: ImageSource, parameter: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """(N, K) of each network, which takes images of the device and precision of `parameter`; they are read once."""

    def together(pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(parameter)
        return torch.stack([network(pixel_values).logits.float() for network in networks.values()], dim=1)

    logits, _ = outputs_over(source, together, parameter.device, batch_size)
    return dict(zip(networks, logits.unbind(dim=1), strict=True))


def _reports(
    networks: Mapping[str, nn.Module], logits: Mapping[str, Tensor], labels: Tensor, pixel_values: Tensor, rounds: int
) -> dict[str, NetworkReport]:
    one = forward_seconds(networks, pixel_values[:1], rounds)
    many = forward_seconds(networks, pixel_values, rounds)
    return {
        name: NetworkReport(
            accuracy=accuracy(logits[name], labels),
            calibration_error=expected_calibration_error(logits[name], labels),
            parameters=parameter_count(network),
            flops=forward_flops(network, pixel_values[:1]),
            latency_s=one[name],
            images_per_second=len(pixel_values) / many[name],
        )
        for name, network in networks.items()
    }


def _noise(preprocessing: Preprocessing) -> Tensor:
    """A batch of noise (64, C, H, W): times do not depend on what images show."""
    side = preprocessing.image_size
    shape = (THROUGHPUT_BATCH, preprocessing.num_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _share(agreed: Tensor) -> float:
    return agreed.double().mean().item()
