"""Write one network of a checkpoint that holds several into a .safetensors file of its own.

    python -m dmae_ds.weights.extract last.ckpt state_dict.generator. network.safetensors

ROOT is the text in front of the network's names, entries of the checkpoint included. Nothing in the file is
run.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.new_path import refuse_existing
from dmae_ds.weights.containers import open_container

_ANY = re.compile(r"(?P<root>).")  # joins all entries, and narrows nothing


def extract(path: Path, root: str, out: Path) -> int:
    """Write the tensors whose names begin with `root`, without it; returns their number. Raises UserError."""
    container = open_container(path, anchor=_ANY)
    names = [name for name in container if name.startswith(root)]
    if not names:
        some = ", ".join(list(container)[:3])
        raise UserError(f"'{path}' has no names that begin with '{root}', but for example {some}")
    existing = refuse_existing(out, name="OUT", reads=path)
    if existing:
        raise UserError(existing)
    try:
        replace_tensors(out, {name.removeprefix(root): container[name] for name in names})
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error}); choose another OUT") from None
    return len(names)


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if len(arguments) != 3:
        print("usage: python -m dmae_ds.weights.extract FILE ROOT OUT.safetensors", file=sys.stderr)
        return 2
    path, root, out = arguments
    try:
        num = extract(Path(path), root, Path(out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {num} tensors that stood under {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
