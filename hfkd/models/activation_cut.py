"""Running a linearised network in two parts: once below theta_2, where nothing is trained, and many times above."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hfkd.errors import InputError
from hfkd.models.adapter import PROBE_SIZE
from hfkd.models.modeling_gradient_features import GradientFeaturesOutput, HfkdGradientFeaturesModel
from hfkd.models.probing import image_errors, probe_pixels, undisturbed


TOLERANCE = 1e-4  # of the largest feature
IRRELEVANT_SETTINGS = ("transformers_version", "_name_or_path", "id2label", "label2id", "problem_type", "dtype")


class ActivationCut:
    """Splits f(x) and J(x) w2 at the first block of theta_2 (paper, section 3.3: pre-computed activations).

    The cut is the innermost module around the first layer of theta_2 that gets everything from below as its first
    positional argument: the layer itself in a plain chain, the whole block where a shortcut goes around the layer. It
    is found by one forward pass and checked by another, with other weights and images.

    Make it when the backbone has its device and precision; move one, and make another. It holds for all images that
    the backbone takes and for any values of the weights.

    Args:
        backbone: of `build_gradient_features(...)`, in any mode.

    Attributes:
        boundary: name of the module in the base network.

    Raises:
        InputError: nothing lies below theta_2, or data goes around its blocks; the gradient branch has a base of its
            own.
    """

    def __init__(self, backbone: HfkdGradientFeaturesModel) -> None:
        if backbone.gradient_base is not None:
            raise InputError(
                "the gradient branch has a base of its own, so there are two activations to keep: "
                "build the model without gradient_base, or leave the cut out"
            )
        self.backbone = backbone
        self._base = backbone.linearised_base
        self._pixels = probe_pixels(backbone, backbone.config.image_size or PROBE_SIZE, backbone.config.num_channels)
        with undisturbed(backbone), image_errors(backbone, self._pixels):
            first = self._first_layer()
            for name in _with_ancestors(first):
                self.boundary = name
                self._outputs = self._run_below()
                if self._outputs and self._holds():
                    return
        raise InputError(
            f"theta2 begins in {first!r}, and nothing lies below it that reaches it and the layers above it as one "
            "tensor: choose whole blocks further up as theta2, or leave the cut out"
        )

    def below(self, pixel_values: Tensor) -> Tensor:
        """z_0 (N, ...), what enters theta_2's first block, of `pixel_values` (N, C, H, W); without gradients."""
        block = self._base.get_submodule(self.boundary)
        hook = block.register_forward_pre_hook(_leave)
        try:
            with torch.no_grad():
                self._base(pixel_values=pixel_values, return_dict=True)
        except _Reached as reached:
            return reached.activations
        finally:
            hook.remove()
        raise RuntimeError(f"{self.boundary} was not called")

    def above(self, activations: Tensor) -> GradientFeaturesOutput:
        """What the backbone gives for the images of which `activations` is the z_0 (N, ...)."""
        with self._entering(activations):
            return self.backbone(self._pixels, return_dict=True)

    def features_above(self, activations: Tensor) -> Tensor:
        """f(x) (N, d) alone, without its tangent."""
        with self._entering(activations):
            return self.backbone.features(self._pixels)

    def identity(self) -> dict[str, str]:
        """What z_0 depends on besides the images, each part with a text that is equal only for equal parts."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._base.state_dict().items()):
            if name not in self.backbone.config.theta2:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        settings = self.backbone.config.base_config.to_dict()
        kept = {key: value for key, value in settings.items() if key not in IRRELEVANT_SETTINGS}
        return {
            "weights below theta2": digest.hexdigest(),
            "base configuration": json.dumps(kept, sort_keys=True, default=str),
            "boundary": self.boundary,
        }

    # -- finding the boundary --------------------------------------------------------------------------------------

    def _first_layer(self) -> str:
        """Name of the module that is called first among those with parameters in theta_2."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.backbone.config.theta2)
        called: list[str] = []
        with ExitStack() as stack:
            for name in filter(None, owners):
                module = self._base.get_submodule(name)
                hook = module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
                stack.callback(hook.remove)
            self._base(pixel_values=self._pixels, return_dict=True)
        if not called:
            raise InputError("theta2 has no layer that is called as a module, so the network cannot be cut there")
        return called[0]

    def _run_below(self) -> dict[nn.Module, Any]:
        """Outputs of the outermost modules that end before the boundary begins and are not called again."""
        boundary = self._base.get_submodule(self.boundary)
        outputs: dict[nn.Module, Any] = {}
        begun = False

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal begun
            begun |= module is boundary
            outputs.pop(module, None)

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not begun:
                for inner in module.modules():
                    outputs.pop(inner, None)
                outputs[module] = output

        with ExitStack() as stack:
            for module in self._base.modules():
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
            self._base(pixel_values=self._pixels, return_dict=True)
        return outputs

    @contextmanager
    def _entering(self, activations: Tensor) -> Iterator[None]:
        """Modules below return what they gave for the probe image, and `activations` enter at the boundary."""
        with ExitStack() as stack:
            for module, output in self._outputs.items():
                stack.enter_context(_returning(module, output))
            block = self._base.get_submodule(self.boundary)
            hook = block.register_forward_pre_hook(lambda module, args: (activations, *args[1:]))
            stack.callback(hook.remove)
            yield

    def _holds(self) -> bool:
        """Whether features of other images, with other values of theta_2, are a function of z_0 alone."""
        generator = torch.Generator().manual_seed(1)

        def noise(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(shape or like.shape, generator=generator).to(like)

        theta2 = {n: p + 0.1 * (p.abs().mean() + 0.1) * noise(p) for n, p in self.backbone.theta2().items()}
        images = noise(self._pixels, 3, *self._pixels.shape[1:])
        expected = self.backbone.features_at(theta2, images)
        # In a network of random weights all images look much alike: where gradients flow tells more than values.
        seen = tree_leaves([self._pixels, *self._outputs.values()])
        others = [tensor for tensor in seen if torch.is_tensor(tensor) and tensor.is_floating_point()]
        try:
            activations = self.below(images)
            with self._entering(activations), torch.enable_grad():
                for tensor in (activations, *others):
                    tensor.requires_grad_(True)
                features = self.backbone.features_at(theta2, self._pixels)
                own, *leaks = torch.autograd.grad(features.sum(), [activations, *others], allow_unused=True)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False  # shapes of the probe image met those of the others, or no tensor came in
        finally:
            for tensor in others:
                tensor.requires_grad_(False)
        close = (features - expected).abs().max() <= TOLERANCE * expected.abs().max()
        return own is not None and all(leak is None for leak in leaks) and bool(close)


class _Reached(Exception):
    """Carries z_0 out of a forward pass."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__("the boundary was reached")
        self.activations = activations


def _leave(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"{type(module).__name__} gets no tensor as its first positional argument")
    raise _Reached(args[0])


def _with_ancestors(name: str) -> list[str]:
    """`a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let `module` return `output` whatever it is called with."""
    own = {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        module.__dict__.update(own)
