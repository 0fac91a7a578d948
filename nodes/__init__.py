"""The nodes: each a schema and a few lines that call `tav_core`."""

from comfy_api.latest import io

from ..tav_core import host
from .clip import LoadClip, PrepareClip
from .compare import CompareVideos
from .demo import DemoClip, LoadDemoModel
from .inflate import InflateUNet
from .invert import DDIMInvert
from .published import ExportPublished, LoadPublished
from .refuse import refusing
from .sample import SampleVideo
from .tune import OneShotTune
from .weights import ApplyWeights, LoadWeights, SaveWeights

NODES: list[type[io.ComfyNode]] = [
    LoadClip,
    PrepareClip,
    InflateUNet,
    OneShotTune,
    DDIMInvert,
    SampleVideo,
    SaveWeights,
    LoadWeights,
    ApplyWeights,
    LoadPublished,
    ExportPublished,
    CompareVideos,
    LoadDemoModel,
    DemoClip,
]
if host.DRIFT is not None:
    NODES = [refusing(node, host.DRIFT) for node in NODES]
