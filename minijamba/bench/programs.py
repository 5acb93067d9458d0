"""The programs that write text side by side: minijamba, transformers and vLLM, each with random weights of full size.

Each is asked through its own `generate`, and gets the same tokens, greedily and without an end.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import available_memory, budget, weights
from ..checkpoint import unfilled
from ..config import JambaConfig, preset
from ..generate import CHUNK, generate
from ..model import Jamba
from ..random_weights import random_weight
from .apart import Memory
from .measure import PEERS, watch

OURS, TRANSFORMERS, VLLM = "minijamba", "transformers", "vllm"
LEAST_CHUNK = 512  # tokens of a prompt
# Those of other programs. Ours are `quantize.SCHEMES`.
SCHEMES = {TRANSFORMERS: (None,), VLLM: ("experts_int8",)}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_DEEP_GEMM_WARMUP": "skip",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What one process measures.

    figures: (program, job, tokens (b, t)) -> the figures of a case, as a part of its row.
    cases:   pairs of batch and context.
    memory:  GiB that a GPU's process may take in all; it does not hold for weights that are not packed.
    new:     tokens, as `figures` understands it;  longest: the most that it asks for after a prompt.
    kv:      how ours keeps keys and values, as in `generate`;  loop: whether a program also runs as its `loop`.
    card:    the rates of `rates`.
    """

    measure: str
    figures: Callable[["Program", "Job", Tensor], dict]
    model: str
    side: str
    quantize: str | None
    cases: tuple[tuple[int, int], ...]
    device: torch.device
    memory: float | None
    repeats: int
    new: int
    longest: int
    kv: str | None = None
    loop: bool = False
    card: dict = field(default_factory=dict)

    @property
    def limit(self) -> float | None:
        return None if self.quantize is None else self.memory

    @property
    def config(self) -> JambaConfig:
        return preset(self.model)


class Program(NamedTuple):
    """A program that is ready.

    write:   (tokens (b, t), new) writes so many tokens after each prompt, and returns when they are written.
    moments: the same, and returns when each token had come, in seconds of a clock; None where nothing tells.
    loop:    the same as `moments`, in the plain way: ours without a CUDA graph, transformers' model called for each
             token, with the cache that it returns.
    model:   ours.
    facts:   for each row.
    """

    write: Callable[[Tensor, int], object]
    moments: Callable[[Tensor, int], list[float]] | None = None
    loop: Callable[[Tensor, int], list[float]] | None = None
    model: Jamba | None = None
    facts: dict = {}


def random_tokens(config: JambaConfig, batch: int, context: int, seed: int = 0) -> Tensor:
    """(b, t) int64 on the CPU, never a special token."""
    special = {config.bos_token_id, config.pad_token_id, *config.stop_tokens}
    allowed = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (batch, context), generator=generator)]


@torch.no_grad()
def random_model(config: JambaConfig, quantize: str | None, device: torch.device, seed: int = 0) -> Jamba:
    """What `load` makes of the checkpoint that `checkpoint.write_random` writes with this seed, without the files.

    Each weight is drawn on the device and packed as it comes: beside the model, memory holds one of them.
    Raises: MemoryError if the device has less memory free than the weights take.
    """
    dtype = getattr(torch, config.dtype)
    refuse_beyond(available_memory(device), config, quantize)
    model, places = unfilled(config, dtype, device, quantize)
    for weight in weights(config):
        numbers = random_weight(weight, config, seed, device).to(dtype)  # as a file would hold it
        places[weight.name].put(0, numbers.reshape(-1))
    return model.eval()


def refuse_beyond(room: int, config: JambaConfig, quantize: str | None = None) -> None:
    need = budget(config, quantize=quantize).weight_bytes
    if need > room:
        raise MemoryError(f"the weights take {need:,} bytes, and there are {room:,}")


def ours(job: Job, memory: Memory) -> Program:
    """A batch's prompts are read in shorter chunks, as many tokens at a time as of one prompt."""
    refuse_beyond(memory.room, job.config, job.quantize)
    model = random_model(job.config, job.quantize, job.device)

    def moments(tokens: Tensor, new: int, **options) -> list[float]:
        when = []
        write_ours(model, job.kv, tokens, new, stream=lambda chosen: when.append(time.perf_counter()), **options)
        return when

    return Program(partial(write_ours, model, job.kv), moments, partial(moments, graph=False), model)


