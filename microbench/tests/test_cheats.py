"""Every way to cheat that was seen or thought of is caught, by the guard that is meant for it; honest ones pass."""

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from blackwell_kernels.microbench import generate, results, third_party
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.cli import app
from blackwell_kernels.microbench.implementations import find
from blackwell_kernels.microbench.results import Impl

FOLDER = Path(__file__).parent / "cheats"
DEFINITION = "moe_routing_softmax_topk10"
CASE = next(c for c in select(sets=("cpu",)) if c.definition == DEFINITION and "num_tokens=65" in c.name)
CAUGHT = {
    "cached_by_pointer": "when its inputs changed in place",
    "cached_by_fingerprint": "when a part of one input changed",
    "changes_input": "input router_logits was changed",
    "freed_memory": "wrong: ",
    "later_in_a_thread": "it returns while a thread of its own still runs",
    "lazy_tensor": "not a plain tensor",
    "not_a_number": "elements are not finite",
    "partial_write": "wrong: ",
    "out_of_bounds": "elements outside the tensor were written",
    "reduced_precision": "wrong: ",
    "skips_other_shapes": "which was not asked for: ",
    "torch_fallback": "leaves the work to torch: aten._softmax, aten.topk",
    "torch_in_a_thread": "leaves the work to torch: aten._softmax, aten.topk",
    "torch_out_of_modes": "leaves the work to torch: aten._softmax, aten.topk",
    "torch_by_hand": "leaves the work to torch: aten.amax, aten.exp, aten.sum",
    "peeks_at_frames": "wrong: ",
    "counts_calls": "wrong after 24 calls",
    "one_output_for_all": "a later call wrote to the output of an earlier one",
    "narrower_output": "topk_weights is torch.bfloat16",
}
# these change the process they run in
PATCHES = {
    "patched_clock": "it changed torch.cuda.Event.elapsed_time",
    "patched_comparison": "it changed compare.similarity",
    "patched_judge": "it changed third_party._Trial.judge",
    "patched_guard": "it changed guards.patched",
    "patched_code": "it changed compare.compare.__code__",
    "patched_setting": "it changed torch.get_float32_matmul_precision()",
}
GPU = {
    "gpu/side_stream": ("another stream", "wrong when its inputs changed in place"),
    "gpu/idle_in_graphs": ("in a CUDA graph",),
    "gpu/remembers_its_graph": ("wrong after", "wrong on", "wrong when", "in a CUDA graph"),
}
DESTINATION = ("partial_write", "out_of_bounds", "honest/destination_passing")


def solution(tmp_path, name):
    path = tmp_path / f"{name.replace('/', '_')}.json"
    source = (FOLDER / f"{name}.py").read_text()
    spec = {
        "language": "triton" if name.startswith("torch_") else "python",
        "target_hardware": ["cuda", "cpu"],
        "entry_point": "main.py::run",
        "dependencies": [],
        "destination_passing_style": name in DESTINATION,
    }
    made = {"name": name, "definition": DEFINITION, "author": "a stranger", "spec": spec}
    path.write_text(json.dumps({**made, "sources": [{"path": "main.py", "content": source}]}))
    return path


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))


def examine(path, case=CASE, device="cpu"):
    # secret in earnest, the same in every run of the tests
    draw = random.Random(0).randrange
    (verdict,) = third_party.Examination((third_party.load(path),), torch.device(device), draw=draw).run([case])
    return verdict.problems


def test_every_cheat_is_in_the_list():
    there = {
        str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.py") if path.parent.name != "honest"
    }
    assert there == {*CAUGHT, *PATCHES, *GPU}
    assert len(there) >= 14


@pytest.mark.parametrize("name", CAUGHT)
def test_a_cheat_is_caught(name, tmp_path):
    problems = examine(solution(tmp_path, name))
    assert any(CAUGHT[name] in problem for problem in problems), problems


@pytest.mark.parametrize("name", PATCHES)
def test_a_cheat_that_changes_the_process_is_caught_in_its_own(name, tmp_path):
    run = ("--solution", str(solution(tmp_path, name)), "--case", CASE.name)
    done = CliRunner().invoke(app, [*run])
    assert done.exit_code == 1, done.output
    assert PATCHES[name] in done.output
    assert "caught" in done.output


@pytest.mark.parametrize("name", [f"honest/{path.stem}" for path in (FOLDER / "honest").glob("*.py")])
@pytest.mark.parametrize("case", [c for c in select(sets=("cpu",)) if c.definition == DEFINITION], ids=lambda c: c.name)
def test_an_honest_solution_passes(name, case, tmp_path):
    assert examine(solution(tmp_path, name), case) == []


@pytest.mark.parametrize("definition", sorted({c.definition for c in select(sets=("cpu",))}))
def test_our_own_solutions_pass(definition, tmp_path):
    case = min((c for c in select(sets=("cpu",)) if c.definition == definition), key=lambda c: sum(c.axes.values()))
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(generate.solution(find(case.spec.name, "ours"))))
    assert examine(path, case) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GPU)
def test_a_cheat_that_needs_a_gpu_is_caught(name, tmp_path):
    problems = examine(solution(tmp_path, name), device="cuda")
    assert any(sign in problem for sign in GPU[name] for problem in problems), problems


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["honest/plain", "honest/destination_passing", "honest/constants_cached"])
def test_an_honest_solution_passes_on_a_gpu(name, tmp_path):
    assert examine(solution(tmp_path, name), device="cuda") == []


def test_times_that_cannot_be_true_are_errors_and_wonders_are_flagged():
    impls = {"ours": Impl(us=10.0), "peer": Impl(us=12.0)}
    told = {us: results.reviewed({**impls, "them": Impl(us=us)}, ["them"], 4.0)["them"] for us in (2.0, 3.0, 9.0)}
    assert told[2.0].us is None
    assert told[2.0].error.startswith("faster than physics: 2.00 µs")
    assert told[3.0].flag == "to be reviewed: 3.3x as fast as the best known"
    assert (told[9.0].us, told[9.0].flag, told[9.0].error) == (9.0, None, None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no solution of FlashInfer-Bench"),
        ('{"name": "x"}', "definition: Field required"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_solution_is_an_error_that_names_it(text, complaint, tmp_path):
    path = tmp_path / "theirs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(third_party.SolutionError, match=rf"theirs\.json.*{complaint}"):
        third_party.load(path)


def test_a_solution_of_an_unknown_definition_is_an_error(tmp_path):
    path = solution(tmp_path, "honest/plain")
    path.write_text(path.read_text().replace(DEFINITION, "gemm_n4096"))
    with pytest.raises(third_party.SolutionError, match="for 'gemm_n4096', which is none of"):
        third_party.load(path)


def test_the_command_examines_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("asks what a machine without a GPU does")
    path = solution(tmp_path, "honest/plain")
    done = CliRunner().invoke(app, ["--solution", str(path), "--case", CASE.name, "--json"])
    assert done.exit_code == 0, done.output
    (verdict,) = json.loads(done.stdout)["verdicts"]
    assert (verdict["solution"], verdict["problems"]) == ("honest/plain", [])
    other = CliRunner().invoke(app, ["--solution", str(path), "--op", "dsa_topk"])
    assert other.exit_code == 2
