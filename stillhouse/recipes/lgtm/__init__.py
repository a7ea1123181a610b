"""LGTM: teacher and student are trained together; the teacher is led by what its lesson does for the student."""

from typing import Any

TITLE = "LGTM: a teacher that learns to teach, led by the student's loss on held-out data"
FAMILY = "model"
GIVES = "one student, trained together with a larger network that adapts its answers to it"
SOURCE = "released code read"
PAPER = "Ren et al., ACL 2023, arXiv 2305.09651"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill", "helpful"):
        from stillhouse.recipes.lgtm import recipe

        return getattr(recipe, name)
    if name == "LGTM":
        from stillhouse.recipes.lgtm.system import LGTM

        return LGTM
    raise AttributeError(name)
