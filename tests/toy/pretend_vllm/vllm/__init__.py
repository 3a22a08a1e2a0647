"""As much of vLLM as its process in ksweep uses, without a model: a text is its seed, as often as it may have tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

FAILING_SEED = 666


class EngineArgs(SimpleNamespace):
    pass


class SamplingParams(SimpleNamespace):
    pass


class LLMEngine:
    def __init__(self, args: EngineArgs) -> None:
        self.running: dict[str, tuple[SamplingParams, int]] = {}
        self.vllm_config = SimpleNamespace(use_v2_model_runner=False, cache_config=SimpleNamespace(block_size=args.block_size))

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert prompt["prompt_embeds"].ndim == 2
        self.running[request_id] = params, 0

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def step(self) -> list[Any]:
        outputs = []
        for request_id, (params, num_tokens) in list(self.running.items()):
            if params.seed == FAILING_SEED:
                raise RuntimeError("a kernel is missing")
            self.running[request_id] = params, num_tokens + 1
            if finished := num_tokens + 1 == params.max_tokens:
                del self.running[request_id]
            text = SimpleNamespace(
                token_ids=[params.seed] * (num_tokens + 1), finish_reason="length" if finished else None,
                cumulative_logprob=-float(num_tokens + 1), logprobs=[{params.seed: SimpleNamespace(logprob=-1.0)}],
            )  # fmt: skip
            outputs.append(SimpleNamespace(request_id=request_id, finished=finished, outputs=[text]))
        return outputs
