"""Students: how a smaller network is made from a larger one."""

from stillhouse.students.plan import Keep, Plan, take

__all__ = ["Keep", "Plan", "take"]
