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
    """The newest checkpoint of a run, on the CPU in float32, ready to be asked.

    Attributes:
        model, tokenizer, run: what was trained, on what ids, from which config.
        update, tokens: how far it had been trained.
    """

    def __init__(self, folder: Path):
        if not (folder / "config.yaml").is_file():
            raise ConfigError([(str(folder), "holds no run; name a folder outputs/<name>/<run id>")], scope="this request")
        checkpoints = list_checkpoints(folder / "checkpoints")
        if not checkpoints:
            raise ConfigError([(str(folder), "has no checkpoint yet; train it further")], scope="this request")
        self.run: RunConfig = load_config(folder / "config.yaml")
        self.tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer.json")
        self.update, self.tokens = checkpoints[-1].update, checkpoints[-1].tokens
        self.model = Llama(self.run.model, vocab_size=self.tokenizer.vocab_size, max_seq_len=self.run.data.max_seq_len)
        self.model.load_state_dict(load_weights(checkpoints[-1]))
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


def load_run(folder: Path) -> LoadedRun:
    """Open a run's newest checkpoint.

    Raises:
        ConfigError: the folder holds no run, or no checkpoint yet.
    """
    return LoadedRun(folder)
