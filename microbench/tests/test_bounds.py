"""Lower bounds, against numbers worked out by hand."""

import pytest
import torch

from blackwell_kernels.common import arch
from blackwell_kernels.microbench import device
from blackwell_kernels.microbench.bounds import Cost, cost, floor
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.results import Ceilings
from blackwell_kernels.microbench.workloads import generate

RATES = {"copy_tbps": 4.0, "fp8_tflops": 1000.0, "bf16_tflops": 500.0, "launch_us": 1.5}


def case_of(definition, part=""):
    return next(c for c in select(sets=("cpu",)) if c.definition == definition and part in c.name)


def test_floor_takes_the_largest_time():
    assert floor(Cost(4_000_000), **RATES) == (1.5, "launch")
    assert floor(Cost(40_000_000), **RATES) == (10.0, "memory")
    assert floor(Cost(1, 10**13, "fp8"), **RATES) == (10_000.0, "compute")
    assert floor(Cost(1, 10**13, "bf16"), **RATES) == (20_000.0, "compute")


def test_a_floor_takes_the_best_rates_known():
    slow, quick = (
        Ceilings(copy_tbps=t, fp8_tflops=t, bf16_tflops=t, launch_us=us) for t, us in ((1.0, 2.0), (1e4, 0.5))
    )
    with arch.pretend("h200"):
        known = arch.ARCHS["h200"]
        assert device.best_known(slow) == {name: getattr(known, name) for name in Ceilings.model_fields}
        assert device.best_known(quick) == quick.model_dump()
    with arch.pretend("b200"):
        assert device.best_known(slow) == slow.model_dump(), "estimates are no measurements"


def test_experts_count_once_however_many_tokens_they_have():
    case = case_of("moe_fp8_block", "num_tokens=33")
    inputs = generate(case)
    inputs["topk_ids"] = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32).expand(33, -1).contiguous()
    work = cost(case, inputs)
    hidden, inter = 256, 128
    weights = 4 * 3 * hidden * inter
    activations = 33 * (2 * 2 * hidden + 4 * 8)
    assert work.bytes == pytest.approx(weights + weights / 4096 + activations, rel=1e-6)
    assert work.flops == 33 * 4 * 6 * hidden * inter
    assert work.kind == "fp8"


def test_what_only_copies_reads_and_writes_each_byte_once():
    def moved(definition):
        case = case_of(definition)
        return cost(case, generate(case)).bytes

    assert moved("dsa_gather_indexer_k") == 2 * 3 * 200 * (128 + 4) + 3 * 4 * 4
    assert moved("dsa_kv_insert_bf16") == 7 * (2 * 576 * 2 + 8)


def test_experts_elsewhere_cost_nothing():
    case = case_of("moe_fp8_block_ep", "num_tokens=33")
    inputs = generate(case)
    inputs["expert_map"].fill_(-1)
    assert cost(case, inputs).flops == 0


def test_decode_reads_and_writes_each_state_once():
    small, large = (case_of("gdn_decode_state_f32"), case_of("gdn_decode_state_bf16", "batch_size=5"))
    states = 2 * 5 * 4 * 128 * 128
    assert states * 4 < cost(small, generate(small)).bytes < states * 4 * 1.05
    assert states * 2 < cost(large, generate(large)).bytes < states * 2 * 1.1


def test_sparse_attention_counts_distinct_entries_and_all_products():
    case = case_of("dsa_sparse_mla_bf16", "tiny")
    inputs = generate(case)
    inputs["req_id"].zero_()
    inputs["indices"] = torch.arange(128, dtype=torch.int32).expand(5, -1).contiguous()
    work = cost(case, inputs)
    own = 5 * 16 * 576 * 2 + 5 * 16 * (1024 + 4) + 5 * 128 * 4
    assert work.bytes == 128 * 1152 + own
    assert work.flops == 5 * 128 * 16 * 2 * 1088
    inputs["indices"][1:] = -1
    assert cost(case, inputs).flops == 128 * 16 * 2 * 1088


def test_logits_read_each_key_once_for_all_queries_of_a_sequence():
    case = case_of("dsa_indexer_logits_paged", "next_n=2")
    inputs = generate(case)
    keys = int(inputs["context_lens"].sum())
    work = cost(case, inputs)
    assert work.flops == keys * 2 * 64 * 256
    assert work.bytes == keys * 132 + keys * 2 * 4 + 4 * 64 * (128 + 4)


def test_keys_of_a_row_that_is_selected_whole_need_not_be_read():
    case = case_of("dsa_pair_decode", "context=3000")
    inputs = generate(case)
    inputs["context_lens"] = torch.tensor([2048, 3000, 1], dtype=torch.int32)
    work = cost(case, inputs)
    heads = inputs["q"].shape[2]
    assert work.bytes == 3000 * 132 + 3 * 2048 * 4 + 3 * heads * (128 + 4)
    assert work.flops == 3000 * heads * 256


@pytest.mark.parametrize("case", select(sets=("cpu",)), ids=lambda c: c.uuid)
def test_every_case_has_a_cost_no_larger_than_what_it_allocates(case):
    inputs = generate(case)
    work = cost(case, inputs)
    axes = case.full_axes()
    assert work.bytes > 0
    tensors = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))
    outputs = 0
    for text in case.spec.outputs.values():
        shape = text.split("[")[1].rstrip("]").split(", ")
        size = 4 if "32" in text.split("[")[0] else 2
        outputs += size * torch.Size([axes[name] for name in shape]).numel()
    # a pool's state is read and written; everything else is read or written once
    assert work.bytes <= 2 * tensors + outputs
