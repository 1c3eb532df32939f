"""A worker's bench on a CPU with implementations that end their process in every way there is."""

import os
import time
from dataclasses import dataclass

import torch
from microbench_examples import HEAD, CountingEngine

from blackwell_kernels.microbench import ours
from blackwell_kernels.microbench.implementations import Implementation
from blackwell_kernels.microbench.runner import Bench

DEFINITION = "gdn_decode_state_bf16"
RATES = {"copy_tbps": 4.0, "fp8_tflops": 1000.0, "bf16_tflops": 500.0, "launch_us": 0.001}
MEMORY = 3 << 29


def hangs(x):
    time.sleep(3600)


def hangs_in_a_child(x):
    if os.fork() == 0:
        time.sleep(3600)
    os.kill(os.getpid(), 11)


def crashes(x):
    os.abort()


def exhausts_memory(x):
    blocks = []
    while True:
        blocks.append(b"x" * (64 << 20))
        time.sleep(0.05)  # slower than the supervisor looks: the machine's own memory is not to be exhausted


def leaves(x):
    os._exit(0)


BAD = (hangs, hangs_in_a_child, crashes, exhausts_memory, leaves)


@dataclass(frozen=True)
class Bad(Implementation):
    """Does `action` on one batch size, and is ours elsewhere."""

    action: int = 0

    def unavailable(self, case, device):
        return None

    def bind(self, inputs, shared=None):
        if len(inputs["mixed_qkv"]) == 1:
            BAD[self.action](inputs)
        return ours.gdn_decode(inputs)


class LosesContext(Bad):
    def bind(self, inputs, shared=None):
        Bench._synchronize = lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error"))
        raise RuntimeError("illegal memory access")


def _named(kind, name, action=0):
    return kind(name, DEFINITION, "ours", "gdn_decode", action=action)


def make(job):
    torch.set_num_threads(1)
    bad = tuple(_named(Bad, action.__name__, i) for i, action in enumerate(BAD))
    return Bench(
        device=torch.device("cpu"),
        engines=[CountingEngine([])],
        head=job.head or {**HEAD, "date": "first worker"},
        rates=RATES,
        rounds=3,
        extra=(*bad, _named(LosesContext, "loses_context")),
        root=job.root,
        l2_bytes=1,
    )


def broken(job):
    raise ImportError("no such library: libnothing.so")
