"""From a network to the linear equations of its scaling exponents, by tracing one forward pass.

A network f is quasi-homogeneous (Kunin et al., arXiv 2210.03820) where exponents lambda >= 0, one for each parameter
tensor, make every logit scale alike: f(psi_a(theta); x) = e^a f(theta; x), psi_a(theta)_i = e^(a lambda_i) theta_i.
Every tensor t of the forward pass then scales as e^(a d_t), and its degree d_t is a sum of exponents. Generator Born
from Classifier (arXiv 2312.02470) solves linear equations that the network's properties give; the rules below, one for
each kind of layer, are ours.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from hfkd.errors import InputError
from hfkd.models.probing import one_line, undisturbed


Degree = Counter[str]  # of a tensor: the parameters whose exponents it sums, each as often as it counts


@dataclass(frozen=True)
class Equation:
    """left - right = constant; `place` says in words where the network asks for it."""

    left: Degree
    right: Degree
    place: str
    constant: float = 0.0


@dataclass(frozen=True)
class Flow:
    """The image reaches tensor `target` through tensor `source`, unless one of the factors `gates` is zero."""

    source: str
    target: str
    gates: frozenset[str]


@dataclass(frozen=True)
class ScalingGraph:
    """What the scaling exponents of a network have to satisfy.

    Attributes:
        shapes: of each parameter tensor, in the model's order.
        equations: which degrees have to be equal.
        flows: how the image reaches the logits, in the order of computation.
        statistics: the degree of each running mean and variance.
        without_effect: parameters that the logits do not depend on: those that the forward pass leaves out, and biases
            directly before a batch norm, which takes them away again when it uses batch statistics.
        image, logits: the first and the last tensor of `flows`.
    """

    shapes: Mapping[str, torch.Size]
    equations: Sequence[Equation]
    flows: Sequence[Flow]
    statistics: Mapping[str, Degree]
    without_effect: frozenset[str]
    image: str
    logits: str

    @property
    def multiplicative(self) -> frozenset[str]:
        """Parameters that the activations are multiplied by: weights, and scales of norms, but no biases."""
        return frozenset().union(*(flow.gates for flow in self.flows))

    def reaches(self, dropped: Collection[str] = ()) -> bool:
        """Whether the logits still depend on the image with the parameters `dropped` at zero."""
        reached = {self.image}
        for flow in self.flows:
            if flow.source in reached and flow.gates.isdisjoint(dropped):
                reached.add(flow.target)
        return self.logits in reached


def trace_scaling(model: nn.Module, pixel_values: Tensor) -> ScalingGraph:
    """The equations of `model`, seen in one forward pass of `pixel_values` (N, ...) in evaluation mode.

    The model gives its logits as a tensor or as the field `logits` of its output. Nothing in it is changed.

    Raises:
        InputError: the model gives no logits, branches on the values of its input, or has a layer without a rule; the
            message names the module.
    """
    classifier = _Logits(model)
    with undisturbed(classifier):
        try:
            program = torch.export.export(classifier, (pixel_values,), strict=False)
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            shape = "x".join(map(str, pixel_values.shape))
            raise InputError(
                f"{type(model).__name__} cannot be traced on input of shape {shape}: {one_line(error)[:200]}: give "
                "images of the size it takes, and no forward pass that branches on values"
            ) from error
    # Tied parameters have several names: equations use the one that `named_parameters` gives.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    signature = program.graph_signature
    parameters = {
        node: names[id(classifier.get_parameter(name))] for node, name in signature.inputs_to_parameters.items()
    }
    buffers = {node: _own_name(name) for node, name in signature.inputs_to_buffers.items()}
    reader = _Reader(type(model).__name__, parameters, buffers, signature.user_inputs[0])
    for node in program.graph.nodes:
        reader.read(node)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return ScalingGraph(
        shapes=shapes,
        equations=reader.equations,
        flows=reader.flows,
        statistics=reader.statistics,
        without_effect=frozenset(reader.cancelled | (shapes.keys() - reader.used)),
        image=reader.image,
        logits=signature.user_outputs[0],
    )


class _Logits(nn.Module):
    """A classifier of any output type as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        output = self.model(pixel_values)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise InputError(f"{type(self.model).__name__} gives no logits: give an image classifier")
        return logits


