"""Fingerprints see every byte and its place, whatever the shape, type and stride."""

import pytest
import torch

from blackwell_kernels.microbench import guards

EXAMPLES = [
    torch.arange(1000, dtype=torch.float32),
    torch.full((7, 3), torch.nan, dtype=torch.bfloat16),
    torch.zeros(13, dtype=torch.uint8),
    torch.zeros(64, dtype=torch.uint8)[3:],
    torch.zeros(5, 6, dtype=torch.float8_e4m3fn).t(),
    torch.zeros(3, dtype=torch.bool),
]


@pytest.mark.parametrize("x", EXAMPLES, ids=lambda x: f"{x.dtype} {list(x.shape)}")
def test_any_changed_element_is_seen(x):
    before = guards.fingerprints({"x": x})
    assert guards.changed({"x": x}, before) == []
    for place in (0, x.numel() // 2, x.numel() - 1):
        other = x.clone().contiguous()
        other.flatten().view(torch.uint8)[place * x.element_size()] ^= 1
        assert guards.changed({"x": other}, before) == ["x"]


def test_places_count_and_scalars_do_not():
    x = torch.tensor([1, 2, 3, 4])
    assert guards.fingerprint(x) != guards.fingerprint(x.flip(0))
    assert guards.fingerprints({"scale": 0.5}) == {}
    assert guards.fingerprint(torch.empty(0)) == 0


def test_large_tensors_are_read_in_pieces(monkeypatch):
    x = torch.randint(0, 1 << 30, (1000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(guards, "_WORDS", 64)
    before = guards.fingerprint(x)
    x[900] += 1
    assert guards.fingerprint(x) != before
