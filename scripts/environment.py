"""`hfkd env`: versions and hardware, to be pasted into a bug report."""

from hfkd.hub.hardware import environment_report

from .parser import OneLineErrors


def run(argv: list[str]) -> int:
    OneLineErrors(prog="hfkd env", description=__doc__, allow_abbrev=False).parse_args(argv)
    report = environment_report()
    width = max(map(len, report)) + 2
    for name, value in report.items():
        print(f"{name:<{width}}{value}")
    return 0
