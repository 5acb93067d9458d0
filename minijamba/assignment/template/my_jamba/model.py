"""Part 7: the whole model, a trained checkpoint in it, and the text that it writes."""

import json
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .block import JambaBlock
from .mixer import RMSNorm


class MyJamba(nn.Module):
    """tokens (b, t) int64 -> logits (b, t, v) of the next token, and the caches of all layers, which continue them.

        logits = lm_head(final_layernorm(block_L(... block_1(embed_tokens(tokens)))))

    Any split of the tokens into calls gives the logits of one call.

    Args: config, the content of a config.json. Released names: everything but lm_head stands under `model`, so that the
        embedding's weight is model.embed_tokens.weight and the first layer model.layers.0. The head has no bias.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        v, d, layers = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
        # <solution>
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(v, d),
                "layers": nn.ModuleList(JambaBlock(config, i) for i in range(layers)),
                "final_layernorm": RMSNorm(d, config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(d, v, bias=False)
        # </solution>

    def forward(self, tokens: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """The cache is a list of one cache a layer; None before the first token."""
        # <solution>
        h, new = self.model.embed_tokens(tokens), []
        for block, past in zip(self.model.layers, cache or [None] * len(self.model.layers), strict=True):
            h, past = block(h, past)
            new.append(past)
        return self.lm_head(self.model.final_layernorm(h)), new
        # </solution>

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> Self:
        """The model of a folder with config.json and the weights, spread over several .safetensors files; float32.

        Source of the names: the checkpoint itself. Print the keys of one file and their shapes.
        """
        # <solution>
        folder, weights = Path(folder), {}
        model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        model.load_state_dict(weights)
        return model.eval()
        # </solution>


@torch.no_grad()
def greedy(model: MyJamba, tokens: Tensor, new: int) -> Tensor:
    """The likeliest next token, `new` >= 1 times: tokens (b, t) -> (b, new) int64, the new ones alone.

    The prompt is read once; then each call reads one token and continues the cache.
    """
    # <solution>
    logits, cache = model(tokens)
    chosen = [logits[:, -1:].argmax(-1)]
    while len(chosen) < new:
        logits, cache = model(chosen[-1], cache)
        chosen.append(logits[:, -1:].argmax(-1))
    return torch.cat(chosen, dim=1)
    # </solution>
