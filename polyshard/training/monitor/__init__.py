"""Monitoring of a run: a record of each step, the sinks that write it, FLOPs of the model, and profiles."""

from polyshard.training.monitor.flops import ModelFlops, model_flops
from polyshard.training.monitor.monitor import Monitor
from polyshard.training.monitor.peak import known_peak_flops, measured_peak_flops
from polyshard.training.monitor.profile import profile_steps
from polyshard.training.monitor.record import StepRecord
from polyshard.training.monitor.sinks import JsonLines, ProgressBar, TensorBoard

__all__ = [
    "JsonLines",
    "ModelFlops",
    "Monitor",
    "ProgressBar",
    "StepRecord",
    "TensorBoard",
    "known_peak_flops",
    "measured_peak_flops",
    "model_flops",
    "profile_steps",
]
