"""The arguments of a verb."""
import argparse

from lib.errors import InputError


class Arguments(argparse.ArgumentParser):
    """The arguments of a verb, whose mistakes are InputErrors."""

    def __init__(self, verb: str, text: str):
        super().__init__(prog=f"python train.py {verb}", description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{self.prog.split()[-1]}: {message}; --help shows what is allowed")
