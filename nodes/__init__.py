"""The nodes: each a schema and a few lines that call `tav_core`."""

from .clip import PrepareClip
from .demo import DemoClip, LoadDemoModel
from .inflate import InflateUNet
from .invert import DDIMInvert
from .published import ExportPublished, LoadPublished
from .sample import SampleVideo
from .tune import OneShotTune
from .weights import ApplyWeights, LoadWeights, SaveWeights

NODES = [
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
    LoadDemoModel,
    DemoClip,
]
