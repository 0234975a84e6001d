"""One optimizer step: micro-batches, precision, clipping, and what it reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place, autocast, to_device
from lavis_dcd.runners.health import Health, LiveBuffers, blame, gradient_norm
from lavis_dcd.runners.logs import scalars_of
from lavis_dcd.runners.optim import make_optimizer, make_scheduler
from lavis_dcd.runners.seeding import seed_everything, seed_for
from lavis_dcd.runners.sharding import is_sharded, kept_whole, load_optimizer, whole


class Stepper:
    """The optimizer, its schedule and its scaler, and a step that uses them.

    Args:
        task: `train_step(model, samples)` returns the model's output dict with "loss", or the loss itself.
        model: as it trains (perhaps inside DistributedDataParallel, or sharded).
        bare_model: the model without that wrapper.
        total_steps: of the whole job, for the schedule.

    Raises:
        UserError: nothing is trainable.
    """

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        bare_model: nn.Module,
        run: RunConfig,
        place: Place,
        total_steps: int,
    ) -> None:
        self._task, self._model, self._run, self._place = task, model, run, place
        self.optimizer = make_optimizer(bare_model, run)
        self.scheduler = make_scheduler(self.optimizer, run, total_steps)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=run.amp == "fp16")
        self.health = Health(place)
        self._buffers = LiveBuffers(bare_model)

    @property
    def lr(self) -> float:
        """The rate of the first group, at which the next step will be taken."""
        return self.optimizer.param_groups[0]["lr"]

    def step(
        self, batches: Iterator[Mapping[str, Any]], size: int, number: int, extra: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Take `size` micro-batches and one optimizer step whose gradient is their mean.

        Where the loss or the gradient is NaN or infinite in any process, all skip the step: weights, optimizer,
        schedule and the model's buffers stay as they were, and `health` counts it.

        Every generator is seeded from (seed, step, micro-batch, process) before each forward pass, so what
        dropout draws does not depend on what ran before.

        Args:
            number: the optimizer step, counted over the whole job.
            extra: more entries of the samples (LAVIS models expect "epoch", "iters", "num_iters_per_epoch").

        Returns:
            The mean over the micro-batches of every scalar in the model's output; "grad_norm" when clipping.
            Nothing where the step is skipped.
        """
        reports, image_ids = [], []
        if is_sharded(self._model):
            self._place.share_tensors(self._buffers.live().values())
        self._buffers.remember()
        for micro in range(size):
            samples = to_device(next(batches), self._place.device)
            samples.update(extra)
            image_ids.append(samples.get("image_id"))
            seed_everything(seed_for(self._run.seed, "step", number, micro, self._place.rank))
            with self._gradient_exchange(last=micro == size - 1):
                reports.append(self._backward(samples, size))
        means = {
            name: torch.stack(
                [report[name].to(self._place.device) for report in reports if name in report]
            ).mean()
            for name in {name: None for report in reports for name in report}
        }
        norm = self._gradient_norm()
        # one flag crosses from the device, and between the processes, in each step
        if self._place.any(not bool(torch.isfinite(means["loss"] + norm))):
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
            self.health.skip(number, blame(reports, image_ids, self.optimizer), scale)
            self._drop()
            return {}
        self.health.took(number)
        return means | self._update(norm)

    def _backward(self, samples: dict[str, Any], size: int) -> dict[str, torch.Tensor]:
        with autocast(self._run, self._place.device):
            output = self._task.train_step(self._model, samples)
        if isinstance(output, torch.Tensor):
            output = {"loss": output}
        self.scaler.scale(output["loss"] / size).backward()
        return scalars_of(output)

    def _gradient_norm(self) -> torch.Tensor:
        parameters = self._parameters()
        if is_sharded(self._model):
            self._place.average_gradients(kept_whole(parameters))
        self.scaler.unscale_(self.optimizer)
        return gradient_norm(parameters)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _update(self, norm: torch.Tensor) -> dict[str, torch.Tensor]:
        report = {}
        if self._run.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters(), self._run.grad_clip, norm)
            report["grad_norm"] = norm.double()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return report

    def _drop(self) -> None:
        self.scaler.update()  # lowers the scale where that is what overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.restore()

    def _gradient_exchange(self, last: bool) -> Any:
        if is_sharded(self._model):
            self._model.set_requires_gradient_sync(last)
        if last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: "optimizer", "scheduler", "scaler", "health". Every process must call it.

        Of a sharded model the main process alone has the optimizer's tensors.
        """
        return {
            "optimizer": whole(self.optimizer.state_dict(), self._place.is_main),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
