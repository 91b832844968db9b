"""Hugging Face's Trainer with its checkpoints in object storage, saved behind training.

Law: the Trainer says when to save and where to go on; the Checkpointer does it. A callback could only save: it is not
told where in its data the Trainer stands, and cannot put it there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from cloudckpt.dcp import Checkpointer, RngStates
from cloudckpt.errors import UsageError
from cloudckpt.manifest import MAX_METRIC_NAME_NBYTES, MAX_METRICS


class _OwnState:
    """The Trainer's own state as JSON, made only when it is saved."""

    def __init__(self, trainer: "CloudTrainer") -> None:
        self._trainer = trainer
        self.loaded = ""

    def state_dict(self) -> dict[str, str]:
        trainer = self._trainer
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        stateful: list[Any] = [one for one in callbacks if isinstance(one, ExportableState)]
        trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        return {"json": json.dumps(asdict(trainer.state))}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.loaded = state["json"]


class CloudTrainer(Trainer):
    """A Trainer whose checkpoints are a Checkpointer's steps; nothing is written to ``output_dir`` for them.

    ``save_strategy`` and ``save_steps`` count as ever; what ``save_total_limit`` would do is the Checkpointer's
    ``keep``. What was logged at a step are its metrics, for `KeepBest`. A save that failed is raised by the next one,
    or when the Checkpointer is closed. After a signal that it waits for (`Checkpointer.save_on_signal`) the step is
    saved at its end, and training stops.

    For another Trainer: ``class MyTrainer(CloudTrainer, Seq2SeqTrainer)``.

    Example:
        >>> with Checkpointer("s3://bucket/run", keep=KeepLast(3)) as checkpointer:
        ...     trainer = CloudTrainer(model, arguments, train_dataset=rows, checkpointer=checkpointer)
        ...     trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, *args: Any, checkpointer: Checkpointer, **kwargs: Any) -> None:
        """Makes the Trainer.

        Args:
            *args: of Trainer.
            checkpointer: saves and loads; its owner closes it.
            **kwargs: of Trainer.

        Raises:
            UsageError: the arguments ask for what is the Checkpointer's, or for DeepSpeed.
        """
        super().__init__(*args, **kwargs)
        self._checkpointer = checkpointer
        self._resumed: tuple[str, int] | None = None
        self._of_rank: dict[str, Any] = {}
        if self.is_deepspeed_enabled:
            msg = "DeepSpeed keeps the state of model and optimizer to itself; train with FSDP2 or DDP"
            raise UsageError(msg)
        if self.args.load_best_model_at_end or self.args.save_total_limit or self.args.save_only_model:
            msg = (
                "load_best_model_at_end, save_total_limit and save_only_model look at files in output_dir: keep the "
                "best steps with Checkpointer(keep=KeepBest(...)), and load one with checkpointer.load"
            )
            raise UsageError(msg)

    def train(self, resume_from_checkpoint: str | int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains.

        Args:
            resume_from_checkpoint: True goes on from the newest committed step, and begins where there is none; a
                number, from that step; a path, from a checkpoint of the Trainer's own.
            *args: of `Trainer.train`.
            **kwargs: of `Trainer.train`.

        Raises:
            CheckpointNotFoundError: the step that was asked for is not committed.
            CheckpointError: a save or the load failed, on whichever rank.
        """
        if (
            resume_from_checkpoint is None
            or resume_from_checkpoint is False
            or isinstance(resume_from_checkpoint, str)
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        own = _OwnState(self)
        asked = None if resume_from_checkpoint is True else resume_from_checkpoint
        step = self._checkpointer.load({"trainer": own}, step=asked, missing="none" if asked is None else "error")
        if step is None:
            return super().train(None, *args, **kwargs)
        with TemporaryDirectory() as directory:  # the Trainer reads its own state, a few KB, from a file
            Path(directory, TRAINER_STATE_NAME).write_text(own.loaded, encoding="utf-8")
            self._resumed = directory, step
            try:
                return super().train(directory, *args, **kwargs)
            finally:
                self._resumed = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if trial is not None:
            msg = "the trials of a hyperparameter search would share their steps; save none of them"
            raise UsageError(msg)
        del model
        self.store_flos()
        self._checkpointer.async_save(
            self.state.global_step,
            self._everything(),
            per_rank={"rng": RngStates()},
            metrics=_metrics(self.state),
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._checkpointer._watch is None:
            return
        own = {"rng": RngStates()}
        if self._checkpointer.save_if_asked(self.state.global_step, self._everything(), per_rank=own):
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_ours(resume_from_checkpoint):  # ours is loaded when model and optimizer are prepared
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self._resumed is not None  # noqa: S101 - for the type checker
        self._of_rank = {}
        self._checkpointer.load(
            self._everything(), step=self._resumed[1], per_rank=self._of_rank, missing_per_rank="none"
        )

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_rng_state(checkpoint)
        elif self._of_rank:
            RngStates(strict=False).load_state_dict(self._of_rank["rng"])

    def _is_ours(self, checkpoint: str | None) -> bool:
        return self._resumed is not None and checkpoint == self._resumed[0]

    def _everything(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "model": self.model_wrapped,
            "optimizer": getattr(self.optimizer, "optimizer", self.optimizer),  # Accelerate's wrapper may not step
            "schedule": self.lr_scheduler,
            "trainer": _OwnState(self),
            **({} if scaler is None else {"scaler": scaler}),
        }


def _metrics(state: Any) -> dict[str, float]:
    """What was logged at this step."""
    logged: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            logged |= _numbers(entry)
    return dict(list(logged.items())[:MAX_METRICS])


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in entry.items()
        if name != "step"
        and type(value) in (int, float)
        and math.isfinite(value)
        and len(json.dumps(name)) <= MAX_METRIC_NAME_NBYTES
    }