def _own_name(name: str) -> str:
    """A name inside `_Logits` as the model itself has it."""
    return name.removeprefix("model").removeprefix(".")


@dataclass(frozen=True)
class _Value:
    """A tensor of the forward pass: its degree, and whether it depends on the image."""

    degree: Degree
    of_image: bool = False


CONSTANT = _Value(Counter())


@dataclass
class _Reader:
    """Reads the operations of a traced forward pass in their order and collects what they ask for."""

    model: str
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    image: str
    values: dict[Node, _Value] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    statistics: dict[str, Degree] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)

    def read(self, node: Node) -> None:
        if node.op == "output":
            (logits,) = tree_leaves(node.args)
            self.equations.append(Equation(self.degree(logits), Counter(), "the logits, of degree 1,", 1.0))
        elif node.op == "call_function":
            self.values[node] = self._result(node)
        elif node.name in self.parameters:
            name = self.parameters[node.name]
            self.values[node] = _Value(Counter([name]))
            self.used.update([name] if node.users else [])
        else:
            self.values[node] = _Value(Counter(), of_image=node.name == self.image)

    def _result(self, node: Node) -> _Value:
        sources = node.all_input_nodes
        degree: Degree = Counter()
        gates: frozenset[str] = frozenset()
        # Whatever is computed from tensors that psi leaves as they are stays as it is too.
        if any(self.values[source].degree for source in sources):
            rule = _RULES.get(_operation(node))
            if rule is None:
                raise self.refusal(node)
            degree, gates = rule(self, node)
        images = [source for source in sources if self.values[source].of_image]
        self.flows.extend(Flow(source.name, node.name, gates) for source in images)
        return _Value(degree, of_image=bool(images))

    def value(self, argument: object) -> _Value:
        return self.values[argument] if isinstance(argument, Node) else CONSTANT

    def degree(self, argument: object) -> Degree:
        return self.value(argument).degree

    def equate(self, left: Degree, right: Degree, node: Node) -> None:
        if left != right:
            self.equations.append(Equation(left, right, f"{_operation(node)} in {self.place(node)}"))

    def place(self, node: Node) -> str:
        """The module that an operation belongs to, by path and type."""
        modules = [*(node.meta.get("nn_module_stack") or {}).values()] or [("model", self.model)]
        path, kind = modules[-1]
        path = _own_name(path.split("@")[0])  # a module's second call is noted as path@1
        kind = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
        return f"module {path!r} ({kind})" if path else f"the forward pass of {self.model}"

    def refusal(self, node: Node, detail: str = "") -> InputError:
        return InputError(
            f"{self.place(node)}: {_operation(node)}{detail} has no scaling rule: use linear or convolutional layers, "
            "batch or group norm, the ReLU family, pooling, reshaping, concatenation or sums"
        )


def _operation(node: Node) -> str:
    operation: Any = node.target
    return str(getattr(operation, "overloadpacket", operation).__name__)


_Rule = Callable[[_Reader, Node], tuple[Degree, frozenset[str]]]
_NO_GATES: frozenset[str] = frozenset()


