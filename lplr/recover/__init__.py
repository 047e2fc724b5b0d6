"""Recovery: what is still free in a compressed model, tuned until it does again what the original did.

latent      a packed matrix as a function that gradients pass through
block       the tensors of a block as functions of what is tuned, and the error that is made small
distill     the original's predictions, and the distance of another model's from them
descend     the optimisation loop: the best iterate on held-out rows is kept
"""

from lplr.recover.block import Tunable, applied, relative_error
from lplr.recover.descend import Course, Group, State, descend
from lplr.recover.distill import Likeliest, taught
from lplr.recover.latent import Latent

__all__ = ["Course", "Group", "Latent", "Likeliest", "State", "Tunable", "applied", "descend", "relative_error", "taught"]
