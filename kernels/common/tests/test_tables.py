"""Tables: what is written is found again, and a file that is wrong in any way is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from blackwell_kernels.common import tables
from blackwell_kernels.errors import TableError

PROVENANCE = {
    "gpu": "NVIDIA H200",
    "sm": 90,
    "driver": "580",
    "torch": "2.11",
    "triton": "3.6.0",
    "vllm": "0.24.0",
    "commit": "abc",
    "date": "2026-11-20",
    "command": "blackwell-kernels bench --write-dispatch",
    "n": 21,
}


def row(tokens: int, use: str = "triton", **case: Any) -> dict[str, Any]:
    case = case or {"heads": 8}
    return {"case": case, "tokens": tokens, "config": {"BV": 32}, "ours_us": 1.5, "stock_us": 2.0, "use": use}


def document(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "op": "gdn_decode", "provenance": PROVENANCE, "rows": list(rows), **changes}


def store(root: Path, content: dict[str, Any] | str) -> Path:
    path = tables.path_of("gdn", "gdn_decode", "h200", root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(root: Path) -> tables.Table:
    table = tables.load("gdn", "gdn_decode", "h200", root)
    assert table is not None
    return table


def test_nobody_measured_it(tmp_path):
    assert tables.load("gdn", "gdn_decode", "h200", tmp_path) is None


def test_lookup_takes_the_next_larger_row_and_pins_the_largest(tmp_path):
    store(tmp_path, document(row(4), row(32, use="stock"), row(256), row(8, heads=16)))
    table = load(tmp_path)
    found = {tokens: table.lookup({"heads": 8}, tokens) for tokens in (0, 1, 4, 5, 32, 33, 256, 10**6)}
    assert {t: r and r.tokens for t, r in found.items()} == {
        0: 4, 1: 4, 4: 4, 5: 32, 32: 32, 33: 256, 256: 256, 10**6: 256,
    }  # fmt: skip
    assert found[5].use == "stock"
    assert found[5].config == {"BV": 32}


@pytest.mark.parametrize("case", [{"heads": 9}, {}, {"heads": 8, "more": 1}, {"heads": 8.0}, {"heads": "8"}])
def test_another_case_never_snaps_to_a_neighbour(tmp_path, case):
    store(tmp_path, document(row(4)))
    assert load(tmp_path).lookup(case, 4) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ("[]", "Input should be an object"),
        (document(row(4), schema=2), "schema"),
        ({k: v for k, v in document(row(4)).items() if k != "provenance"}, "provenance: Field required"),
        (document(row(4), extra=1), "extra"),
        (document(row(4), row(4)), "there twice"),
        (document(row(8), row(4)), "not sorted"),
        (document(row(4, heads=16), row(4, heads=8)), "not sorted"),
        (document(row(4), row(8, head=8)), "axes differ"),
        (document(row(0)), "rows.0.tokens"),
        (document({**row(4), "use": "cutlass"}), "rows.0.use"),
        (document({**row(4), "ours_us": -1.0}), "rows.0.ours_us"),
        (document({**row(4), "ours_us": 2.5}), "slower than stock"),
        (document({**row(4), "ours_us": None}), "slower than stock"),
        (document({**row(4), "config": {"BV": [1]}}), "rows.0.config"),
        (document(row(4), op="gdn_prefill"), "holds gdn_prefill measured on h200, not gdn_decode on h200"),
        (document(row(4), provenance={**PROVENANCE, "gpu": "NVIDIA B200"}), "measured on b200"),
        (json.dumps(document(row(4))).replace("1.5", "NaN"), "ours_us"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, problem):
    path = store(tmp_path, content)
    with pytest.raises(TableError) as error:
        load(tmp_path)
    message = str(error.value)
    assert str(path) in message
    assert problem in message
    assert "blackwell-kernels bench --write-dispatch" in message


def test_a_corrected_file_is_read_again(tmp_path):
    path = store(tmp_path, document(row(4)))
    assert load(tmp_path).lookup({"heads": 8}, 1).config == {"BV": 32}
    path.write_text(path.read_text().replace("32", "64"))
    assert load(tmp_path).lookup({"heads": 8}, 1).config == {"BV": 64}


@pytest.mark.parametrize("name", ["../x", "a/b", "", "H200"])
def test_names_stay_inside_the_folder(name):
    with pytest.raises(TableError, match="can be named"):
        tables.load("gdn", "gdn_decode", name)


FLOATS = st.floats(-9, 9).map(lambda x: x + 0.0)
SCALARS = st.one_of(st.booleans(), st.integers(-99, 99), FLOATS, st.sampled_from(["bf16", "fp8", "é"]))


@given(
    st.dictionaries(
        st.tuples(SCALARS, st.integers(1, 4096)),
        st.sampled_from(["triton", "stock"]),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 9999),
)
def test_what_is_written_is_found_again(tmp_path_factory, measured, tokens):
    root = tmp_path_factory.mktemp("tables")
    unique = {(repr(axis), m): (axis, m, use) for (axis, m), use in measured.items()}
    rows = [tables.Row.model_validate(row(m, use, axis=axis)) for axis, m, use in unique.values()]
    table = tables.Table(
        schema=1,
        op="gdn_decode",
        provenance=tables.Provenance.model_validate(PROVENANCE),
        rows=tables.sort_rows(rows),
    )
    path = tables.write("gdn", table, root)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    read = load(root)
    assert read == table
    for wanted in rows:
        assert read.lookup(wanted.case, wanted.tokens) == wanted
        found = read.lookup(wanted.case, tokens)
        sizes = [r.tokens for r in rows if repr(r.case) == repr(wanted.case)]
        assert found.tokens == min((s for s in sizes if s >= tokens), default=max(sizes))
        assert repr(found.case) == repr(wanted.case)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store(tmp_path, document(row(4)))
    table = load(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(TableError, match="No space left"):
        tables.write("gdn", table, tmp_path)
    assert load(tmp_path) == table
    assert len(list(tables.path_of("gdn", "gdn_decode", "h200", tmp_path).parent.iterdir())) == 1


def test_rows_cannot_be_changed_once_checked(tmp_path):
    store(tmp_path, document(row(4)))
    with pytest.raises(ValidationError):
        load(tmp_path).rows[0].tokens = 8


def test_every_shipped_table_loads():
    found = sorted(tables.ROOT.glob("*/configs/*/*.json"))
    for path in found:
        assert tables.load(path.parts[-4], path.stem, path.parts[-2]) is not None


def test_an_override_answers_every_lookup_of_its_operator_and_ends(tmp_path):
    store(tmp_path, document(row(4)))
    with tables.override("gdn_decode", {"BV": 64}):
        with tables.override("gdn_decode", {}):
            assert load(tmp_path).lookup({"heads": 99}, 1).config == {}
        found = load(tmp_path).lookup({"heads": 8}, 4)
        assert (found.config, found.use) == ({"BV": 64}, "triton")
        assert load(tmp_path / "where no table is").lookup({"heads": 8}, 0).config == {"BV": 64}
        assert tables.load("moe", "moe", "h200", tmp_path) is None
    with pytest.raises(RuntimeError, match="a launch failed"), tables.override("gdn_decode", {"BV": 1}):
        raise RuntimeError("a launch failed")
    assert load(tmp_path).lookup({"heads": 8}, 4).config == {"BV": 32}


def test_what_runs_on_a_gpu_is_told_apart_and_comments_are_not(tmp_path):
    folder = tmp_path / "moe"
    folder.mkdir()
    texts = {"gemm.py": "@triton.jit\ndef f():\n    pass\n", "config.py": "x = 1\n", "cpu.py": "y = 1\n"}

    def after(**changed: str) -> str:
        for name, text in texts.items():
            (folder / name).write_text(changed.get(name.removesuffix(".py"), text))
        tables.kernels_of.cache_clear()
        return tables.kernels_of("moe", tmp_path)

    first = after()
    assert after(gemm="# why\n@triton.jit\n\ndef f():\n    pass  \n", cpu="y = 2\n") == first
    assert len({first, after(gemm="@triton.jit\ndef f():\n    return\n"), after(config="x = 2\n")}) == 3
