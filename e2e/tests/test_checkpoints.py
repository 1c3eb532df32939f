"""Checkpoints: the names and shapes that transformers and vLLM expect, values that behave, files found again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blackwell_kernels.e2e import checkpoints, models, reference, weights
from blackwell_kernels.errors import BlackwellKernelsError

TINY = [(model, quant) for model in models.MODELS for quant in ("bf16", "fp8")]


@pytest.fixture(scope="module", params=TINY, ids="-".join)
def tiny(request: pytest.FixtureRequest, cache: Path) -> tuple[str, str, Path]:
    model, quant = request.param
    return model, quant, checkpoints.build(model, quant=quant)


def test_transformers_takes_every_tensor_and_misses_none(tiny: tuple[str, str, Path]) -> None:
    import transformers

    _, quant, folder = tiny
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    del_quantised = {n: t for n, t in checkpoints.load_weights(folder) if not n.endswith("scale_inv")}
    state = {n: t.to(torch.bfloat16) for n, t in del_quantised.items()}
    if quant == "fp8":
        del config.quantization_config
    _, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_scales_are_positive_and_weights_finite(tiny: tuple[str, str, Path]) -> None:
    model, quant, folder = tiny
    tensors = dict(checkpoints.load_weights(folder))
    scales = {n: t for n, t in tensors.items() if n.endswith("weight_scale_inv")}
    assert bool(scales) == (quant == "fp8")
    for name, scale in scales.items():
        weight = tensors[name.removesuffix("_scale_inv")]
        assert weight.dtype == torch.float8_e4m3fn
        assert scale.shape == tuple(-(-s // 128) for s in weight.shape)
        assert (scale > 0).all()
        if model == "deepseek-v3.2":
            assert (torch.log2(scale) % 1 == 0).all(), "powers of two, as scale_fmt says"
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())
    spread = torch.cat([s.flatten() for s in scales.values()]) if scales else torch.tensor([1.0, 9.0])
    assert spread.max() / spread.min() > 3, "a scale of the wrong block must matter"


def test_found_again_and_rebuilt_when_anything_changes(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    one = checkpoints.build("qwen", root=tmp_path, say=said.append)
    again = checkpoints.build("qwen3-next", root=tmp_path, say=said.append)
    assert one == again
    assert "written" in said[0]
    assert "found in the cache" in said[1]
    assert checkpoints.build("qwen", root=tmp_path, seed=1) != one
    assert checkpoints.build("qwen", root=tmp_path, layers=8) != one
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_same_seed_same_tensors_in_any_order() -> None:
    config = models.hf_config("qwen3-next")
    whole = dict(weights.generate(config, seed=3))
    part = dict(weights.generate(config, seed=3, only=("model.layers.2.mlp.experts.5.",)))
    assert len(part) == 6
    for name, tensor in part.items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8))
    other = dict(weights.generate(config, seed=4, only=("model.layers.2.mlp.experts.5.",)))
    assert not any(torch.equal(part[n].view(torch.uint8), other[n].view(torch.uint8)) for n in part)


def test_default_dtype_does_not_change_the_weights() -> None:
    config = models.hf_config("qwen3-next")
    only = ("model.layers.0.linear_attn.",)
    expected = dict(weights.generate(config, only=only))
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        got = dict(weights.generate(config, only=only))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[n].view(torch.uint8), t.view(torch.uint8)) for n, t in expected.items())


@pytest.mark.parametrize("ue8m0", [False, True])
def test_block_quantisation_against_its_definition(ue8m0: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(300, 200) * torch.linspace(0.1, 9, 200)
    q, scale = weights.quantise_blocks(w, ue8m0=ue8m0)
    assert q.shape == w.shape
    assert scale.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            block = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            exact = block.abs().max() / 448
            s = 2.0 ** torch.ceil(torch.log2(exact)) if ue8m0 else exact
            assert scale[i, j] == pytest.approx(float(s))
            expected = (block / scale[i, j]).to(torch.float8_e4m3fn).float() * scale[i, j]
            back = weights.dequantise_blocks(q, scale)[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert torch.equal(back, expected)


def test_linears_keep_the_size_of_their_input() -> None:
    config = models.hf_config("deepseek", quant="bf16")
    torch.manual_seed(0)
    for name, w in weights.generate(config, only=("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj")):
        y = torch.randn(64, w.shape[1]) @ w.float().T
        assert float(y.pow(2).mean().sqrt()) == pytest.approx(1.0, rel=0.25), name


def test_experts_are_used_unevenly_but_all_are_used(cache: Path) -> None:
    ref = reference.Reference(checkpoints.build("qwen"))
    chosen: list[torch.Tensor] = []
    gate = ref.model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1]))
    ref.log_probs(np.random.default_rng(0).integers(3, 1024, 200).tolist())
    counts = torch.bincount(chosen[0].flatten(), minlength=8)
    assert counts.min() > 0
    assert counts.max() > 1.5 * counts.min()


def test_reference_leaves_kernels_for_gpus_alone(cache: Path, tmp_path: Path) -> None:
    folder = checkpoints.build("qwen")
    package = tmp_path / "fla" / "ops" / "gated_delta_rule"
    package.mkdir(parents=True)
    kernels = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    (package / "__init__.py").write_text(
        "".join(f"def {k}(*a, **k):\n    raise ValueError('cpu tensor')\n" for k in kernels)
    )
    (tmp_path / "fla" / "__init__.py").touch()
    (tmp_path / "fla" / "ops" / "__init__.py").touch()
    run = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from blackwell_kernels.e2e.reference import Reference
print(len(Reference(Path({str(folder)!r})).log_probs([5, 6, 7])), "fla" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_reference_rounds_inputs_of_experts_only_when_asked(cache: Path) -> None:
    folder = checkpoints.build("qwen")
    tokens = np.random.default_rng(0).integers(3, 1024, 40).tolist()
    plain, experts, everything = (
        reference.Reference(folder, inputs=kind).log_probs(tokens) for kind in ("none", "experts", "all")
    )
    assert plain.shape == (39,)
    assert 0 < np.abs(plain - experts).mean() < 0.2
    assert np.abs(plain - everything).mean() > np.abs(plain - experts).mean()
    assert np.exp(plain).max() < 1


def test_real_dimensions_are_the_published_ones() -> None:
    qwen, deepseek = models.hf_config("qwen", "real", layers=8), models.hf_config("deepseek", "real", layers=5)

    def gib(config: dict[str, object]) -> float:
        quantised = {True: 1, False: 2}
        return sum(np.prod(s.shape) * quantised[s.fp8] for s in weights.tensor_specs(config)) / 2**30

    assert gib(qwen) == pytest.approx(13.5, abs=1)
    assert gib(deepseek) == pytest.approx(26, abs=2)
    full = models.hf_config("qwen", "real")
    assert sum(np.prod(s.shape) for s in weights.tensor_specs(full)) / 1e9 == pytest.approx(79.7, abs=0.5)
    full = models.hf_config("deepseek", "real")
    assert sum(np.prod(s.shape) for s in weights.tensor_specs(full)) / 1e9 == pytest.approx(671.9, abs=1)


def test_impossible_depths_and_unknown_names_say_what_to_do() -> None:
    with pytest.raises(BlackwellKernelsError, match="every fourth layer is full attention"):
        models.hf_config("qwen", layers=6)
    with pytest.raises(BlackwellKernelsError, match="the first 3 are dense"):
        models.hf_config("deepseek", "real", layers=3)
    with pytest.raises(BlackwellKernelsError, match="unknown model 'gpt'; supported: qwen3-next"):
        models.hf_config("gpt")


def test_tokenizer_round_trips_any_text(cache: Path) -> None:
    from transformers import AutoTokenizer

    folder = checkpoints.build("qwen")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == json.loads((folder / "config.json").read_text())["vocab_size"]
    text = "def f(x): return x ** 2  # ünïcödé, 漢字, \N{ROCKET}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_large_vocabulary_is_filled_and_every_id_decodes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoints.write_tokenizer(tmp_path, 8192)  # more than the made-up words give
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 8192
    assert tokenizer.decode([8191]).strip() == "w8191"
    text = "def f(x): return w8191"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_weights_depends_on_what_decides_them(tmp_path: Path) -> None:
    folder = checkpoints.without_weights("qwen", "tiny", "fp8", root=tmp_path)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors"))
    assert checkpoints.without_weights("qwen", "tiny", "fp8", root=tmp_path) == folder
    assert checkpoints.without_weights("qwen", "tiny", "fp8", seed=1, root=tmp_path) != folder
    assert checkpoints.without_weights("qwen", "tiny", "bf16", root=tmp_path) != folder
