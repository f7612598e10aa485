"""A trained run as an object: its model, tokenizer and config, ready to be asked."""

import shlex
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config
from llama_lab.config.schema import Problem, RunConfig
from llama_lab.data.cache import prepared_root
from llama_lab.data.shards import TOKENIZER
from llama_lab.data.tokenizer import Tokenizer, load_tokenizer
from llama_lab.inference.completion import Completion, Piece, Prompt, complete
from llama_lab.inference.generate import BATCH, Decoder
from llama_lab.inference.options import Options, is_number, read_options
from llama_lab.model.llama import Llama
from llama_lab.training.run_folder import RunFolder, find_run, relative
from llama_lab.training.saving.checkpoint import load_weights
from llama_lab.training.saving.choice import chosen_checkpoint, damaged
from llama_lab.training.saving.manifest import WEIGHTS, DamagedCheckpoint

SCOPE = "this request"
FLAG = "update="
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoadedRun:
    """A checkpoint of a run, ready to be asked.

    It is for one caller at a time: texts that are continued at once are given in one call.

    Attributes:
        model, tokenizer, run: what was trained, on what ids, from which config. On a CPU the weights of the model are laid out
            anew when it first continues a text; their values stay.
        update, tokens: how far it had been trained.
    """

    def __init__(
        self,
        folder: Path,
        update: int | Literal["last", "best"] | None = None,
        *,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ):
        found = find_run(folder)
        chosen = chosen_checkpoint(found, None if update is None else str(update), scope=SCOPE, flag=FLAG)
        self.run: RunConfig = load_config(found.path / "config.yaml")
        self.tokenizer: Tokenizer = _tokenizer_of(found)
        self.update, self.tokens = chosen.update, chosen.tokens
        if not self.update and self.tokenizer.bos_id is not None:
            # Nothing was trained here: an imported model reads texts as its own tokenizer begins them.
            self.tokenizer.start_id = self.tokenizer.bos_id
        self.model = Llama(self.run.model, vocab_size=self.tokenizer.vocab_size, max_seq_len=self.run.data.max_seq_len)
        try:
            self.model.load_state_dict(load_weights(chosen))
        except DamagedCheckpoint as error:
            raise damaged(found, error, scope=SCOPE, files=WEIGHTS, flag=FLAG) from None
        self.model.to(_device(device), _dtype(precision)).eval()
        self._decoder: Decoder | None = None
        self._folder = found.path

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {relative(self._folder)} after {self.update} updates>"

    @overload
    def generate(self, prompt: str | list[int], *, seed: int = 0, batch: int = BATCH, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], *, seed: int = 0, batch: int = BATCH, **options: Any) -> list[str]: ...

    def generate(self, prompt: Any, *, seed: int = 0, batch: int = BATCH, **options: Any) -> Any:
        """Continue a text that is taken as the beginning of a document, or several.

        Args:
            prompt: a text, or several in a list, which are continued side by side.
            seed: of the draws; the same seed gives the same text. Of several prompts the second has the next seed, and so on, and
                each gets what it would get alone with its seed.
            batch: prompts that are continued at once at most.
            options: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `stop`, `beyond_context`;
                `help(llama_lab.inference.options.Options)` says what they mean.

        Returns:
            The continuation, without the prompt; a list of them for a list.

        Raises:
            ConfigError: options or prompts that are not as they must be, all at once.
        """
        several = isinstance(prompt, list | tuple) and (not prompt or any(isinstance(one, str | list | tuple) for one in prompt))
        given: Any = prompt if several else [prompt]
        found = self.complete(given, batch=batch, seed=seed, **options)
        return [completion.text for completion in found] if several else found[0].text

    def complete(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None, batch: int = BATCH, **options: Any
    ) -> list[Completion]:
        """What `generate` gives, with why each continuation ended and how many tokens it has. Raises like it.

        Args:
            prompts: texts, or lists of ids that the model is to read as they are.
            seeds: one for each prompt, in place of `seed`.
            batch, options: as for `generate`.
        """
        texts = [""] * len(prompts)
        last: dict[int, Piece] = {}
        with closing(self.stream(prompts, seeds=seeds, batch=batch, **options)) as pieces:
            for piece in pieces:
                texts[piece.index] += piece.text
                last[piece.index] = piece
        found = []
        for number, text in enumerate(texts):
            piece = last[number]
            assert piece.finish is not None
            found.append(Completion(text, piece.finish, piece.prompt_tokens, piece.new_tokens))
        return found

    def stream(
        self, prompts: Prompt | Sequence[Prompt], *, seeds: Sequence[int] | None = None, batch: int = BATCH, **options: Any
    ) -> Generator[Piece, None, None]:
        """What `generate` gives, piece by piece as it becomes certain. Mistakes are raised here and not by the first piece.

        Args:
            prompts: one text, or several prompts; a piece says of which it is.
            seeds, batch, options: as for `complete`.
        """
        given: Any = prompts if isinstance(prompts, list | tuple) else [prompts]
        asked: Options = read_options(**options)
        if not is_number(batch, Integral) or batch < 1:
            rule = "is no whole number from 1 on; 1 continues one prompt after the other"
            raise ConfigError([(f"batch={batch!r}", rule)], scope=SCOPE)
        return complete(self.model, self.tokenizer, given, asked, seeds=seeds, decoder=self._decoder_of(min(batch, len(given))))

    @torch.no_grad()
    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Logits of the token after each position, (len(ids), vocabulary), float32, on the CPU.

        Args:
            ids: as the model is to read them; training's documents follow an end-of-document token. Of several lists of one
                length the logits are (lists, length, vocabulary).

        Raises:
            ConfigError: there are none, more than the context holds, or some outside the vocabulary.
        """
        given: Any = ids
        found: list[Problem] = []
        try:
            several = len(given) > 0 and hasattr(given[0], "__len__") and getattr(given[0], "ndim", 1) > 0
            rows = [list(map(index, row)) for row in (given if several else [given])]
        except (TypeError, LookupError):
            rule = "is no list of ids; give the numbers of tokens, as tokenizer.encode(text) does"
            raise ConfigError([(f"ids={ids!r}", rule)], scope=SCOPE) from None
        lengths = sorted({len(row) for row in rows})
        if not lengths[0]:
            found.append(("ids=[]", "is empty; give at least one id"))
        elif len(lengths) > 1:
            rule = "cannot be read at once; give lists of one length, or one after the other"
            found.append((f"lists of {lengths[0]} and {lengths[-1]} ids", rule))
        elif lengths[0] > self.model.max_seq_len:
            found.append((f"{lengths[0]} ids", f"are more than the context of {self.model.max_seq_len}; give a part of them"))
        found += [
            (f"id {id} at {place}", f"is outside the vocabulary; ids are 0 to {self.model.vocab_size - 1}")
            for row in rows
            for place, id in enumerate(row)
            if not 0 <= id < self.model.vocab_size
        ][:3]
        if found:
            raise ConfigError(found, scope=SCOPE)
        logits = self.model.forward(torch.tensor(rows, device=self.model.embedding.weight.device)).float().cpu()
        return logits if several else logits[0]

    def _decoder_of(self, rows: int) -> Decoder:
        """The decoder of the call before, if it fits: what it has recorded on a GPU is worth keeping."""
        rows = max(1, rows)
        if self._decoder is None or self._decoder.rows != rows or self._decoder.texts:
            self._decoder = None  # before another takes its memory
            self._decoder = Decoder(self.model, rows, tuned=True)
        return self._decoder


def load_run(
    folder: Path,
    update: int | Literal["last", "best"] | None = None,
    *,
    device: str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> LoadedRun:
    """Open a run's checkpoint.

    Args:
        update: number of the update it follows; `best`: by validation; None or `last`: the newest.
        device: `cpu`, `cuda`, `mps`, or `auto` for the best there is.
        precision: dtype of the weights and of all that is computed with them.

    Raises:
        ConfigError: the folder holds no run, or no such checkpoint; or this machine has no such device.
    """
    return LoadedRun(folder, update, device=device, precision=precision)


def _tokenizer_of(folder: RunFolder) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        ConfigError: it cannot be read; where it is gone, with the copy that prepared data has of it, if there is one.
    """
    path = folder.path / TOKENIZER
    if path.is_file():
        return load_tokenizer(path)
    wanted, copy = (folder.meta().get("data") or {}).get("tokenizer"), None
    for place in sorted(prepared_root().glob(f"*/{TOKENIZER}")):
        with suppress(ConfigError):
            if load_tokenizer(place).hash == wanted:
                copy = place
                break
    remedy = f"its data has a copy: {shlex.join(['cp', str(copy), relative(path)])}" if copy else "put it back from a copy"
    rule = f"is missing, and ids mean nothing without it; {remedy}, or type the command that trained the run with fresh=true"
    raise ConfigError([(relative(path), rule)], scope=SCOPE)


def _device(name: str) -> torch.device:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError([(f"device={name}", "is no device; there are cpu, cuda, mps and auto")], scope=SCOPE)
    is_beyond = device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count())
    if is_beyond or (device.type == "mps" and not has_mps):
        raise ConfigError([(f"device={name}", "is not there; device=cpu works on every machine")], scope=SCOPE)
    return device


def _dtype(precision: str) -> torch.dtype:
    if not isinstance(precision, str) or precision not in DTYPES:
        raise ConfigError([(f"precision={precision}", "is neither fp32 nor bf16")], scope=SCOPE)
    return DTYPES[precision]
