"""The parser of both programs' command lines: a mistake is one line, without the usage."""

from __future__ import annotations

import argparse
from typing import Callable, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, whose errors say what is wrong and where the usage is."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]
        self.exit(2, f"{program}: error: {message}; see {self.prog} --help\n")


def in_list(kind: Callable[[str], object]) -> Callable[[str], object]:
    """Return a type for an option with several values, which takes every word up to the next option."""

    def parse(word: str) -> object:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{word}' is none of its values; a list ends at the next option, so write '{word}' in front "
                "of it"
            ) from None

    return parse
