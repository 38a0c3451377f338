import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import RoundFailed
from fedcore.grids.pool import WorkerPool


def double(job, shared, out):
    time.sleep(0.002 * ((7 * job) % 5))  # results arrive in another order than the jobs
    out[:] = shared * job
    return job * 2


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_jobs(workers):
    pool = WorkerPool(workers, double, 3, 3)
    try:
        for scale in (1.0, 10.0):  # shared memory may change between calls
            pool.shared[:] = [scale, 2 * scale, 3 * scale]
            found = [(result, vector.copy()) for result, vector in pool.map(range(40))]
            assert [result for result, _ in found] == [2 * job for job in range(40)]
            for job, (_, vector) in enumerate(found):
                assert vector.tolist() == [job * scale, 2 * job * scale, 3 * job * scale]
    finally:
        pool.close()


def failing(job, shared, out):
    if job == 3:
        raise ValueError("three")
    if job == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 7:
        time.sleep(60)
    return job


def test_an_exception_in_a_worker_is_reported():
    pool = WorkerPool(2, failing, 1, 1)
    with pytest.raises(RoundFailed, match="ValueError: three"):
        list(pool.map([1, 2, 3, 4]))
    pool.close()


def test_a_killed_worker_is_reported_not_waited_for():
    pool = WorkerPool(2, failing, 1, 1)
    with pytest.raises(RoundFailed, match="killed by signal 9; was memory short"):
        list(pool.map([1, 5, 2, 4]))
    pool.close()


def test_the_wait_is_bounded():
    pool = WorkerPool(2, failing, 1, 1)
    with pytest.raises(RoundFailed, match=r"cohort\.timeout"):
        list(pool.map([1, 7], timeout=0.3))
    pool.close()


def test_workers_end_with_their_parent():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        pool = WorkerPool(2, double, 1, 1)
        os.write(writer, " ".join(str(process.pid) for process in pool._processes).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pids = [int(pid) for pid in os.read(reader, 100).split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_vectors_of_no_length_are_fine():
    pool = WorkerPool(1, double, 0, 0)
    assert [result for result, _ in pool.map([1])] == [2]
    assert np.asarray(pool.shared).size == 0
