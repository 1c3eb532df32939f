"""The README's table of a GPU: each stored row once, counted right, and up to date here."""

import pytest
from microbench_examples import HEAD, row
from typer.testing import CliRunner

from blackwell_kernels.microbench import overview, results
from blackwell_kernels.microbench.cli import app
from blackwell_kernels.microbench.parts import PARTS
from blackwell_kernels.microbench.results import Results, Row
from blackwell_kernels.microbench.specs import SPECS

FILES = [results.load(path) for path in sorted((results.ROOT / "h200").glob("*.json"))]
ROWS = [one for found in FILES for one in found.rows]
NO_HOOK = {spec.name for spec in PARTS}


def test_the_readme_here_has_what_is_stored():
    assert "<!-- h200:begin -->" in overview.README.read_text()
    assert overview.stale(FILES) == [], "run: blackwell-kernels bench report h200 --write"


def test_every_row_has_a_group_but_the_contests_and_what_no_hook_calls():
    found = overview.grouped(ROWS)
    told = {id(one) for listed in found.values() for one in listed}
    assert sum(map(len, found.values())) == len(told)
    left = [one for one in ROWS if id(one) not in told]
    assert all("contest" in SPECS[one.definition].tags or one.definition in NO_HOOK for one in left)
    assert [group for group, listed in found.items() if not listed] == []
    assert all(len({one.op for one in listed}) == 1 for listed in found.values())


def test_a_group_counts_what_is_slower_and_what_is_served():
    made = [
        row("model/qwen3-next/batch_size=1", ours=(4.0, 4.0, 4.0)),
        row("model/qwen3-next/batch_size=8", ours=(10.0, 10.0, 10.0)),
        row("model/qwen3-next/batch_size=64", ours=(5.0, 5.0, 5.0)),
    ]
    for one, dispatched in zip(made, ("ours", "vllm", "ours"), strict=True):
        one |= {"axes": {"batch_size": 1}, "dispatched": dispatched, "ratio_stock": None}
    parsed = [Row.model_validate(one) for one in made]
    ratios = [one.ratio_best_peer for one in parsed]
    assert ratios[1] < 1 < min(ratios[0], ratios[2]), ratios
    text = overview.markdown([Results.model_validate({**HEAD, "rows": made})])
    (line,) = [one for one in text.splitlines() if one.startswith("| GDN decode, the recurrence alone")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "3"
    assert cells[3] == f"{sorted(ratios)[1]:.2f}× ({ratios[1]:.2f}–{max(ratios):.2f})"
    assert cells[4:6] == ["**1**", "8 sequences"]
    assert cells[6].startswith(f"{sorted(ratios)[1]:.2f}× ({ratios[1]:.2f}, ")
    assert cells[7] == "in 2 of 3"
    assert "FlashInfer-Bench" not in text
    assert "In 3 rows vLLM's choice has no time, and the fastest peer stands in for it." in text


def test_both_timings_are_counted():
    """Of rows that have both, of ours and of stock."""
    made = [row(f"model/qwen3-next/batch_size={n}") | {"axes": {"batch_size": n}} for n in (1, 8, 64)]
    for one, us in zip(made, (100.0, 30.0, None), strict=True):
        one["impls"]["ours"]["fib_us"], one["impls"]["vllm.packed_decode"]["fib_us"] = us, 60.0
    text = overview.markdown([Results.model_validate({**HEAD, "rows": made})])
    assert "in 2 of 2 rows by graph replays, as in the table, and in 1 by FlashInfer-Bench's timing" in text


def test_a_group_without_a_peer_says_no_ratio():
    alone = row("model/qwen3-next/batch_size=1") | {"best_peer": None, "ratio_best_peer": None, "ratio_stock": None}
    alone |= {"axes": {"batch_size": 1}, "dispatched": "vllm"}
    text = overview.markdown([Results.model_validate({**HEAD, "rows": [alone]})])
    assert "| 1 | – | – | – | – | never |" in text


@pytest.mark.parametrize(
    ("definition", "case", "words"),
    [
        ("moe_fp8_block", "model/deepseek-v3.2/tp2/num_tokens=1024", "1,024 tokens on 2 GPUs"),
        ("dsa_topk2048", "model/deepseek-v3.2/columns=65536/num_rows=8/context=4096", "8 rows of 4K in 64K"),
        ("dsa_sparse_mla_fp8", "model/deepseek-v3.2/tp8/num_tokens=64", "64 tokens with 16 heads"),
        ("gdn_prefill_state_f32", "model/qwen3-next/tp4/lengths=8x1024", "8 × 1,024 tokens on 4 GPUs, float32 state"),
        ("gdn_core_prefill", "agent/qwen3-next/lengths=200+700+1500+4000", "200 + 700 + 1,500 + 4,000 tokens"),
    ],
)
def test_cases_in_words(definition, case, words):
    (one,) = [one for one in ROWS if (one.definition, one.case) == (definition, case)]
    assert overview.label(one) == words


def test_the_table_is_renewed_between_its_marks_and_nowhere_else(tmp_path):
    readme = tmp_path / "README.md"
    assert overview.stale(FILES, readme) == [], "none is there"
    readme.write_text("before\n")
    assert overview.stale(FILES, readme, write=True) == [], "it does not speak of this GPU"
    readme.write_text("before\n<!-- h200:begin -->\nold\n<!-- h200:end -->\nafter\n")
    assert overview.stale(FILES, readme) == ["README.md"]
    assert "old" in readme.read_text()
    assert overview.stale(FILES, readme, write=True) == ["README.md"]
    assert readme.read_text() == f"before\n<!-- h200:begin -->\n{overview.markdown(FILES)}<!-- h200:end -->\nafter\n"
    assert overview.stale(FILES, readme) == []


def test_the_command_says_that_the_readme_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "README", tmp_path / "README.md")
    overview.README.write_text("<!-- h200:begin -->\nold\n<!-- h200:end -->\n")
    done = CliRunner().invoke(app, ["report", "h200", "--check"])
    assert done.exit_code == 1, done.output
    assert "stale README.md" in done.output
    assert "next: blackwell-kernels bench report h200 --write" in done.output
