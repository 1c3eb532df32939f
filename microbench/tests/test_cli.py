"""The command line: exit codes, JSON, what it says without a GPU."""

import json

import pytest
import torch
from microbench_examples import HEAD, row
from typer.testing import CliRunner

from blackwell_kernels.microbench import device, generate, launched
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.cli import app
from blackwell_kernels.microbench.results import ROOT, Results, load, write

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU does")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_without_a_gpu_it_checks_correctness_and_says_that_timing_was_skipped(bench):
    done = bench("--op", "moe_routing")
    assert done.exit_code == 0, done.output
    assert f"source {device.source_hash()}" in done.output
    assert done.output.count("PASSED") == 6
    assert "6 right, 0 wrong; timing skipped: no CUDA device" in done.output
    assert "vllm.grouped_topk" in done.output
    assert "needs a CUDA device" in done.output
    assert done.output.splitlines()[-1].startswith("next: ")


def test_json_is_json_only(bench):
    done = bench("--op", "moe_routing", "--case", "tiny", "--json")
    told = json.loads(done.stdout)
    assert told["timing"] == "timing skipped: no CUDA device"
    assert {v["status"] for v in told["verdicts"]} == {"PASSED", "UNAVAILABLE"}
    assert len(told["verdicts"]) == 8


def test_a_wrong_operator_exits_with_1(bench, monkeypatch):
    from blackwell_kernels.microbench import ours

    def wrong(x):
        tokens = len(x["router_logits"])
        return lambda: (torch.ones(tokens, 10), torch.zeros(tokens, 10, dtype=torch.int32))

    monkeypatch.setattr(ours, "moe_routing_softmax", wrong)
    done = bench("--op", "moe_routing", "--case", "num_tokens=65")
    assert done.exit_code == 1
    assert "1 right, 1 wrong" in done.output
    assert "selected twice" in done.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--op", "moe_rooting"), "no operator is named 'moe_rooting'"),
        (("--set", "agents"), "no set is named 'agents'"),
        (("--case", "no such case"), "no case matches"),
        (("--impl", "vllm.packed_decod"), "no peer is named 'vllm.packed_decod'; did you mean 'vllm.packed_decode'?"),
        (("--audit", "--results", "nowhere"), "no results are stored under nowhere"),
    ],
)
def test_usage_errors_exit_with_2(bench, arguments, complaint):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert complaint in done.output


