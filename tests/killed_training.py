"""The demo's training of a small model, one rank of it: what `test_kills` kills.

``python -m torch.distributed.run -m killed_training`` with the arguments of `cloudckpt.cli.demo.train`. It begins
anew where nothing was ever committed, as a job does that is started by the same command each time.
"""

from typing import NamedTuple

import torch
from torch import nn

from cloudckpt.cli.demo.sentences import PAIRS
from cloudckpt.cli.demo.train import main, sharded

_TOKENS, _WIDTH, _LAYERS, _LENGTH = 65_536, 96, 3, 12
"""A shard of each rank takes two parts of 8 MiB, so that a kill can leave a multipart upload."""


class Output(NamedTuple):
    last_hidden_state: torch.Tensor


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(_WIDTH, 4, 2 * _WIDTH, dropout=0.1, batch_first=True) for _ in range(_LAYERS)
        )

    def forward(self, hidden, is_padding):
        for layer in self.layer:
            hidden = layer(hidden, src_key_padding_mask=is_padding)
        return hidden


class Small(nn.Module):
    """As the demo's model is called, and what it gives back."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(_TOKENS, _WIDTH)
        self.encoder = Encoder()

    def forward(self, *, input_ids, attention_mask):
        return Output(self.encoder(self.embeddings(input_ids), attention_mask == 0))


def small(directory, seed, is_read):
    """A `Build` of `cloudckpt.cli.demo.train` that reads nothing."""
    torch.manual_seed(seed)
    rows = 2 * len(PAIRS)
    mask = (torch.arange(_LENGTH) < torch.randint(4, _LENGTH + 1, (rows, 1))).long()
    tokens = {"input_ids": torch.randint(_TOKENS, (rows, _LENGTH)), "attention_mask": mask}
    return sharded(Small(), tokens, seed)


if __name__ == "__main__":
    main(small, missing="none")
