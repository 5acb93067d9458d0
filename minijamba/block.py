"""One layer: a mixer and a feed-forward, or one of them, each behind its own norm and added to the residual stream."""

from torch import Tensor, nn

from .attention import Attention
from .cache import KeyValues, Layout, MambaState
from .config import JambaConfig
from .mamba import Mamba
from .mlp import MLP
from .moe import MoE, Routing
from .norm import RMSNorm


class Block(nn.Module):
    """h = h + mixer(norm(h));  h = h + feed_forward(norm(h)).

    Takes the stream h (b, t, d) and what the layer before adds to it, y (b, t, d) or None; returns both anew, y being
    this layer's own, and how the tokens were routed, None where there are no experts. So each sum is formed together
    with the norm that follows it.
    Source: Jamba, figure 1.
    """

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        mixer, feed_forward = config.layers[index]
        if mixer is not None:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if mixer == "attention":
            self.self_attn = Attention(config)
        elif mixer == "mamba":
            self.mamba = Mamba(config)
        if feed_forward is not None:
            self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.feed_forward = MoE(config) if feed_forward == "moe" else MLP(config)

    @property
    def mixer(self) -> Attention | Mamba | None:
        return getattr(self, "self_attn", None) or getattr(self, "mamba", None)

    def forward(
        self, h: Tensor, y: Tensor | None, layout: Layout, cache: KeyValues | MambaState | None = None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        routing = None
        if self.mixer is not None:
            h, normed = self.input_layernorm.of_sum(h, y)
            y = self.mixer(normed, layout, cache)
        if hasattr(self, "feed_forward"):
            h, normed = self.pre_ff_layernorm.of_sum(h, y)
            if isinstance(self.feed_forward, MoE):
                y, routing = self.feed_forward(normed, layout.real)
            else:
                y = self.feed_forward(normed)
        return h, y, routing
