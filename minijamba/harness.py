"""EleutherAI's lm-evaluation-harness on a Jamba: the questions that models are compared by.

    results = run_harness("checkpoints/mine", ["lambada_openai", "arc_easy"], limit=100)

Importing this file registers the model: `lm_eval.simple_evaluate(model="minijamba", model_args="model=FOLDER", ...)`.
The harness reads its data sets through the Hugging Face Hub; tasks of your own may read files instead (include_path).
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby, takewhile
from os import PathLike

import torch

from .checkpoint import load, locate
from .evaluate import bos, check_vocabulary, predict
from .generate import generate
from .model import Jamba
from .tokenizer import load_tokenizer

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"tasks need lm-evaluation-harness, which is not installed ({error}): pip install 'minijamba[eval]'"
    ) from error


def run_harness(
    model: Jamba | str | PathLike,
    tasks: Sequence[str],
    *,
    tokenizer=None,
    include_path: str | PathLike | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> dict[str, dict]:
    """Run tasks of the harness.

    Args:
        model, tokenizer, batch_size, device, dtype: see `HarnessModel`.
        include_path: folder of your own tasks, YAML files, beside those that the harness brings.
        limit:        documents of each task at most.
        num_fewshot:  solved examples before each question; the task's own number when None.
    Returns: task -> metric -> value; "acc,none" is the accuracy without a filter, "acc_stderr,none" its standard error.
    Raises:  ValueError for an unknown task, and as `HarnessModel`.
    """
    results = lm_eval.simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size, device, dtype),
        tasks=list(tasks),
        task_manager=_task_manager(tasks, include_path),
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=1000,  # of the standard errors that have no formula; the default takes minutes
        log_samples=False,
    )
    return {
        task: {metric: value for metric, value in values.items() if "," in metric}  # the others are names and counts
        for task, values in results["results"].items()
    }


def _task_manager(tasks: Sequence[str], include_path: str | PathLike | None) -> TaskManager:
    folder = None if include_path is None else str(include_path)
    if folder is not None:
        # To know the names of its own 14,000 tasks the harness reads all their files: only if the folder lacks one.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"the harness has no task {', '.join(unknown)}: `lm-eval ls tasks` lists those it has")
    return manager


@register_model("minijamba")
class HarnessModel(TemplateLM):
    """A Jamba as the harness calls it.

    Every text stands behind <bos>, as in training. It is never cut: the state and the cache carry any length.

    Args:
        model:      a Jamba, or the folder or Hub id of a checkpoint.
        tokenizer:  the model's; None reads the one beside the checkpoint.
        batch_size: texts at once; changes speed and memory, not results.
        device, dtype: of a checkpoint, as for `load`.
    Raises: ValueError if the tokenizer is missing or another model's, if the model has no <bos>, and as `load`.
    """

    def __init__(
        self,
        model: Jamba | str | PathLike,
        tokenizer=None,
        batch_size: int = 8,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> None:
        super().__init__()
        if isinstance(model, Jamba):
            if tokenizer is None:
                raise ValueError("a model in memory comes without its tokenizer: give it as tokenizer=...")
        else:
            path = locate(model, weights=False)
            tokenizer = tokenizer or load_tokenizer(path if path.is_dir() else path.parent)
            model = load(model, device, dtype)
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer, self.batch_size, self._device = model, tokenizer, int(batch_size), model.device
        self.bos = bos(model)

    @property
    def eot_token_id(self) -> int:
        """The token that TemplateLM puts before a continuation without context."""
        return self.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.bos, *ids]

    # `loglikelihood` is TemplateLM's: it tokenizes context and continuation together and cuts after the context's.
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(texts, context, continuation) -> log p(continuation | context) in nats, and if it is the likeliest."""
        rows = [context + continuation for _, context, continuation in requests]
        answers = []
        for (_, context, _), (log_p, likeliest) in zip(requests, self._predict(rows, disable_tqdm), strict=True):
            first = len(context) - 1  # `predict` says nothing of a row's first token
            answers.append((log_p[first:].sum().item(), bool(likeliest[first:].all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, nats: every token from all before it."""
        rows = [self.tok_encode(request.args[0]) for request in requests]
        return [log_p.sum().item() for log_p, _ in self._predict(rows, disable_tqdm)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the first of the request's stop strings."""
        answers = []
        for options, group in groupby(requests, key=lambda request: request.args[1]):
            prompts = [request.args[0] for request in group]
            for start in range(0, len(prompts), self.batch_size):
                answers += self._answer(prompts[start : start + self.batch_size], options)
        return answers

    def _predict(self, rows: list[list[int]], disable_tqdm: bool):
        return predict(self.model, rows, batch=self.batch_size, progress=not disable_tqdm)

    def _answer(self, prompts: list[str], options: dict) -> list[str]:
        until, options = _options(options)
        rows = [[] for _ in prompts]

        def add(tokens: list[int]) -> None:
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            if all(self._text(row, until)[1] for row in rows):
                raise _AllEnded

        with suppress(_AllEnded):
            generate(self.model, [self.tok_encode(prompt) for prompt in prompts], stream=add, **options)
        return [self._text(row, until)[0] for row in rows]

    def _text(self, row: list[int], until: list[str]) -> tuple[str, bool]:
        """The answer that a row of new tokens holds, and whether a stop token or a stop string has ended it."""
        before = list(takewhile(lambda token: token not in self.model.config.stop_tokens, row))
        text = self.tokenizer.decode(before)
        answer = text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
        return answer, len(before) < len(row) or len(answer) < len(text)


class _AllEnded(Exception):
    """Leaves `generate`, which by itself stops at tokens only, once a stop string has ended every answer."""


def _options(options: dict) -> tuple[list[str], dict]:
    """The options of a task -> its stop strings, and the arguments for `generate`."""
    options = {"temperature": 0.0, **normalize_gen_kwargs(options)}
    del options["do_sample"]  # already in the temperature
    until, arguments = options.pop("until"), {"max_new_tokens": options.pop("max_gen_toks")}
    if unknown := options.keys() - {"temperature", "top_k", "top_p", "repetition_penalty"}:
        raise ValueError(f"a task asks for {', '.join(sorted(unknown))}, which `generate` does not know: leave it out")
    return until, arguments | options
