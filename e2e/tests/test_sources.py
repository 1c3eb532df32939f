"""Recorded sessions: equal blocks are equal tokens, and corrupt files are refused with file, line, what and fix."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackwell_kernels.e2e import sessions as s
from blackwell_kernels.e2e import sources

SCENARIO = s.Scenario(seed=3, gap_scale=0.5, gap_cap_s=4.0)
ENCODED = {
    "id": "a",
    "block": 64,
    "tools": 130,
    "system": 70,
    "turns": [
        [0.0, 300, 20, 0, 4, 0, 1.0],
        [9.0, 330, 10, 4, 5, 6.0, 1.0],
        [20.0, 250, 30, 3, 3, 100.0, 1.0],  # history was cut
    ],
}


def request(t: float, tokens: int, ids: list[int], **given: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "model": "m", "in": tokens, "out": 8, "hash_ids": ids, "stop": "", **given}


TRACE = {
    "id": "trace_1",
    "models": ["m"],
    "block_size": 64,
    "hash_id_scope": "local",
    "tool_tokens": 64,
    "system_tokens": 64,
    "requests": [
        request(0.0, 300, [1, 2, 3, 4], think_time=0.0, api_time=5.0),
        {
            "t": 8.0,
            "type": "subagent",
            "agent_id": "x",
            "duration_ms": 9000,
            "tool_tokens": 64,
            "system_tokens": 0,
            "requests": [request(0.0, 130, [50, 51]), request(3.0, 200, [50, 51, 52])],
        },
        {"t": 8.0, "type": "subagent", "agent_id": "y", "duration_ms": 2000, "requests": [request(0.0, 70, [60])]},
        request(20.0, 400, [1, 2, 3, 4, 5, 6], think_time=15.0, api_time=2.0),
        request(31.0, 410, [1, 2, 7, 8, 9, 10]),  # an older trace: no think time
    ],
}
MOONCAKE = [
    {"timestamp": 4000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 3]},
    {"timestamp": 2500, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
]


def write(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_reencoded_sessions_keep_what_they_kept(tmp_path: Path) -> None:
    source = sources.load(write(tmp_path / "x.jsonl.gz", ENCODED), SCENARIO)
    one = source.session(0, 7.0)
    assert (one.id, one.start_s) == ("a", 7.0)
    assert [one.prompt_tokens(i) for i in range(3)] == [300, 330, 250]
    assert [t.output for t in one.turns] == [20, 10, 30]
    assert [t.gap_s for t in one.turns] == [0.0, 3.0, 4.0], "scaled, then capped"
    prompts = [one.prompt(i) for i in range(3)]
    assert list(map(len, prompts)) == [300, 330, 250]
    assert [one.reusable(i) for i in range(3)] == [3 * 64, 4 * 64, 3 * 64]
    assert shared_prefix(prompts[0], prompts[1]) == 256
    assert shared_prefix(prompts[1], prompts[2]) == 192
    assert source.describe() == {
        "file": "x.jsonl.gz",
        "format": "re-encoded sessions",
        "sessions": 1,
        "turns": 3,
        "turns_beyond_max_context": 0,
    }


def test_sessions_share_tools_and_system_of_equal_length(tmp_path: Path) -> None:
    other = {**ENCODED, "id": "b"}
    longer = {**ENCODED, "id": "c", "system": 80}
    source = sources.load(write(tmp_path / "x.jsonl", ENCODED, other, longer), SCENARIO)
    first = {x.id: x.prompt(0) for x in (source.session(i, 0.0) for i in range(3))}
    assert shared_prefix(first["a"], first["b"]) == 3 * 64
    assert shared_prefix(first["a"], first["c"]) == 2 * 64, "the same tools, another system prompt"


def test_a_second_pass_hits_nothing_but_tools(tmp_path: Path) -> None:
    source = sources.load(write(tmp_path / "x.jsonl", ENCODED), SCENARIO)
    first, second = source.session(0, 0.0), source.session(1, 0.0)
    assert (first.id, second.id) == ("a", "a#1")
    assert shared_prefix(first.prompt(0), second.prompt(0)) == 3 * 64


@pytest.mark.parametrize("scale", [0.5, 0.1, 1 / 100])
def test_a_context_scale_keeps_prefixes(tmp_path: Path, scale: float) -> None:
    scenario = s.Scenario(context_scale=scale)
    one = sources.load(write(tmp_path / "x.jsonl", ENCODED), scenario).session(0, 0.0)
    assert [one.prompt_tokens(i) for i in range(3)] == [round(n * scale) for n in (300, 330, 250)]
    for i in (1, 2):
        assert shared_prefix(one.prompt(i - 1), one.prompt(i)) >= one.reusable(i)


def test_turns_beyond_the_context_end_a_session(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ENCODED)
    source = sources.load(path, s.Scenario(max_context=330))
    assert len(source.session(0, 0.0).turns) == 1
    assert source.describe()["turns_beyond_max_context"] == 2
    with pytest.raises(sources.SourceError, match="no session fits max_context=100 at context_scale=1: raise"):
        sources.load(path, s.Scenario(max_context=100))


def test_original_traces_with_sub_agents(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE, indent=1))
    one = sources.load(path, s.Scenario(gap_cap_s=100)).session(0, 0.0)
    assert [one.prompt_tokens(i) for i in range(3)] == [300, 400, 410]
    # 15 s of thinking contain the 9 s in which sub-agents ran; the last gap is the time between less the server's 2 s
    assert [t.gap_s for t in one.turns] == [0.0, 6.0, 9.0]
    first, second = one.turns[1].agents
    assert (len(first.turns), len(second.turns)) == (2, 1)
    assert first.prompt(1)[:128] == first.prompt(0)[:128]
    assert one.turns[0].agents == one.turns[2].agents == ()
    assert [one.reusable(i) for i in range(3)] == [128, 256, 128]
    assert shared_prefix(one.prompt(1), one.prompt(2)) == 128
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.json").write_text(json.dumps({**TRACE, "id": f"t{i}"}))
    assert sources.load(folder, SCENARIO).describe()["sessions"] == 3


def test_mooncake_requests_at_their_times(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", *MOONCAKE)
    source = sources.load(path, s.Scenario(arrivals="trace", sessions_per_s=0.0))
    played = s.preview(source.scenario, 6, source)
    assert [x.start_s for x in played[:3]] == [0.0, 1.5, 3.0]
    assert [x.prompt_tokens(0) for x in played[:3]] == [1030, 600, 1100]
    assert [x.turns[0].output for x in played[:3]] == [6, 7, 5]
    prompts = [x.prompt(0) for x in played[:3]]
    assert shared_prefix(prompts[0], prompts[2]) == 1024
    assert shared_prefix(prompts[0], prompts[1]) == 512
    assert [x.start_s for x in played[3:]] == [4.5, 6.0, 7.5], "again, a mean gap later"
    # in the file's order: the first knows nothing, the others what came before
    assert {x.prompt_tokens(0): x.reusable(0) for x in played[:3]} == {1100: 0, 1030: 1024, 600: 512}
    faster = sources.load(path, s.Scenario(arrivals="trace", sessions_per_s=2.0))
    starts = list(itertools.islice(faster.arrivals(), 6))
    assert starts[3] == pytest.approx(1.5), "three requests in 1.5 s"


def test_recorded_times_are_needed_for_trace_arrivals(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match="have no arrival times: use poisson or gamma"):
        sources.load(write(tmp_path / "x.jsonl", ENCODED), s.Scenario(arrivals="trace"))
    with pytest.raises(ValueError, match="need a source"):
        s.preview(s.Scenario(arrivals="trace"), 1)


def turns(*changes: tuple[int, int, Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        row = json.loads(json.dumps(ENCODED))
        for turn, place, value in changes:
            row["turns"][turn][place] = value
        return row

    return make


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"x.jsonl:2: this is no JSON .*fetch the file again, or remove the line"),
        ([1, 2], r"x.jsonl:2: unknown format, none of the keys turns, requests, input_length; supported: re-encoded"),
        ({"timestamp": 1}, "unknown format"),
        ({**ENCODED, "turns": []}, r"x.jsonl:2: turns: List should have at least 1 item.*correct or remove the line"),
        ({**ENCODED, "block": 0}, r"x.jsonl:2: block: Input should be greater than 0 \(it is 0"),
        ({**ENCODED, "turns": [[0, 1, 2]]}, r"x.jsonl:2: turns.0: List should have at least 7 items"),
        (turns((1, 3, 5))(), r"x.jsonl:2: .*turn 1 keeps 5 blocks; it has 5, the turn before 4"),
        (turns((0, 4, 6))(), r"turn 0: 6 blocks of 64 are more than its 300 tokens"),
        (turns((2, 2, 1.5))(), r"turn 2: in, out, kept_blocks, blocks must be whole"),
        (turns((2, 1, "many"))(), r"turns.2.1: Input should be a valid number \(it is 'many'"),
        ({**TRACE, "requests": [{"type": "z"}]}, r"requests.0: Input tag 'z' found using 'type'"),
        ({**TRACE, "requests": [request(0, 0, [])]}, r"requests.0.n.in: Input should be greater than 0"),
        ({"timestamp": 0, "input_length": 2000, "output_length": 1, "hash_ids": [1]}, r"1 hash_ids for 2000 tokens"),
        (
            {"timestamp": -1, "input_length": 2, "output_length": 1, "hash_ids": []},
            r"timestamp: .*greater than or equal",
        ),
        (MOONCAKE[0], "mixes formats"),
    ],
)
def test_corrupt_lines_say_where_what_and_what_to_do(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ENCODED) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(sources.SourceError, match=message):
        sources.load(path, SCENARIO)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=r"none.jsonl does not exist: --source takes a file of re-encoded"):
        sources.load(tmp_path / "none.jsonl", SCENARIO)
    with pytest.raises(sources.SourceError, match="is empty"):
        sources.load(write(tmp_path / "empty.jsonl"), SCENARIO)
    whole = write(tmp_path / "cut.jsonl.gz", *[ENCODED] * 200)
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(sources.SourceError, match=r"cut.jsonl.gz cannot be read: .*it may be cut short"):
        sources.load(whole, SCENARIO)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(sources.SourceError, match=r"holds no \.json or \.jsonl file"):
        sources.load(folder, SCENARIO)
