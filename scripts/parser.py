"""Argument parsers whose complaints are one-line errors."""

import argparse
from typing import NoReturn

from hfkd.errors import InputError


class OneLineErrors:
    """For a parser to inherit from first: raises `InputError` where argparse prints a usage text and exits."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the options).")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """A parser for one subcommand; options are not to be abbreviated."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"hfkd {command}", description=description, allow_abbrev=False)
