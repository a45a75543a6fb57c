"""transformers in float64 as the reference of loss, logits and gradients, and its float32 as the measure of rounding.

polyshard sums in another order, so it may be up to four times as far from float64 as transformers' float32 (observed:
at most about twice), with a floor of a few units in the last place.
"""

import torch
import transformers
from torch.nn import functional as F

from support.models.tiny import VOCAB

MARGIN = 4.0
FLOOR = 1e-6  # relative: about eight roundings of float32

MODELS = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),  # fewer KV heads than tensor ranks
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


def batch(vocab=VOCAB, rows=4, length=12):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocab, (rows, length), generator=generator)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    return input_ids, labels


def run_transformers(directory, input_ids, labels, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    logits = model(input_ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits.detach(), "gradients": gradients}


def reference(directory, input_ids, labels):
    return tuple(run_transformers(directory, input_ids, labels, dtype) for dtype in (torch.float64, torch.float32))


def relative_error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def assert_equal_to_reference(result, expected):
    exact, rounded = expected
    result = {**result, "loss": torch.tensor(result["loss"], dtype=torch.float64)}
    for name in ("loss", "logits"):
        bound = MARGIN * relative_error(rounded[name], exact[name]) + FLOOR
        assert relative_error(result[name], exact[name]) < bound, name
    assert set(result["gradients"]) == set(exact["gradients"])
    # One bound for all gradients: the error of a single small tensor is a matter of luck.
    worst = max(relative_error(rounded["gradients"][name], g) for name, g in exact["gradients"].items())
    bound = MARGIN * worst + FLOOR
    for name, gradient in exact["gradients"].items():
        assert relative_error(result["gradients"][name], gradient) < bound, name
