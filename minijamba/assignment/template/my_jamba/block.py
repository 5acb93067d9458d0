"""Part 6: one layer, and the schedule that says what is in it."""

from torch import Tensor, nn

from .attention import AttentionMixer
from .mixer import MambaMixer, RMSNorm
from .router import FeedForward, MixtureOfExperts


class JambaBlock(nn.Module):
    """h = h + mixer(input_layernorm(h));   h = h + feed_forward(pre_ff_layernorm(h)).

    Of layer i = 0, 1, ...

        the mixer is attention     if i mod attn_layer_period = attn_layer_offset,      otherwise Mamba
        feed_forward is a mixture  if i mod expert_layer_period = expert_layer_offset,  otherwise dense

    With num_experts = 1 all are dense.

    Modules bear the released names: input_layernorm, pre_ff_layernorm, feed_forward, and the mixer is called self_attn
    or mamba. A mixture has num_experts experts, num_experts_per_tok of them a token; c = mamba_expand d.

    Args: config, the content of a config.json; index, i.
    h: (b, t, d). The cache is the mixer's. Returns: h and the new cache.
    Source: Jamba, figure 1.
    """

    def __init__(self, config: dict, index: int) -> None:
        super().__init__()
        d, f, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        # <solution>
        self.input_layernorm, self.pre_ff_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        if index % config["attn_layer_period"] == config["attn_layer_offset"]:
            self.self_attn = AttentionMixer(d, config["num_attention_heads"], config["num_key_value_heads"])
        else:
            n, r, w = config["mamba_d_state"], config["mamba_dt_rank"], config["mamba_d_conv"]
            self.mamba = MambaMixer(d, config["mamba_expand"] * d, n, r, w, eps)
        e, k = config["num_experts"], config["num_experts_per_tok"]
        if e > 1 and index % config["expert_layer_period"] == config["expert_layer_offset"]:
            self.feed_forward = MixtureOfExperts(d, f, e, k)
        else:
            self.feed_forward = FeedForward(d, f)
        # </solution>

    def forward(
        self, h: Tensor, cache: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        # <solution>
        mixer = self.self_attn if hasattr(self, "self_attn") else self.mamba
        y, cache = mixer(self.input_layernorm(h), cache)
        h = h + y
        return h + self.feed_forward(self.pre_ff_layernorm(h)), cache
        # </solution>
