"""The driver: run after run, several at a time, until nothing is missing."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from experiments.accuracy import bfloat16, plan, training, work
from icarus import memory

Job = plan.Wanted | str
"""A run, or a task on which the base model is to be scored."""


def run(place: work.Place, jobs: int) -> int:
    """Run after run until nothing is left; one that fails is said and left out."""
    place.results.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    failed: set[Job] = set()
    while not _all_done(place, jobs, threads, failed):
        pass  # a process was killed, as for its memory, which ends a pool: the rest goes on in another one
    return 1 if failed else 0


def _all_done(place: work.Place, jobs: int, threads: int, failed: set[Job]) -> bool:
    """Whether the pool lived until nothing was left."""
    running: dict[Future[None], Job] = {}
    spawn = multiprocessing.get_context("spawn")
    # On a CPU each run has a process of its own, which gives memory back. Starting one takes as long as a run on a GPU.
    lives = None if training.device() == "cuda" else 1
    with ProcessPoolExecutor(jobs, spawn, _begin, (threads,), max_tasks_per_child=lives) as pool:
        while True:
            for job in _jobs(place):
                if len(running) == jobs:
                    break
                if job not in failed and job not in running.values():
                    print("start", _name(job), flush=True)
                    running[pool.submit(_perform, place, job)] = job
            if not running:
                return True
            broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                failed |= {job} if error else set()
                broken |= isinstance(error, BrokenProcessPool)
                print("failed" if error else "done", _name(job), error or "", flush=True)
            if broken:
                for job in running.values():
                    print("failed", _name(job), "with the one that was killed", flush=True)
                failed |= set(running.values())
                return False


def _begin(threads: int) -> None:
    """A process that runs: it ends when the driver is killed, which would otherwise start the same run once more."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; what is done is in checkpoints
    torch.set_num_threads(threads)


def _jobs(place: work.Place) -> list[Job]:
    """What is missing, the most wanted first: a run, or a task whose base model is to be scored."""
    tasks = list(dict.fromkeys(task for task, _ in place.settings.pairs))
    runs = [wanted for wanted in plan.wanted(place.settings, place.loss) if not place.done(wanted)]
    bases = [task for task in tasks if place.settings.scores and not work.base_done(place, task)]
    scored = {wanted.cell.task for wanted in runs if wanted.scored}
    return [*(task for task in bases if task in scored), *runs, *(task for task in bases if task not in scored)]


def _perform(place: work.Place, job: Job) -> None:
    if training.device() == "cpu":
        memory.keep()
        bfloat16.speed_up()
    if isinstance(job, str):
        work.perform_base(place, job)
    else:
        work.perform(place, job)
    if training.device() == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # for the processes beside this one


def _name(job: Job) -> str:
    return f"{job}.base" if isinstance(job, str) else f"{job.cell.name}{' scored' if job.scored else ''}"
