"""One layer: a mixer and a feed-forward, each behind its own norm and added to the residual stream."""

from torch import Tensor, nn

from .attention import Attention
from .cache import KeyValues, Layout, MambaState
from .config import JambaConfig
from .mamba import Mamba
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm


class Block(nn.Module):
    """h = h + mixer(norm(h));  h = h + feed_forward(norm(h)).

    x (b, t, d) -> h (b, t, d) and the router's logits (b, t, e), None where the feed-forward is dense.
    Source: Jamba, figure 1.
    """

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        mixer, feed_forward = config.layers[index]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if mixer == "attention":
            self.self_attn = Attention(config)
        else:
            self.mamba = Mamba(config)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MoE(config) if feed_forward == "moe" else MLP(config)

    @property
    def mixer(self) -> Attention | Mamba:
        return self.self_attn if hasattr(self, "self_attn") else self.mamba

    def forward(
        self, x: Tensor, layout: Layout, cache: KeyValues | MambaState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        h, normed = self.pre_ff_layernorm.of_sum(x, self.mixer(self.input_layernorm(x), layout, cache))
        y = self.feed_forward(normed)
        y, router_logits = y if isinstance(y, tuple) else (y, None)
        return h + y, router_logits
