"""The PTX of the row top-k itself, run thread by thread: exact, and nothing that only some orders of threads forgive.

Interpreted, the kernels keep their counts in a value and one program has a row, so that their inline assembly and what
programs of a cluster tell each other run here alone without a GPU. That the check can fail: deliberate breakages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from blackwell_kernels.common.testing.generators import seeded
from blackwell_kernels.common.testing.ptx import Kernel, PtxError, Source, launch
from blackwell_kernels.dsa import reference
from blackwell_kernels.dsa.config import TopkConfig
from blackwell_kernels.dsa.testing import same_selection

K, WARPS = 40, 2


@dataclass(frozen=True)
class Form:
    """A kernel as `topk.launch` compiles it. gap: columns between rows. here: bitmaps may be in shared memory."""

    columns: int
    config: TopkConfig
    gap: int = 3
    arch: int = 90
    here: bool = True

    def cheap(self) -> bool:
        return self.config.cluster < 4

    def case(self) -> str:
        strides = {"stride_logits": self.columns + self.gap, "stride_indices": K + 3}
        return json.dumps({**asdict(self), **strides, "rows": 8, "k": K})


def of_cluster(programs: int, spare: int, gap: int = 3, **config: int) -> Form:
    """Rows up to one column a thread are asked for ahead, up to two held, the rest streamed: `spare` columns more."""
    together = 32 * WARPS * programs
    held = TopkConfig(block=together, num_warps=WARPS, held=2, cluster=programs, early=True)
    return Form(2 * together + spare, replace(held, **config), gap)


FORMS = {
    **{f"{n} programs": of_cluster(n, 2 * 32 * WARPS * n + 11 if n < 8 else 77) for n in (1, 2, 4, 8, 16)},
    "rows on 16 bytes": of_cluster(2, 200, gap=4),
    "known to fit": of_cluster(2, 256, block=512),
    "sm_100": replace(of_cluster(2, 300), arch=100),
    "one program, held": Form(700, TopkConfig(block=1024, num_warps=WARPS, early=True)),
    "one program, list": Form(700, TopkConfig(block=128, num_warps=WARPS, held=1, early=True)),
    "bitmaps in global memory": Form(700, TopkConfig(block=128, num_warps=WARPS, held=1), here=False),
}


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    """Of all forms, compiled in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_topk.py"))],
        input="\n".join(form.case() for form in FORMS.values()),
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    parsed = [json.loads(line) for line in child.stdout.splitlines()]
    found = [Source(**{**source, "arguments": tuple(source["arguments"])}) for source in parsed]
    return dict(zip(FORMS, found, strict=True))


def scores(kind: str, columns: int, rng: torch.Generator) -> torch.Tensor:
    normal, uniform = torch.randn(columns, generator=rng), torch.rand(columns, generator=rng)
    match kind:
        case "normal":
            return normal
        case "ties":
            return (2 * normal).round()
        case "one bin":
            return 1.0 + 0.03 * uniform
        case "NaN":
            return normal.masked_fill(uniform < 0.5, torch.nan)
        case "-inf":
            return normal.masked_fill(uniform < 0.95, -torch.inf)
        case "equal":
            return torch.full((columns,), -1.7)
        case "bits":
            return torch.randint(-(2**31), 2**31, (columns,), generator=rng).to(torch.int32).view(torch.float32)
        case "zeros":
            return torch.where(uniform < 0.5, 0.0, -0.0)
    raise AssertionError(kind)


KINDS = ["normal", "ties", "one bin", "NaN", "-inf", "equal", "bits", "zeros"]


def ranges(form: Form) -> list[tuple[int, int]]:
    """Whole rows, streamed where rows are; one held that begins somewhere; one asked for ahead; of K, short, empty."""
    columns, most = form.columns, 2 * form.config.block if form.config.cluster else form.columns
    held = max(K + 1, min(most, columns) - 9)
    return [
        (0, columns),
        (-7, 2**31 - 1),
        (5, columns - 2),
        (columns - held, columns - 1),
        (3, min(K + 20, columns)),
        (columns - K, columns),
        (columns - 17, columns),
        (30, 30),
        (50, 20),
    ]


