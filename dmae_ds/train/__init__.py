"""Training: preflight (no torch) -> run (wiring) -> loop, on the DeepSpeed engine.

`dmae_ds.train(recipe)` trains a recipe in Python, as `dmae-ds train` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from dmae_ds.output.callable_room import make_callable


def train(
    recipe: str | Path,
    overrides: Mapping[str, object] | Iterable[str] = (),
    *,
    resume: str = "auto",
) -> Path:
    """Train a recipe to its end, as one rank in a process of its own; returns the run folder.

    recipe: the path of a YAML file, or the name of a shipped recipe (`dmae-ds recipes`)
    overrides: {"optim.epochs": 10}, or words such as "optim.epochs=10"
    resume: auto continues from the newest checkpoint, and does nothing in a finished run; never begins
    Raises UserError for a mistake in the recipe, RunFailed where the run breaks, Requeue after Ctrl-C, once
    the step is finished and saved. Several ranks need a launcher: see launch/README.md.
    """
    from dmae_ds.config.load import load_config, override_words
    from dmae_ds.distributed.world import World
    from dmae_ds.output.lines import say
    from dmae_ds.train.apart import run_apart, train_words
    from dmae_ds.train.preflight import describe_finished, prepare

    words = override_words(overrides)
    preflight = prepare(load_config(str(recipe), words), World(), resume=resume)
    if preflight.is_finished:
        say(describe_finished(preflight))
    else:
        run_apart([sys.executable, "-m", "dmae_ds", *train_words(recipe, words, resume=resume)])
    return preflight.run_dir


make_callable(train)
