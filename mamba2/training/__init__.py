"""The parts of a training run: hardware, optimizer, schedule, step, metrics, output folder. No argument parsing."""

from mamba2.training.hardware import autocast, memory_used, versions
from mamba2.training.job import Counters, Job
from mamba2.training.metrics import MetricsLog, Progress, Tracker, dt_summary
from mamba2.training.optimizer import DECAYS, OPTIMIZERS, SCHEDULES, make_optimizer
from mamba2.training.run_folder import RunFolder
from mamba2.training.signals import Stop

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Counters",
    "Job",
    "MetricsLog",
    "Progress",
    "RunFolder",
    "Stop",
    "Tracker",
    "autocast",
    "dt_summary",
    "make_optimizer",
    "memory_used",
    "versions",
]
