"""Several image classifiers as branches of one network: they share all layers below the last stage."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.models.adapter import PROBE_SIZE, ClassifierAdapter, ClassifierFeatures
from hfkd.models.probing import probe_pixels, undisturbed


MEND = "choose shared_trunk=False, which keeps whole networks"


class BranchFeatures(list[ClassifierFeatures]):
    """Features of each branch, and `trunk`, the map (N, C, H, W) or, of an MLP, (N, C) that all of them read."""

    def __init__(self, features: Sequence[ClassifierFeatures], trunk: Tensor) -> None:
        super().__init__(features)
        self.trunk = trunk


class SharedTrunk:
    """Ties the networks below their last stage to the first one's, and runs that trunk once for all of them.

    The very modules are shared, so that a network stays whole: it trains, moves, saves and loads as before, and its
    plain forward pass gives what its branch gives. A branch is the last stage with all that follows it.

    It works for networks whose stages are the one module list `stages` of their base model, and whose head reads the
    output of the last stage (through a module `tail`, if there is one): the classifiers of this package, and of
    transformers ResNet and ConvNeXt. Whether that holds is tried out.

    Args:
        adapters: of networks that are alike below their last stage; all but the first are changed in place.

    Attributes:
        channels: C of the trunk's map.

    Raises:
        InputError: networks that have no such stages, or are not alike below the last. They are left as they were.
    """

    def __init__(self, adapters: Sequence[ClassifierAdapter]) -> None:
        self.adapters = list(adapters)
        self._branches = [_Branch(adapter) for adapter in adapters]
        models = [adapter.model for adapter in adapters]
        _check_alike(models)
        own = [(parent, name, parent.get_submodule(name)) for m in models[1:] for parent, name in _below(m)]
        for model in models[1:]:
            for (parent, name), (first, _) in zip(_below(model), _below(models[0]), strict=True):
                parent.register_module(name, first.get_submodule(name))
        try:
            self.channels = self._try_out()
        except InputError:
            for parent, name, module in own:
                parent.register_module(name, module)
            raise

    def __call__(self, pixel_values: Tensor) -> BranchFeatures:
        """Features of `pixel_values` (N, C, H, W) by one pass through the trunk and one through each branch."""
        maps: list[Tensor] = []
        hook = self._branches[0].stage.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
        try:
            first = self.adapters[0](pixel_values)
        finally:
            hook.remove()
        return BranchFeatures([first, *(branch(maps[0]) for branch in self._branches[1:])], maps[0])

    def _try_out(self) -> int:
        """Channels of the map, where every branch gives the logits of its network's plain forward pass."""
        model = self.adapters[0].model
        size = getattr(model.config, "image_size", None) or PROBE_SIZE
        pixels = probe_pixels(model, size, getattr(model.config, "num_channels", 3))
        with undisturbed(nn.ModuleList(adapter.model for adapter in self.adapters)):
            try:
                shared = self(pixels)
                # The first network's, too, whose own pass ran the trunk.
                logits = [self._branches[0](shared.trunk).logits, *(branch.logits for branch in shared[1:])]
            except RuntimeError as error:  # a last stage that is called otherwise, or a map of another shape
                raise _refusal(model, "its last stage and its head do not run by themselves") from error
            for adapter, own in zip(self.adapters, logits, strict=True):
                plain = adapter(pixels).logits
                tolerance = math.sqrt(torch.finfo(plain.dtype).eps) * plain.abs().max()
                if not (own - plain).abs().max() <= tolerance:
                    raise _refusal(adapter.model, "its head does not read the output of its last stage")
        return shared.trunk.shape[1]


class _Branch:
    """From the trunk's map to the features of one network: the last stage, the tail if there is one, the head."""

    def __init__(self, adapter: ClassifierAdapter) -> None:
        self.adapter = adapter
        backbone = adapter.model.base_model
        self.stage = backbone.get_submodule(_last_stage(adapter.model))
        self.tail = getattr(backbone, "tail", None) or nn.Identity()

    def __call__(self, trunk: Tensor) -> ClassifierFeatures:
        pooled: list[Tensor] = []
        feature_map = self.tail(self.stage(trunk))
        hook = self.adapter.classifier.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
        try:
            logits = self.adapter.head(feature_map)
        finally:
            hook.remove()
        return ClassifierFeatures(feature_map, pooled[0], logits)


def _last_stage(model: PreTrainedModel) -> str:
    """The name of the last stage in the base model."""
    found = [
        f"{name}.{len(module) - 1}"
        for name, module in model.base_model.named_modules()
        if name.rpartition(".")[2] == "stages" and isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if len(found) != 1:
        raise _refusal(model, "its base model has not one list of two or more stages")
    return found[0]


def _below(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Each module before the last stage, as its parent and its name there."""
    parent: nn.Module = model.base_model
    for step in _last_stage(model).split("."):
        for name, _ in parent.named_children():
            if name == step:
                break
            yield parent, name
        parent = parent.get_submodule(step)


def _check_alike(models: Sequence[PreTrainedModel]) -> None:
    trunks = [[repr(parent.get_submodule(name)) for parent, name in _below(model)] for model in models]
    for k, model in enumerate(models):
        if type(model) is not type(models[0]) or trunks[k] != trunks[0]:
            raise InputError(
                f"students 0 and {k} are not of one architecture below the last stage, and a trunk cannot be shared: "
                f"give students of one architecture, or {MEND}"
            )


def _refusal(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(f"{type(model).__name__} has no trunk to be shared ({reason}): {MEND}")
