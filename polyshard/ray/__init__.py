"""Trainer ranks and vLLM engines as Ray actors: environment and placement. Ray restarts engines."""

from polyshard.ray.engine import RayClient, ray_engine
from polyshard.ray.trainers import run_on_ray

__all__ = ["RayClient", "ray_engine", "run_on_ray"]
