"""kill -9 at random moments, in steps and in saves: every restart goes on, and the end is that of a run left alone.

MAMBA2_KILLS sets how often a run is killed, by default 40 times.
"""

import multiprocessing
import os
import random

import pytest

from tests.runs import arguments, contents, metrics, run_train

STEPS = 40


@pytest.fixture(scope="module")
def context():
    """Processes that are forked from one which has imported torch, and nothing of this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    return context


def command(study, output) -> list[str]:
    options = ["--max-steps", STEPS, "--save-steps", 1, "--eval-steps", 3, "--keep", 3, "--sample-tokens", 0]
    return arguments(study, output, *options)


def check(context, study, folder, kills: int) -> None:
    """Kill runs after random times until there were `kills`, starting each again until it ends; compare each in the
    end with one that was left alone."""
    whole = study / "whole"
    run_train(*command(study, whole))  # does nothing the second time
    moments, killed, runs = random.Random(kills), 0, 0
    while killed < kills:
        output, runs = folder / f"run{runs}", runs + 1
        while not output.with_name(output.name + "-final").exists():
            process = context.Process(target=run_train, args=command(study, output))
            process.start()
            # Loading takes the first two tenths of a second, the steps and saves that are left at most one second.
            process.join(moments.uniform(0.1, 0.8) if killed < kills else None)
            if process.is_alive():
                process.kill()
                process.join()
                killed += 1
            else:
                assert process.exitcode == 0
        assert [row["step"] for row in metrics(output, "loss")] == list(range(1, STEPS + 1))
        assert contents(output) == contents(whole)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(context, study, tmp_path):
    check(context, study, tmp_path, kills=6)


@pytest.mark.slow
def test_many_kills(context, study, tmp_path):
    check(context, study, tmp_path, kills=int(os.environ.get("MAMBA2_KILLS", "40")))
