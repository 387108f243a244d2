"""What train.py calls: hardware, optimizer, schedule, one step, metrics, the run's folder. No argument parsing."""

from mamba2.training.hardware import autocast, choose_device, choose_dtype, memory_used, peak_flops, versions
from mamba2.training.job import Counters, Job
from mamba2.training.metrics import MetricsLog, Progress, Tracker, dt_summary
from mamba2.training.optimizer import DECAYS, OPTIMIZERS, SCHEDULES, Schedule, make_optimizer
from mamba2.training.run_folder import RunFolder
from mamba2.training.signals import Stop
from mamba2.training.step import accumulate_gradients, mean_loss, spread, update

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Counters",
    "Job",
    "MetricsLog",
    "Progress",
    "RunFolder",
    "Schedule",
    "Stop",
    "Tracker",
    "accumulate_gradients",
    "autocast",
    "choose_device",
    "choose_dtype",
    "dt_summary",
    "make_optimizer",
    "mean_loss",
    "memory_used",
    "peak_flops",
    "spread",
    "update",
    "versions",
]
