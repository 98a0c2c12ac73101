"""Which parameters of a classifier the stationarity condition is asked of, and on which the force must vanish."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from hfkd.errors import InputError
from hfkd.models.scaling_exponents import ScalingExponents, solve_exponents


if TYPE_CHECKING:
    from .generator_from_classifier import GeneratorFromClassifierConfig


_EQUAL = 1e-6  # of exponents, which are solutions of linear programs


def choose_sets(
    classifier: PreTrainedModel, pixels: Tensor, args: "GeneratorFromClassifierConfig"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parameters in S, and of those in Z: outside S, and growing slower than all of S.

    Z is empty where `zero_weight` is 0. The scaling exponents, which not every network has, are solved for only where
    a set is told by them.

    Args:
        classifier: whose parameters they are.
        pixels: images that it takes, for the solver.
        args: `stationarity_set`, `custom_set` and `zero_weight` of a run.

    Raises:
        InputError: no exponents, or a pattern that no parameter has.
    """
    names = tuple(name for name, _ in classifier.named_parameters())
    if args.stationarity_set == "all":
        return names, ()
    if args.stationarity_set == "custom":
        chosen = _matching(args.custom_set, names)
        return chosen, _slower(solve_exponents(classifier, pixels), chosen) if args.zero_weight else ()
    exponents = solve_exponents(classifier, pixels)
    if args.stationarity_set == "core":
        chosen = tuple(exponents.core)
    elif args.stationarity_set == "last":
        layer = exponents.core[-1].rpartition(".")[0]
        chosen = tuple(name for name in exponents.core if name.rpartition(".")[0] == layer)
    else:
        needed = _with_effect(exponents)
        fastest = max(needed.values()) - _EQUAL
        chosen = tuple(name for name, value in needed.items() if value >= fastest)
    return chosen, _slower(exponents, chosen) if args.zero_weight else ()


def _with_effect(exponents: ScalingExponents) -> dict[str, float]:
    return {name: value for name, value in exponents.exponents.items() if name not in exponents.free}


def _slower(exponents: ScalingExponents, chosen: Sequence[str]) -> tuple[str, ...]:
    slowest = min(exponents.exponents[name] for name in chosen) - _EQUAL
    return tuple(name for name, value in _with_effect(exponents).items() if value < slowest)


def _matching(patterns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"custom_set: no parameter of the classifier is named {pattern!r}: the first ones are "
                f"{', '.join(names[:4])}"
            )
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
