"""A results file's head and rows, and engines that pretend to time."""

HEAD = {
    "gpu": "NVIDIA H200",
    "sm": 90,
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "vllm": "0.24.0",
    "commit": "0123456789ab",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "blackwell-kernels bench --op gdn_decode",
    "source": "abcdef012345",
    "ceilings": {"copy_tbps": 4.3, "fp8_tflops": 1310.0, "bf16_tflops": 790.0, "launch_us": 1.3},
}


def impl(*samples):
    ordered = sorted(samples)
    return {
        "us": ordered[len(ordered) // 2],
        "p10": ordered[0] + 0.2 * (ordered[1] - ordered[0]),
        "p90": ordered[-1] - 0.2 * (ordered[-1] - ordered[-2]),
        "n": len(samples),
        "samples_us": list(samples),
        "method": "graph",
        "accuracy": 1e-6,
    }


def row(case="model/qwen3-next/batch_size=1", ours=(5.0, 4.0, 6.0), stock=(8.0, 9.0, 10.0)):
    impls = {
        "ours": impl(*ours),
        "vllm.packed_decode": impl(*stock),
        "flashinfer.gdn_decode": {"error": "flashinfer-python is not installed"},
    }
    quotient = sorted(stock)[1] / sorted(ours)[1]
    return {
        "op": "gdn_decode",
        "definition": "gdn_decode_state_bf16",
        "case": case,
        "axes": {"batch_size": 1, "model": "qwen3-next", "tp": 1, "ep": 1, "dtype": "bfloat16"},
        "floor_us": 2.0,
        "bound": "memory",
        "impls": impls,
        "stock": "vllm.packed_decode",
        "best_peer": "vllm.packed_decode",
        "ratio_stock": quotient,
        "ratio_best_peer": quotient,
        "dispatched": "ours",
        "sets": 64,
        "rotated_bytes": 1 << 27,
        "commit": "0123456789ab",
        "source": "abcdef012345",
        "date": "2026-01-02T03:04:05+00:00",
    }


class FakeEngine:
    """Every call costs what it returns; `log` sees who was sampled when."""

    method = "graph"

    def __init__(self, log, refuses=()):
        self.log, self.refuses = log, refuses

    def prepare(self, calls):
        costs = [call() for call in calls]
        if any(cost in self.refuses for cost in costs):
            raise RuntimeError("cannot capture")
        turn = iter(range(10**6))

        def sample():
            self.log.append(costs[0])
            return sum(costs) / len(costs) + next(turn)

        return sample


class FakeEager(FakeEngine):
    method = "eager"


class CountingEngine(FakeEngine):
    """Runs the calls for real, then pretends each takes as many µs as there are calls."""

    def prepare(self, calls):
        for call in calls:
            call()
        self.log.append(len(calls))
        return lambda: float(len(calls))
