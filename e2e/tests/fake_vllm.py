"""Stands in for `vllm`: takes the same command line, answers the same endpoints, misbehaves when told to.

Told by the environment: FAKE_START=fail exits at start; FAKE_DIE_AFTER=n kills itself after n completions;
FAKE_CHILD=path starts a child that ignores SIGTERM and writes its process id there; FAKE_TOKEN_S is the time between
tokens; FAKE_SHORT=1 sends one token too few; FAKE_REFUSE=1 answers 400; FAKE_HANG_UP=1 answers nothing;
FAKE_DIE_ONCE=path makes the death of FAKE_DIE_AFTER happen in one process only; FAKE_JIT_AFTER=n compiles a kernel
after n completions, on /metrics and, but for VLLM_LOGGING_LEVEL=ERROR, in the log. FAKE_SLOW=x makes its experts x
times as slow in the traces that it writes when it is profiled.
log p of a token is −(token mod 7) − 0.5, so that a test can know it; FAKE_WRONG=x adds x, FAKE_NOISE=x something
normal of that size, another for every request.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VOCAB, LONGEST = 1024, 1000
TOKEN_S = float(os.environ.get("FAKE_TOKEN_S", "0.005"))
served = 0
generated = 0
running = 0


def log_prob(token: int) -> float:
    noise = float(os.environ.get("FAKE_NOISE", "0"))
    return -(token % 7) - 0.5 + float(os.environ.get("FAKE_WRONG", "0")) + (noise and random.gauss(0.0, noise))


def dies() -> bool:
    if served <= int(os.environ.get("FAKE_DIE_AFTER", "1000000000")):
        return False
    once = os.environ.get("FAKE_DIE_ONCE")
    if once and os.path.exists(once):
        return False
    if once:
        open(once, "w").close()
    return True


def compiled() -> bool:
    return served > int(os.environ.get("FAKE_JIT_AFTER", "1000000000"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each token leaves when it is there

    def do_GET(self) -> None:
        page = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": "tiny", "max_model_len": LONGEST}]}),
            "/metrics": metrics(),
        }[self.path]
        self.reply(200, page)

    def do_POST(self) -> None:
        global served, generated, running
        if self.path in ("/start_profile", "/stop_profile"):
            self.profile()
            return
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "tiny"
            assert all(0 <= token < VOCAB for token in body["prompt"])
            assert body["max_tokens"] > 0
            assert len(body["prompt"]) < LONGEST
        except (ValueError, KeyError, AssertionError, TypeError):
            self.reply(400, json.dumps({"error": "malformed"}))
            return
        served += 1
        told = os.environ.get("VLLM_LOGGING_LEVEL") != "ERROR"
        if told and served == int(os.environ.get("FAKE_JIT_AFTER", "1000000000")) + 1:
            print("WARNING Triton kernel JIT compilation during inference: _late_kernel. This causes ...", flush=True)
        if dies():
            print("fake server dies as told", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("FAKE_HANG_UP"):
            self.close_connection = True
            return
        if os.environ.get("FAKE_REFUSE"):
            self.reply(400, json.dumps({"error": "refused as told"}))
            return
        n = body["max_tokens"] - bool(os.environ.get("FAKE_SHORT"))
        tokens = [(body["prompt"][-1] + i) % 1000 for i in range(1, n + 1)]
        if only := body.get("allowed_token_ids"):
            tokens = only * n
        if not body.get("stream"):
            of_prompt = [None, *({str(t): {"logprob": log_prob(t)}} for t in body["prompt"][1:])]
            of_tokens = {"token_logprobs": [log_prob(t) for t in tokens]}
            choice = {"token_ids": tokens, "prompt_logprobs": of_prompt, "logprobs": of_tokens}
            self.reply(200, json.dumps({"choices": [choice]}))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        running += 1
        try:
            for token in tokens:
                time.sleep(TOKEN_S)
                generated += 1
                self.chunk({"choices": [{"text": "x", "token_ids": [token]}]})
            self.chunk({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}})
            self.chunk(None)
        except OSError:  # the client went away
            self.close_connection = True
        running -= 1

    def profile(self) -> None:
        if "--profiler-config" not in sys.argv:
            self.reply(404, "no profiler")
            return
        if self.path == "/stop_profile":
            folder = json.loads(sys.argv[sys.argv.index("--profiler-config") + 1])["torch_profiler_dir"]
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"rank0.{time.time_ns()}.pt.trace.json"), "w") as file:
                json.dump({"traceEvents": trace()}, file)
        self.reply(200, "")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def chunk(self, data: dict | None) -> None:
        text = b"data: " + (b"[DONE]" if data is None else json.dumps(data).encode()) + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text) + (b"0\r\n\r\n" if data is None else b""))
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def trace() -> list[dict]:
    """Three decode steps of each batch size that is asked for without a GPU, one prefill, and what comes after."""
    slow = float(os.environ.get("FAKE_SLOW", "1"))
    kinds = [f"execute_context_0(0)_generation_{n}({n})" for n in (1, 1, 1, 4, 4, 4)]
    events, now = [], 0.0
    for i, kind in enumerate(
        [*kinds, "execute_context_1(256)_generation_0(0)", "execute_context_0(0)_generation_9(9)"]
    ):
        events.append({"ph": "X", "cat": "user_annotation", "name": kind, "ts": now, "dur": 10.0})
        for j, (name, us) in enumerate([("fused_moe_kernel", 400.0 * slow), ("nvjet_tst_64", 100.0)]):
            about = {"ph": "X", "tid": 7, "args": {"correlation": 10 * i + j}}
            events.append({**about, "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": now + 1 + j, "dur": 1.0})
            events.append({**about, "cat": "kernel", "name": name, "ts": now + 50 + 900 * j, "dur": us})
        now += 2000.0
    return events


def metrics() -> str:
    return (
        f'vllm:generation_tokens_total{{engine="0"}} {generated}\n'
        f'vllm:inter_token_latency_seconds_sum{{engine="0"}} {0.005 * generated}\n'
        f'vllm:inter_token_latency_seconds_count{{engine="0"}} {generated}\n'
        'vllm:prefix_cache_queries_total{engine="0"} 10\n'
        'vllm:prefix_cache_hits_total{engine="0"} 4\n'
        'blackwell_kernels_op_info{arch="",impl="cpu",op="moe"} 1.0\n'
        f"blackwell_kernels_jit_after_warmup_total {int(compiled())}\n"
        f'vllm:num_requests_running{{engine="0"}} {running}\n'
        f'vllm:num_requests_waiting{{engine="0"}} 0\nvllm:kv_cache_usage_perc{{engine="0"}} 0.25\n'
    )


def write_status(folder: str) -> None:
    ops = ("moe", "moe_routing", "gdn_prefill", "gdn_decode")
    status = {
        "schema": 1,
        "run": None,
        "version": "0",
        "processes": [{"pid": os.getpid(), "name": "EngineCore"}],
        "arch": "cpu",
        "layers": [
            {"op": op, "layer": f"layers.{i}", "impl": "cpu", "reason": "told so"} for op in ops for i in (0, 1)
        ],
        "counts": [
            {"op": op, "layer": "layers.0", "impl": "cpu", "phase": "decode", "calls": 2, "tokens": 1234} for op in ops
        ],
        "fallbacks": [],
        "jit_warmup": [],
        "jit_after_warmup": [],
    }
    with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
        json.dump(status, file)


def main() -> None:
    print("fake vllm starts", sys.argv[1:], flush=True)
    print("Kernel JIT monitor activated", flush=True)
    if os.environ.get("FAKE_START") == "fail":
        print("(Worker pid=1) ERROR 11-22 11:34:28 [x.py:953] RuntimeError: the reason why it cannot start", flush=True)
        print("RuntimeError: see above", flush=True)
        sys.exit(7)
    if path := os.environ.get("FAKE_CHILD"):
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code])
        with open(path, "w") as file:
            file.write(str(child.pid))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if folder := os.environ.get("BLACKWELL_KERNELS_STATUS_DIR"):
        write_status(folder)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        time.sleep(0.1)


main()
