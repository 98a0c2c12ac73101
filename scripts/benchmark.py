"""`hfkd benchmark METHOD`: the method's speed as ratios inside one run, so that machines can be compared."""

from pathlib import Path

from .methods import METHODS, find_method
from .parser import Parser
from .timing import append_measured


def run(argv: list[str]) -> int:
    names = ", ".join(method.name for method in METHODS.values() if method.benchmark)
    parser = Parser("benchmark", __doc__)
    parser.add_argument("method", help=f"one of {names}")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that are measured (default: 20)")
    parser.add_argument("--output", type=Path, help="CSV file to append the rows to")
    arguments = parser.parse_args(argv)
    method = find_method(arguments.method)
    rows = method.load("benchmark")(arguments.repeats)
    for row in rows:
        print(row.describe())
    if arguments.output is not None:
        append_measured(arguments.output, method.name, rows, arguments.repeats)
        print(f"appended to {arguments.output}")
    return 0
