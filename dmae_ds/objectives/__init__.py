"""What is optimised. One file an objective; this table names them, `config/objectives.py` holds their schemas.

An objective is one `nn.Module` that owns all that the optimiser trains (student, decoder, heads) and says what it needs:

    taps        names of the frozen teacher's features it wants, such as "block/18" (none: no teacher)
    prepare     pixels on the device -> the masked batch that teacher and student share
    forward     (masked batch, {tap: features}) -> {"loss": ..., and every named part}

`train/run.py` wires exactly that; nothing in the loop, the loader or the teacher knows an objective's name.
"""

from dmae_ds.objectives.dmae import Dmae
from dmae_ds.objectives.mae import Mae

OBJECTIVES = {"mae": Mae, "dmae": Dmae}
