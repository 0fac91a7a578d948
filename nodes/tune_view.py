"""What One-Shot Tune shows: the loss curve, an edit beside it that is played like a flip-book, and notes below."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..tav_core import host
from ..tav_core.method.tuning import Step
from ..tav_core.pictures import image
from ..tav_core.pictures.plot import curve_with_edit, loss_curve, with_note

log = logging.getLogger(__name__)

PICTURE_SECONDS = 0.5  # the page need not redraw the curve more often
# A frame of the edit with each picture: the page draws progress pictures on a canvas, where an animated file would
# stand still.
EDIT_FPS = 8


class TuneView:
    """One run of the node in the page: its progress, picture and text.

    Args:
        node: the node's id in the graph; None outside of one.
        steps: of the whole tune.
    """

    def __init__(self, node: str | None, steps: int):
        self.node, self.steps = node, steps
        self.losses: list[float] = []
        self.notes: list[str] = []
        self._show = host.progress(steps)
        self._shown_at = 0.0
        self._edit: deque[Any] = deque()  # the frames of the latest preview, the one that is shown in front
        self._edited = 0  # the step that it was made at

    def on_step(self, step: Step) -> None:
        """A step is done: move the progress bar on, and redraw now and then."""
        self.losses[step.number - 1 :] = [step.loss]  # a step that is done again replaces its first report
        picture, now = None, time.monotonic()
        wait = 1 / EDIT_FPS if self._edit else PICTURE_SECONDS
        if now - self._shown_at > wait or step.number == self.steps:
            self._shown_at = now
            self._edit.rotate(-1)  # one frame after the other, however slow the steps are
            picture = self._picture()
        self._show(step.number, picture)

    def on_edit(self, step: int, frames: Sequence[Any]) -> None:
        """A preview was sampled after `step`; its frames are PIL pictures."""
        self._edit, self._edited = deque(frames), step
        self._show(step, self._picture())

    def tell(self, note: str) -> None:
        """Show a note for as long as the node's picture stands."""
        self.notes.append(note)
        log.info("Tune-A-Video: %s", note)
        host.progress_text(self.node, self.text)
        # Newer pages clear that text when the job ends, but leave the last picture.
        self._show(len(self.losses), self._picture())

    def plot(self) -> Tensor:
        """The curve and the notes as IMAGE, [1, h, w, 3]."""
        return image.from_picture(with_note(loss_curve(self.losses, self.steps), self.text))

    def report(self) -> tuple[str, str]:
        """(what happened, the same with the losses), when the tune has ended."""
        if not self.notes:
            self.notes.append(f"trained {self.steps} steps")
            host.progress_text(self.node, self.text)  # the page shows it, but no PreviewText of such a node
        return self.text, f"{self.text}\n{_summary(self.losses)}"

    @property
    def text(self) -> str:
        return "\n".join(self.notes)

    def _picture(self) -> Any:
        if self._edit:
            picture = curve_with_edit(self.losses, self.steps, self._edit[0], f"edit at step {self._edited}")
        else:
            picture = loss_curve(self.losses, self.steps)
        return with_note(picture, self.text)


def _summary(losses: list[float]) -> str:
    """The loss at both ends of a tune. A single step's mostly shows which timestep was drawn."""
    part = max(len(losses) // 10, 1)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return f"mean loss of the first {part} of {len(losses)} steps: {first:.4f}, of the last {part}: {last:.4f}"
