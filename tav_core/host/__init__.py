"""All of ComfyUI: the rest of the pack asks this room, and imports nothing of ComfyUI's itself."""

from .build import *  # noqa: F403
from .comfyui import *  # noqa: F403
from .video import *  # noqa: F403
from .vision import *  # noqa: F403
