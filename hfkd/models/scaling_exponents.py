"""Scaling exponents of a quasi-homogeneous network: solved for, explained, and applied.

Generator Born from Classifier (arXiv 2312.02470) asks that the classifier satisfies the maximum-margin conditions of
quasi-homogeneous networks (Kunin et al., arXiv 2210.03820), for which it needs these exponents. It finds them from
linear equations that the network's properties give. Such a system has many solutions: the rule that chooses among them
here, and the core set, are ours.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from hfkd.errors import InputError
from hfkd.models.scaling_graph import Equation, ScalingGraph, trace_scaling


TOLERANCE = 1e-7  # that of the linear programs; exponents this close are equal
ROLES = {
    "core": "the highest exponent whose tensors data cannot be classified without: stationarity ties them to the data",
    "zero-force": "a smaller exponent: the margins exert no force on it",
    "above": "a larger exponent, but the network can do without it: no condition",
    "free": "without effect on the logits (unused, or a bias directly before a batch norm): no condition",
}


Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ScalingExponents:
    """Exponents lambda with f(psi_a(theta); x) = e^a f(theta; x), psi_a(theta)_i = e^(a lambda_i) theta_i.

    Attributes:
        exponents: lambda of every parameter tensor, in the model's order.
        statistics: exponents of the running means and variances of batch norms, which have to scale along.
        shapes: of the parameter tensors.
        core, zero_force, above, free: names of the parameters in each role of `ROLES`; every one has one.
    """

    exponents: Mapping[str, float]
    statistics: Mapping[str, float]
    shapes: Mapping[str, torch.Size]
    core: tuple[str, ...]
    zero_force: tuple[str, ...]
    above: tuple[str, ...]
    free: tuple[str, ...]

    def explain(self) -> str:
        """A table with the name, shape, exponent and role of every parameter tensor, and what the roles mean."""
        members = (self.core, self.zero_force, self.above, self.free)
        roles = {name: role for role, names in zip(ROLES, members, strict=True) for name in names}
        rows = [("tensor", "shape", "lambda", "role")]
        for name, exponent in self.exponents.items():
            shape = "x".join(map(str, self.shapes[name])) or "scalar"
            rows.append((name, shape, _as_fraction(exponent), roles[name]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        legend = [f"{role}: {meaning}" for role, meaning in ROLES.items() if role in roles.values()]
        return "\n".join([*map(str.rstrip, lines), "", *legend])


def solve_exponents(
    model: nn.Module, pixel_values: Tensor, pinned: Mapping[str, float] | None = None
) -> ScalingExponents:
    """The scaling exponents of a classifier that is built of the layers that `scaling_graph` has rules for.

    Where the equations leave a choice, ours is the leximin over weights and scales of norms: the largest exponent is
    made as small as it can be, then the second largest, and so on. Gradient flow lets tensors that a rescaling
    symmetry links grow at equal rates, which is what this gives for a chain of layers. Biases follow from the weights.

    The core set is found from the top: the tensors of the highest exponent are set to zero, then those of the next
    one too, until the logits no longer depend on the image. The level that did it is the first at which margins force
    the norm to stay above zero ("conditional separability" in Kunin et al.), so the first at which minimising the norm
    under margin constraints is well posed. What lies above it, such as the last layer's bias, is not needed and does
    not enter: they conjecture that such parameters are driven out.

    Args:
        model: a classifier with logits; it is traced in evaluation mode, and nothing in it is changed.
        pixel_values: images (N, ...) that it takes. Their values do not matter, and one will do, unless a norm takes
            its statistics from them.
        pinned: exponents to hold at given values, by parameter name.

    Raises:
        InputError: a layer without a rule, equations that contradict one another (both name the module), logits that
            do not depend on the image, or an unknown name in `pinned`.
    """
    graph = trace_scaling(model, pixel_values)
    if not graph.reaches():
        raise InputError(f"the logits of {type(model).__name__} do not depend on the image: give an image classifier")
    equations = [*graph.equations]
    for name, value in (pinned or {}).items():
        if name not in graph.shapes:
            raise InputError(f"pinned exponent of {name!r}: {type(model).__name__} has no such parameter")
        equations.append(Equation(Counter([name]), Counter(), f"the pinned exponent of {name!r}", value))
    names = [*graph.shapes]
    solution = _leximin(names, equations, graph.multiplicative)
    if solution is None:
        places = _contradiction(names, equations)
        raise InputError(
            f"{type(model).__name__} has no scaling exponents, as these contradict one another: {'; '.join(places)}: "
            "give each branch that is summed or concatenated weights or a norm of its own"
        )
    exponents = dict(zip(names, solution, strict=True))
    statistics = {
        name: math.fsum(exponents[parameter] for parameter in degree.elements())
        for name, degree in graph.statistics.items()
    }
    level = _core_level(graph, exponents)
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    for name, exponent in exponents.items():
        above, same = exponent > level + TOLERANCE, abs(exponent - level) <= TOLERANCE
        role = "core" if same else "above" if above else "zero-force"
        roles["free" if name in graph.without_effect else role].append(name)
    return ScalingExponents(exponents, statistics, graph.shapes, *(tuple(role) for role in roles.values()))


@torch.no_grad()
def rescale(model: Model, exponents: ScalingExponents, a: float) -> Model:
    """psi_a: a copy of `model` whose logits are e^a times those of `model`.

    Exact up to rounding but for norms, whose `eps` is left as it is: there it is exact where that is zero.

    Raises:
        InputError: `exponents` are those of another model.
    """
    scaled = copy.deepcopy(model)
    parameters = dict(scaled.named_parameters())
    if parameters.keys() != exponents.exponents.keys():
        odd = sorted(parameters.keys() ^ exponents.exponents.keys())[0]
        raise InputError(f"exponents of another model than this {type(model).__name__}: they differ in {odd!r}")
    buffers = dict(scaled.named_buffers())
    for name, exponent in exponents.exponents.items():
        parameters[name].mul_(math.exp(a * exponent))
    for name, exponent in exponents.statistics.items():
        buffers[name].mul_(math.exp(a * exponent))
    return scaled


def _as_fraction(exponent: float) -> str:
    """`1/3` where the exponent is a fraction of small numbers, else its decimals."""
    fraction = Fraction(exponent).limit_denominator(1000)
    return str(fraction) if abs(fraction - exponent) < TOLERANCE else f"{exponent:.6f}"


def _core_level(graph: ScalingGraph, exponents: Mapping[str, float]) -> float:
    """The highest exponent such that the logits ignore the image with all parameters from it upwards at zero."""
    for level in sorted(set(exponents.values()), reverse=True):
        if not graph.reaches({name for name, exponent in exponents.items() if exponent > level - TOLERANCE}):
            return level
    raise AssertionError("logits of degree 1 that depend on the image pass a factor of positive exponent")


def _system(names: Sequence[str], equations: Sequence[Equation]) -> tuple[np.ndarray, np.ndarray]:
    """A (E, P) and b (E,) of the equations A lambda = b over the P named parameters."""
    columns = {name: column for column, name in enumerate(names)}
    matrix = np.zeros((len(equations), len(names)))
    for row, equation in enumerate(equations):
        for sign, degree in ((1, equation.left), (-1, equation.right)):
            for name, count in degree.items():
                matrix[row, columns[name]] += sign * count
    return matrix, np.array([equation.constant for equation in equations])


def _minimise(cost: np.ndarray, **constraints: Any) -> Any:
    """The solution of a linear program, or None where it has none."""
    result = linprog(cost, method="highs", **constraints)
    if result.status == 2:
        return None
    if not result.success:
        raise RuntimeError(f"linear program of the scaling exponents: {result.message}")
    return result


def _leximin(names: Sequence[str], equations: Sequence[Equation], among: frozenset[str]) -> list[float] | None:
    """The exponents, or None where there are none: leximin over `among`, and then the least sum of the others.

    One linear program for each level: minimise t with lambda_i <= t for those not yet settled. A positive multiplier
    of lambda_i <= t means that lambda_i = t in every solution (complementary slackness), which settles it.
    """
    matrix, constants = _system(names, equations)
    size = len(names)
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * size
    unsettled = [column for column, name in enumerate(names) if name in among]
    while unsettled:
        below = np.zeros((len(unsettled), size + 1))
        below[range(len(unsettled)), unsettled] = 1
        below[:, -1] = -1
        solved = _minimise(
            np.eye(size + 1)[-1],
            A_ub=below,
            b_ub=np.zeros(len(unsettled)),
            A_eq=np.hstack([matrix, np.zeros((len(matrix), 1))]),
            b_eq=constants,
            bounds=[*bounds, (0.0, None)],
        )
        if solved is None:
            return None
        level = solved.x[-1]
        multipliers = -solved.ineqlin.marginals
        # At level 0 all that is left is 0.
        settled = [
            column
            for column, weight in zip(unsettled, multipliers, strict=True)
            if level <= TOLERANCE or weight > TOLERANCE
        ]
        for column in settled:
            bounds[column] = (level, level)
        unsettled = [column for column in unsettled if column not in settled]
    solved = _minimise(np.ones(size), A_eq=matrix, b_eq=constants, bounds=bounds)
    return None if solved is None else [float(value) for value in solved.x]


def _contradiction(names: Sequence[str], equations: Sequence[Equation]) -> list[str]:
    """The places of equations that cannot hold together, though any one fewer of them can."""
    needed = list(equations)
    for equation in equations:
        fewer = [other for other in needed if other is not equation]
        matrix, constants = _system(names, fewer)
        if _minimise(np.zeros(len(names)), A_eq=matrix, b_eq=constants, bounds=(0, None)) is None:
            needed = fewer
    return list(dict.fromkeys(equation.place for equation in needed))
