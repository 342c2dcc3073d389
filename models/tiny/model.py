"""The toy Nemotron-H in PyTorch: training forward (chunked SSD) and single-token decoding.

Module names equal the checkpoint's tensor names, except that the experts of a layer are held stacked
(`experts_up [E, inter, latent]`, `experts_down [E, latent, inter]`) and that the body lives under `backbone`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 128,
    "hybrid_override_pattern": "MEM*EMEM*E",
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 16,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 128,
    "moe_latent_size": 64,
    "moe_shared_expert_intermediate_size": 256,
    "moe_shared_expert_overlap": False,
    "mtp_hybrid_override_pattern": "*E",
    "n_group": 1,
    "n_groups": 2,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 10,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 1280,
}


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-5)


def linear(rows, cols, std=1.0):
    layer = nn.Linear(cols, rows, bias=False)
    nn.init.normal_(layer.weight, std=std / math.sqrt(cols))
    return layer


class Mamba(nn.Module):
    def __init__(self, c, out_std):
        super().__init__()
        self.H, self.P, self.N, self.G = c["mamba_num_heads"], c["mamba_head_dim"], c["ssm_state_size"], c["n_groups"]
        self.d, self.chunk = self.H * self.P, c["chunk_size"]
        self.c = self.d + 2 * self.G * self.N
        self.in_proj = linear(self.d + self.c + self.H, c["hidden_size"])
        self.conv1d = nn.Conv1d(self.c, self.c, 4, groups=self.c)
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.H))
        dt = torch.exp(torch.empty(self.H).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = Norm(self.d)
        self.out_proj = linear(c["hidden_size"], self.d, out_std)

    def gate_norm(self, y, z):
        g = y * F.silu(z.float())
        g = F.rms_norm(g.unflatten(-1, (self.G, -1)), (self.d // self.G,), None, 1e-5).flatten(-2)
        return g * self.norm.weight

    def forward(self, u, state=None):
        """u [B, T, h]. `state` is a dictionary to fill (empty, any T) or to advance (T = 1)."""
        B, T = u.shape[:2]
        z, xbc, dt = self.in_proj(u).split([self.d, self.c, self.H], -1)
        w = self.conv1d.weight[:, 0]
        if state is None:
            past = F.pad(xbc, (0, 0, 3, 0))
        else:
            past = torch.cat([state.get("conv", xbc.new_zeros(B, 3, self.c)), xbc], 1)
            state["conv"] = past[:, -3:]
        act = self.conv1d.bias
        for j in range(4):
            act = act + w[:, j] * past[:, j:j + T]
        x, b, c = F.silu(act).split([self.d, self.G * self.N, self.G * self.N], -1)
        x = x.unflatten(-1, (self.H, self.P))
        b, c = b.unflatten(-1, (self.G, self.N)), c.unflatten(-1, (self.G, self.N))
        dt = F.softplus(dt.float() + self.dt_bias)
        a = -torch.exp(self.A_log.float()) * dt
        if state is None or "ssm" not in state:
            y, last = self.scan(x, b, c, dt, a, state is not None)
            if state is not None:
                state["ssm"] = last
        else:
            rep = self.H // self.G
            b1, c1 = b[:, 0].repeat_interleave(rep, 1), c[:, 0].repeat_interleave(rep, 1)
            new = state["ssm"] * a[:, 0].exp()[..., None, None] + (dt[:, 0, :, None] * x[:, 0])[..., None] * b1[:, :, None]
            state["ssm"] = new
            y = (new @ c1[..., None])[..., 0][:, None]
        y = y + self.D[:, None] * x
        return self.out_proj(self.gate_norm(y.flatten(-2), z))

    def scan(self, x, b, c, dt, a, want_state=False):
        """Chunked SSD: quadratic inside a chunk, one state handed from chunk to chunk. Also the last state [B, H, P, N]."""
        B, T = dt.shape[:2]
        H, G, Q = self.H, self.G, min(self.chunk, T)
        n = -(-T // Q)
        if n * Q != T:
            fill = n * Q - T
            x, b, c = (F.pad(v, (0, 0, 0, 0, 0, fill)) for v in (x, b, c))
            dt, a = F.pad(dt, (0, 0, 0, fill)), F.pad(a, (0, 0, 0, fill))
        rep = H // G
        # [B, n, G, ...] with the heads of a group next to each other
        xdt = (x * dt[..., None].to(x.dtype)).view(B, n, Q, G, rep, self.P).permute(0, 1, 3, 4, 2, 5)
        b = b.reshape(B, n, Q, G, self.N).permute(0, 1, 3, 2, 4)
        c = c.reshape(B, n, Q, G, self.N).permute(0, 1, 3, 2, 4)
        cs = a.view(B, n, Q, G, rep).permute(0, 1, 3, 4, 2).cumsum(-1)              # [B, n, G, rep, Q]
        low = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
        decay = (cs[..., :, None] - cs[..., None, :]).masked_fill(~low, -1e9).exp()
        cb = c @ b.transpose(-1, -2)                                                # [B, n, G, Q, Q]
        y = (decay * cb[:, :, :, None]).to(xdt.dtype) @ xdt
        last = None
        if n > 1 or want_state:
            left = (cs[..., -1:] - cs).exp()[..., None].to(xdt.dtype)
            add = b.transpose(-1, -2)[:, :, :, None] @ (left * xdt)                 # [B, n, G, rep, N, P]
            total = cs[..., -1].exp()[..., None, None]
            state, starts = torch.zeros_like(add[:, 0], dtype=torch.float32), []
            for i in range(n):
                starts.append(state)
                if i + 1 < n or want_state:
                    state = state * total[:, i] + add[:, i]
            last = state.flatten(1, 2).transpose(-1, -2)
            y = y + cs.exp()[..., None] * (c[:, :, :, None] @ torch.stack(starts, 1).to(c.dtype))
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(B, n * Q, H, self.P)
        return y[:, :T], last


class Attention(nn.Module):
    def __init__(self, c, out_std):
        super().__init__()
        self.heads, self.kv, self.dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        h = c["hidden_size"]
        self.q_proj = linear(self.heads * self.dim, h)
        self.k_proj = linear(self.kv * self.dim, h)
        self.v_proj = linear(self.kv * self.dim, h)
        self.o_proj = linear(h, self.heads * self.dim, out_std)

    def forward(self, u, state=None):
        q = self.q_proj(u).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k = self.k_proj(u).unflatten(-1, (self.kv, self.dim)).transpose(1, 2)
        v = self.v_proj(u).unflatten(-1, (self.kv, self.dim)).transpose(1, 2)
        if state is not None:
            if "k" in state:
                k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            state["k"], state["v"] = k, v
        rep = self.heads // self.kv
        k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


    def chained(self, u, keys):
        """As `forward` for the first of `keys`; for a later one with one key and value of each pass behind it."""
        q, k, v = (p(u).unflatten(-1, (n, self.dim)).transpose(1, 2).repeat_interleave(self.heads // n, 1)
                   for p, n in ((self.q_proj, self.heads), (self.k_proj, self.kv), (self.v_proj, self.kv)))
        keys.append((k, v))
        (k, v), later = keys[0], keys[1:]
        low = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = [(q @ k.transpose(-1, -2)).masked_fill(~low, -1e9)] + [(q * a).sum(-1, keepdim=True) for a, _ in later]
        p = (torch.cat(scores, -1).float() / math.sqrt(self.dim)).softmax(-1).to(v.dtype)
        y = p[..., :q.shape[2]] @ v + sum(p[..., q.shape[2] + n, None] * b for n, (_, b) in enumerate(later))
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class Gate(nn.Module):
    def __init__(self, experts, h):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, h) / math.sqrt(h))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))


class Shared(nn.Module):
    def __init__(self, h, width, out_std):
        super().__init__()
        self.up_proj = linear(width, h)
        self.down_proj = linear(h, width, out_std)

    def forward(self, u):
        return self.down_proj(F.relu(self.up_proj(u)).square())


class MoE(nn.Module):
    def __init__(self, c, out_std):
        super().__init__()
        h, lat, inter, e = c["hidden_size"], c["moe_latent_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        self.k, self.scale = c["num_experts_per_tok"], c["routed_scaling_factor"]
        self.gate = Gate(e, h)
        self.fc1_latent_proj = linear(lat, h)
        self.fc2_latent_proj = linear(h, lat, out_std)
        self.experts_up = nn.Parameter(torch.randn(e, inter, lat) / math.sqrt(lat))
        self.experts_down = nn.Parameter(torch.randn(e, lat, inter) / math.sqrt(inter) * 0.5)
        self.shared_experts = Shared(h, c["moe_shared_expert_intermediate_size"], out_std)
        self.register_buffer("load", torch.zeros(e), persistent=False)

    def forward(self, u, state=None):
        with torch.autocast("cpu", enabled=False):
            s = torch.sigmoid(F.linear(u.float(), self.gate.weight.float()))
            idx = (s + self.gate.e_score_correction_bias).topk(self.k, -1).indices
            pick = torch.zeros_like(s).scatter(-1, idx, 1.0)
            w = s * pick
            w = w / (w.sum(-1, keepdim=True) + 1e-20) * self.scale
            if self.training:
                self.load += pick.flatten(0, -2).sum(0).detach()
        e, inter, lat = self.experts_up.shape
        v = self.fc1_latent_proj(u)
        # every expert for every token: two plain products are faster on a CPU than gathering
        y = F.relu(F.linear(v, self.experts_up.reshape(e * inter, lat))).square().unflatten(-1, (e, inter))
        y = (y * w[..., None].to(y.dtype)).flatten(-2)
        y = F.linear(y, self.experts_down.transpose(0, 1).reshape(lat, e * inter))
        return self.fc2_latent_proj(y) + self.shared_experts(u)

    @torch.no_grad()
    def balance(self, rate):
        """Auxiliary-loss-free balancing: the bias of crowded experts sinks, of idle ones rises."""
        self.gate.e_score_correction_bias += rate * torch.sign(self.load.mean() - self.load)
        self.gate.e_score_correction_bias -= self.gate.e_score_correction_bias.mean()
        self.load.zero_()


KINDS = {"M": Mamba, "E": MoE, "*": Attention}


class Layer(nn.Module):
    def __init__(self, kind, c, out_std):
        super().__init__()
        self.norm = Norm(c["hidden_size"])
        self.mixer = KINDS[kind](c, out_std)

    def forward(self, x, state=None):
        return x + self.mixer(self.norm(x), state)


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        pattern = c["hybrid_override_pattern"]
        self.embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        nn.init.normal_(self.embeddings.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(k, c, 0.5 / math.sqrt(len(pattern))) for k in pattern)
        self.norm_f = Norm(c["hidden_size"])


class Mtp(nn.Module):
    """The draft block: attention entry 0, MoE entry 1."""

    def __init__(self, c):
        super().__init__()
        h = c["hidden_size"]
        self.layers = nn.ModuleList(Layer(k, c, 0.3) for k in c["mtp_hybrid_override_pattern"])
        self.layers[0].enorm, self.layers[0].hnorm = Norm(h), Norm(h)
        self.layers[0].eh_proj = linear(h, 2 * h)
        self.layers[1].final_layernorm = Norm(h)

    def forward(self, embedded, hidden, states=(None, None)):
        first, second = self.layers
        y = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], -1))
        return second.final_layernorm(second(first(y, states[0]), states[1]))

    def unroll(self, embedded, hidden, passes):
        """The outputs of `passes` passes from every position at once, each [B, T - passes, h]: pass d reads the token d
        places ahead and what pass d - 1 gave. It sees the first pass of all positions up to its own, for those tokens
        were certain when it began, and of the later passes only its own chain."""
        first, second = self.layers
        T, keys, outputs = embedded.shape[1] - passes, [], []
        y = hidden[:, :T]
        for d in range(1, passes + 1):
            x = first.eh_proj(torch.cat([first.enorm(embedded[:, d:d + T]), first.hnorm(y)], -1))
            x = x + first.mixer.chained(first.norm(x), keys)
            y = second.final_layernorm(second(x))
            outputs.append(y)
        return outputs


class Tiny(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.backbone = Backbone(c)
        self.lm_head = linear(c["vocab_size"], c["hidden_size"])
        self.mtp = Mtp(c)

    def hidden(self, ids, states=None):
        """Hidden states after norm_f."""
        x = self.backbone.embeddings(ids)
        for i, layer in enumerate(self.backbone.layers):
            x = layer(x, None if states is None else states[i])
        return self.backbone.norm_f(x)

    def draft(self, ids, g):
        """MTP output m for positions 0..T-2: (E[t_{i+1}], g_i) predicts t_{i+2}."""
        return self.mtp(self.backbone.embeddings(ids[:, 1:]), g[:, :-1])

    def moes(self):
        return [m for m in self.modules() if isinstance(m, MoE)]

    @torch.no_grad()
    def generate(self, prompt, limit, stop=(2, 11)):
        """Greedy continuation of one prompt."""
        states = [{} for _ in self.backbone.layers]
        g = self.hidden(torch.tensor([prompt]), states)
        out = []
        while len(out) < limit:
            out.append(int(self.lm_head(g[:, -1]).argmax()))
            if out[-1] in stop:
                break
            g = self.hidden(torch.tensor([out[-1:]]), states)
        return out
