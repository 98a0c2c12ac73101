"""Argument parsers whose complaints are one-line errors."""

import argparse
from typing import NoReturn

from hfkd.errors import InputError


class OneLineErrors(argparse.ArgumentParser):
    """Raises `InputError` where argparse prints a usage text and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the options).")
