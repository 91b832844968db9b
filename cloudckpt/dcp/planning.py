"""What a rank writes, as shards.

Law: pure, but for the random names of shards: attempts never share a key.
"""

from collections.abc import Sequence
from secrets import token_hex

from cloudckpt import layout
from cloudckpt.engine.framing import MAX_PARTS, AnyPlan, Item, plan_frames, plan_shards
from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions.chain import Rules


def plan_rank(
    items: Sequence[Item], keys: Sequence[str], *, rules: Rules, options: WriteOptions, rank: int
) -> list[AnyPlan]:
    """A rank's shards: for each chain of extensions its own.

    Args:
        items: of the rank.
        keys: of the state dict, one for each item.
        rules: which item goes through which chain.
        options: how to write.
        rank: for the shards' headers.
    """
    plans: list[AnyPlan] = []
    for chain, chosen in rules.group(keys):
        if chain.extensions:
            plans += plan_frames(
                items,
                chosen,
                chain,
                frame_size=options.frame_size,
                new_key=lambda: layout.shard_key(token_hex(16), layout.FRAMES),
                max_size=MAX_PARTS * options.frames_part_size // 2,
            )
        else:
            plans += plan_shards(
                items,
                chosen,
                rank=rank,
                frame_size=options.frame_size,
                new_token=lambda: token_hex(16),
                key_of=lambda token: layout.shard_key(token, layout.SAFETENSORS),
            )
    return plans