def _positively_homogeneous(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    return reader.degree(node.args[0]), _NO_GATES


def _clamp(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    lower, upper = (*node.args[1:], None, None)[:2]
    if (lower, upper) not in ((0, None), (None, 0)):
        raise reader.refusal(node, f" to [{lower}, {upper}]")
    return reader.degree(node.args[0]), _NO_GATES


def _pad(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    if mode == "constant" and value:
        raise reader.refusal(node, f" with {value}")
    return reader.degree(node.args[0]), _NO_GATES


def _prelu(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    reader.equate(reader.degree(node.args[1]), Counter(), node)
    return reader.degree(node.args[0]), _NO_GATES


def _sum(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    operands: Any = node.args[0] if isinstance(node.args[0], list | tuple) else node.args[:2]
    # Python's own `sum` starts at 0.
    first, *others = [operand for operand in operands if isinstance(operand, Node) or operand != 0]
    for other in others:
        reader.equate(reader.degree(other), reader.degree(first), node)
    return reader.degree(first), _NO_GATES


def _product(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    return _multiply(reader, node, tree_leaves(node.args))


def _quotient(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    numerator, denominator = node.args
    if reader.value(denominator) != CONSTANT or node.kwargs:
        raise reader.refusal(node, " by what is no constant")
    return reader.degree(numerator), _NO_GATES


def _affine(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    """W x + b: lambda_W + d_x, which lambda_b has to equal."""
    degree, gates = _multiply(reader, node, node.args[:2])
    bias = (*node.args, None)[2]
    if bias is not None:
        reader.equate(reader.degree(bias), degree, node)
    return degree, gates


def _multiply(reader: _Reader, node: Node, factors: Sequence[object]) -> tuple[Degree, frozenset[str]]:
    values = [reader.value(factor) for factor in factors]
    if sum(value.of_image for value in values) > 1:
        raise reader.refusal(node, " of two activations")
    degree: Degree = sum((value.degree for value in values), Counter())
    return degree, frozenset().union(*(value.degree for value in values if not value.of_image))


def _batch_norm(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    """g (x - mean) / sqrt(var) + c: the scale of x is removed, if the running statistics scale with it."""
    source, scale, shift, *statistics = node.args[:5]
    assert isinstance(source, Node)
    entering = reader.degree(source)
    # Of x, the mean scales as x does, the variance as its square.
    for statistic, degree in zip(statistics, (entering, entering + entering), strict=True):
        if isinstance(statistic, Node):
            name = reader.buffers[statistic.name]
            reader.equate(reader.statistics.setdefault(name, degree), degree, node)
    bias = (*source.args, None, None)[2]
    if _RULES.get(_operation(source)) is _affine and isinstance(bias, Node):
        only_here = len(source.users) == len(bias.users) == 1
        reader.cancelled.update(reader.degree(bias) if only_here else ())
    return _norm(reader, node, scale, shift)


def _group_norm(reader: _Reader, node: Node) -> tuple[Degree, frozenset[str]]:
    scale, shift = (*node.args[2:], None, None)[:2]
    return _norm(reader, node, scale, shift)


def _norm(reader: _Reader, node: Node, scale: object, shift: object) -> tuple[Degree, frozenset[str]]:
    degree = reader.degree(scale)
    if shift is not None:
        reader.equate(reader.degree(shift), degree, node)
    return degree, frozenset(degree)


_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)]
_POSITIVELY_HOMOGENEOUS = [
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg", "dropout", "dropout_", "feature_dropout"),
    *(*_POOLS, "mean", "sum", "amax", "amin"),
    *("flatten", "view", "reshape", "permute", "transpose", "t", "movedim", "squeeze", "unsqueeze", "expand"),
    *("unflatten", "repeat", "flip", "roll", "pixel_shuffle", "pixel_unshuffle"),
    *("contiguous", "clone", "detach", "alias", "to"),
    *("select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind", operator.getitem.__name__),
]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_POSITIVELY_HOMOGENEOUS, _positively_homogeneous),
    **dict.fromkeys(("clamp", "clamp_", "clamp_min", "clamp_min_"), _clamp),
    "pad": _pad,
    "prelu": _prelu,
    **dict.fromkeys(("add", "add_", "sub", "rsub", "cat", "stack", "maximum", "minimum"), _sum),
    **dict.fromkeys(("mul", "matmul", "mm", "bmm", "einsum"), _product),
    "div": _quotient,
    **dict.fromkeys(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))), _affine),
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
}
