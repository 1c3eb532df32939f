from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blackwell_kernels.common import arch


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA H200 MIG 1g.18gb", "h200-mig-1g-18gb"),
        ("", "unknown"),
    ],
)
def test_variants_of_a_chip_do_not_share_measurements(name, slug):
    assert arch.gpu_slug(name) == slug


@given(st.text())
def test_a_slug_is_always_a_safe_folder_name(name):
    slug = arch.gpu_slug(name)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert arch.gpu_slug(slug) == slug


def test_known_chips_are_returned_as_recorded():
    assert arch.arch_of("NVIDIA H200", sm=90, sms=132, smem_bytes=232_448) is arch.ARCHS["h200"]


def test_a_part_of_a_known_chip_is_an_estimate():
    part = arch.arch_of("NVIDIA H200", sm=90, sms=66, smem_bytes=232_448)
    assert not part.measured
    assert part.copy_tbps == pytest.approx(arch.ARCHS["h200"].copy_tbps / 2)


@pytest.mark.parametrize(("sm", "kin"), [(80, "h200"), (90, "h200"), (100, "b200"), (103, "b200"), (120, "b200")])
def test_an_unknown_chip_is_estimated_from_its_generation(sm, kin):
    known = arch.ARCHS[kin]
    guess = arch.arch_of("NVIDIA X1", sm=sm, sms=known.sms, smem_bytes=99 * 1024)
    assert (guess.sm, guess.smem_bytes, guess.measured) == (sm, 99 * 1024, False)
    assert guess.fp8_tflops == pytest.approx(known.fp8_tflops)


def test_a_cpu_is_no_gpu():
    assert arch.current_arch("cpu") is arch.CPU
    if not torch.cuda.is_available():
        assert arch.current_arch() is arch.CPU


def test_another_chip_can_be_pretended():
    with arch.pretend("h200"), arch.pretend("b200"):
        assert arch.current_arch() == arch.current_arch("cpu") == arch.ARCHS["b200"]
        assert arch.current_gpu() == "b200"
    assert arch.current_arch("cpu") is arch.CPU
    assert arch.current_gpu("cpu") is None


@pytest.mark.gpu
def test_the_gpu_here_is_described_by_its_own_properties():
    here = arch.current_arch()
    properties = torch.cuda.get_device_properties(0)
    assert (here.sm, here.sms) == (properties.major * 10 + properties.minor, properties.multi_processor_count)
    assert arch.current_gpu() == arch.gpu_slug(properties.name)
