"""Writes this checkpoint as GGUF, by llama.cpp's own `gguf` package: an independent check of the reader.

    pip install gguf              # besides requirements.txt
    python models/tiny/gguf_export.py BF16 /tmp/tiny-BF16.gguf
    cargo run --release -- chat --model /tmp/tiny-BF16.gguf

The type is one that the package can write: F32, F16, BF16, Q8_0, Q4_0. Names, shapes and permutations are those of
llama.cpp's converter; the router, norms and other small tensors stay F32 as it leaves them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file

HERE = Path(__file__).parent

# Our names and GGUF's, of a layer's matrices.
MATRICES = {
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
}
# Those that stay F32.
SMALL = {
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
}


class Export:
    def __init__(self, kind: str, out: Path) -> None:
        self.config = json.loads((HERE / "config.json").read_text())
        self.tensors = load_file(HERE / "model.safetensors")
        self.kind = GGMLQuantizationType[kind]
        self.writer = GGUFWriter(out, "nemotron_h_moe")

    def metadata(self) -> None:
        config, writer = self.config, self.writer
        layers = config["hybrid_override_pattern"]
        mtp = config["num_nextn_predict_layers"]
        kinds = list(layers) + ["!"] * mtp
        writer.add_block_count(len(kinds))
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv([config["num_key_value_heads"] if k in "*!" else 0 for k in kinds])
        writer.add_feed_forward_length([config["moe_intermediate_size"] if k in "E!" else 0 for k in kinds])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_ssm_conv_kernel(config["conv_kernel"])
        writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
        writer.add_ssm_state_size(config["ssm_state_size"])
        writer.add_ssm_group_count(config["n_groups"])
        writer.add_ssm_time_step_rank(config["mamba_num_heads"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_expert_count(config["n_routed_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        writer.add_moe_latent_size(config["moe_latent_size"])
        writer.add_nextn_predict_layers(mtp)

    def tokenizer(self) -> None:
        tokenizer, writer = json.loads((HERE / "tokenizer.json").read_text()), self.writer
        tokens = {i: (text, TokenType.NORMAL) for text, i in tokenizer["model"]["vocab"].items()}
        for added in tokenizer["added_tokens"]:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]] = (added["content"], kind)
        ordered = [tokens[i] for i in range(len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("pixtral")
        writer.add_token_list([text for text, _ in ordered])
        writer.add_token_types([kind for _, kind in ordered])
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(11)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_chat_template((HERE / "chat_template.jinja").read_text())

    def values(self, name: str) -> np.ndarray:
        return self.tensors[name].float().contiguous().numpy()

    def matrix(self, name: str, values: np.ndarray) -> None:
        self.writer.add_tensor(name, quantize(values, self.kind), raw_dtype=self.kind)

    def interleaved(self, values: np.ndarray) -> np.ndarray:
        heads = values.shape[0] // self.config["head_dim"]
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    def small(self, name: str, values: np.ndarray) -> np.ndarray:
        if name.endswith("A_log"):
            return -np.exp(values)[:, None]
        if name.endswith(".D"):
            return values[:, None]
        if name.endswith("conv1d.weight"):
            return values.squeeze(1)
        if name.endswith("mixer.norm.weight"):
            return values.reshape(self.config["n_groups"], -1)
        return values

    def mixer(self, prefix: str, block: int) -> None:
        for here, there in MATRICES.items():
            name = f"{prefix}.{here}"
            if name in self.tensors:
                values = self.values(name)
                if "q_proj" in here or "k_proj" in here:
                    values = self.interleaved(values)
                self.matrix(f"blk.{block}.{there}", values)
        for here, there in SMALL.items():
            name = f"{prefix}.{here}"
            if name in self.tensors:
                self.writer.add_tensor(f"blk.{block}.{there}", self.small(name, self.values(name)))
        for projection in ("up", "down"):
            names = [
                f"{prefix}.mixer.experts.{e}.{projection}_proj.weight"
                for e in range(self.config["n_routed_experts"])
            ]
            if names[0] in self.tensors:
                stack = np.stack([self.values(name) for name in names])
                self.matrix(f"blk.{block}.ffn_{projection}_exps.weight", stack)

    def norm(self, here: str, there: str) -> None:
        self.writer.add_tensor(there, self.values(here))

    def network(self) -> None:
        self.matrix("token_embd.weight", self.values("backbone.embeddings.weight"))
        self.matrix("output.weight", self.values("lm_head.weight"))
        self.norm("backbone.norm_f.weight", "output_norm.weight")
        layers = len(self.config["hybrid_override_pattern"])
        for layer in range(layers):
            self.norm(f"backbone.layers.{layer}.norm.weight", f"blk.{layer}.attn_norm.weight")
            self.mixer(f"backbone.layers.{layer}", layer)
        if self.config["num_nextn_predict_layers"] == 1:
            block = f"blk.{layers}"
            self.norm("mtp.layers.0.enorm.weight", f"{block}.nextn.enorm.weight")
            self.norm("mtp.layers.0.hnorm.weight", f"{block}.nextn.hnorm.weight")
            self.matrix(f"{block}.nextn.eh_proj.weight", self.values("mtp.layers.0.eh_proj.weight"))
            self.norm("mtp.layers.0.norm.weight", f"{block}.attn_norm.weight")
            self.norm("mtp.layers.1.norm.weight", f"{block}.post_attention_norm.weight")
            self.norm("mtp.layers.1.final_layernorm.weight", f"{block}.nextn.shared_head_norm.weight")
            self.mixer("mtp.layers.0", layers)
            self.mixer("mtp.layers.1", layers)

    def write(self) -> None:
        self.metadata()
        self.tokenizer()
        self.network()
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", choices=["F32", "F16", "BF16", "Q8_0", "Q4_0"])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    Export(arguments.type, arguments.out).write()


if __name__ == "__main__":
    main()
