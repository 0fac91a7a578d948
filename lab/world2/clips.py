"""The clips that a method is measured on: by a rule, not by hand; the first half to develop on, the rest held out.

Even numbers show a thing, odd ones a person doing something; figures, looks, motions, cameras and places come in turn,
at different paces. No caption tells the look: a method has to make the frames agree about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .sprites import LOOKS, THINGS, VERBS
from .world import CAMERAS, MOTIONS, PLACES, STYLES, Actor, Clip, make_clip

COUNT = 24
DEVELOPMENT, HELD_OUT = range(COUNT // 2), range(COUNT // 2, COUNT)
EDITS = ("figure", "place", "style")  # figure: another thing, or the person does something else


@dataclass(frozen=True)
class Plan:
    """What a clip shows, as `make_clip` takes it."""

    motion: str
    camera: str
    actor: Actor
    place: str
    seed: int
    style: str = "plain"
    other: Actor | None = None

    def make(self, frames: int = 8) -> Clip:
        return make_clip(
            self.motion, self.camera, self.actor, self.place, self.style, frames, seed=self.seed, other=self.other
        )


def plan(number: int) -> Plan:
    """Clip number 0 to COUNT - 1."""
    turn, person = divmod(number, 2)
    figures = VERBS if person else THINGS
    motion = MOTIONS[turn % len(MOTIONS)]
    look = list(LOOKS)[(turn + turn // 4) % len(LOOKS)]
    actor = Actor(figures[turn % len(figures)], look, size=0.6)
    other = Actor(THINGS[(turn + 3) % len(THINGS)], list(LOOKS)[(turn + 1) % len(LOOKS)], size=0.54)
    place = list(PLACES)[(turn + 3 * person) % len(PLACES)]
    camera = CAMERAS[(turn + turn // 4 + person) % len(CAMERAS)]
    return Plan(motion, camera, actor, place, 200 + number, other=other if motion == "cross" else None)


def edits(number: int) -> dict[str, Plan]:
    """The clip's edits, each of EDITS: as the world draws them, one thing changed."""
    source, turn = plan(number), number // 2
    figures = VERBS if source.actor.figure in VERBS else THINGS
    free = [name for name in figures if name not in (source.actor.figure, source.other and source.other.figure)]
    places = [name for name in PLACES if name != source.place]
    styles = [name for name in STYLES if name != source.style]
    return {
        "figure": replace(source, actor=replace(source.actor, figure=free[turn % len(free)])),
        "place": replace(source, place=places[turn % len(places)]),
        "style": replace(source, style=styles[turn % len(styles)]),
    }
