"""Checkpoints in the layouts of the released files: load, save, convert, with weights of fewer bits or without.

A checkpoint is a folder with config.json and either model.safetensors or model.safetensors.index.json and its shards.
It is checked against its config before memory is taken, and then read block by block. A pickle is opened only for a
family that was released as one, and refused if it holds anything but tensors; what is written is always safetensors.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import packed_files
from .budget import KEPT_FLOAT32, Weight, available_memory, budget, readable, refuse_if_too_large, released, weights
from .config import DTYPES, JambaConfig
from .families import rename
from .model import Jamba
from .quantize import SCHEMES, PackedWeight, scheme
from .random_weights import random_weight
from .rungs import find_device
from .stored import CONFIG, FLOATS, INDEX, Stored, check_shapes, listed, matching, read_headers
from .stream import BESIDE, BLOCK, LoadReport, Place, block_bytes, fill
from .writing import CHECKSUMS, COMPANIONS, WEIGHTS, Output, bar, companions_of, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The small Jamba that was trained here on Python's own source; it is in the repository, not in an installed package.
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "python"


def load(
    path_or_repo_id: str | os.PathLike = SHIPPED,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
) -> Jamba:
    """The model of a checkpoint.

        model = mj.load()                              # the small trained one of this repository
        model = mj.load("checkpoints/mine")            # a folder, or a .safetensors file beside its config.json
        model = mj.load("ai21labs/Jamba-tiny-dev")     # an id of the Hugging Face Hub, downloaded once
        model = mj.load("state-spaces/mamba-130m-hf")  # any family that is in `families`, known from its config.json
        model = mj.load("ai21labs/Jamba-v0.1", quantize="int8")    # experts and MLPs in a byte a weight

    Reads shards with their index or a single file, tied heads, and the names of first releases. All is checked before
    memory is taken; then memory holds the model and one tensor at most, also where weights are packed: each block of
    rows is packed on the device as it arrives. A head that is stored although the config ties it must equal the
    embedding. Mamba and BlackMamba were released as pickles: those are opened with weights_only=True, and refused if
    they hold anything but tensors.

    Args:
        device:   "auto" is the GPU where CUDA finds one, otherwise the CPU.
        dtype:    "float32", "bfloat16", "float16", "float64" or torch's own; "auto" is the config's, or the stored one
                  where it says none. A_log and delta's bias are float32 at least.
        quantize: "int8", "int4", "int8-all" or "int4-all", one of `quantize.SCHEMES`; None leaves the weights as they
                  are stored. A checkpoint whose weights were packed when it was written says so itself, and its
                  checksums are checked.
    Raises: ValueError with file, tensor and remedy for whatever is wrong with the checkpoint, or if it does not fit in
        memory; ConnectionError if an id cannot be downloaded.
    """
    return load_timed(path_or_repo_id, device, dtype, quantize)[0]


def load_timed(
    path_or_repo_id: str | os.PathLike = SHIPPED,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
) -> tuple[Jamba, LoadReport]:
    """`load`, and where its time went."""
    start, report = perf_counter(), LoadReport()
    with report.timed("headers"):
        device = find_device(device)
        folder = locate(path_or_repo_id, weights=False)
        config, packed = _config(folder), packed_files.scheme_of_files(_folder(folder))
        quantize = _agreed(quantize, packed, path_or_repo_id)
        _memory(config, dtype, quantize, device, path_or_repo_id, packed is not None)
        path = locate(path_or_repo_id, pickled=config.family.pickle)
        stored = packed_files.match_packed(config, path, packed) if packed else _match(config, path)
        config = _with_stored_dtype(config, path, stored)
        need = _memory(config, dtype, quantize, device, path_or_repo_id, packed is not None)
    try:
        with report.timed("headers"):
            model = _unfilled(config, need.dtype, device, quantize)
        if packed:
            places = {name: Place(tensor) for name, tensor in packed_files.in_memory(model).items()}
        else:
            places = _places(model)
        sums = packed_files.read_checksums(_folder(path), stored) if packed else None
        with bar(f"loading {path_or_repo_id}", sum(tensor.nbytes for tensor in stored.values())) as progress:
            fill(places, stored, device, report, sums, progress.update)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise ValueError(need.ran_out()) from None
    report.total = perf_counter() - start
    return model.eval(), report


class _Need(NamedTuple):
    """What loading asks of a device."""

    what: str
    dtype: torch.dtype
    bytes: int  # of the weights, and of loading beside them
    free: int
    device: torch.device
    remedy: str

    def ran_out(self) -> str:
        return (
            f"{self.what} needs {readable(self.bytes)}, and {self.device} ran out of memory, although it had "
            f"{readable(self.free)} free before: end what else takes memory there, or {self.remedy}"
        )


def _memory(
    config: JambaConfig, dtype: str | torch.dtype, quantize: str | None, device: torch.device, name, packed: bool
) -> _Need:  # fmt: skip
    """What the weights need, and loading beside them; ValueError if that is more than is free."""
    dtype = _dtype(dtype, config.dtype, (*DTYPES, "float64"))
    beside = max(weight.size * _dtype_in_memory(weight.name, dtype).itemsize for weight in weights(config))
    if device.type == "cuda":
        block = BLOCK if packed else block_bytes(max(weight.size for weight in weights(config)) * 4)
        beside = max(beside, BESIDE * block // BLOCK)
    sizes = {q: budget(config, quantize=q, dtype=dtype).weight_bytes + beside for q in (None, *SCHEMES)}
    smaller = [f"quantize={q!r} ({readable(size)})" for q, size in sizes.items() if size < sizes[quantize]]
    remedy = "use a device with more memory"
    choices = [*smaller, *(["a dtype of fewer bits"] if dtype.itemsize > 2 else [])]
    if packed:
        remedy += ", or convert the checkpoint that it was made from to fewer bits" if smaller else ""
    elif choices:
        remedy = f"use {', '.join(choices)} or a device with more memory"
    what = f"{name} in {_name(dtype)}" + (f" and {quantize}" if quantize else "")
    free = available_memory(device)
    need = _Need(what, dtype, sizes[quantize], free, device, remedy)
    refuse_if_too_large(need.bytes, device, need.what, remedy)
    return need


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, whose error has a type of its own, of pinned memory or of the CPU, whose errors have not."""
    said = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def save(
    model: Jamba, path: str | os.PathLike, *, shard_bytes: int = 5_000_000_000, dtype: str | torch.dtype = "auto"
) -> None:
    """Write a checkpoint that `load`, and AutoModelForCausalLM of transformers, read.

    Its layout is that of the first family that can say the model (`config.family`). Some are read by `load` alone:
    BlackMamba, which transformers does not have, "minijamba", for models that no family can say, and a model of packed
    weights, which is written as it is in memory, with checksums.

    It is written to a hidden folder beside `path` that takes its place at the end: if anything fails, an earlier
    checkpoint stays as it was, or, should the process be killed between the two renames, beside it as `.name.*.old`.
    Its tokenizer files are kept. Beside the model, memory holds a tensor for each of four files at most.

    Args:
        path:        a folder that is absent, empty or a checkpoint; the folders above it are made.
        shard_bytes: most bytes of tensors in a file that holds more than one.
        dtype:       "float32", "bfloat16" or "float16", with A_log and delta's bias in float32; "auto" keeps every
                     tensor as it is. Packed weights stay as they are.
    Raises: ValueError if the folder holds other things; OSError if it cannot be written or the disk is too small.
    """
    file_dtype, packed = _dtype(dtype, _name(model.dtype), DTYPES), packed_files.scheme_of(model)
    if packed:
        wanted, tensors = packed_files.layout(model.config, packed), packed_files.in_memory(model)
    else:
        wanted, tensors = {weight.name: (weight.shape, None) for weight in weights(model.config)}, _tensors(model)
    outputs = {}
    for name, tensor in _planned(tensors, wanted).items():
        stays = dtype == "auto" or wanted[name][1] is not None
        kind = tensor.dtype if stays else _dtype_in_memory(name, file_dtype)
        outputs[name] = Output(name, kind, tensor.shape, tensor.detach)
    config = replace(model.config, dtype=_name(file_dtype))
    outputs, said = list(outputs.values()) if packed else _joined(config, outputs), packed_files.entry(packed)
    write_checkpoint(path, config.to_dict() | said, outputs, shard_bytes, checksums=packed is not None)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    *,
    quantize: str | None = None,
    device: str | torch.device = "auto",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of any layout that `load` reads as `save` does, with its tokenizer files.

    Args:
        dtype:    as for `save`; "auto" keeps every tensor as stored.
        quantize: one of `quantize.SCHEMES`: what `save` writes of a model that was loaded so.
        device:   where weights are packed.
    Memory holds a tensor for each of four files at a time, never the model; with `quantize` a layer's experts.
    Raises: as `load` and `save`; ValueError for a checkpoint whose weights are packed already.
    """
    scheme(quantize)
    path = locate(source, weights=False)
    config = _config(path)
    if packed := packed_files.scheme_of_files(_folder(path)):
        raise ValueError(f"{source} holds weights packed as {packed}: give the checkpoint that it was made from")
    path = locate(source, pickled=config.family.pickle)
    stored = _match(config, path)
    config = _with_stored_dtype(config, path, stored)
    file_dtype = _dtype(dtype, config.dtype, DTYPES)
    tensors = {}
    for name, tensor in stored.items():
        kept = FLOATS[tensor.dtype] if dtype == "auto" else _dtype_in_memory(name, file_dtype)
        tensors[name] = Output(name, kept, tensor.shape, tensor.read)
    config = replace(config, dtype=_name(file_dtype))
    if quantize is None:
        outputs = _joined(config, tensors)
    else:
        outputs = packed_files.packed_outputs(config, quantize, tensors, find_device(device), file_dtype)
    said = config.to_dict() | packed_files.entry(quantize)
    write_checkpoint(target, said, outputs, shard_bytes, companions_of(_folder(path)), checksums=quantize is not None)


def write_random(
    config: JambaConfig,
    target: str | os.PathLike,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of random weights (`random_weights`) in the released layout of the config's family.

    Of Jamba-v0.1: 1,251 tensors, 103,140,646,656 bytes in 21 files. Every tensor is in the config's dtype, or `dtype`.
    Memory holds a tensor for each of four files at a time. The same seed gives the same files on the same kind of
    device, where the numbers are drawn.
    Raises: as `save`.
    """
    file_dtype, device = _dtype(dtype, config.dtype, DTYPES), find_device(device)
    config = replace(config, dtype=_name(file_dtype))
    write_checkpoint(target, config.to_dict(), random_outputs(config, seed, device), shard_bytes)


