"""Training schedules for lmKANs; `lmkan_gen.fitting.lightning` has them as a Lightning callback."""

from lmkan_gen.fitting.schedule import Curve, FittingSchedule, Phase, Settings

__all__ = ["Curve", "FittingSchedule", "Phase", "Settings"]
