"""A teacher's logits for all images of a source, computed once and kept on disk, whole or as the top k classes.

With `top_k` a row holds, of the K logits z of an image, the k largest in float16, their class numbers in uint16, and
R = log sum exp of all others in float32. Logits between -30 and 30 are kept to 0.008 in float16 and to 0.06 in
bfloat16, which is as large: hence float16. Of K classes of which k are known, `gather` gives each other one
z_j = R - log(K - k), an even share of what is left. No other choice assumes less (it has the largest entropy that the
kept numbers allow), and at temperature 1 it leaves each kept class the probability that it had. At T > 1 the others
together get at least what they had, as u^(1/T) is concave: the softened target is a little flatter than the teacher's.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hfkd.errors import InputError

from .row_store import Encode, RowStore, as_numpy, check_unchanging
from .sources import ImageSource


MOST_CLASSES = 2**16  # that uint16 tells apart


class TeacherCache(RowStore):
    """Logits in a folder, mapped into memory and not read into it.

    An image takes 4K bytes (8K for float64 logits), or with top k classes 4k + 4 bytes; of several teachers whose
    logits are kept apart, each takes as much. The file's header and `key.json` add less than 4 KiB to the whole.

    Args:
        folder: as `open_teacher_cache` left it.

    Raises:
        InputError: the folder holds no whole cache.
    """

    setting = "teacher_cache_dir"
    rows_file = "logits.npy"

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._classes = self._output[-1]

    @property
    def top_k(self) -> int | None:
        """How many classes of an image are kept; None where all are."""
        return self._array.dtype["values"].shape[-1] if self._array.dtype.names else None

    def gather(self, index: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Logits (N, ..., K) of the images `index` (N,), in the precision they were computed in.

        `device`: where to; by default where `index` is.
        """
        device = index.device if device is None else device
        rows = self.rows(index)
        if self.top_k is None:
            return torch.from_numpy(rows).view(self._dtype).to(device, non_blocking=True)
        # Sent small, and unfolded there.
        values, classes, rest = (
            torch.from_numpy(np.ascontiguousarray(part)).to(device, non_blocking=True)
            for part in (rows["values"], rows["classes"].astype(np.int32), rows["rest"])
        )
        share = rest.to(self._dtype) - math.log(self._classes - self.top_k)
        logits = share.unsqueeze(-1).expand(*share.shape, self._classes).clone()
        return logits.scatter_(-1, classes.long(), values.to(self._dtype))


def open_teacher_cache(
    folder: Path | str,
    source: ImageSource,
    encode: Encode,
    identity: Mapping[str, str],
    *,
    top_k: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> TeacherCache:
    """The cache in `folder` for these images and teachers; filled first where there is none.

    Args:
        folder, batch_size, workers: as in `RowStore.open`.
        source: without augmentation: what a teacher says of one view is not what it says of another.
        encode: from what a loader of the source yields to logits (N, ..., K).
        identity: what `encode` depends on besides the images, by name: the teachers' weights, the precision.
        top_k: classes of an image to keep, from 1 to K - 1; None: all.

    Raises:
        InputError: an augmented source; a `top_k` out of range, or with logits that float16 cannot hold; else as
            `RowStore.open`.
    """
    check_unchanging(source, TeacherCache.setting)
    return TeacherCache.open(
        folder,
        source,
        encode,
        {**identity, "top_k": str(top_k)},
        pack=as_numpy if top_k is None else partial(_pack, top_k=top_k),
        batch_size=batch_size,
        workers=workers,
    )


def _pack(logits: Tensor, top_k: int) -> np.ndarray:
    """Rows of the `top_k` largest of logits (N, ..., K), their classes, and the log-sum-exp of the rest."""
    classes = logits.shape[-1]
    if not 1 <= top_k < classes <= MOST_CLASSES:
        raise InputError(
            f"teacher_cache_top_k={top_k} of {classes:,} classes: choose 1 to {min(classes, MOST_CLASSES) - 1:,}, "
            f"for at most {MOST_CLASSES:,} classes, or leave it out"
        )
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits  # which NumPy has not
    ordered = wide.sort(dim=-1, descending=True)
    values, rest = ordered.values.split([top_k, classes - top_k], dim=-1)
    if not values.abs().max() <= torch.finfo(torch.float16).max:
        raise InputError(
            f"teacher_cache_top_k={top_k} keeps logits in float16, and one is {values.abs().max():.3g}: leave it out"
        )
    outer = tuple(logits.shape[1:-1])
    kind = np.dtype([("values", "<f2", (*outer, top_k)), ("classes", "<u2", (*outer, top_k)), ("rest", "<f4", outer)])
    rows = np.empty(len(logits), kind)
    rows["values"] = values.numpy()
    rows["classes"] = ordered.indices[..., :top_k].numpy()
    rows["rest"] = rest.logsumexp(dim=-1).numpy()
    return rows