def random_outputs(config: JambaConfig, seed: int, device: torch.device) -> list[Output]:
    """What `write_random` writes, in its order; nothing is drawn before it is written."""
    dtype = getattr(torch, config.dtype)

    def drawn(weight) -> Callable[[], Tensor]:
        return lambda: random_weight(weight, config, seed, device)

    return _joined(config, {w.name: Output(w.name, dtype, w.shape, drawn(w)) for w in weights(config)})


def locate(path_or_repo_id: str | os.PathLike, weights: bool = True, pickled: str | None = None) -> Path:
    """Where a checkpoint is on this machine: the given folder or file, or the folder that an id is downloaded to.

    weights=False downloads config and tokenizer alone; `pickled` names a file to take where there is no safetensors.
    A folder here goes before an id of the same name.
    Raises: ValueError if there is neither; ConnectionError if the download fails.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.exists():
        return path
    if path == SHIPPED:
        raise ValueError(
            f"{path} does not exist: the trained model is in the repository, not in the installed package; "
            f"clone it and run pip install -e . inside, or give another checkpoint"
        )
    is_id = isinstance(path_or_repo_id, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_repo_id)
    if not is_id or path.suffix == ".safetensors":
        raise ValueError(f"{path} does not exist: give the folder of a checkpoint, or a Hub id of the form owner/name")
    folder = _download(path_or_repo_id, [CONFIG, INDEX, CHECKSUMS, *COMPANIONS, *(WEIGHTS if weights else ())])
    if weights and pickled and not matching(folder, WEIGHTS):
        folder = _download(path_or_repo_id, [pickled])
    return folder


def _download(repo_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ValueError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id} and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo_id} is neither a folder here nor a repository of the Hub: correct the path or the id, or log in "
            f"with `hf auth login` if it is private"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ConnectionError(
            f"{repo_id} is no folder here, and the Hub does not give it ({reason}): connect to the network, or copy "
            f"the checkpoint to this machine and give its folder"
        ) from None


def _tensors(model: Jamba) -> dict[str, Tensor]:
    """The model's memory by the names of `weights`: parameters, each expert's share of stacked ones. No tied head."""
    found = {}
    for ours, parameter in model.named_parameters():
        found |= packed_files.shares(ours, parameter.detach())
    return found


def _places(model: Jamba) -> dict[str, Place]:
    """Where each tensor of an unpacked checkpoint belongs in a model of packed weights, or of none."""
    found = {name: Place(tensor) for name, tensor in _tensors(model).items()}
    for ours, module in model.named_modules():
        if isinstance(module, PackedWeight):
            values, scales = packed_files.shares(ours, module.values), packed_files.shares(ours, module.scales)
            found |= {name: Place(values[name], scales[name], module.inputs, module.dtype) for name in values}
    return found


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of random weights: for billions that are overwritten at once it takes minutes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _unfilled(
    config: JambaConfig, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> Jamba:  # fmt: skip
    """A model whose memory is not written yet; what is packed never takes more than its packed size."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # every parameter is made in its dtype at once, never converted
    try:
        # On "meta" nothing takes memory, so that what is packed need never be there in full; but torch takes seconds
        # to get ready for it.
        with torch.device("meta" if quantize else device), _NoDraws():
            model = Jamba(config)
            packed_files.pack_modules(model, quantize, dtype)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype_in_memory(name, dtype))
    _materialise(model, device)
    return model


