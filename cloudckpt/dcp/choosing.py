"""Which step a job loads.

Law: all ranks try the same steps in the same order.
"""

import logging
from collections.abc import Callable, Sequence

from cloudckpt import catalog
from cloudckpt.errors import CheckpointNotFoundError, IntegrityError

log = logging.getLogger(__name__)


def load_first(root: str, steps: Sequence[int], load: Callable[[str], object], *, fallback: bool) -> int | None:
    """Loads the first of the steps that is committed.

    Args:
        root: that they lie below.
        steps: to try; the same on all ranks.
        load: loads from a URL; raises the same on all ranks.
        fallback: go on to the next where one is damaged.

    Returns:
        The step; None if none is committed.

    Raises:
        IntegrityError: it is damaged, or all are.
        CheckpointError: whatever else failed.
    """
    damage: IntegrityError | None = None
    for step in steps:
        url = catalog.step_url(root, step)
        try:
            load(url)
        except CheckpointNotFoundError:
            continue
        except IntegrityError as e:
            damage = damage or e
            if not fallback:
                e.add_note("load(step=...) takes an earlier step, load(fallback=True) the newest that is whole")
                raise
            log.warning("%s is damaged, trying the step before it: %s", url, e)
        else:
            return step
    if damage is not None:
        raise damage
    return None
