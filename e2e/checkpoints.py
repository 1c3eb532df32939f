"""Checkpoints on disk: config, local byte-level tokenizer, seeded random weights. Nothing is downloaded.

A checkpoint lives under a name that contains the hash of everything that decides its content (config, seed, generator
source, tokenizer source), so a changed generator never meets an old file, and a finished one is found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import models
from blackwell_kernels.errors import BlackwellKernelsError

SHARD_BYTES = 4 << 30
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cache_root() -> Path:
    """Where checkpoints are kept: $XDG_CACHE_HOME/blackwell-kernels (~/.cache by default)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blackwell-kernels"


def content_hash(config: dict[str, Any], seed: int) -> str:
    """Twelve hex digits that change with anything that changes the checkpoint's bytes."""
    here = Path(__file__).parent
    digest = hashlib.sha256(json.dumps([config, seed], sort_keys=True).encode())
    for source in ("weights.py", "checkpoints.py"):
        digest.update((here / source).read_bytes())
    return digest.hexdigest()[:12]


def build(
    model: str,
    *,
    size: str = "tiny",
    quant: str = "fp8",
    seed: int = 0,
    layers: int | None = None,
    device: str = "cpu",
    root: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """The folder of a checkpoint that vLLM and transformers can load, written now unless the cache holds it."""
    name = models.canonical(model)
    config = models.hf_config(name, size, quant, layers)
    folder = (root or cache_root()) / "checkpoints" / f"{name}-{size}-{quant}-{content_hash(config, seed)}"
    if (folder / "config.json").is_file():
        say(f"checkpoint {folder.name}: found in the cache")
        return folder
    # written beside and renamed whole: a build cut short leaves nothing that looks finished
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir(parents=True)
        write_tokenizer(part, config["vocab_size"])
        total = write_weights(part, config, seed=seed, device=device)
        write_config(part, config)
        try:
            part.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process finished first
                raise
    except OSError as error:
        raise BlackwellKernelsError(
            f"cannot write the checkpoint {folder}: {error}; free some space or set XDG_CACHE_HOME"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"checkpoint {folder.name}: written, {total / 1e6:.1f} MB")
    return folder


def without_weights(
    model: str, size: str, quant: str, layers: int | None = None, seed: int = 0, root: Path | None = None
) -> Path:
    """A folder with configuration and tokenizer only, for load formats that read no weights."""
    name = models.canonical(model)
    config = models.hf_config(name, size, quant, layers)
    folder = (root or cache_root()) / "checkpoints" / f"{name}-{size}-{quant}-{content_hash(config, seed)}-empty"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, config["vocab_size"])
        write_config(folder, config)
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json and generation_config.json (greedy)."""
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False}, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_weights(folder: Path, config: dict[str, Any], *, seed: int, device: str = "cpu", mtp: bool = False) -> int:
    """Write model-*.safetensors and its index, one shard of ≤ 4 GiB in memory at a time; returns the bytes written."""
    from safetensors.torch import save_file

    from blackwell_kernels.e2e.weights import generate

    shards: list[Path] = []
    index: dict[str, str] = {}
    total = 0

    def flush(shard: dict[str, Any]) -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in shard.items()}, path, metadata={"format": "pt"})
        shards.append(path)
        index.update(dict.fromkeys(shard, path.name))

    shard: dict[str, Any] = {}
    held = 0
    for name, tensor in generate(config, seed=seed, device=device, mtp=mtp):
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            flush(shard)
            shard, held = {}, 0
        shard[name] = tensor
        held += size
        total += size
    flush(shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=0)
    )
    return total


def load_weights(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every (name, tensor) of a checkpoint folder, on the CPU."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                yield name, shard.get_tensor(name)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens, trained on seeded made-up words: any text round-trips."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as bpe
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "or")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(4000)]
    tokenizer = Tokenizer(bpe.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    # the words give some thousand tokens; the rest of a large vocabulary decodes to names that nothing encodes to
    described = json.loads(tokenizer.to_str())
    known = described["model"]["vocab"]
    known |= {f"\u0120w{i}": i for i in range(len(known), vocab_size)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
