"""The peer beside `ferrotron bench`: the same checkpoint in Hugging Face transformers on the CPU.

    pip install -r models/tiny/requirements.txt
    python benches/peer.py models/tiny                                          # decode and prefill, medians of 5
    python benches/peer.py DIR --dtype bfloat16 --threads 2 --prefill 512,2048

Its prefill runs the reference PyTorch path: the fused CUDA kernels have no CPU form.
"""

import argparse
import statistics
import time

import torch
from transformers import NemotronHForCausalLM

CONTEXT = 64


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a checkpoint folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per run")
    parser.add_argument("--prefill", default="512", help="lengths of prompts, one row each")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def ids(vocab, length):
    """The same ids that `ferrotron bench` reads."""
    return torch.tensor([[(i * 7919 + 13) % vocab for i in range(length)]])


@torch.inference_mode()
def decode(model, tokens):
    prompt = ids(model.config.vocab_size, CONTEXT)
    out = model(prompt, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return tokens / (time.perf_counter() - start)


@torch.inference_mode()
def prefill(model, length):
    prompt = ids(model.config.vocab_size, length)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return length / (time.perf_counter() - start)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = NemotronHForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    rows = [("decode, batch 1", lambda: decode(model, args.tokens))]
    rows += [(f"prefill {n}", lambda n=int(n): prefill(model, n)) for n in args.prefill.split(",")]
    for name, measure in rows:
        measure()
        rate = statistics.median(measure() for _ in range(args.repeats))
        print(f"transformers {args.dtype} {name}: {rate:.1f} tok/s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
