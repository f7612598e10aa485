"""A trained run as an object: its model, tokenizer and config."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config
from llama_lab.config.schema import RunConfig
from llama_lab.data.tokenizer import Tokenizer, load_tokenizer
from llama_lab.inference.generate import generate
from llama_lab.model.llama import Llama
from llama_lab.training.checkpoint import list_checkpoints, load_weights


class LoadedRun:
    """A checkpoint of a run, the newest unless another is asked for, on the CPU in float32, ready to be asked.

    Attributes:
        model, tokenizer, run: what was trained, on what ids, from which config.
        update, tokens: how far it had been trained.
    """

    def __init__(self, folder: Path, update: int | None = None):
        if not (folder / "config.yaml").is_file():
            raise ConfigError([(str(folder), "holds no run; name a folder outputs/<name>/<run id>")], scope="this request")
        checkpoints = list_checkpoints(folder / "checkpoints")
        if not checkpoints:
            raise ConfigError([(str(folder), "has no checkpoint yet; train it further")], scope="this request")
        by_update = {checkpoint.update: checkpoint for checkpoint in checkpoints}
        chosen = by_update.get(checkpoints[-1].update if update is None else update)
        if chosen is None:
            there = ", ".join(map(str, by_update))
            raise ConfigError([(f"update {update}", f"is no checkpoint of {folder}; there are {there}")], scope="this request")
        self.run: RunConfig = load_config(folder / "config.yaml")
        self.tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer.json")
        self.update, self.tokens = chosen.update, chosen.tokens
        self.model = Llama(self.run.model, vocab_size=self.tokenizer.vocab_size, max_seq_len=self.run.data.max_seq_len)
        self.model.load_state_dict(load_weights(chosen))
        self.model.eval()

    def generate(
        self, prompt: str, *, max_new_tokens: int = 100, temperature: float = 0.8, top_k: int | None = 50, seed: int = 0
    ) -> str:
        """Continue a text that is taken as the beginning of a document.

        Args:
            max_new_tokens: tokens added at most; an end-of-document token ends earlier.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among the k most likely tokens; None: among all.
            seed: of the draws; the same seed gives the same text.

        Returns:
            The continuation, without the prompt.
        """
        (output,) = generate(
            self.model,
            [[self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]],
            new_tokens=max_new_tokens,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
            top_k=top_k,
            eos_id=self.tokenizer.eos_id,
        )
        return self.tokenizer.decode(output)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of the token after each position, (len(ids), vocabulary), float32."""
        return self.model(torch.tensor([list(ids)]))[0]


def load_run(folder: Path, update: int | None = None) -> LoadedRun:
    """Open a run's checkpoint.

    Args:
        update: number of the update it follows; None: the newest.

    Raises:
        ConfigError: the folder holds no run, or no such checkpoint.
    """
    return LoadedRun(folder, update)
