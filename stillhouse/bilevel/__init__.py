"""How an outer loss moves when what an inner loss is made of moves: through one step, or through many.

`one_step` is for weights that the inner loss is linear in; `mixed`, with `step`, for one step and parameters that the
inner loss depends on in any way; `unrolled` for many steps.
"""

from stillhouse.bilevel.mixed import along, mixed, step
from stillhouse.bilevel.one_step import Hypergradient, one_step, own_precision
from stillhouse.bilevel.unrolled import unrolled

__all__ = ["Hypergradient", "along", "mixed", "one_step", "own_precision", "step", "unrolled"]
