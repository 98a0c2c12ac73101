"""What a study measures of each run's student, beside the run's own test metrics: probes of `hfkd evaluate`."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hfkd.data import DataArguments
from hfkd.errors import InputError

from .evaluate import EvaluateArguments
from .methods import Method
from .options import build, check_values
from .probes import ProbeArguments
from .suggest import nearest


# By protocol, how its metrics begin: a method may have a `knn_accuracy` of its own.
PROBES = {"knn": "knn_probe", "linear-probe": "linear_probe"}
_SET_BY_STUDY = ("protocol", "output", "output_dir", "revision", "dataset_name")

Protocols = dict[str, dict[str, Any]]  # protocol -> options of `hfkd evaluate`


def read_protocols(names: Sequence[str], settings: Mapping[str, Any], source: str) -> Protocols:
    """Each protocol with those of the settings that it looks at.

    Args:
        names: keys of `PROBES`.
        settings: options of `hfkd evaluate`; those named `knn_...` and `probe...` are of one protocol, all others of
            both.
        source: what an error names.

    Raises:
        InputError: an unknown protocol, or an option that is unknown, out of range or of no protocol here.
    """
    for name in names:
        if name not in PROBES:
            raise InputError(
                f"{source}: protocols: {name!r} is unknown{nearest(name, PROBES)}: choose of {', '.join(PROBES)}."
            )
    source = f"{source}: protocol_settings"
    for name in _SET_BY_STUDY:
        if name in settings:
            raise InputError(f"{source}: {name} is set by the study itself; leave it out.")
    kinds = [EvaluateArguments, ProbeArguments, DataArguments]
    checked = check_values(dict(settings), kinds, source)
    for option in checked:
        if (owner := _owner(option)) not in (None, *names) or not names:
            raise InputError(
                f"{source}: {option} is for protocol {owner or 'knn or linear-probe'}: add it to protocols."
            )
    protocols: Protocols = {}
    for name in names:
        options = {option: value for option, value in checked.items() if _owner(option) in (None, name)}
        try:
            _, of_probe, _ = build(kinds, options)
            of_probe.refuse_unused({item.name for item in fields(ProbeArguments)} & options.keys(), name)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        protocols[name] = options
    return protocols


def check_can_be_probed(method: Method, settings: Mapping[str, Any], protocols: Protocols, source: str) -> None:
    """Raise InputError unless probes can read what the method leaves, and their data options agree with the run's."""
    if protocols and method.leaves_generator:
        raise InputError(f"{source}: method {method.name} leaves a generator, which protocols cannot probe.")
    for name, options in protocols.items():
        try:
            build([DataArguments], {**settings, **options})
        except InputError as error:
            raise InputError(f"{source}, protocol {name}: {error}") from error


def metrics_of(protocol: str, found: Mapping[str, float]) -> dict[str, float]:
    """The metrics of `hfkd evaluate` as a study calls them.

    Of one student `knn_probe_accuracy` or `linear_probe_accuracy` (and, of `probe: sgd`, the best epoch's
    `linear_probe_best_accuracy`); of several `student_<k>_linear_probe_accuracy`.
    """
    owners = {name: re.sub(r"^(student_\d+_).*", r"\1", name) for name in found}
    several = len(set(owners.values())) > 1
    return {
        f"{owners[name] if several else ''}{PROBES[protocol]}_{name.removeprefix(owners[name])}": value
        for name, value in found.items()
    }


def is_measured(protocol: str, metrics: Collection[str]) -> bool:
    """Whether the protocol's accuracy is among the metrics of a run."""
    return any(metric.endswith(f"{PROBES[protocol]}_accuracy") for metric in metrics)


def _owner(option: str) -> str | None:
    """The one protocol that looks at an option; None where both do."""
    if option.startswith("knn_"):
        return "knn"
    return "linear-probe" if option.startswith("probe") else None
