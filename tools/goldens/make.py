"""Make small random nemotron_h checkpoints and what transformers computes with them.

    pip install torch==2.15.0 transformers==5.23.0
    python tools/goldens/make.py            writes tests/goldens/<name>/{config.json,model.safetensors,golden.json}

FP32 on the CPU. `time_step_min` is set to a tiny number while computing, because transformers clamps dt from below
with it in prefill (and only there); the config.json that is written carries the usual 0.001, which a reader must
ignore. The stored weights are the ones computed with: F32, or BF16 values where the case says so.
"""

import copy
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

OUT = Path(__file__).resolve().parents[2] / "tests" / "goldens"

BASE = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "chunk_size": 8, "conv_kernel": 4, "expand": 2, "head_dim": 16, "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 96, "layer_norm_epsilon": 1e-5, "mamba_head_dim": 16, "mamba_hidden_act": "silu",
    "mamba_num_heads": 8, "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 4096, "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 2, "norm_eps": 1e-5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_logits_to_keep": 1, "rescale_prenorm_residual": True,
    "residual_in_fp32": False, "sliding_window": None, "ssm_state_size": 16, "tie_word_embeddings": False,
    "time_step_floor": 1e-4, "time_step_max": 0.1, "time_step_min": 0.001, "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 96,
}
MOE = {
    "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "rope_theta": 10000, "partial_rotary_factor": 1.0,
}
# name -> (pattern, changes, stored as BF16, lengths of the inputs)
MODELS = {
    # dense, one head per group, several Mamba groups
    "dense": ("M-*-M", {"n_groups": 8}, False, [1, 7, 8, 9, 29]),
    # routed experts on the full hidden, all four kinds of layer
    "moe": ("ME*-M", MOE, False, [1, 7, 8, 9, 29]),
    # routed experts in a latent space, BF16 weights
    "latent": ("MEM*E", MOE | {"moe_latent_size": 32, "routed_scaling_factor": 5.0}, True, [1, 8, 13, 29]),
    # group-limited routing, weights not normalised
    "grouped": ("E*ME", MOE | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
                              "n_routed_experts": 16, "num_experts_per_tok": 4}, False, [1, 9, 21]),
    # group-limited, normalised, latent
    "grouped-latent": ("ME*", MOE | {"n_group": 2, "topk_group": 1, "moe_latent_size": 16, "num_experts_per_tok": 5,
                                     "routed_scaling_factor": 1.5}, False, [5, 17]),
    # no convolution bias, four heads in one group, chunk of 5, sizes that are no powers of two
    "odd": ("MM*M-", {"use_conv_bias": False, "n_groups": 1, "mamba_num_heads": 6, "mamba_head_dim": 12,
                      "hidden_size": 48, "head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2,
                      "ssm_state_size": 24, "intermediate_size": 56, "chunk_size": 5, "vocab_size": 71},
            False, [1, 4, 5, 6, 20]),
    # the real inner sizes: head 128, Mamba head 64, state 128; long inputs around the chunk of 128
    "wide": ("M*E", MOE | {"head_dim": 128, "mamba_head_dim": 64, "mamba_num_heads": 16, "ssm_state_size": 128,
                           "n_groups": 2, "chunk_size": 128, "moe_latent_size": 64, "moe_intermediate_size": 64,
                           "moe_shared_expert_intermediate_size": 128, "n_routed_experts": 8,
                           "num_experts_per_tok": 3}, True, [1, 127, 128, 129, 389]),
}
TOKENS = 16
MAX_ROWS = 16


def randomise(model, generator):
    """Every kind of parameter away from its default, sizes such that no layer dominates."""
    for name, p in model.named_parameters():
        def normal(std, mean=0.0):
            return mean + std * torch.randn(p.shape, generator=generator)
        if name.endswith("A_log"):
            value = torch.log(0.5 + 15 * torch.rand(p.shape, generator=generator))
        elif name.endswith("dt_bias"):
            dt = torch.exp(math.log(5e-4) + torch.rand(p.shape, generator=generator) * math.log(400))
            value = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith(".D"):
            value = normal(0.4, 1.0)
        elif "norm" in name:
            value = normal(0.2, 1.0)
        elif "conv1d" in name:
            value = normal(0.4) if name.endswith("weight") else normal(0.1)
        elif "embeddings" in name:
            value = normal(1.0)
        else:
            value = normal(1.2 / math.sqrt(p.shape[-1]))
        p.data.copy_(value)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.data.copy_(0.3 * torch.randn(b.shape, generator=generator))


def official(model, folder):
    """What save_pretrained writes, checked to be the official layout; one file, no metadata of ours."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        assert name.startswith(("backbone.", "lm_head.")), name
        assert ".experts." not in name or tensors[name].ndim == 2, name
    return tensors


@torch.no_grad()
def make(seed, name, pattern, changes, bf16, lengths):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = BASE | changes | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern),
                               "torch_dtype": "bfloat16" if bf16 else "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    used = NemotronHConfig.from_pretrained(folder)
    used.time_step_min = 1e-30
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(copy.deepcopy(used)).float().eval()
    randomise(model, generator)
    if bf16:
        for p in model.parameters():
            p.data.copy_(p.data.bfloat16())
    tensors = official(model, folder)
    for extra in folder.iterdir():
        extra.unlink()
    if bf16:
        tensors = {k: v if k.endswith("correction_bias") else v.bfloat16() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    # read back, so that the numbers belong to the files
    again, info = NemotronHForCausalLM.from_pretrained(folder, config=copy.deepcopy(used), dtype=torch.float32,
                                                       output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    again = again.float().eval()
    for (a, x), (_, y) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(x.float(), y.float()), a
    cases = []
    for n in lengths:
        ids = torch.randint(0, config["vocab_size"], (1, n), generator=generator)
        logits = again(ids).logits[0]
        rows = list(range(n)) if n <= MAX_ROWS * 2 else sorted({0, 1, 2, 3, n // 2, n - 5, n - 4, n - 3, n - 2, n - 1,
                                                                126, 127, 128, 255, 256, 257} & set(range(n)))
        tokens, y, margin = [], ids, math.inf
        for _ in range(TOKENS):
            last = again(y).logits[0, -1]
            best = last.topk(2).values
            margin = min(margin, float(best[0] - best[1]))
            tokens.append(int(last.argmax()))
            y = torch.cat([y, torch.tensor([[tokens[-1]]])], 1)
        cases.append({"ids": ids[0].tolist(), "rows": rows,
                      "logits": [[float(f"{v:.9g}") for v in row] for row in logits[rows].tolist()],
                      "tokens": tokens, "margin": float(f"{margin:.3g}")})
    doc = {"source": "transformers 5.23.0, FP32, CPU, time_step_min lowered to 1e-30 (no clamp of dt); `rows` are "
                     "positions of `ids`, `logits` their full rows, `tokens` the greedy continuation (full forward per "
                     "token, stop tokens not obeyed), `margin` the smallest lead of a greedy choice", "cases": cases}
    text = json.dumps(doc, separators=(",", ":")).replace('{"ids"', '\n{"ids"') + "\n"
    (folder / "golden.json").write_text(text)
    size = sum(f.stat().st_size for f in folder.iterdir())
    spread = max(float(torch.tensor(c["logits"]).abs().max()) for c in cases)
    print(f"{name:15} {pattern:6} {size / 1e6:.2f} MB, largest logit {spread:.1f}, smallest margins "
          f"{[c['margin'] for c in cases]}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for n, (name, spec) in enumerate(MODELS.items()):
        make(1000 + n, name, *spec)
    print(f"all: {sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file()) / 1e6:.2f} MB")
