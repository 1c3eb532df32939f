"""The checked-in FlashInfer-Bench files: valid by its schema, equal to what the generator gives, self-contained."""

import ast
import inspect

import pytest
from flashinfer_bench.data import Definition, Solution, TraceSet

from blackwell_kernels.microbench import generate, references
from blackwell_kernels.microbench.bundle import bundle
from blackwell_kernels.microbench.cases import all_cases
from blackwell_kernels.microbench.implementations import OURS, find, implementations, stock
from blackwell_kernels.microbench.spec import dtype_of, shape_of
from blackwell_kernels.microbench.specs import OPS, SPECS

REFERENCES = "blackwell_kernels.microbench.references"


def test_checked_in_files_match_their_sources():
    assert generate.stale() == [], "run `blackwell-kernels bench definitions --write`"


def test_a_changed_a_missing_and_a_foreign_file_are_stale(tmp_path):
    generate.write(tmp_path)
    assert generate.stale(tmp_path) == []
    changed, missing = sorted(p for p in tmp_path.glob("definitions/*/*.json"))[:2]
    changed.write_text(changed.read_text().replace("float64", "float32"))
    missing.unlink()
    foreign = tmp_path / "solutions" / "moe" / "foreign.json"
    foreign.write_text("{}")
    stale = generate.stale(tmp_path)
    assert stale == sorted(str(p.relative_to(tmp_path)) for p in (changed, missing, foreign))
    assert sorted(generate.write(tmp_path)) == stale
    assert not foreign.exists()
    assert generate.stale(tmp_path) == []


def test_flashinfer_bench_loads_them_as_a_data_set():
    data = TraceSet.from_path(str(generate.ROOT))
    assert data.definitions.keys() == SPECS.keys()
    for name, definition in data.definitions.items():
        assert {s.name for s in data.solutions[name]} == {f"{name}__{i.name}" for i in implementations(name)}
        assert definition.op_type in OPS


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_definition_agrees_with_its_spec_and_reference(spec):
    definition = Definition.model_validate(generate.definition(spec))
    assert definition.const_axes == {k: v for k, v in spec.axes.items() if v is not None}
    # every variable axis must be bound by an input: FlashInfer-Bench sizes outputs from inputs
    assert set(definition.var_axes) == set(definition.var_axes_bindings)
    run = getattr(references, f"run_{spec.reference}")
    assert list(inspect.signature(run).parameters) == list(spec.inputs)
    for output, source in spec.mutates.items():
        assert shape_of(spec.outputs[output]) == shape_of(spec.inputs[source])
        assert dtype_of(spec.outputs[output]) == dtype_of(spec.inputs[source])
    assert set(spec.rules) <= set(spec.outputs)
    assert spec.tokens in spec.axes


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_reference_text_needs_torch_only(spec):
    tree = ast.parse(generate.definition(spec)["reference"])
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert "torch" in imported
    assert imported <= {"__future__", "math", "torch"}


def test_solutions_are_a_few_lines_of_python():
    for name in SPECS:
        for item in implementations(name):
            solution = Solution.model_validate(generate.solution(item))
            assert len(solution.sources[0].content.splitlines()) <= 3
            assert ("cpu" in solution.spec.target_hardware) == (item.name == OURS)


def test_every_case_has_a_stock_implementation_on_both_chips():
    for case in all_cases():
        names = [item.name for item in implementations(case.spec.name)]
        assert names[0] == OURS
        for sm in (90, 100):
            assert stock(case, sm) in names[1:]


def test_blackwells_own_peers_are_stock_there_for_few_heads_and_say_why_elsewhere(monkeypatch):
    picked = {
        (case.definition, case.tp): stock(case, 100)
        for case in all_cases()
        if case.set == "model" and case.spec.op in ("dsa_sparse_mla", "dsa_step")
    }
    assert picked["dsa_sparse_mla_bf16", 8] == "vllm.flashinfer_mla_sparse"
    assert picked["dsa_sparse_mla_bf16", 1] == "flash_mla.sparse_fwd"
    assert picked["dsa_sparse_mla_fp8", 8] == "flash_mla.with_kvcache"
    assert picked["dsa_step_decode", 8] == "vllm.deep_gemm+topk+flashinfer_mla_sparse"
    case = next(c for c in all_cases() if c.definition == "dsa_sparse_mla_fp8" and c.set == "model")
    item = find(case.definition, "vllm.flashinfer_mla_sparse")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for capability, why in (((9, 0), "needs sm100 or sm103, this is sm90"), ((10, 0), "does not read the fp8_ds_mla")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert item.unavailable(case, "cuda").startswith(why)


def test_bundle_follows_names_and_renames_only_the_entry():
    text = bundle(REFERENCES, "run_moe_routing_softmax")
    assert text.count("def run(") == 1
    assert "def moe_softmax_topk(" in text
    assert "moe_grouped_topk" not in text


def test_bundle_refuses_two_definitions_of_one_name(tmp_path, monkeypatch):
    package = tmp_path / "blackwell_kernels_fake"
    package.mkdir()
    for name, body in {
        "__init__": "",
        "a": "def helper():\n    return 1\n\ndef first():\n    return helper()\n",
        "b": (
            "from blackwell_kernels_fake.a import first\n\n"
            "def helper():\n    return 2\n\ndef entry(x):\n    return helper() + first()\n"
        ),
    }.items():
        (package / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("blackwell_kernels.microbench.bundle.PROJECT", "blackwell_kernels_fake")
    with pytest.raises(ValueError, match="helper is defined in both"):
        bundle("blackwell_kernels_fake.b", "entry")