def run(form: Form, source: Source, kinds: list[str], bounds: list[tuple[int, int]], seed: int, **wrong: int) -> bool:
    """Whether a launch selects as the reference does. wrong: other arguments than the right ones."""
    rng, rows, columns = seeded(seed), len(bounds), form.columns
    starts, ends = (torch.tensor(each, dtype=torch.int32) for each in zip(*bounds, strict=True))
    memory = torch.empty(rows, columns + form.gap)
    logits, indices = memory[:, :columns], torch.full((rows, K + 3), 7, dtype=torch.int32)[:, :K]
    for row in range(rows):
        logits[row] = scores(kinds[row % len(kinds)], columns, rng)
        column = torch.arange(columns)
        outside = (column < int(starts[row])) | (column >= int(ends[row]))
        logits[row].masked_fill_(outside, (torch.inf, torch.nan)[row % 2])
    outputs = {
        "indices_ptr": indices,
        "marks_ptr": torch.empty(rows, -(-columns // 32) + 1, dtype=torch.int32),
        "lists_ptr": torch.empty(rows, 2, 8192, dtype=torch.int32),
    }
    numbers = {"columns": columns, "stride_logits": columns + form.gap, "stride_indices": K + 3, **wrong}
    inputs = {"logits_ptr": logits, "starts_ptr": starts, "ends_ptr": ends}
    launch(Kernel(source), (rows,), {**inputs, **outputs, **numbers}, outputs.keys(), seed)
    return same_selection(indices, reference.topk(logits, starts, ends, K))


@pytest.mark.parametrize(("name", "seed"), [(n, s) for n, f in FORMS.items() for s in range(4 if f.cheap() else 2)])
def test_every_form_is_exact(sources: dict[str, Source], name: str, seed: int):
    form = FORMS[name]
    bounds = ranges(form)
    if not form.cheap():  # half of the long rows
        bounds = bounds[seed % 2 : 4 : 2] + bounds[4:]
    first = 2 * seed if form.cheap() else 3 * seed
    assert run(form, sources[name], KINDS[first:] + KINDS[:first], bounds, seed)


def edit(pattern: str, replacement: str, which: int | None = None) -> tuple[str, str, int | None]:
    """An edit of all places of a pattern, or of one."""
    return pattern, replacement, which


ARRIVE, WAIT = r"barrier\.cluster\.arrive\.release;", r"barrier\.cluster\.wait\.acquire;"
# what is broken -> edits, what is said of it
BREAKAGES = {
    "counts are read before all are there": ([edit(r"bar\.sync 0;(?=\nmov)", "", 0)], "no barrier orders"),
    "what was found is read before it is": ([edit(r"SHARE: bar\.sync 0;", "SHARE:", 0)], "no barrier|nobody wrote"),
    "what warps write is read before it is": ([edit(r"\[b\+9264\], x; bar\.sync 0;", "[b+9264], x;")], "no ba|nobody"),
    "no barrier behind cleared counts": ([edit(r"bar\.sync\s+0;", "", 0)], "no barrier orders|nobody wrote"),
    "no cluster barrier before counts are read": ([edit(ARRIVE, "", 0), edit(WAIT, "", 0)], "may not have begun"),
    "no cluster barrier before counting again": ([edit(ARRIVE, "", 1), edit(WAIT, "", 1)], "no barrier orders"),
    "no cluster barrier before the end": ([edit(ARRIVE, "", -1), edit(WAIT, "", -1)], "may exit|no barrier|nobody"),
    "nobody waits before ranks": ([edit(WAIT, "", -1)], "no barrier orders|nobody wrote|may exit"),
    "pushes to one program twice": ([edit(r"(mapa\S+ y, b), 1;(?= st)", r"\1, 0;")], "no barrier|nobody wrote"),
    "reads one program's counts twice": ([edit(r"(mapa\S+ y, \w), 1;(?= ld)", r"\1, 0;")], "out of bounds|wrong"),
    "counts itself among those before": ([edit(r"setp\.gt\.u32 p, r,", "setp.ge.u32 p, r,")], "nobody wrote|bounds"),
    "lists one place past": ([edit(r"\[y\+9392\]", "[y+9400]")], "nobody wrote|out of bounds"),
    "compares with one past the list": ([edit(r"setp\.lt(\.u32 p, i,)", r"setp.le\1")], "nobody wrote"),
    "takes one too many of the list": ([edit(r"setp\.lt(\.and\.u32 p, r,)", r"setp.le\1")], "out of bounds"),
    "reserves one place for all": ([edit(r"(atom\.shared\.add\.u32 b, \[a\+9216\]), s", r"\1, 0")], "no barrier"),
    "clears one array too few": ([edit("add.u32 e, a, 9232", "add.u32 e, a, 9216")], "nobody wrote"),
    "does not wait for the kernel before": ([edit(r"griddepcontrol\.wait;", "")], r"griddepcontrol\.wait"),
}  # fmt: skip
# of a row that one program lists
BREAKAGES_LISTED = {
    "no word of the bitmap is cleared": ([edit(r"@p st\.shared\.b32 \[a\], b;", "")], "nobody wrote"),
    "marks are stored, not added": ([edit(r"red\.shared\.or(\.b32 \[d\])", r"st.shared\1")], "no barrier orders"),
    "marks the first of a word": ([edit(r"and(\.b32 a, \S+,) 31;(?= mov)", r"and\1 0;")], "wrong"),
    "marks words too far": ([edit(r"(red\.shared\.or\.b32) \[d\]", r"\1 [d+64]")], "nobody wrote|bounds|wrong"),
    "gathers one place past": ([edit(r"st\.shared\.b32 \[g\]", "st.shared.b32 [g+4]")], "wrong|no barrier"),
    "stores one place past": ([edit(r"(st\.global\.b32) \[g\](?=, b; add\.u32 t)", r"\1 [g+4]")], "wrong|bounds"),
    "stores before all is gathered": ([edit(r"bar\.sync\s+0;", "", -1)], "no barrier orders|nobody wrote"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "name"),
    [*(("known to fit", name) for name in BREAKAGES), *(("one program, list", name) for name in BREAKAGES_LISTED)],
)
def test_what_is_broken_is_found(sources: dict[str, Source], broken: str, name: str):
    edits, message = (BREAKAGES | BREAKAGES_LISTED)[name]
    form, source = FORMS[broken], sources[broken]
    ptx = source.ptx
    for pattern, replacement, which in edits:
        places = list(re.finditer(pattern, ptx))
        for place in reversed(places if which is None else [places[which]]):
            ptx = ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :]
    assert ptx != source.ptx
    try:
        found = (
            "right" if run(form, replace(source, ptx=ptx), ["ties", "one bin"], [(0, form.columns)] * 2, 0) else "wrong"
        )
    except PtxError as error:
        found = str(error)
    assert re.search(message, found)


@pytest.mark.parametrize(
    "wrong", [{"columns": 1}, {"stride_logits": -1}, {"stride_indices": 2}, {"stride_indices": -4}]
)
def test_wrong_arguments_are_found(sources: dict[str, Source], wrong: dict[str, int]):
    form = FORMS["2 programs"]
    right = {"columns": form.columns, "stride_logits": form.columns + form.gap, "stride_indices": K + 3}
    wrong = {name: right[name] + by for name, by in wrong.items()}
    with pytest.raises(PtxError, match=r"out of bounds|no barrier orders"):
        run(form, sources["2 programs"], ["normal"], [(0, 2**31 - 1)] * 3, 0, **wrong)
