"""Where other systems looked for the settings before they moved to `stillhouse.plain`."""

from stillhouse.plain import Plain as Config
from stillhouse.plain import optimizer_of, schedule

__all__ = ["Config", "optimizer_of", "schedule"]
