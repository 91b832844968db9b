"""A process group's store, on a connection that this process makes once for the group.

Law: only calls that do not wait are made on it. A call that waits, as torch's own do on the group's connection, holds
up all other threads of that connection; and a new connection each time can cost seconds, for torch looks up the name
of each peer.
"""

import threading
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

ANSWER_S = 30
"""For one answer of a store."""

_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_lock = threading.Lock()


def store_of(group: dist.ProcessGroup) -> Any:
    """The store of a group, the same for all who ask."""
    with _lock:
        if group not in _connections:
            _connections[group] = connected(group.get_group_store())
        return _connections[group]


def connected(store: Any) -> Any:
    """A store on a connection of its own, where it can have one."""
    try:
        own = store.clone()
    except RuntimeError:  # a store that cannot be cloned
        return store
    own.set_timeout(timedelta(seconds=ANSWER_S))
    return own
