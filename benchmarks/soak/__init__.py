"""Tried to death: random load compared with contexts, malformed adapters and requests, killed processes.

    python -m benchmarks.soak load       random load on tiny models, in engines with too little of everything
    python -m benchmarks.soak real       the same on the packaged model behind icarus serve
    python -m benchmarks.soak adapters   malformed adapters by every way in
    python -m benchmarks.soak bodies     malformed requests, from schemathesis
    python -m benchmarks.soak kills      killed processes, a full disk, vanished folders
    python -m benchmarks.soak replay     a job that failed, once more

What came of them is in ``results/soak/``. A short form of the first three is among the tests.
"""
