import os
import platform

import torch

from hfkd.hub.hardware import PACKAGES, environment_report, hardware_line, versions_line


def test_the_report_names_machine_and_versions() -> None:
    report = environment_report()
    assert report["torch"] == torch.__version__ and report["python"] == platform.python_version()
    assert {"cpu", "cores", "memory", "gpu", "os", *PACKAGES} <= set(report)
    assert 1 <= int(report["cores"]) <= (os.cpu_count() or 1)
    assert (report["gpu"] == "none") is not torch.cuda.is_available()
    assert all(isinstance(value, str) and value for value in report.values())


def test_lines_for_tables() -> None:
    report = environment_report() | {"cpu": "EPYC", "cores": "2", "memory": "8 GiB", "gpu": "none", "hfkd": "0.1.0"}
    assert hardware_line(report) == "EPYC (2 cores, 8 GiB)"
    assert hardware_line(report | {"gpu": "1 x H200"}) == "1 x H200; EPYC (2 cores, 8 GiB)"
    assert "hfkd 0.1.0" in versions_line(report) and "accelerate" not in versions_line(report | {"accelerate": "none"})
