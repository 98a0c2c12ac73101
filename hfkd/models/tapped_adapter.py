"""A classifier's features with the outputs of chosen layers, which are named by stage or by module path."""

import difflib
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hfkd.errors import InputError
from hfkd.models.adapter import ClassifierAdapter, ClassifierFeatures, Tap, find_blocks
from hfkd.models.feature_discriminator import Shape
from hfkd.models.probing import ImageSize, image_errors, undisturbed


POOLED = "pooled"


class TappedFeatures(ClassifierFeatures):
    """With `layers`: by the name of each tapped layer its output, (N, C, H, W)."""

    layers: Mapping[str, Tensor]


class TappedAdapter(ClassifierAdapter):
    """A `ClassifierAdapter` that also gives the outputs of layers, see `tap_layers`; hooks live for one call only.

    Tokens (N, T, C) are laid out as a map of the patches, vectors (N, C) as maps of one position.

    Args, errors: as in `ClassifierAdapter`.
    """

    def __init__(self, model: PreTrainedModel, tap: Tap = "post_activation") -> None:
        super().__init__(model, tap)
        self._tapped: dict[str, nn.Module] = {}
        self._pooled_tapped = False

    def __call__(self, pixel_values: Tensor) -> TappedFeatures:
        seen, features = self._run_watched(self._tapped, pixel_values)
        tapped = TappedFeatures(*features)
        layers = {name: self._laid_out(name, output, pixel_values) for name, output in seen.items()}
        tapped.layers = layers | ({POOLED: features.pooled[:, :, None, None]} if self._pooled_tapped else {})
        return tapped

    def stages(self, image_size: ImageSize) -> list[str]:
        """The module path of each stage's last block: the blocks whose maps are of one shape are a stage.

        Of a transformer, whose blocks all give the same tokens, each block is a stage.
        """
        blocks = dict(find_blocks(self.model))
        pixels = self._probe_pixels(image_size)
        with undisturbed(self.model), image_errors(self.model, pixels):
            seen, _ = self._run_watched(blocks, pixels)
        ends: list[str] = []
        before: tuple[int, ...] | None = None
        for name, output in seen.items():
            if ends and output.ndim == 4 and output.shape[1:] == before:
                ends[-1] = name
            else:
                ends.append(name)
            before = tuple(output.shape[1:])
        return ends

    def path(self, layer: str, image_size: ImageSize) -> str:
        """The module path that `layer` means: a stage's number (1 the first, -1 the last), a path, or `pooled`.

        Raises:
            InputError: there is no such stage or module; the nearest name is suggested.
        """
        if layer == POOLED:
            return layer
        if re.fullmatch(r"-?\d+", layer):
            stages, number = self.stages(image_size), int(layer)
            if number == 0 or abs(number) > len(stages):
                raise InputError(
                    f"layer {layer}: {type(self.model).__name__} has {len(stages)} stages: use 1 to {len(stages)}, or "
                    "-1 for the last"
                )
            return stages[number - (number > 0)]
        known = [name for name, _ in self.model.named_modules() if name]
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"layer {layer!r} is no module of {type(self.model).__name__} (nearest: {near!r}): give a path of "
                f"named_modules(), the number of a stage, or {POOLED}"
            )
        return layer

    def tap_layers(self, paths: Iterable[str], image_size: ImageSize) -> dict[str, Shape]:
        """Have all calls from now on give the outputs of these modules, or `pooled`, too.

        Returns:
            Their shapes (C, H, W), by path.

        Raises:
            InputError: a module that a forward pass does not reach, or whose output is neither map, tokens nor vector.
        """
        modules, paths = dict(self.model.named_modules()), list(dict.fromkeys(paths))
        self._tapped = {path: modules[path] for path in paths if path != POOLED}
        self._pooled_tapped = POOLED in paths
        pixels = self._probe_pixels(image_size)
        with undisturbed(self.model), image_errors(self.model, pixels):
            layers = self(pixels).layers
        if missed := self._tapped.keys() - layers.keys():
            raise InputError(
                f"layer {min(missed)!r} of {type(self.model).__name__} takes no part in a forward pass, or returns no "
                "tensor: name another"
            )
        return {path: (layers[path].shape[1], layers[path].shape[2], layers[path].shape[3]) for path in paths}

    def _run_watched(
        self, modules: Mapping[str, nn.Module], pixel_values: Tensor
    ) -> tuple[dict[str, Tensor], ClassifierFeatures]:
        """The (first) output tensor of each module, in the order of execution, and the features."""
        seen: dict[str, Tensor] = {}

        def keeping(name: str) -> Any:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple | list | ModelOutput) and len(output) else output
                if isinstance(first, Tensor):
                    seen[name] = first

            return keep

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(keeping(name)).remove)
            features = super().__call__(pixel_values)
        return seen, features

    def _laid_out(self, name: str, output: Tensor, pixel_values: Tensor) -> Tensor:
        if output.ndim == 2:
            return output[:, :, None, None]
        if output.ndim not in (3, 4):
            raise InputError(
                f"layer {name!r} gives {tuple(output.shape)}: a map (N, C, H, W), tokens (N, T, C) or a vector (N, C) "
                "is needed"
            )
        return self._as_map(output, pixel_values)


def paired(stages: int, teacher_stages: int) -> list[tuple[int, int]]:
    """Pairs of stage numbers, from 1, as many as the one with fewer has, evenly spread over the other; last with last.

    Three stages and a transformer of twelve blocks give (1, 4), (2, 8), (3, 12).
    """
    count = min(stages, teacher_stages)
    return [(-(-k * stages // count), -(-k * teacher_stages // count)) for k in range(1, count + 1)]
