"""What a number was measured on: machine and versions, for model cards, result tables and `hfkd env`."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path


PACKAGES = ("hfkd", "torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors", "numpy")


def environment_report() -> dict[str, str]:
    """Machine and versions as short texts: cpu, cores, memory, gpu, os, python, and one entry per package.

    What cannot be found out is "unknown", and "none" stands for no GPU and for packages that are not installed.
    """
    report = {
        "cpu": _cpu_model(),
        "cores": str(_cores()),
        "memory": _memory(),
        "gpu": _gpu(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return report | {name: _version(name) for name in PACKAGES}


def hardware_line(report: Mapping[str, str]) -> str:
    """The machine in a few words, as the `hardware` column of result tables has it."""
    cpu = f"{report['cpu']} ({report['cores']} cores, {report['memory']})"
    return cpu if report["gpu"] == "none" else f"{report['gpu']}; {cpu}"


def versions_line(report: Mapping[str, str]) -> str:
    """The versions in a few words, as the `versions` column of result tables has them."""
    return ", ".join(f"{name} {report[name]}" for name in ("python", *PACKAGES) if report[name] != "none")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # Containers are often given fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{size / 2**30:.0f} GiB"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