def unfilled(
    config: JambaConfig, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> tuple[Jamba, dict[str, Place]]:  # fmt: skip
    """A model whose memory is not written yet, and where each of its `weights` belongs."""
    model = _unfilled(config, dtype, device, quantize)
    return model, _places(model)


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every parameter and buffer on "meta" memory on the device; what is shared stays shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda buffer: buffer)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in made:
                        made[tensor] = wrap(torch.empty_like(tensor, device=device))
                    tensors[name] = made[tensor]


def _dtype_in_memory(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor has in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(KEPT_FLOAT32) else dtype


def _match(config: JambaConfig, path: Path) -> dict[str, Stored]:
    """Our name -> where it is stored; ValueError unless the file holds exactly what the config describes."""
    family, layout = config.family, released(config)
    stored = read_headers(path, family)
    shapes = {name: _joined_shape([weight.shape for weight in parts]) for name, parts in layout.items()}
    found = {name: stored.get(name) or stored.get(rename(name, family.older)) for name in shapes}
    head, embedding = rename(HEAD, family.names), rename(EMBEDDING, family.names)
    _check_floats(stored)
    if missing := [name for name, tensor in found.items() if tensor is None]:
        tie = ", set tie_word_embeddings to true if the head is the embedding" if head in missing else ""
        raise ValueError(
            f"{path}: no tensor {listed(missing)}, which {CONFIG} asks for: download the checkpoint again{tie}, or "
            f"correct the schedule and num_experts in {CONFIG}"
        )
    extra = stored.keys() - {tensor.name for tensor in found.values()}
    if family.passed_over:
        extra = {name for name in extra if not name.endswith(family.passed_over)}
    if config.tie_word_embeddings and head in extra:
        _check_tied(stored[head], found[embedding])
        extra.remove(head)
    if extra:
        raise ValueError(
            f"{stored[min(extra)].file}: {listed(sorted(extra))}, for which the model of {CONFIG} has no place: "
            f"correct {CONFIG} (num_hidden_layers, num_experts, the schedule, biases), or take it out of the file"
        )
    check_shapes(found, shapes)
    return {name: share for stored_name, parts in layout.items() for name, share in _rows(found[stored_name], parts)}


def _rows(stored: Stored, parts: list[Weight]) -> Iterator[tuple[str, Stored]]:
    """Each of our tensors that a stored one holds, row after row."""
    first = 0
    for part in parts:
        yield part.name, stored if len(parts) == 1 else stored.rows(first, part.shape[0])
        first += part.shape[0]


def _joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _with_stored_dtype(config: JambaConfig, path: Path, stored: dict[str, Stored]) -> JambaConfig:
    """The config with the dtype of the stored embedding, float32 at most, where config.json says none."""
    said = json.loads((_folder(path) / CONFIG).read_text(encoding="utf-8"))
    if said.get("dtype") or said.get("torch_dtype"):
        return config
    name = _name(FLOATS[stored[EMBEDDING].dtype])
    return replace(config, dtype=name if name in DTYPES else "float32")


def _check_floats(stored: dict[str, Stored]) -> None:
    for tensor in stored.values():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, but only {', '.join(FLOATS)} are read: give the "
                f"checkpoint that was not quantized"
            )


