"""Samples, sources of batches, data by name, and a user's own data."""

from stillhouse.data.images import Images
from stillhouse.data.mixing import mixing, with_draws
from stillhouse.data.named import find, load
from stillhouse.data.samples import Arrays, Relabelled, Samples, Subset
from stillhouse.data.sets import Data, as_data, from_arrays, split
from stillhouse.data.sources import Batches, Drawn, Weighted, prefetch, together
from stillhouse.data.wrapped import Wrapped

__all__ = [
    "Arrays",
    "Batches",
    "Data",
    "Drawn",
    "Images",
    "Relabelled",
    "Samples",
    "Subset",
    "Weighted",
    "Wrapped",
    "as_data",
    "find",
    "from_arrays",
    "load",
    "mixing",
    "prefetch",
    "split",
    "together",
    "with_draws",
]
