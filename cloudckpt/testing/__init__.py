"""For testing this project, and training loops that use it.

Law: real parts first (an embedded S3 server), fakes only for what a server cannot be made to do.
"""

from cloudckpt.testing import faults
from cloudckpt.testing.decorators import remove_all, with_checkpoint_logging, with_temp_prefix
from cloudckpt.testing.proxy import FaultProxy, fault_proxy
from cloudckpt.testing.rot13 import Rot13, get_test_extension_registry
from cloudckpt.testing.server import EmbeddedServer, embedded_server
from cloudckpt.testing.stores import FailingStore, RecordingStore, SlowStore, WrappedStore

__all__ = [
    "EmbeddedServer",
    "FailingStore",
    "FaultProxy",
    "RecordingStore",
    "Rot13",
    "SlowStore",
    "WrappedStore",
    "embedded_server",
    "fault_proxy",
    "faults",
    "get_test_extension_registry",
    "remove_all",
    "with_checkpoint_logging",
    "with_temp_prefix",
]
