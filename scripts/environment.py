"""`hfkd env`: versions and hardware, to be pasted into a bug report."""

from hfkd.hub.hardware import environment_report

from .parser import Parser


def run(argv: list[str]) -> int:
    Parser("env", __doc__).parse_args(argv)
    report = environment_report()
    width = max(map(len, report)) + 2
    for name, value in report.items():
        print(f"{name:<{width}}{value}")
    return 0
