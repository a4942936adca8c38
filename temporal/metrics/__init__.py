"""Quality metrics: the distance between two sets of clips, and motion."""

from .frechet import frechet_distance
from .motion import motion, motion_ratio

__all__ = ["frechet_distance", "motion", "motion_ratio"]
