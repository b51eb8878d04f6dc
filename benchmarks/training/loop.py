"""Train a network, one epoch at a time: batches, steps, learning rates, evaluation."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from benchmarks.common.errors import ConfigError, DataError, DivergenceError, RunError
from benchmarks.training import distributed
from benchmarks.training.config import Config
from benchmarks.training.data.batches import Batches, Part, draws
from benchmarks.training.data.in_memory import ImageData
from benchmarks.training.rank_schedule import BATCHES, RankSchedule, layers
from benchmarks.training.records import Result
from benchmarks.training.teacher import Normalise, Teacher
from tnlayers import frobenius_penalty, param_groups
from tnlayers.measuring.timing import keep_freed_memory

REPORT_EVERY = 10  # steps; each report waits for the device
EVALUATION_BATCH = 1000  # images


def batches(config: Config, data: Any) -> tuple[int, int]:
    """Return the images per step, and the steps per epoch.

    Raises:
        ConfigError, DataError: there are fewer images than the configuration needs.
    """
    if not data.count:
        raise DataError(f"{config.dataset} has no training images")
    held_out = ", which leaves out those to validate on" if config.split == "validation" else ""
    if config.images is not None and config.images > data.count:
        raise ConfigError(f"images is {config.images}, but there are {data.count} to train on{held_out}")
    count = config.images or data.count
    if config.batch_size > count:
        few = "images is" if config.images else "the number of training images is"
        raise ConfigError(f"batch_size is {config.batch_size}, but {few} {count}{'' if config.images else held_out}")
    return config.batch_size, count // config.batch_size  # each epoch leaves out other images


def set_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the kernels of a model's plain convolutions in a memory format."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.to(memory_format=memory_format)


class Loop:
    """Training of a network on a data set, one epoch at a time, without writing files.

    Args:
        config: the configuration of the run.
        data: its data set, on the device to train on.
        model: the network, on the same device.
        groups: parameter groups of the optimizer. By default, parameters with at least two axes decay.
        teacher: a trained network whose outputs the network learns to give.

    Raises:
        ConfigError, DataError: the data set has too few images, or the batches cannot be split over the processes.
    """

    def __init__(
        self,
        config: Config,
        data: Any,
        model: nn.Module,
        groups: list[dict[str, Any]] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.data, self.device = config, data, data.device
        if config.keep_memory:
            keep_freed_memory()
        self.processes = distributed.processes(self.device.type == "cpu")
        self.part = Part(self.processes.process_index, self.processes.num_processes)
        self.normalise = data.normaliser()
        self.batch_size, self.steps = batches(config, data)
        if self.batch_size % self.part.world:
            raise ConfigError(
                f"batch_size is {self.batch_size}, but {self.part.world} processes need a multiple of their number"
            )
        if config.rank_schedule is not None and self.part.world > 1:
            raise ConfigError(f"rank_schedule is {config.rank_schedule}, but there are several processes: start one")
        self.ranks = None if config.rank_schedule is None else RankSchedule(config, model)
        self.saved = ""  # epoch and step of the last checkpoint, in words
        self._place(model)
        self.teacher = teacher
        if teacher is not None:
            set_format(teacher.network.to(self.device), self.image_format)
        groups = self._groups() if groups is None else groups
        if config.optimizer == "sgd":
            sgd = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
            self.optimizer: torch.optim.Optimizer = sgd
        else:
            self.optimizer = torch.optim.AdamW(groups, config.lr, (config.momentum, 0.999))
        self.scheduler = self._schedule()
        # Scales gradients if Accelerate uses half precision. Accelerate.prepare would keep it after the run.
        self.scaled = AcceleratedOptimizer(self.optimizer, device_placement=False, scaler=self.processes.scaler)
        self.average = distributed.Average(self.model, config.ema) if config.ema else None
        self.history: list[dict[str, Any]] = []
        self.ending = False  # whether any process was asked to end; equal in all processes
        self._start_epoch()

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups of parameters that decay, and of those that do not; with matched rates also of cores."""
        if self.config.rates == "matched":
            optimizer = "sgd" if self.config.optimizer == "sgd" else "adam"
            decay, lr = self.config.weight_decay, self.config.lr
            found = param_groups(self.model, lr, weight_decay=decay, optimizer=optimizer, scale="expected")
            for group in found:
                if self.config.decay == "cores" and group["name"] not in ("weights", "others"):
                    group["weight_decay"] = decay
            return found
        tensor = layers(self.model).values() if self.config.decay == "kernels" else ()
        cores = {id(core) for layer in tensor for core in layer.cores}
        decaying = [p.ndim > 1 and id(p) not in cores for p in self.model.parameters()]  # no normalisation, no biases
        matrices, others = (
            [p for p, decays in zip(self.model.parameters(), decaying, strict=True) if decays == wanted]
            for wanted in (True, False)
        )
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _place(self, model: nn.Module) -> None:
        """Set `model`, and `trained`: the model that is distributed, in its memory format, and compiled."""
        self.image_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        if not self.config.shard:  # FSDP2 shards only contiguous tensors
            set_format(model, self.image_format)
        if self.part.world > 1 and self.config.sync_norm:
            model = distributed.synced(model, self.device)
        if self.config.compile:
            model.compile()
        self.model = self.trained = model
        if self.config.shard:
            if self.part.world == 1:
                raise ConfigError("shard is True, but there is one process: start several, as with torchrun")
            distributed.sharded(model)
        elif self.part.world > 1:
            self.trained = distributed.copies(model, self.device)

    def _schedule(self) -> Any:
        steps = self.config.epochs * self.steps
        if self.config.schedule != "one-cycle":
            return torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        rates, momentum = [group["lr"] for group in self.optimizer.param_groups], self.config.momentum
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, steps + 1, pct_start=max(self.config.warmup, 2 / (steps + 1)),
            base_momentum=0.85 / 0.95 * momentum, max_momentum=momentum,
        )  # fmt: skip

    @property
    def images(self) -> int:
        """Number of images in all epochs together."""
        return self.config.epochs * self.steps * self.batch_size

    @property
    def images_done(self) -> int:
        """Number of images trained on so far."""
        return (len(self.history) * self.steps + self.step) * self.batch_size

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.config.epochs

    def epoch(self, report: Callable[..., Any] = lambda **_: None) -> None:
        """Train for one epoch, or for the rest of it.

        Args:
            report: called regularly with advance= (images), epoch=, and this epoch's training loss= and accuracy=.

        Raises:
            RunError: the loss is not finite.
        """
        loss, accuracy = self._train_epoch(report)
        self.history.append({"train_loss": loss, "train_accuracy": accuracy})

    def finish(self, report: Callable[..., Any] = lambda **_: None) -> Result:
        """Train to the end. For the arguments and exceptions, see epoch."""
        while not self.finished:
            self.epoch(report)
        return Result(self.config, self.model, self.history)

    def _start_epoch(self) -> None:
        self.step, self.seconds, self.lr = 0, 0.0, self.scheduler.get_last_lr()[0]
        # Sums of losses and of correct predictions, in this process.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _train_epoch(self, report: Callable[..., Any]) -> tuple[float, float]:
        self.started = time.perf_counter() - self.seconds
        self.model.train()
        epoch, reported, config = len(self.history) + 1, self.step, self.config
        batches = Batches(
            self.batch_size, self.step, self.steps, config.seed, epoch, config.augment, self.part, config.pad
        )
        for images, labels in self.data.training(batches):
            self.image_shape = images.shape[1:]
            mixed, targets = self._mix(images, labels, epoch)
            logits = self._logits(mixed, self.trained)
            loss = self._loss(mixed, logits, targets)
            self.scaled.zero_grad()
            self.processes.backward(self._decayed(loss))
            if config.clip is not None:
                self.processes.unscale_gradients(self.scaled)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.scaled.step()
            self.scheduler.step()
            if self.average:
                self.average.update()
            correct = (logits.detach().argmax(1) == labels).sum()
            self.sums += torch.stack([loss.detach() * len(labels), correct]).to(self.sums)
            self.step += 1
            last = self.step == self.steps
            asked = self.part.world == 1 and distributed.signals.came  # several processes agree on it in _total
            saving = not last and (asked or (config.save_every and self.step % config.save_every == 0))
            if self.step % REPORT_EVERY == 0 or last or saving:
                mean_loss, accuracy = (self._total(self.sums) / (self.step * self.batch_size)).tolist()
                if not math.isfinite(mean_loss):
                    raise self._lost(f"the loss is {mean_loss} in epoch {epoch}")
                done = (self.step - reported) * self.batch_size
                report(advance=done, epoch=epoch, loss=mean_loss, accuracy=accuracy)
                reported = self.step
            if saving or (self.ending and not last):
                self.seconds = time.perf_counter() - self.started
                self._save()
            if self.ending and not last:
                raise self._ended()
        if self.ranks:
            self._lower_ranks(self.ranks, epoch)
        self._start_epoch()
        return mean_loss, accuracy

    def _lower_ranks(self, ranks: RankSchedule, epoch: int) -> None:
        """Lower the ranks as the schedule says, by the loss on the epoch's first images."""

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self._logits(batch[0], model), batch[1])

        steps = min(BATCHES, self.steps)
        batches = Batches(self.batch_size, 0, steps, self.config.seed, epoch, False, self.part)
        ranks.lower(self.model, epoch, self.data.training(batches), loss, self.optimizer)

    @property
    def _there(self) -> str:
        """The existing checkpoint, in words."""
        return "there is no checkpoint yet"

    def _save(self) -> None:
        """Write a checkpoint. Run overrides it; here it does nothing."""

    def _lost(self, what: str) -> DivergenceError:
        return DivergenceError(f"{self.config.arm}: {what}: try a smaller --lr; {self._there}")

    def _ended(self) -> distributed.Ended:
        return distributed.Ended(distributed.signals.came or signal.SIGTERM)  # 0: another process got the signal

    def _total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes. They also agree here whether to end, so that all end at the same step.

        It is called where the device is waited for anyway, so the agreement costs one more number in the reduction.
        """
        asked = bool(distributed.signals.came)
        if self.part.world == 1:
            self.ending = asked
            return values
        total: Tensor = self.processes.reduce(torch.cat([values.flatten(), values.new_tensor([asked])]), "sum")
        self.ending = total[-1].item() > 0
        return total[:-1].view_as(values)

    def _mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return images with boxes of others (CutMix) and shares of the labels, or both unchanged."""
        if not self.config.cutmix:
            return images, labels
        generator = draws(self.config.seed, epoch, self.step, 1)
        wanted, keep, down, right = torch.rand(4, generator=generator).tolist()
        if wanted >= self.config.cutmix:
            return images, labels
        sizes = [round(math.sqrt(1 - keep) * size) for size in images.shape[2:]]
        top, left = (
            round(a * size) - b // 2 for a, size, b in zip((down, right), images.shape[2:], sizes, strict=True)
        )
        box = (..., slice(max(0, top), max(0, top + sizes[0])), slice(max(0, left), max(0, left + sizes[1])))
        images, others = images.clone(), images.roll(1, 0)  # the order of a batch is random
        images[box] = others[box]
        share = images[box].shape[2:].numel() / images.shape[2:].numel()
        one, other = (F.one_hot(which, self.data.num_classes).float() for which in (labels, labels.roll(1)))
        return images, (1 - share) * one + share * other

    def _loss(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = self._logits(images, self.teacher.network, self.teacher.normalise)
        return self.teacher.loss(logits, wanted, loss)

    def _decayed(self, loss: Tensor) -> Tensor:
        """Return the loss with the decay of kernels, where that is asked for."""
        if self.config.decay == "cores":
            return loss
        return loss + 0.5 * self.config.weight_decay * frobenius_penalty(self.model)

    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        self._share_statistics()
        size = EVALUATION_BATCH if isinstance(self.data, ImageData) else self.batch_size // self.part.world
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        inference = torch.no_grad() if self.config.shard else torch.inference_mode()
        with self.average.applied() if self.average else nullcontext(), inference:
            for images, labels in self._in_step(self.data.evaluation(size, self.part)):
                logits = self._logits(images, self.model)[: len(labels)]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))]).to(sums)
        loss, correct, count = self._total(sums).tolist()
        if not count:
            raise RunError(f"{self.config.dataset} has no images to evaluate on")
        return loss / count, correct / count

    def _in_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches. With sharded parameters, add empty ones: all processes must gather equally often."""
        if not self.config.shard:
            yield from batches
            return
        while True:
            batch = next(batches, None)
            if not self._total(torch.tensor(float(batch is not None), device=self.device)):
                return
            blank = torch.zeros(1, *self.image_shape, device=self.device)
            yield (blank, torch.zeros(0, dtype=torch.int64, device=self.device)) if batch is None else batch

    def _logits(self, images: Tensor, model: nn.Module, normalise: Normalise | None = None) -> Tensor:
        images = (normalise or self.normalise)(images).contiguous(memory_format=self.image_format)
        ours = torch.autocast(self.device.type, torch.bfloat16) if self.config.amp else nullcontext()
        with self.processes.autocast(), ours:  # the first has an effect only if Accelerate enables it
            logits: Tensor = model(images)
        return logits.float()

    def _lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate: linear warm-up, then half a cosine or a line down to zero."""
        steps = self.config.epochs * self.steps
        warmup = round(self.config.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 1 - done if self.config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2

    def _share_statistics(self) -> None:
        """Average running statistics over the processes, where each has its own, before evaluating or saving."""
        if self.part.world > 1 and not self.config.sync_norm:
            distributed.share_(self.model.buffers())
            if self.average:
                names = {name for name, _ in self.model.named_buffers()}
                distributed.share_(value for name, value in self.average.values.items() if name in names)
