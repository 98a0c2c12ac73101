"""`hfkd demo [METHOD]`: from data to card on the embedded digits, offline, in under two minutes on two cores."""

from pathlib import Path

from .methods import METHODS, find_method
from .parser import Parser


def run(argv: list[str]) -> int:
    default = next(iter(METHODS.values())).name
    parser = Parser("demo", __doc__)
    parser.add_argument("method", nargs="?", default=default, help=f"(default: {default})")
    parser.add_argument("--output_dir", type=Path, help="(default: hfkd-demo/METHOD)")
    parser.add_argument("--toy", action="store_true", help="points in a plane instead of digits, as one picture")
    arguments = parser.parse_args(argv)
    method = find_method(arguments.method)
    method.load("toy" if arguments.toy else "demo")(arguments.output_dir or Path("hfkd-demo") / method.name)
    return 0
