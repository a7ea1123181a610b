"""How an outer loss moves when what an inner loss is made of moves: through one step, or through many.

`one_step` is for weights that the inner loss is linear in; `unrolled` for anything the inner losses depend on.
"""

from stillhouse.bilevel.one_step import Hypergradient, one_step
from stillhouse.bilevel.unrolled import unrolled

__all__ = ["Hypergradient", "one_step", "unrolled"]
