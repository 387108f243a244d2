"""A study: a grid of runs in one file, what came of each, statistics, figures, the report."""

from mamba2.study.grid import Study, add_study, read_study, study_runs

__all__ = ["Study", "add_study", "read_study", "study_runs"]
