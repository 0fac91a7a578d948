"""The nodes: each a schema and a few lines that call `tav_core`."""

from .clip import PrepareClip
from .demo import DemoClip, LoadDemoModel
from .inflate import InflateUNet
from .invert import DDIMInvert
from .sample import SampleVideo
from .tune import OneShotTune

NODES = [PrepareClip, InflateUNet, OneShotTune, DDIMInvert, SampleVideo, LoadDemoModel, DemoClip]
