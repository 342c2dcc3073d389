"""The peer beside `ferrotron bench`: the same checkpoint in Hugging Face transformers on the CPU.

    pip install -r models/tiny/requirements.txt
    python benches/peer.py models/tiny            # decode and prefill, medians of 5, FP32

Its prefill runs the reference PyTorch path: the fused CUDA kernels have no CPU form.
"""

import statistics
import sys
import time

import torch
from transformers import NemotronHForCausalLM

CONTEXT, DECODE, PREFILL, REPEATS = 64, 64, 512, 5


def ids(vocab, length):
    """The same ids that `ferrotron bench` reads."""
    return torch.tensor([[(i * 7919 + 13) % vocab for i in range(length)]])


@torch.inference_mode()
def decode(model):
    prompt = ids(model.config.vocab_size, CONTEXT)
    out = model(prompt, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(DECODE):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return DECODE / (time.perf_counter() - start)


@torch.inference_mode()
def prefill(model):
    prompt = ids(model.config.vocab_size, PREFILL)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return PREFILL / (time.perf_counter() - start)


def main():
    model = NemotronHForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    for name, measure in (("decode, batch 1", decode), (f"prefill {PREFILL}", prefill)):
        measure(model)
        rate = statistics.median(measure(model) for _ in range(REPEATS))
        print(f"transformers {name}: {rate:.1f} tok/s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
