"""Running a network over all images of a source, in order."""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hfkd.data import Augmentation, ImageSource, KeyedSampler, collate


@torch.no_grad()
def outputs_over(
    source: ImageSource,
    function: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int = 256,
    most: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`function(pixel_values)` of every image of `source`, unaugmented and in stored order.

    `most` is the number of images to run over where there are more: always the same ones, drawn at random.

    `function` maps (B, C, H, W) on `device` to (B, ...). Returns its outputs (N, ...) as float32 and the labels (N,),
    or (N, L) multi-hot, or None where the source has none; both on the CPU.
    """
    source = source.variant(augmentation=Augmentation(), views=1)
    drawn = most is not None and most < len(source)
    order = list(islice(KeyedSampler(len(source), shuffle=drawn), most if drawn else None))
    loader = DataLoader(source, batch_size=batch_size, sampler=order, collate_fn=collate)
    outputs, labels = [], []
    for keys in loader:
        batch = source.materialise(keys, device=device)
        outputs.append(function(batch["pixel_values"]).float().cpu())
        if "labels" in batch:
            labels.append(batch["labels"].cpu())
    return torch.cat(outputs), torch.cat(labels) if labels else None
