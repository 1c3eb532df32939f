"""What is measured: one `Spec` per FlashInfer-Bench definition, and the rule by which its outputs are compared.

Tensors are written `dtype[axis, axis]`, scalars `dtype`. FlashInfer-Bench has no uint8, so byte caches are int8 here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

# a peer may trade accuracy for speed (vLLM's DeepGEMM layer rounds weight scales up to powers of two, which alone costs
# 1.7e-3 where ours may miss 1e-3): leaving it out would flatter ours, so it is timed, counted and flagged
PEER_SLACK = 4.0
Kind = Literal["close", "logits", "selection", "routing"]


@dataclass(frozen=True)
class Rule:
    """How one output is compared with the reference's.

    close: 1 − similarity <= `dissimilarity` and at least `matched` of the elements within atol + rtol·|reference|;
    infinities must be reproduced. logits: the same, on the elements the reference leaves finite; the others are
    columns outside a row's range, unspecified; and atol counts in bounds that are derived from the inputs, element by
    element, from what FP8 tensor cores may lose (`kernels/dsa/testing.py`: logits_bound). selection: indices in any
    order; how many, none twice, and the sorted scores of what was selected must agree, atol in root mean squares of
    them. routing: weights, compared in descending order, since ids may be permuted.
    """

    kind: Kind = "close"
    dissimilarity: float = 1e-5
    atol: float = 1e-2
    rtol: float = 1e-2
    matched: float = 1.0

    def for_peers(self) -> Rule:
        """What a peer must meet to be timed: PEER_SLACK times ours on values, the same on selections and routing."""
        if self.kind in ("selection", "routing"):
            return self
        slack = {name: PEER_SLACK * getattr(self, name) for name in ("dissimilarity", "atol", "rtol")}
        return replace(self, **slack)


@dataclass(frozen=True)
class Spec:
    """One definition. `mutates` maps an output to the input that may be updated in place and returned as that output.

    `rows` names the axis along which rows are independent: on large cases the reference then checks a sample of them.
    `reduced` gives constant axes smaller values for machines without a GPU.
    """

    name: str
    op: str
    description: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    reference: str
    constants: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    mutates: dict[str, str] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tokens: str = "num_tokens"
    rows: str | None = None
    reduced: dict[str, int] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, int | None]:
        """Axis name -> value, None when variable; in order of appearance."""
        names = [axis for tensor in (*self.inputs.values(), *self.outputs.values()) for axis in shape_of(tensor) or ()]
        return {name: self.constants.get(name) for name in dict.fromkeys(names)}

    def rule(self, output: str) -> Rule:
        """The comparison rule of `output`."""
        return self.rules.get(output, Rule())

    def cpu(self) -> Spec:
        """This definition with its constant axes reduced; itself where nothing needs reducing."""
        if not self.reduced:
            return self
        return replace(self, name=f"{self.name}_reduced", constants={**self.constants, **self.reduced}, reduced={})


def dtype_of(tensor: str) -> str:
    """`bfloat16` of `bfloat16[a, b]`."""
    return tensor.split("[", 1)[0]


def shape_of(tensor: str) -> tuple[str, ...] | None:
    """`("a", "b")` of `bfloat16[a, b]`; None for a scalar."""
    match = re.fullmatch(r"\w+\[(.*)\]", tensor)
    return None if match is None else tuple(name.strip() for name in match[1].split(","))


FP8_CLOSE = Rule(dissimilarity=1e-3, atol=2e-2, rtol=0.1, matched=0.98)
# Hopper's sums of FP8 products err by 1.3e-4 of the root mean square, 1e-8 here; weights rounded to bf16 by 6e-7
LOGITS = Rule("logits", dissimilarity=1e-7, atol=1.0, rtol=0.0)
LSE = Rule(atol=1e-3, rtol=1e-3)
STATE_BF16 = Rule(dissimilarity=1e-4, atol=1e-2, rtol=2e-2, matched=0.999)
STATE_F32 = Rule(dissimilarity=1e-4, atol=5e-3, rtol=1e-2, matched=0.999)
SELECTION, ROUTING = Rule("selection", atol=1e-4, rtol=1e-4), Rule("routing", atol=1e-5, rtol=1e-4)