def _check_tied(head: Stored, embedding: Stored) -> None:
    if head.dtype != embedding.dtype or not torch.equal(head.read(), embedding.read()):
        raise ValueError(
            f"{head.file}: {head.name} differs from {embedding.name}, but the model ties them: set "
            f"tie_word_embeddings to false where {CONFIG} has it, or take {head.name} out of the file"
        )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _config(path: Path) -> JambaConfig:
    return JambaConfig.from_json(_folder(path) / CONFIG)


def _joined(config: JambaConfig, tensors: dict[str, Output]) -> list[Output]:
    """What is written under the names of the config's family, which may hold several of our tensors in one."""

    def join(name: str, parts: list[Output]) -> Output:
        dtype, shape = parts[0].dtype, _joined_shape([part.shape for part in parts])
        return Output(name, dtype, shape, lambda: torch.cat([part.tensor() for part in parts]))

    layout = {name: [tensors[weight.name] for weight in parts] for name, parts in released(config).items()}
    return [parts[0]._replace(name=name) if len(parts) == 1 else join(name, parts) for name, parts in layout.items()]


def _planned(tensors: dict[str, Tensor], wanted: dict[str, tuple]) -> dict[str, Tensor]:
    """The tensors in the order of what is wanted; ValueError unless they are what the config describes."""
    own = {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if different := sorted({name for name, _ in own ^ {(name, shape) for name, (shape, _) in wanted.items()}}):
        raise ValueError(
            f"the model is not the one of its config in {listed(different)}, so nothing could load the file: undo the "
            f"change to the model, or describe it in model.config"
        )
    return {name: tensors[name] for name in wanted}


def _agreed(quantize: str | None, packed: str | None, name) -> str | None:
    """The scheme to load in; ValueError if the weights are stored in another one."""
    scheme(quantize)
    if packed and quantize not in (None, packed):
        raise ValueError(
            f"quantize is {quantize!r}, but the weights of {name} are packed as {packed!r}: leave quantize None, or "
            f"load the checkpoint that was not quantized"
        )
    return packed or quantize


def _dtype(dtype: str | torch.dtype, auto: str, allowed: tuple[str, ...]) -> torch.dtype:
    name = auto if dtype == "auto" else _name(dtype)
    if name not in allowed:
        raise ValueError(f"dtype is {name!r}, but must be one of {', '.join(allowed)}")
    return getattr(torch, name)


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
