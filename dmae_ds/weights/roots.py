"""Find the network in a file by its content: under which names its tensors stand, and which of several it is.

Trainers wrap what they save: in entries (`state_dict`, `model_ema`, `teacher`), in attributes of theirs
(Lightning's `model.`), in wrappers (DDP's `module.`, torch.compile's `_orig_mod.`). All of these are text in
front of the names, once the entries of a checkpoint are joined by dots:

    state_dict_ema.module.blocks.0.norm1.weight    root: state_dict_ema.module.

A root is found by the patch projection, which every format has. Where a file holds several networks, the one
that timm or the published evaluation would take is read, and a note says so.
"""

from __future__ import annotations

import re
from typing import Iterable

from dmae_ds.errors import UserError
from dmae_ds.weights.places import Container

# Entries in which timm.models.load_state_dict looks, in its order.
TIMM_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
# Networks that are made to be evaluated: averages over the steps (DINO, DINOv2, iBOT: teacher; I-JEPA:
# target_encoder; callbacks of Lightning).
_AVERAGED = re.compile(r"(^|_)(ema|averaged|swa|teacher|target_encoder)(_|$)")
# Networks that the published evaluations leave alone: the momentum encoder of MoCo-v3, BYOL's target.
_AUXILIARY = re.compile(r"(^|_)(momentum|target|key)(_|$)|^encoder_k$|^discriminator$")


# Wrappers that stand anywhere in a name: torch.compile's, FSDP's, activation checkpointing's.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


# Of a key map that takes every name of a checkpoint, with its entries, as it is.
ANYTHING = re.compile(r"(?P<root>)")


class SeveralNetworks(UserError):
    """A file holds several networks, and nothing tells which is meant."""


def unwrapped(name: str) -> str:
    """A name without the wrappers that stand anywhere in it: "blocks.0._orig_mod.norm1.weight" -> without."""
    return _WRAPPERS.sub("", name)


def find_roots(names: Iterable[str], anchor: re.Pattern | None) -> list[str]:
    """Texts in front of every network's names, in the file's order; "" where nothing is.

    anchor: matches the name of a tensor that every network has; its group `root` is what stands in front;
    None: of a format without one
    """
    if anchor is None:
        return []
    matches = (anchor.match(name) for name in names)
    return list(dict.fromkeys(match["root"] for match in matches if match))


def narrow(container: Container, anchor: re.Pattern) -> Container:
    """The tensors of the file's network, without the root in front of their names.

    The same container where there is no root. `note` says what was read and what was not.
    Raises SeveralNetworks where there are several and nothing tells which is meant.
    """
    if anchor is ANYTHING:
        return container
    container = _unwrap(container)
    roots = find_roots(container.keys(), anchor)
    if not roots or roots == [""]:
        return container
    root = choose_root(roots, container)
    if root is None:
        raise SeveralNetworks(_explain_several(container, roots))
    deeper = tuple(other for other in roots if other != root and other.startswith(root))
    places = {
        name.removeprefix(root): place
        for name, place in container.places.items()
        if name.startswith(root) and not name.startswith(deeper)
    }
    inside = container.with_places(places)
    inside.root, inside.note = root, _describe_choice(container, root, roots)
    return inside


def _unwrap(container: Container) -> Container:
    places = {unwrapped(name): place for name, place in container.places.items()}
    if len(places) < len(container) or places.keys() == container.places.keys():
        return container
    return container.with_places(places)


def choose_root(roots: list[str], container: Container) -> str | None:
    """The root that is read; None where nothing tells which.

    A network at the top level comes first, then the entries in the order in which timm looks at them. Among
    those of one entry, and where timm knows none, an average of the others comes first.
    """
    if "" in roots:
        return ""
    for entry in TIMM_ENTRIES:
        inside = [root for root in roots if root.startswith(f"{entry}.")]
        if inside:
            roots = inside
            break
    ranked: dict[int, list[str]] = {}
    for root in roots:
        ranked.setdefault(_rank(root), []).append(root)
    best = ranked[max(ranked)]
    if len(best) > 1:
        return None
    # A teacher of another size is no average of the student.
    averaged = max(ranked) == 2
    if averaged and any(
        _blocks(container, root) != _blocks(container, best[0]) for root in ranked.get(1, [])
    ):
        return None
    return best[0]


def _rank(root: str) -> int:
    parts = root.split(".")
    if any(_AVERAGED.search(part) for part in parts):
        return 2
    return 0 if any(_AUXILIARY.search(part) for part in parts) else 1


def _blocks(container: Container, root: str) -> set[tuple]:
    """Names and shapes of the numbered tensors under a root."""
    return {
        (name.removeprefix(root), place.shape)
        for name, place in container.places.items()
        if name.startswith(root) and re.search(r"\.\d+\.", name.removeprefix(root))
    }


def _describe_choice(container: Container, root: str, roots: list[str]) -> str:
    """What was read and what was not; empty where the file holds one network and nothing next to it."""
    others = [f"`{other}`" if other else "the top level" for other in roots if other != root]
    entry = root.split(".")[0]
    # Next to the network, in the same entry of a checkpoint: not its optimizer.
    beside = [
        name
        for name in container
        if (entry not in container.entries or name.startswith(f"{entry}."))
        and not name.startswith(tuple(roots))
    ]
    if not others and not beside:
        return ""
    is_ema = any(re.search(r"(^|_)ema(_|$)", part) for part in root.split("."))
    note = f"read the network under `{root}`{', an EMA' if is_ema else ''}" if root else "read the top level"
    if others:
        note += f", not that under {', '.join(others)}"
    if beside:
        more = ", ..." if len(beside) > 2 else ""
        note += f"; {len(beside)} tensors are outside it: {', '.join(beside[:2])}{more}"
    return note


def _explain_several(container: Container, roots: list[str]) -> str:
    """One line: the networks that the file holds, and the command that writes one of them by itself."""
    listed = ", ".join(f"`{root}`" for root in roots[:4]) + (", ..." if len(roots) > 4 else "")
    path = container.path
    return (
        f"{container.label.weights} '{path}' holds {len(roots)} networks, under {listed}, and nothing tells "
        f"which is meant; write it into a file of its own: python -m dmae_ds.weights.extract '{path}' "
        f"{roots[0]} network.safetensors"
    )
