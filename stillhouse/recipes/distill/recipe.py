"""Plain distillation: the algorithm is the library's own, `stillhouse.plain`, since other systems are built on it."""

from stillhouse.plain import Plain as Config
from stillhouse.plain import distill

__all__ = ["Config", "distill"]
