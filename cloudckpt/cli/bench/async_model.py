"""A small GPT that is trained on the CPU, and its state as others would save it.

Law: the same model for everyone; its states are the tensors that training changes in place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

VOCABULARY = 1024


class Block(nn.Module):
    """Attention and two layers, each on top of what came in."""

    def __init__(self, width: int) -> None:
        """Of a width that 64 divides."""
        super().__init__()
        self.heads = width // 64
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_layers = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of batch, tokens, width."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, tokens, 3, self.heads, 64)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.before_layers(x))))
        return out


class Gpt(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int, layers: int) -> None:
        """See `Block` for the width."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of each next token."""
        logits: torch.Tensor = self.head(self.blocks(self.embedding(tokens)))
        return logits


@dataclass(frozen=True, slots=True)
class Learner:
    """A model, its AdamW with moments, and a batch."""

    model: Gpt
    optimizer: torch.optim.Optimizer
    tokens: torch.Tensor

    @classmethod
    def of(cls, nbytes: int, *, width: int, batch: int, length: int) -> "Learner":
        """One whose weights and moments take about so many bytes."""
        per_layer = 12 * (12 * width * width + 13 * width)
        layers = max(1, round((nbytes - 24 * VOCABULARY * width) / per_layer))
        torch.manual_seed(0)
        model = Gpt(width, layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        learner = cls(model, optimizer, torch.randint(VOCABULARY, (batch, length + 1)))
        learner.step()
        return learner

    def step(self) -> None:
        """One step of training."""
        logits = self.model(self.tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def nbytes(self) -> int:
        """Of the weights and the moments."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def objects(self) -> dict[str, Any]:
        """As they are, for who takes them so."""
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def application(self) -> dict[str, Any]:
        """As docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html has it saved."""
        return {"app": _Application(self)}


class _Application:
    """What torch calls a Stateful."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._learner.model, self._learner.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError  # nothing is loaded here
