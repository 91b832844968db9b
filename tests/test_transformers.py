"""Hugging Face's Trainer, with the recipe of the page about frameworks and the real package."""

import os
import signal
from functools import partial
from secrets import token_hex

import pytest
import torch
from transformers import TrainingArguments

import cloudckpt
from cloudckpt.catalog import committed_steps
from cloudckpt.dcp import Checkpointer, WriterHook
from cloudckpt.errors import CheckpointError, CheckpointNotFoundError, UsageError
from cloudckpt.frameworks.transformers import CloudTrainer
from recipes import Lost, after, lost_after, recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the recipe defines, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return recipe("Hugging Face Transformers", "memory://page/")[0]


def measured(log):
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "second" not in name}
        for entry in log
        if "loss" in entry
    ]


def test_a_run_that_was_lost_goes_on_from_the_newest_step_to_the_same_losses(names, tmp_path):
    root = f"memory://{token_hex(6)}"
    with pytest.raises(Lost), lost_after(8):
        names["train"](f"{root}/lost")
    assert committed_steps(f"{root}/lost") == [3, 6]
    undisturbed = names["train"](f"{root}/undisturbed")
    resumed = names["train"](f"{root}/lost")
    assert len(measured(resumed)) == 12
    assert measured(resumed) == measured(undisturbed)
    with cloudckpt.open(f"{root}/undisturbed/step-12") as a, cloudckpt.open(f"{root}/lost/step-12") as b:
        weights = a.to_torch("model.*")
        assert all(weights[key].equal(tensor) for key, tensor in b.to_torch("model.*").items())
        assert b.summary.metrics["loss"] == measured(resumed)[-1]["loss"]
    assert not any(files for _, _, files in os.walk(tmp_path)), "nothing was written to the local disk"


class Full(WriterHook):
    """Stands for whatever makes a save fail behind training."""

    def pre_commit(self, info):
        raise OSError(f"no room for step {info.step}")


def test_a_save_that_fails_behind_training_is_raised_out_of_it_by_the_next(names):
    names["Checkpointer"] = partial(Checkpointer, hooks=[Full()])
    with pytest.raises(CheckpointError, match=r"the save of step 3, of before, failed: .*no room for step 3"):
        names["train"](f"memory://{token_hex(6)}")


def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_to_the_same_losses(names):
    def told_of_signals(*args, **kwargs):
        checkpointer = Checkpointer(*args, **kwargs)
        checkpointer.save_on_signal(signal.SIGUSR1)
        return checkpointer

    root = f"memory://{token_hex(6)}"
    undisturbed = names["train"](f"{root}/undisturbed")
    names["Checkpointer"] = told_of_signals
    with after(5, lambda: signal.raise_signal(signal.SIGUSR1)):
        names["train"](f"{root}/told")
    assert committed_steps(f"{root}/told") == [3, 5]
    assert measured(names["train"](f"{root}/told")) == measured(undisturbed)


def test_what_only_the_checkpointer_can_do_is_refused_before_anything_is_trained(names, tmp_path):
    with Checkpointer(f"memory://{token_hex(6)}") as checkpointer:
        for option in ({"save_total_limit": 2}, {"save_only_model": True}):
            arguments = TrainingArguments(tmp_path, use_cpu=True, **option)
            with pytest.raises(UsageError, match="KeepBest"):
                CloudTrainer(torch.nn.Linear(1, 1), arguments, checkpointer=checkpointer)
        trainer = CloudTrainer(
            torch.nn.Linear(1, 1), TrainingArguments(tmp_path, use_cpu=True), checkpointer=checkpointer
        )
        with pytest.raises(CheckpointNotFoundError, match="step 7"):
            trainer.train(resume_from_checkpoint=7)
