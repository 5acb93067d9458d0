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

    x (b, t, d) -> h (b, t, d), and how the tokens were routed, None where there are no experts.
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
        self, x: Tensor, layout: Layout, cache: KeyValues | MambaState | None = None
    ) -> tuple[Tensor, Routing | None]:
        if self.mixer is None:
            h, normed = x, self.pre_ff_layernorm(x)
        else:
            y = self.mixer(self.input_layernorm(x), layout, cache)
            if not hasattr(self, "feed_forward"):
                return x + y, None
            h, normed = self.pre_ff_layernorm.of_sum(x, y)
        if isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(normed, layout.real)
        else:
            y, routing = self.feed_forward(normed), None
        return h + y, routing
