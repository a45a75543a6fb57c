"""transformers' greedy generation: tokens and their log-probabilities."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def greedy_transformers(directory: Path, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    results = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, len(prompt) :].tolist()
        results.append((ids, [step[0].log_softmax(-1)[i].item() for step, i in zip(output.logits, ids)]))
    return results


def assert_same_generation(got, want, bound: float) -> None:
    for (ids, logprobs), (want_ids, want_logprobs) in zip(got, want, strict=True):
        assert ids == want_ids
        assert max(abs(a - b) for a, b in zip(logprobs, want_logprobs, strict=True)) < bound