def write_ours(model: Jamba, kv: str | None, tokens: Tensor, new: int, **options) -> Tensor:
    chunk = chunk_of(model.device, len(tokens))
    return generate(model, tokens, max_new_tokens=new, stop=(), chunk=chunk, kv=kv, **options)


def chunk_of(device: torch.device, batch: int) -> int | None:
    """Tokens of each of `batch` prompts that are read at a time; None is what `generate` takes by itself."""
    return None if batch == 1 or device.type != "cuda" else max(LEAST_CHUNK, CHUNK // batch)


def transformers(job: Job, memory: Memory) -> Program:
    """In the config's dtype, built on the device. Raises: ImportError if a Mamba's kernels do not run on a GPU."""
    refuse_beyond(memory.room, job.config)
    wanted = PEERS if job.device.type == "cuda" and "m" in job.config.schedule else ()
    for package in wanted:
        import_module(package)
    model = _transformers_model(job.config, job.device)

    def write(tokens: Tensor, new: int, **options) -> Tensor:
        tokens = tokens.to(job.device)
        text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, **options)
        if text.shape[1] != tokens.shape[1] + new:
            raise ValueError(f"it wrote {text.shape[1] - tokens.shape[1]} tokens, not {new}")
        return text

    def moments(tokens: Tensor, new: int) -> list[float]:
        when = []
        come = SimpleNamespace(put=lambda _: when.append(time.perf_counter()), end=lambda: None)
        write(tokens, new, streamer=come)
        return when[1:]  # the prompt comes first

    @torch.inference_mode()
    def loop(tokens: Tensor, new: int) -> list[float]:
        when, cache, step = [], None, tokens.to(job.device)
        for _ in range(new):
            made = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = made.past_key_values, made.logits.argmax(-1)
            step.tolist()  # as `generate`, which looks at each token
            when.append(time.perf_counter())
        return when

    _, functions = watch(lambda: write(random_tokens(job.config, 1, 32), 2))
    if wanted and {function.split(".")[0] for function in functions} != set(wanted):
        raise ImportError(f"it ran without the kernels of {' and '.join(wanted)}")
    return Program(write, moments, loop, facts={"functions": functions} if functions else {})


@torch.no_grad()
def _transformers_model(config: JambaConfig, device: torch.device):
    import transformers
    from transformers.initialization import no_init_weights

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, folder)
        theirs = transformers.AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, config.dtype)
    with torch.device(device), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name.endswith("A_log"):
        states = torch.arange(1, parameter.shape[-1] + 1, device=parameter.device)
        parameter.copy_(states.float().log().expand_as(parameter))
    elif parameter.dim() >= 2:
        parameter.normal_(0, 0.02, generator=generator)
    else:
        parameter.fill_(1.0 if "norm" in name or name.endswith(".D") else 0.0)


def vllm(job: Job, memory: Memory) -> Program:
    """Its own dummy weights, and the share of the card that `memory` is. Raises: ImportError without a GPU."""
    if job.device.type != "cuda":
        raise ImportError("it is measured on a GPU only")
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    longest = max(context for _, context in job.cases) + job.longest
    batches = sorted({batch for batch, _ in job.cases})
    folder = tempfile.TemporaryDirectory()  # it lives as long as the engine, which may look at it again
    write_config(_for_context(job.config, longest), folder.name)
    engine = LLM(
        model=folder.name, load_format="dummy", skip_tokenizer_init=True, dtype=job.config.dtype,
        quantization=job.quantize, max_model_len=longest, gpu_memory_utilization=_share(job),
        max_num_seqs=batches[-1], enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": batches},
    )  # fmt: skip

    def write(tokens: Tensor, new: int, folder=folder) -> list:
        prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        how = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        texts = engine.generate(prompts, how, use_tqdm=False)
        if any(len(text.outputs[0].token_ids) != new for text in texts):
            raise ValueError(f"it did not write {new} tokens after each prompt")
        return texts

    return Program(write)


def _share(job: Job) -> float:
    """Of the card's memory; what is free without a process, less half a GiB for its own context, is the most."""
    most = job.card["free_bytes"] - 2**29
    return min(most, most if job.limit is None else job.limit * 2**30) / job.card["memory_bytes"]


def _for_context(config: JambaConfig, longest: int) -> JambaConfig:
    """No tensor depends on it, but vLLM refuses what is longer."""
    return replace(config, max_position_embeddings=max(longest, config.max_position_embeddings))


def write_config(config: JambaConfig, folder: str) -> None:
    (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


PROGRAMS = {OURS: ours, TRANSFORMERS: transformers, VLLM: vllm}
