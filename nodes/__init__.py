"""The nodes: each a schema and a few lines that call `tav_core`."""

import logging

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.host import drift
from .clip import LoadClip, PrepareClip
from .compare import CompareVideos
from .demo import DemoClip, LoadDemoModel
from .inflate import InflateUNet
from .invert import DDIMInvert
from .mask import FindMask
from .published import ExportPublished, LoadPublished
from .refuse import refusing
from .sample import SampleVideo
from .scores import ScoreVideo
from .tune import OneShotTune
from .weights import ApplyWeights, LoadWeights, SaveWeights

log = logging.getLogger(__name__)

# The nodes, and which of `host_symbols.NEEDS` each has.
NEEDS: dict[type[io.ComfyNode], tuple[str, ...]] = {
    LoadClip: (),
    PrepareClip: (),
    InflateUNet: ("model",),
    OneShotTune: ("model", "weights", "sampling", "tuning", "low-rank weights"),
    DDIMInvert: ("model", "sampling"),
    FindMask: ("model", "sampling", "text"),
    SampleVideo: ("model", "sampling"),
    SaveWeights: ("files",),
    LoadWeights: ("files",),
    ApplyWeights: ("model", "low-rank weights"),
    LoadPublished: ("model", "weights", "files", "published models"),
    ExportPublished: ("model", "weights", "files", "published models"),
    CompareVideos: (),
    ScoreVideo: ("scores",),
    LoadDemoModel: ("model", "demo"),
    DemoClip: (),
}
NODES: list[type[io.ComfyNode]] = []
for node, needs in NEEDS.items():
    why = drift.refusal(name for need in needs for name in host.LOST[need])
    if why is not None:
        log.error("Tune-A-Video: %s cannot run: %s", node.__name__, why)
    NODES.append(node if why is None else refusing(node, why))
