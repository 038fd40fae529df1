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
    while killed := _until_killed(place, jobs, threads, failed):
        if len(killed) > 1:  # any of them, as for its memory: each once more, alone, from its checkpoints
            killed = {job for job in killed if _until_killed(place, 1, threads, failed, only=job)}
        failed |= killed
    return 1 if failed else 0


def _until_killed(place: work.Place, jobs: int, threads: int, failed: set[Job], only: Job | None = None) -> set[Job]:
    """Runs until nothing is left, or until a process is killed, which ends its pool: those that ran then."""
    running: dict[Future[None], Job] = {}
    spawn = multiprocessing.get_context("spawn")
    # On a CPU each run has a process of its own, which gives memory back. Starting one takes as long as a run on a GPU.
    lives = None if training.device() == "cuda" else 1
    with ProcessPoolExecutor(jobs, spawn, _begin, (threads,), max_tasks_per_child=lives) as pool:
        while True:
            try:
                _start(pool, place, jobs, running, failed, only)
            except BrokenProcessPool:
                return set(running.values())
            if not running:
                return set()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    print("killed", *map(_name, running.values()), flush=True)
                    return set(running.values())
                job = running.pop(future)
                failed |= {job} if error else set()
                print("failed" if error else "done", _name(job), error or "", flush=True)


def _start(
    pool: ProcessPoolExecutor,
    place: work.Place,
    jobs: int,
    running: dict[Future[None], Job],
    failed: set[Job],
    only: Job | None,
) -> None:
    for job in _jobs(place):
        if len(running) == jobs:
            return
        if job not in failed and job not in running.values() and only in (None, job):
            print("start", _name(job), flush=True)
            running[pool.submit(_perform, place, job)] = job


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
