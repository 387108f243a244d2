"""A study: a grid of runs described in one file, their results, statistics, figures and report."""

from mamba2.study.grid import Study, add_study, read_study, study_runs

__all__ = ["Study", "add_study", "read_study", "study_runs"]
