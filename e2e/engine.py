"""vLLM in this process: a model of generated weights, requests with forced tokens, steps one at a time.

Needs VLLM_ENABLE_V1_MULTIPROCESSING=0 (set by `equal`): the engine then runs here, where a profiler sees its kernels
and `status` counts its tokens. With several ranks every rank runs this same code (`external_launcher`).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.e2e.plan import Request, step_tokens

LOAD_FORMAT = "blackwell_kernels_generated"
GENERATOR_FILE = "generator.json"
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<which>gate|up|down)_proj\.(?P<kind>\w+)")


def register_loader() -> None:
    """Teach vLLM of this process to fill a model from `weights.generate`, straight on the device."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from blackwell_kernels.e2e.weights import generate

    @register_model_loader(LOAD_FORMAT)
    class GeneratedLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            folder = Path(model_config.model)
            config = json.loads((folder / "config.json").read_text())
            draft = "MTP" in type(model).__name__
            only = ("mtp.", "model.embed_tokens.", "lm_head.") if draft else ("model.", "lm_head.")
            settings = json.loads((folder / GENERATOR_FILE).read_text())
            device = next(model.parameters()).device
            made = generate(config, device=device, mtp=draft, only=only, **settings)
            model.load_weights(whole_layers(dict(model.named_parameters()), made))


def whole_layers(
    parameters: Mapping[str, Any], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the experts of a layer to their parameter's own loader in one piece, and yield everything else.

    vLLM looks for the parameter of every expert's tensor among those of all experts: some 0.3 ms each on a GPU's host
    (8 layers of Qwen3-Next took 9.5 s), most of a minute for all 147,456. Its loader also takes all experts at once.
    Those that EP splits go the usual way.
    """
    held: dict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    for name, tensor in weights:
        match = _EXPERT.fullmatch(name)
        target = _parameter(parameters, match) if match else None
        if match is None or target is None:
            yield name, tensor
            continue
        stack, whole = held[match["layer"], match["which"], match["kind"]], parameters[target]
        if int(match["expert"]) != len(stack):
            raise ValueError(f"{name} follows expert {len(stack) - 1}: experts come in order")
        stack.append(tensor)
        if len(stack) == whole.shape[0]:
            shard = {"gate": "w1", "up": "w3", "down": "w2"}[match["which"]]
            whole.weight_loader(whole, torch.stack(stack), target, shard_id=shard, expert_id=0)
            stack.clear()


def _parameter(parameters: Mapping[str, Any], match: re.Match[str]) -> str | None:
    """The name of the parameter that holds this tensor of every expert; None where there is none."""
    part = "w2" if match["which"] == "down" else "w13"
    for inner in ("routed_experts.", ""):
        name = f"{match['layer']}.{inner}{part}_{match['kind']}"
        if name in parameters:
            owner = getattr(parameters[name].weight_loader, "__self__", None)
            every = getattr(owner, "global_num_experts", None) == parameters[name].shape[0]
            return name if every else None
    return None


def forced_tokens() -> type:
    """A logits processor that makes a request emit the tokens in its `extra_args["forced"]`.

    vLLM reports log p from the logits as they were before processors, so the forced tokens are scored by the model.
    """
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForcedTokens(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            forced = (params.extra_args or {}).get("forced")
            if forced is None:
                return None

            def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
                logits.fill_(float("-inf"))
                logits[forced[len(output)]] = 0.0
                return logits

            return force

    return ForcedTokens


class Engine:
    """An `LLM` stepped by hand. `settings` go to vLLM's LLM(...)."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, force: bool = True) -> None:
        from vllm import LLM

        register_loader()
        self.force = force
        processors = [forced_tokens()] if force else None
        # asynchronous scheduling runs ahead of the tokens that a processor must see
        self.llm = LLM(
            model=str(folder),
            load_format=LOAD_FORMAT,
            skip_tokenizer_init=True,
            logits_processors=processors,
            async_scheduling=False,
            seed=0,
            **settings,
        )
        self.engine: Any = self.llm.llm_engine
        self.batches: Counter[str] = Counter()
        self.accepted: Counter[int] = Counter()
        self.largest = 0
        self.scheduler: Any = self.engine.engine_core.engine_core.scheduler
        self.most_step_tokens: int = self.scheduler.max_num_scheduled_tokens
        self._watch(self.scheduler)

    def _watch(self, scheduler: Any) -> None:
        """Count steps by kind, from what the scheduler put into them."""
        stock = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            before = {r.request_id: (r.num_computed_tokens, r.num_prompt_tokens) for r in scheduler.running}
            out = stock(*args, **kwargs)
            prefills = decodes = 0
            for name in out.num_scheduled_tokens:
                computed, prompt = before.get(name, (0, 1))
                decodes += computed >= prompt
                prefills += computed < prompt
            if prefills or decodes:
                self.batches["mixed" if prefills and decodes else "prefill" if prefills else "decode"] += 1
                self.largest = max(self.largest, prefills + decodes)
            return out

        scheduler.schedule = schedule

    def limit_step(self, composition: str) -> None:
        """Let a step hold as many tokens as the composition says."""
        # a step must be able to hold one block where prefixes are cached by block
        block = self.scheduler.cache_config.block_size
        self.scheduler.max_num_scheduled_tokens = step_tokens(composition, self.most_step_tokens, block)

    def add(self, request: Request, *, greedy_tokens: int = 0) -> None:
        """Queue a request: its forced tokens, or `greedy_tokens` of the model's own choice."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=greedy_tokens or len(request.forced),
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if request.scored else None,
            detokenize=False,
            extra_args=None if greedy_tokens else {"forced": list(request.forced)},
        )
        self.engine.add_request(request.name, {"prompt_token_ids": list(request.prompt)}, params)

    def run(self, arrivals: Iterable[tuple[int, Request]], *, greedy_tokens: int = 0) -> dict[str, dict[str, Any]]:
        """Run requests to their end, each added at its step: {name: {prompt, decode, tokens}} (log p and token ids)."""
        waiting = list(arrivals)
        done: dict[str, dict[str, Any]] = {}
        produced: Counter[str] = Counter()
        step = 0
        while waiting or self.engine.has_unfinished_requests():
            if not self.engine.has_unfinished_requests():
                step = max(step, waiting[0][0])
            while waiting and waiting[0][0] <= step:
                self.add(waiting.pop(0)[1], greedy_tokens=greedy_tokens)
            for output in self.engine.step():
                tokens = len(output.outputs[0].token_ids)
                if produced[output.request_id]:
                    self.accepted[tokens - produced[output.request_id]] += 1
                produced[output.request_id] = tokens
                if output.finished:
                    done[output.request_id] = _scores(output)
            step += 1
        return done

    def take_counts(self) -> dict[str, Any]:
        """Steps by kind, tokens gained per decode step, largest batch, since the last call."""
        found = {"steps": dict(self.batches), "tokens_per_step": dict(self.accepted), "largest_batch": self.largest}
        self.batches.clear()
        self.accepted.clear()
        self.largest = 0
        return found


def _scores(output: Any) -> dict[str, Any]:
    prompt = output.prompt_logprobs
    completion = output.outputs[0]
    return {
        "prompt": [row[t].logprob for t, row in zip(output.prompt_token_ids[1:], prompt[1:], strict=True)]
        if prompt
        else [],
        "decode": [row[t].logprob for t, row in zip(completion.token_ids, completion.logprobs, strict=True)],
        "tokens": list(completion.token_ids),
    }
