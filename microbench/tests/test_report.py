"""Reports say what was measured, by what, and why something was not."""

import re

from microbench_examples import HEAD, row

from blackwell_kernels.microbench.report import cells, markdown, notes, page, summary, terminal
from blackwell_kernels.microbench.results import Results

FILES = [Results.model_validate({**HEAD, "rows": [row("a"), row("b", ours=(10.0, 9.0, 11.0))]})]


def test_cells_carry_times_ratios_and_the_floor():
    found = cells(FILES[0].rows[0])
    assert found[1:4] == ["5.00", "vllm.packed_decode 9.00", "1.80x"]
    assert found[6:] == ["40% (memory)", "ours"]


def test_a_missing_peer_is_a_note_with_its_reason_once():
    assert notes(FILES[0].rows) == ["flashinfer.gdn_decode: flashinfer-python is not installed (2 cases)"]


def test_summary():
    text = summary(FILES[0].rows)
    assert "2 cases against stock" in text
    assert "worst 0.90x" in text
    assert "faster in 50%" in text
    assert "geometric mean 1.27x" in text
    assert summary([]) == "no case has a time for both ours and stock"


def test_markdown_and_terminal_have_every_case_and_the_provenance():
    text = markdown(FILES)
    assert text.count("| gdn_decode_state_bf16 ") == 2
    for part in ("0123456789ab", "580.1", "4.30 TB/s", "is not installed"):
        assert part in text
    assert terminal(FILES[0].rows).row_count == 2


def test_html_is_one_file():
    text = page(FILES)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "gdn_decode on NVIDIA H200" in text
    assert "is not installed" in text
