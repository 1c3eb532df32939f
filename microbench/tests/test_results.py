"""Results files: the agreed shape, written at once, and an audit that catches what was doctored."""

import json

import pytest
from microbench_examples import HEAD, row

from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench.results import Results, audit, best_peer, dump, load, merge, path_of, ratio, write


def stored(**changes):
    return Results.model_validate({**HEAD, "rows": [row()], **changes})


def doctored(change):
    raw = json.loads(dump(stored()))
    change(raw["rows"][0])
    return audit(Results.model_validate(raw))


def test_round_trip(tmp_path):
    path = tmp_path / "h200" / "gdn_decode.json"
    results = stored()
    write(path, results)
    assert load(path) == results
    assert audit(load(path)) == []
    assert [p.name for p in path.parent.iterdir()] == ["gdn_decode.json"], "a temporary file was left"


def test_shape_is_the_agreed_one():
    raw = json.loads(dump(stored()))
    head = ["schema", "gpu", "sm", "driver", "torch", "triton", "vllm", "commit", "date", "command", "ceilings", "rows"]
    assert set(head) <= set(raw)
    assert raw["schema"] == 1
    assert set(raw["ceilings"]) == {"copy_tbps", "fp8_tflops", "bf16_tflops", "launch_us"}
    agreed = {"op", "case", "axes", "floor_us", "bound", "impls", "stock", "best_peer"}
    assert agreed | {"ratio_stock", "ratio_best_peer", "dispatched"} <= set(raw["rows"][0])
    for one in raw["rows"][0]["impls"].values():
        assert {"us", "p10", "p90", "n", "error", "samples_us"} <= set(one)


def test_paths():
    assert path_of("h200", "moe").parts[-2:] == ("h200", "moe.json")


def test_honest_results_pass():
    assert audit(stored()) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r["impls"]["ours"].update(us=3.0), "ours: us is 3.0, the samples give 5.0"),
        (lambda r: r["impls"]["ours"].update(p90=5.0), "p90"),
        (lambda r: r["impls"]["ours"].update(n=4), "n is 4, there are 3 samples"),
        (lambda r: r["impls"]["ours"]["samples_us"].pop(), "n is 3, there are 2 samples"),
        (lambda r: r["impls"]["vllm.packed_decode"]["samples_us"].append(50.0), "n is 3"),
        (lambda r: r.update(ratio_stock=2.5), "ratio_stock is 2.5, the samples give 1.8"),
        (lambda r: r.update(ratio_best_peer=None), "ratio_best_peer"),
        (lambda r: r.update(best_peer=None), "best_peer is None"),
        (lambda r: r.update(stock="vllm.imaginary"), "stock vllm.imaginary is not among"),
        (lambda r: r.update(dispatched="nobody"), "dispatched nobody is not among"),
        (lambda r: r.update(floor_us=40.0), "under the floor"),
        (lambda r: r["impls"]["flashinfer.gdn_decode"].update(error=None), "neither a time nor a reason"),
        (lambda r: r["impls"]["flashinfer.gdn_decode"].update(us=1.0), "has a time but no samples"),
        (lambda r: r["impls"]["ours"].update(error="crashed"), "both a time and an error"),
    ],
)
def test_a_doctored_file_is_caught(change, complaint):
    assert complaint in " | ".join(doctored(change))


def test_faster_samples_alone_do_not_make_a_faster_median():
    problems = doctored(lambda r: r["impls"]["ours"].update(samples_us=[1.5, 1.6, 1.7]))
    assert {p.split(": ")[1].split(" is ")[0] for p in problems if ", ours" in p} >= {"us", "p10", "p90"}


def test_merge_replaces_a_case_and_keeps_the_others(tmp_path):
    path = tmp_path / "gdn_decode.json"
    first = Results.model_validate({**HEAD, "rows": [row("a"), row("b")]})
    write(path, first)
    again = Results.model_validate({**HEAD, "rows": [row("b", ours=(2.5, 2.0, 3.0)), row("c")]}).rows
    merged = merge(path, {**HEAD, "commit": "newer"}, again)
    assert [r.case for r in merged.rows] == ["a", "b", "c"]
    assert merged.rows[1].impls["ours"].us == 2.5
    assert (merged.commit, merged.rows[0].commit) == ("newer", "0123456789ab")
    assert load(path) == merged
    assert audit(merged) == []


def test_best_peer_and_ratio():
    impls = Results.model_validate({**HEAD, "rows": [row()]}).rows[0].impls
    assert best_peer(impls) == "vllm.packed_decode"
    assert ratio(impls, "vllm.packed_decode") == pytest.approx(1.8)
    assert ratio(impls, "flashinfer.gdn_decode") is None
    assert best_peer({"ours": impls["ours"]}) is None


def test_the_fastest_peer_of_one_timing_need_not_be_that_of_the_other():
    impls = Results.model_validate({**HEAD, "rows": [row()]}).rows[0].impls
    impls["other"] = impls["vllm.packed_decode"].model_copy(update={"us": 10.0, "fib_us": 30.0})
    impls["ours"].fib_us, impls["vllm.packed_decode"].fib_us = 20.0, 50.0
    assert (best_peer(impls), best_peer(impls, "fib_us")) == ("vllm.packed_decode", "other")
    assert ratio(impls, "other", "fib_us") == pytest.approx(1.5)
    assert ratio(impls, "flashinfer.gdn_decode", "fib_us") is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Invalid JSON"),
        (json.dumps({**HEAD, "schema": 2}), "schema"),
        (json.dumps({**HEAD, "surprise": 1}), "surprise"),
        (json.dumps({**HEAD, "ceilings": {**HEAD["ceilings"], "copy_tbps": 0}}), "ceilings.copy_tbps"),
    ],
)
def test_a_corrupt_file_is_an_error_that_names_it(tmp_path, text, complaint):
    path = tmp_path / "moe.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"moe\.json") as caught:
        load(path)
    assert complaint in str(caught.value)
    assert "blackwell-kernels bench" in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(TableError, match="run `blackwell-kernels bench` first"):
        load(tmp_path / "none.json")
