"""Start ranks as torchrun does (same environment variables, a free port), collect what they return, show their errors.

Children are forked, so a test's closures travel as they are and a world of four starts in a tenth of a second.
Only the processes started here are ever ended.
"""

import multiprocessing as mp
import os
import queue
import socket
import time
import traceback

import torch._dynamo  # noqa: F401  DDP imports it on first use; done once here instead of in every forked rank


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_env(rank: int, world: int, port: int, per_node: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _child(fn, args, rank, env, group_timeout, results):
    os.environ.update(env)
    import torch

    from protomem import distributed

    torch.set_num_threads(1)
    try:
        distributed.init("cpu", timeout_s=group_timeout)
        results.put((rank, True, fn(*args)))
        distributed.barrier()  # nobody leaves while another still talks to it
        distributed.shutdown()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)


def run_ranks(world: int, fn, *args, timeout: float = 90.0, per_node: int | None = None, group_timeout: float = 60.0) -> list:
    """Run fn(*args) on `world` gloo ranks; return their results (picklable; tensors as numpy) in rank order.

    per_node: the ranks have local ranks as if so many of them ran on each of several nodes; None: one node.
    group_timeout: seconds that a collective waits for a rank.
    Raises AssertionError with every failed rank's traceback, or naming the ranks that had not answered in time.
    """
    context = mp.get_context("fork")
    results, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_child, args=(fn, args, r, rank_env(r, world, port, per_node or world), group_timeout, results))
        for r in range(world)
    ]
    for worker in workers:
        worker.start()
    out, errors, end = {}, {}, time.monotonic() + timeout
    try:
        while len(out) + len(errors) < world and time.monotonic() < end:
            try:
                rank, ok, value = results.get(timeout=0.2)
                (out if ok else errors)[rank] = value
            except queue.Empty:
                gone = [r for r, w in enumerate(workers) if not w.is_alive() and r not in out and r not in errors]
                if gone and results.empty():
                    time.sleep(0.2)
                    if results.empty():
                        errors.update({r: f"died with exit code {workers[r].exitcode}\n" for r in gone})
            if errors and time.monotonic() > end - timeout + 2:
                end = min(end, time.monotonic() + 2)  # the others will hang in a collective: do not wait for them
        if errors or len(out) < world:
            silent = sorted(set(range(world)) - set(out) - set(errors))
            text = "".join(f"--- rank {r} of {world}:\n{e}" for r, e in sorted(errors.items()))
            raise AssertionError(text + (f"--- no answer within {timeout:.0f} s from ranks {silent}" if silent else ""))
        return [out[r] for r in range(world)]
    finally:
        for worker in workers:
            worker.join(2)
            if worker.is_alive():
                worker.kill()
                worker.join()
