"""What counts as slower: more than the samples scatter, more than the machine drifted."""

import json
import random

import pytest
from microbench_examples import HEAD, impl, row

from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import regressions
from blackwell_kernels.microbench.results import Results, Row, write


def rows(scale_ours=1.0, scale_peers=1.0, noise=0.01, cases=4, seed=0):
    draw = random.Random(seed)

    def samples(us):
        return impl(*(us * draw.gauss(1.0, noise) for _ in range(15)))

    made = []
    for i in range(cases):
        one = row(f"case {i}")
        one["impls"] |= {"ours": samples(5.0 * scale_ours), "vllm.packed_decode": samples(9.0 * scale_peers)}
        made.append(Row.model_validate(one))
    return made


def verdicts(now, then):
    return {change.verdict for change in regressions.compare(now, then)}


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ({}, "same"),
        ({"scale_ours": 1.02}, "same"),
        ({"scale_ours": 1.10}, "regression"),
        ({"scale_ours": 0.80}, "improvement"),
        ({"scale_ours": 1.10, "noise": 0.3}, "same"),
        ({"scale_ours": 1.10, "scale_peers": 1.10}, "same"),
        ({"scale_ours": 1.00, "scale_peers": 0.85}, "regression"),
    ],
)
def test_noise_and_drift_are_no_regressions(now, verdict):
    changes = regressions.compare(rows(seed=1, **now), rows())
    assert [change.verdict for change in changes] == [verdict] * 4
    assert regressions.failed(changes) == (verdict == "regression")


def drifted(ours: float, *peers: float) -> str:
    """The verdict on a case of its own drift among three that have none."""
    then, now = rows(), rows(seed=1)
    for made, scales in ((then, (1.0, *(1.0 for _ in peers))), (now, (ours, *peers))):
        calls = [made[0].impls["ours"], *(made[0].impls["ours"].model_copy() for _ in peers)]
        made[0].impls |= {
            name: call.model_copy(update={"us": call.us * by, "samples_us": [us * by for us in call.samples_us]})
            for name, call, by in zip(("ours", "a", "b"), calls, scales, strict=False)
        }
        made[0].impls.pop("vllm.packed_decode")
    return regressions.compare(now, then)[0].verdict


def test_a_case_whose_peers_drifted_with_ours_is_none():
    """Two runs of the same experts: ours 1.079 times the time, two of vLLM's 1.109 and 1.013."""
    assert drifted(1.079, 1.109, 1.013) == "same"
    assert drifted(1.079, 1.0, 1.0) == "regression"
    assert drifted(1.2, 1.109, 1.013) == "regression", "more than they"
    assert drifted(1.079, 1.109) == "regression", "one peer may be the one that changed"
    assert drifted(1.0, 0.9, 0.9) == "same", "nor is what did not follow peers that got faster"
    assert drifted(0.92, 0.9, 0.9) == "same"
    assert drifted(0.80, 0.9, 0.9) == "improvement"


def test_few_peers_say_nothing_about_the_machine():
    now, then = rows(scale_ours=1.1, scale_peers=1.1, cases=2), rows(cases=2)
    assert regressions.drift(now, then) == 1.0
    assert verdicts(now, then) == {"regression"}


def test_what_stopped_working_is_a_failure_and_what_began_to_is_not():
    then = rows(cases=1)
    now = [Row.model_validate(row("case 0") | {"impls": row()["impls"] | {"ours": {"error": "killed"}}})]
    (change,) = regressions.compare(now, then)
    assert (change.verdict, change.why) == ("broken", "killed")
    assert regressions.failed([change])
    assert verdicts(then, now) == {"fixed"}


def test_cases_of_one_run_alone_are_not_compared():
    assert regressions.compare(rows(cases=1), rows(cases=3)[1:]) == []


def test_files_folders_and_printed_json_can_be_compared_with(tmp_path):
    stored = Results.model_validate({**HEAD, "rows": [row()]})
    write(tmp_path / "h200" / "gdn_decode.json", stored)
    (tmp_path / "printed.txt").write_text(json.dumps([json.loads(stored.model_dump_json(by_alias=True))]))
    for path in (tmp_path / "h200", tmp_path / "h200" / "gdn_decode.json", tmp_path / "printed.txt"):
        assert regressions.read(path) == {"h200": stored.rows}
    for bad in ("{", '[{"schema": 1}]'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(TableError, match=r"bad\.json: cannot be compared with"):
            regressions.read(tmp_path / "bad.json")


def test_what_lies_beside_the_results_of_a_gpu_is_not_read_and_gpus_stay_apart(tmp_path):
    for gpu in ("H200", "B200"):
        stored = Results.model_validate({**HEAD, "gpu": f"NVIDIA {gpu}", "rows": [row(f"on {gpu}")]})
        write(tmp_path / gpu.lower() / "gdn_decode.json", stored)
    for folder in ("tune", "profile"):
        (tmp_path / "h200" / folder).mkdir()
        (tmp_path / "h200" / folder / "gdn_decode.json").write_text('{"schema": 1}')
    found = regressions.read(tmp_path)
    cases = {gpu: [one.case for one in rows] for gpu, rows in found.items()}
    assert cases == {"h200": ["on H200"], "b200": ["on B200"]}
    assert regressions.read(tmp_path / "h200") == {"h200": found["h200"]}
