"""Plain distillation: the recipe is the library's own, `stillhouse.plain`, since other systems are built on it."""

from stillhouse.plain import Plain as Config
from stillhouse.plain import check_classes, distill, kept, train_teacher

__all__ = ["Config", "check_classes", "distill", "kept", "train_teacher"]
