"""Requests to warm up: as many rounds as something is compiled in, kernels named from the log, failures told."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from blackwell_kernels.e2e import warm_up
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.errors import ServerError

STEPS = Steps(Console(file=io.StringIO()))


@pytest.fixture
def server(fake: list[str], tmp_path: Path) -> Server:
    return Server(tmp_path, tmp_path, command=fake)


def test_it_goes_on_until_a_round_compiles_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # the kernel comes in the second round, so a third must follow
    server.env["FAKE_JIT_AFTER"] = str(warm_up.REQUESTS + 3)
    with server:
        server.wait_ready(STEPS)
        found = warm_up.run(server, 1024, 900, STEPS)
    assert found["requests"] == 3 * warm_up.REQUESTS
    assert found["compiled"] == ["_late_kernel"]
    assert found["settled"]


def test_what_a_silent_log_does_not_name_counts_all_the_same(server: Server) -> None:
    """A served DeepSeek-V3.2 compiled five kernels while its log said errors only; two rounds seemed enough."""
    server.env |= {"FAKE_JIT_AFTER": str(warm_up.REQUESTS + 3), "VLLM_LOGGING_LEVEL": "ERROR"}
    with server:
        server.wait_ready(STEPS)
        found = warm_up.run(server, 1024, 900, STEPS)
    assert (found["requests"], found["compiled"], found["settled"]) == (3 * warm_up.REQUESTS, [], True)


def test_servers_log_what_is_read_of_their_logs(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert Server(tmp_path, tmp_path, command=fake).env["VLLM_LOGGING_LEVEL"] == "INFO"
    asked = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    assert Server(tmp_path, tmp_path, command=fake, env=asked).env["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_nothing_to_compile_takes_two_rounds_and_time_ends_it(server: Server) -> None:
    with server:
        server.wait_ready(STEPS)
        assert warm_up.run(server, 1024, 900, STEPS)["requests"] == 2 * warm_up.REQUESTS
        found = warm_up.run(server, 1024, 900, STEPS, limit_s=1e-9)
    assert (found["requests"], found["settled"]) == (warm_up.REQUESTS, False)


def test_a_request_that_fails_is_told(server: Server) -> None:
    server.env["FAKE_REFUSE"] = "1"
    with server:
        server.wait_ready(STEPS)
        with pytest.raises(ServerError, match="refused as told"):
            warm_up.run(server, 1024, 900, STEPS)


def test_prompts_are_of_all_lengths_and_some_continue_others() -> None:
    rng = random.Random(0)
    prompts = [prompt for _ in range(20) for prompt in warm_up.one_round(rng, 1024, 4000)]
    lengths = [len(prompt) for prompt in prompts]
    assert 8 <= min(lengths) < 12
    assert 3000 < max(lengths) <= 4000
    assert {n % 4 for n in lengths} == {0, 1, 2, 3}, "rows that kernels read by four and rows that they cannot"
    assert all(0 <= token < 1024 for prompt in prompts for token in prompt)
    known = [i for i, prompt in enumerate(prompts) if any(p != prompt and p[:7] == prompt[:7] for p in prompts)]
    assert len(known) > len(prompts) / 4


def test_kernels_are_named_once_for_each_time_they_were_compiled(tmp_path: Path) -> None:
    server = Server(tmp_path, tmp_path)
    server.log.write_text(
        "WARNING a.b.topk_kernel was compiled after the warm-up: the request that met it had to wait\n"
        "WARNING Triton kernel JIT compilation during inference: topk_kernel. This causes a latency spike\n"
        "WARNING a.b.topk_kernel was compiled after the warm-up: the request that met it had to wait\n"
        "WARNING Triton kernel JIT compilation during inference: _slots_kernel. This causes a latency spike\n"
    )
    assert warm_up.compilations(server) == ["a.b.topk_kernel", "a.b.topk_kernel", "_slots_kernel"]
