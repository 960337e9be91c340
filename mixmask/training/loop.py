"""What happens around a training step, once for every stage: resume, progress, log, checkpoints, signals, the end.

    loop = Loop(run, config, state, rates, images)
    loop.resume()
    with loop.running():
        for epoch in loop.epochs():
            for batch in loop.batches(...):     of the epoch, from step `loop.skip` on
                loop.log(one_step(batch))
                loop.save_if_due()
            loop.end_epoch(evaluate)
    loop.finish(result)

A checkpoint is written before what is measured at an epoch's end. A run that stops in between owes the epoch's line:
it resumes at that epoch with no batch left, measures and logs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from mixmask import checkpoint
from mixmask.runs import Run, read_log
from mixmask.training import distributed
from mixmask.training.clock import Clock, Work
from mixmask.training.interrupt import Interrupt
from mixmask.training.nonfinite import dump_on_nonfinite, finite
from mixmask.training.progress import Progress, say
from mixmask.training.state import TrainState

T = TypeVar("T")


def finished(run: Run) -> dict[str, Any] | None:
    """The result of a run that has one, and a line that says so. Several processes read it one after the other."""
    with distributed.main_process_first():
        result = run.result
    if result is not None:
        say(f"{run.id} is finished: {headline(result)}; nothing to do")
    return result


class Loop:
    """One run's way through its epochs.

    config: the stage's, of which `batch_size` and `run` are used. rates(step): the learning rates of a step, by name.
    images(epoch): the indices of the epoch's images, (steps, batch). step_lines: log every `run.log_every` steps.
    """

    def __init__(
        self,
        run: Run,
        config: Any,
        state: TrainState,
        rates: Callable[[int], dict[str, float]],
        images: Callable[[int], Tensor],
        step_lines: bool = False,
    ):
        self.run, self.config, self.state = run, config, state
        self.rates, self.images, self.step_lines = rates, images, step_lines
        self.epoch, self.owes_epoch_line = 0, False
        self.interrupt, self.clock, self.work = Interrupt(), Clock(), Work()
        self.progress: Progress | None = None

    # ----------------------------------------------------------------------------------------- beginning and end

    def resume(self) -> None:
        """Fill the state from the last whole checkpoint, where there is one; log lines after it are dropped."""
        state = self.state
        with distributed.main_process_first():
            saved = checkpoint.load_last(self.run.checkpoint)
            if saved is not None:
                state.load_state_dict(saved, self.run.checkpoint)
            self.run.rewind(state.step if saved else -1, state.step // state.steps_per_epoch)
        distributed.assert_in_sync(state.model.state_dict(), state.step)
        self._find_owed_line()

    def _find_owed_line(self) -> None:
        state, spe = self.state, self.state.steps_per_epoch
        if not state.sums or state.step % spe:
            return
        lines = read_log(self.run.directory)
        self.owes_epoch_line = not any(x["kind"] == "epoch" and x["epoch"] == state.step // spe for x in lines)
        if not self.owes_epoch_line:
            state.start_epoch()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Signals stop at the next safe point; a number that is not finite is reported and dumped."""
        with self.interrupt, dump_on_nonfinite(self.run, self.state, self._about):
            yield

    def _about(self, step: int) -> dict[str, Any]:
        """What the report says of a step: its learning rates, the image indices of it and of the previous step."""
        epoch, position = divmod(step, self.state.steps_per_epoch)
        batches, first = self.images(epoch), step - position
        indices = {i: batches[i - first].tolist() for i in range(max(first, step - 1), step + 1)}
        return {"epoch": epoch + 1, **self.rates(step), "indices": indices}

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json; returns what it holds."""
        if distributed.rank() == 0:
            self.run.finish(result)
            say(f"{self.run.id} is finished: {headline(result)}")
        distributed.barrier()
        return self.run.result

    # ------------------------------------------------------------------------------------------------ on the way

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 0."""
        state = self.state
        for epoch in range(state.step // state.steps_per_epoch - self.owes_epoch_line, state.epochs):
            self.epoch, self.clock = epoch, Clock()
            yield epoch

    @property
    def skip(self) -> int:
        """Steps of this epoch that are done."""
        return self.state.step - self.epoch * self.state.steps_per_epoch

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """The epoch's batches, under a progress bar."""
        state = self.state
        told = self.progress and self.progress.told
        self.progress = Progress(state.steps, f"epoch {self.epoch + 1}/{state.epochs}", state.step, told)
        with contextlib.closing(self.progress):
            yield from self.clock.waits(batches)

    def log(self, values: Mapping[str, Tensor], also: Callable[[], dict[str, Tensor]] = dict) -> None:
        """Count a step and its scalars. `also()`: scalars for the step's line alone. Raises NonFiniteError."""
        config, state, step = self.config, self.state, self.state.step - 1
        state.add(values)
        self.clock.images += config.batch_size
        self.clock.flops += self.work.flops * distributed.size()
        shown = {}
        if self.step_lines and step % config.run.log_every == 0:
            numbers = finite({**values, **distributed.mean(also())}, step)
            timing = self.clock.timing()
            self.run.log("step", step, epoch=self.epoch + 1, **numbers, **self.rates(step), timing=timing)
            shown = {"loss": f"{numbers['loss']:.3f}"}
        self.progress.step(**shown)

    def save_if_due(self) -> None:
        """Within an epoch: save every `run.checkpoint_minutes`; if a signal asks to stop, save and stop.

        The end of an epoch is `end_epoch`'s.
        """
        due = distributed.rank() == 0 and self.clock.due(self.config.run.checkpoint_minutes)
        stop, due = distributed.any_rank(self.interrupt.requested, due)
        if self.skip < self.state.steps_per_epoch and (stop or due):
            self.save()
            if stop:
                raise KeyboardInterrupt

    def end_epoch(self, evaluate: Callable[[], dict[str, float]] = dict) -> None:
        """Save where it is due, measure, log. Raises NonFiniteError, and KeyboardInterrupt where a signal has come."""
        state, step, epoch = self.state, self.state.step - 1, self.epoch + 1
        means, timing = finite(state.means(), step), self.clock.timing()
        finite({"the norm of weights and buffers": state.model_norm}, step)
        (stop,) = distributed.any_rank(self.interrupt.requested)
        stays = self.config.run.keep_every > 0 and epoch % self.config.run.keep_every == 0
        due = epoch == state.epochs or epoch % self.config.run.checkpoint_every == 0 or stop or stays
        if due and not self.owes_epoch_line:
            self.save()
        if stays and distributed.rank() == 0:
            self._keep(epoch)
        if stop:
            raise KeyboardInterrupt
        values = {**means, **evaluate(), **self.rates(step)}
        same = distributed.assert_in_sync(state.model.state_dict(), state.step)
        self.run.log("epoch", step, epoch=epoch, **values, **same, timing=timing)
        say(epoch_line(epoch, state.epochs, values, timing))
        state.start_epoch()
        self.owes_epoch_line = False
        (stop,) = distributed.any_rank(self.interrupt.requested)
        if stop and epoch < state.epochs:
            if not due:
                self.save()
            raise KeyboardInterrupt

    def _keep(self, epoch: int) -> None:
        """The checkpoint of an epoch's end stays beside those that are replaced."""
        if not checkpoint.kept_checkpoint(self.run.checkpoint, epoch).exists():
            if self.owes_epoch_line:  # what was resumed may be the checkpoint before the last
                self._write()
            checkpoint.keep(self.run.checkpoint, epoch)

    def save(self) -> None:
        """Write the state and the log to disk. Raises NonFiniteError, and saves nothing, where a number is not finite.

        All processes hold the same state; the first writes it, and the others wait: if one exited now, torchrun
        or SLURM would end the first as well.
        """
        state = self.state
        finite({**state.sums, "the norm of weights and buffers": state.model_norm}, state.step - 1)
        with distributed.main_process_first():
            if distributed.rank() == 0:
                self._write()

    def _write(self) -> None:
        self.run.sync()
        checkpoint.save(self.run.checkpoint, {**self.run.about, **self.state.state_dict()})


# ------------------------------------------------------------------------------------------------------- results


def epoch_lines(run: Run) -> list[dict[str, Any]]:
    """The log's lines of whole epochs; epoch 0 is the state before training."""
    run.sync()
    return [line for line in read_log(run.directory) if line["kind"] == "epoch"]


def last_and_best(lines: list[dict[str, Any]], key: str, name: str) -> dict[str, float]:
    """A metric after the last epoch, its best, and its value before training where that was measured."""
    values = {line["epoch"]: line[key] for line in lines if key in line}
    metrics = {f"{name}_last": values[max(values)], f"{name}_best": max(v for epoch, v in values.items() if epoch)}
    return metrics | ({f"{name}_init": values[0]} if 0 in values else {})


def test_results(lines: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The test accuracies of a probe or a fine-tuning: top-1 under `name`, and top-5 where it was measured."""
    metrics = last_and_best(lines, "test_top1", name)
    top5 = any("test_top5" in line for line in lines)
    return metrics | (last_and_best(lines, "test_top5", f"{name}_top5") if top5 else {})


test_results.__test__ = False  # not a test, whatever its name says to pytest


def seconds(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What the epochs took, for result.json's `timing`."""
    return {"seconds": round(sum(line["timing"]["seconds"] for line in lines if "timing" in line), 1)}


def headline(result: Mapping[str, Any]) -> str:
    """The numbers of a result, for people: accuracies and AP in percent."""
    shown = {name: value for name, value in result["metrics"].items() if not name.endswith("_best")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def epoch_line(epoch: int, epochs: int, values: Mapping[str, float], timing: Mapping[str, float]) -> str:
    """One line an epoch: loss, accuracies, learning rates, speed."""
    shown = {k.replace("test_top", "top-"): v for k, v in values.items() if k.startswith(("knn_", "test_"))}
    rates = {name: value for name, value in values.items() if name.endswith("lr")}
    parts = [
        f"epoch {epoch}/{epochs}",
        f"loss {values['loss']:.4f}",
        *(f"{name} {value:.2f} %" for name, value in shown.items()),
        *(f"{name} {value:.4g}" for name, value in rates.items()),
        f"{timing['images_per_second']:.0f} images/s",
        *([f"{timing['tflops_per_second']:.3g} TFLOP/s"] if "tflops_per_second" in timing else []),
        f"data wait {timing['data_wait']:.0%}",
    ]
    return "  ".join(parts)
