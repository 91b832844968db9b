"""torch_checkpointing over our storage, with the recipe of the page about frameworks and the real package."""

from contextlib import closing
from pathlib import Path
from secrets import token_hex

import pytest
import torch
from torch_checkpointing import (
    AsyncCheckpointSaverConfig,
    CheckpointManager,
    CheckpointWriterConfig,
    SyncCheckpointSaverConfig,
)
from torch_checkpointing.staging import CheckpointStagerConfig

from cloudckpt.frameworks.torch_checkpointing import CloudStorageConfig, publish
from conftest import BUCKET
from recipes import recipe

IN_PLACE = CheckpointWriterConfig(write_to_temp_dir=False)


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture
def storage(tmp_path):
    return CloudStorageConfig(f"file://{tmp_path}/tree", part_size=5 << 20).create_storage()


def test_the_recipe_of_the_page_saves_and_loads():
    names, calls = recipe("torch_checkpointing", f"memory://{token_hex(6)}/")
    exec(calls, names)
    assert names["loaded"]["step"] == 1
    assert names["loaded"]["model"]["weight"].equal(torch.ones(4, 4))


def test_its_own_process_saves_to_a_server_and_what_was_published_is_not_written_to_again(store_options):
    config = CheckpointManager.Config(
        storage_config=CloudStorageConfig(f"s3://{BUCKET}/{token_hex(6)}", store_options),
        save=AsyncCheckpointSaverConfig(
            writer_config=IN_PLACE,
            staging_config=CheckpointStagerConfig(
                use_pinned_memory=False, use_non_blocking_copy=False, use_async_staging=False
            ),
        ),
        finalize_callback=publish,
    )
    given = {"model": {"weight": torch.randn(100, 100)}}
    with closing(config.build()) as manager:
        manager.save("step-1", given).result()
        loaded = manager.load("step-1", {"model": {"weight": torch.zeros(100, 100)}})
        assert loaded["model"]["weight"].equal(given["model"]["weight"])
        with pytest.raises(FileNotFoundError, match="step-2"):
            manager.load("step-2", given)
    manager = config.build()
    with pytest.raises(FileExistsError, match="holds a checkpoint"), closing(manager):
        manager.save("step-1", given).result()


def test_a_checkpoint_that_was_not_published_is_not_there():
    config = CheckpointManager.Config(
        storage_config=CloudStorageConfig(f"memory://{token_hex(6)}"),
        save=SyncCheckpointSaverConfig(writer_config=IN_PLACE),
    )
    with closing(config.build()) as manager:
        manager.save("step-1", {"step": 1})
        with pytest.raises(FileNotFoundError, match="step-1"):
            manager.load("step-1", {"step": 0})


def test_files_of_several_parts_appear_whole_or_not_at_all(storage):
    path, data = Path("a/b/large"), torch.arange(13 << 20, dtype=torch.uint8).numpy()
    with pytest.raises(ZeroDivisionError), storage.stream_write(path) as file:
        file.write(data)
        raise ZeroDivisionError
    assert not storage.exists(path)
    with storage.stream_write(path) as file:
        for start in range(0, len(data), 4 << 20):
            file.write(data[start : start + (4 << 20)])
    assert storage.getsize(path) == len(data)
    with storage.stream_read(path) as file:
        file.seek(6 << 20)
        assert file.read(5) == data[6 << 20 :][:5].tobytes()
    assert storage.read(path) == data.tobytes()
    assert (storage.ls(Path("a")), storage.isdir(Path("a/b")), storage.isdir(path)) == (["b"], True, False)
    storage.rmdir(Path("a"))
    assert storage.ls(Path()) == []


def test_a_rename_is_refused_with_what_to_do_instead(storage):
    with pytest.raises(OSError, match="finalize_callback"):
        storage.rename(Path("a"), Path("b"))
