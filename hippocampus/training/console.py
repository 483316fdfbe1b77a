"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hippocampus.training.clock import clock_face


class RunConsole:
    """Prints the course of a run; silent on all processes but the first."""

    def __init__(self, steps: int, quiet: bool = False):
        """Prepares for a run of `steps` steps."""
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._steps = steps
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(escape(text))

    def start(self, step: int) -> None:
        """Shows the bar, on a terminal."""
        if self._console.is_terminal and not self._console.quiet:
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(),
                TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(),
                console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("", total=self._steps, completed=step,
                                                 numbers="")

    def step(self, step: int, values: Mapping[str, float], seconds_left: float | None) -> None:
        """The numbers of a logged step."""
        numbers = [f"loss {values['train/loss']:.4f}",
                   f"lr {values['train/learning_rate']:.2e}",
                   f"grad {values['train/grad_norm']:.2f}"]
        if "train/tokens_per_second" in values:
            numbers.append(f"{_short(values['train/tokens_per_second'])} tok/s")
        if "train/mfu" in values:
            numbers.append(f"MFU {values['train/mfu']:.1%}")
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers="  ".join(numbers))
        else:
            left = "" if seconds_left is None else f"  {clock_face(seconds_left)} left"
            width = len(str(self._steps))
            self.say(f"step {step:>{width}}/{self._steps}  {'  '.join(numbers)}{left}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text the model wrote."""
        self.say(f"--- sample at step {step} " + "-" * 40)
        self.say((prompt + text).strip("\n"))
        self.say("-" * 64)

    def show(self, content: RenderableType) -> None:
        """Anything that rich prints."""
        self._console.print(content)

    def stop(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
