"""Training objectives: one file each, and the table of their names; `config/objectives.py` has their schemas.

An objective is one `nn.Module` that owns everything the optimiser trains (student, decoder, heads) and
declares what it needs (base.py): a frozen teacher's features, views of an image, labels, an EMA teacher.
`train/run.py` wires exactly that; nothing in the loop, the loader or the teacher knows an objective's name.
"""

from dmae_ds.config.objectives import find_own
from dmae_ds.objectives.adapt import Adapt
from dmae_ds.objectives.amd import Amd
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.dino import Dino
from dmae_ds.objectives.dmae import Dmae
from dmae_ds.objectives.features import Features
from dmae_ds.objectives.g2sd_generic import G2sdGeneric
from dmae_ds.objectives.g2sd_specific import G2sdSpecific
from dmae_ds.objectives.mae import Mae
from dmae_ds.objectives.mocov3 import MoCoV3
from dmae_ds.objectives.sdae import Sdae
from dmae_ds.objectives.tinymim import TinyMim

OBJECTIVES = {
    "mae": Mae,
    "dmae": Dmae,
    "mocov3": MoCoV3,
    "sdae": Sdae,
    "dino": Dino,
    "g2sd_generic": G2sdGeneric,
    "g2sd_specific": G2sdSpecific,
    "tinymim": TinyMim,
    "amd": Amd,
    "features": Features,
    "adapt": Adapt,
}


def find_objective(name: str) -> type[Objective]:
    """Return the class of a shipped objective, or of your own (`module:Class`), of a checked recipe."""
    return find_own(name) or OBJECTIVES[name]