def test_audit_passes_honest_files_and_fails_doctored_ones(bench, tmp_path):
    root = tmp_path / "results"
    honest = Results.model_validate({**HEAD, "rows": [row() | {"dispatched": "vllm.packed_decode"}]})
    write(root / "h200" / "gdn_decode.json", honest)
    done = bench("--audit", "--results", str(root), "--tables", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "every number follows from its samples" in done.output
    path = root / "h200" / "gdn_prefill.json"
    path.write_text((root / "h200" / "gdn_decode.json").read_text().replace('"us": 5.0', '"us": 2.5'))
    done = bench("--audit", "--results", str(root))
    assert done.exit_code == 1
    assert "us is 2.5, the samples give 5.0" in done.output
    told = json.loads(bench("--audit", "--json", "--results", str(root), "--tables", str(tmp_path)).stdout)
    assert told["h200/gdn_decode.json"] == []
    assert told["h200/gdn_prefill.json"]


def test_dispatch_writes_tables_from_stored_results(bench, tmp_path):
    case = next(c for c in select(sets=("model",)) if c.definition == "gdn_decode_state_bf16")
    found = row() | {"case": case.name, "axes": case.full_axes(), "dispatched": "vllm.packed_decode"}
    found["kernels"] = launched.of(case, "h200")
    root, configs = tmp_path / "results", tmp_path / "tables"
    write(root / "h200" / "gdn_decode.json", Results.model_validate({**HEAD, "rows": [found]}))
    places = ("--results", str(root), "--tables", str(configs))
    done = bench("dispatch", "h200", *places)
    assert done.exit_code == 0, done.output
    assert (configs / "gdn" / "configs" / "h200" / "gdn_decode.json").is_file()
    assert bench("--audit", *places).exit_code == 0
    assert load(root / "h200" / "gdn_decode.json").rows[0].dispatched == "ours"
    assert bench("dispatch", "b200", *places).exit_code == 2


def test_report_of_stored_results(bench, tmp_path):
    root = tmp_path / "results"
    write(root / "h200" / "gdn_decode.json", Results.model_validate({**HEAD, "rows": [row()]}))
    done = bench("report", "h200", "--results", str(root), "--html", str(tmp_path / "new" / "page.html"))
    assert done.exit_code == 0, done.output
    assert "gdn_decode" in done.output
    assert "not measured" in done.output
    assert "Roofline" not in done.output
    assert (tmp_path / "new" / "page.html").stat().st_size > 1 << 20, "plotly is inside"
    told = json.loads(bench("report", "h200", "--results", str(root), "--json").stdout)
    assert next(score for score in told["scores"] if score["op"] == "gdn_decode")["stock"]["median"] == 1.8
    assert next((peer["name"], peer["fastest"]) for peer in told["peers"]) == ("vllm.packed_decode", 1)
    assert set(told["contest"]["best_peer"]) == {"us", "fib_us"}
    assert bench("report", "b200", "--results", str(root)).exit_code == 2


def test_audit_of_the_stored_results(bench):
    """What is in the repository must follow from its own samples."""
    done = bench("--audit")
    assert done.exit_code == 0, done.output


def test_the_stored_results_can_be_compared_with_themselves(bench, tmp_path):
    assert "regression" not in (done := bench("--compare", str(ROOT))).output
    assert done.exit_code == 0, done.output
    assert bench("--compare", str(ROOT / "h200")).exit_code == 0
    elsewhere = Results.model_validate({**HEAD, "gpu": "NVIDIA B200", "rows": [row()]})
    write(tmp_path / "b200.json", elsewhere)
    done = bench("--compare", str(tmp_path / "b200.json"))
    assert done.exit_code == 1
    assert "these rows are of h200, those of b200" in done.output


def test_definitions_are_checked_and_renewed(bench, tmp_path, monkeypatch):
    stale, write = generate.stale, generate.write
    monkeypatch.setattr(generate, "stale", lambda root=tmp_path: stale(root))
    monkeypatch.setattr(generate, "write", lambda root=tmp_path: write(root))
    done = bench("definitions")
    assert (done.exit_code, done.output.count("stale ")) == (1, len(generate.files()))
    assert bench("definitions", "--write").exit_code == 0
    assert bench("definitions").exit_code == 0


def test_cases_are_listed(bench):
    done = bench("cases", "--op", "gdn_core", "--json")
    listed = json.loads(done.stdout)
    definitions = {"gdn_core_decode", "gdn_core_decode_f32", "gdn_core_prefill", "drafts_gdn_core_bf16"}
    assert {one["definition"] for one in listed} == definitions


def test_dataset_can_be_loaded_by_flashinfer_bench(bench, tmp_path):
    from flashinfer_bench.bench.utils import gen_inputs, load_safetensors
    from flashinfer_bench.data import TraceSet

    done = bench("dataset", str(tmp_path / "data"), "--op", "dsa_topk")
    assert done.exit_code == 0, done.output
    data = TraceSet.from_path(str(tmp_path / "data"))
    (definition,) = data.definitions.values()
    for trace in data.workloads[definition.name]:
        tensors = load_safetensors(definition, trace.workload, data.root)
        assert len(gen_inputs(definition, trace.workload, "cpu", tensors)) == len(definition.inputs)


def test_source_hash_changes_with_the_source(monkeypatch, tmp_path):
    before = device.source_hash()
    assert before == device.source_hash()
    monkeypatch.setattr(device, "_PACKAGES", (".common",))
    assert device.source_hash() != before


def test_a_recorded_command_can_be_repeated_anywhere(monkeypatch):
    asked = "bench --op moe --case model* --results /here --html=/there.html --json --no-fib"
    monkeypatch.setattr("sys.argv", ["/an/environment/blackwell-kernels", *asked.split()])
    assert device.command() == "blackwell-kernels bench --op moe --case 'model*' --no-fib"
