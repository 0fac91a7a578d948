from fractions import Fraction

from comfy_api.latest import Input, io

from ..tav_core import host
from ..tav_core.pictures import clip, load_clip, video
from .schema import CATEGORY, found_by


def _size_inputs() -> list[io.Input]:
    """What both nodes ask of a clip."""
    return [
        io.Int.Input(
            "stride",
            default=2,
            min=1,
            max=1000,
            tooltip="Use every n-th frame. 1 or 2 keeps motion smooth; larger covers a longer time.",
        ),
        io.Int.Input(
            "count",
            default=24,
            min=1,
            max=4096,
            tooltip="Number of frames in the clip. The paper uses 24 to 32; memory and time grow with it.",
        ),
        io.Int.Input(
            "width",
            default=512,
            min=8,
            max=clip.MAX_SIZE,
            tooltip="Width in pixels, a multiple of 8. SD 1.x is at home at 512, SD 2.1 at 768, SDXL at 1024.",
        ),
        io.Int.Input("height", default=512, min=8, max=clip.MAX_SIZE, tooltip="Height in pixels, a multiple of 8."),
        io.Combo.Input(
            "fit",
            options=list(clip.FITS),
            default="crop",
            tooltip="crop: fill the size, cut the edges. pad: whole picture on black. stretch: distort.",
        ),
    ]


def _clip_outputs() -> list[io.Output]:
    return [
        io.Image.Output("clip", display_name="clip", tooltip="The clip's frames, for VAE Encode."),
        io.Float.Output(
            "fps", display_name="fps", tooltip="Frames per second at which the clip plays at its own speed."
        ),
    ]


class LoadClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVLoadClip",
            display_name="Load Clip",
            category=CATEGORY,
            description="Reads one short clip from a video, at the model's size. Long videos take no more memory.",
            **found_by("load video", "video frames", "trim video", "cut video", "resample fps", "import clip"),
            inputs=[
                io.Video.Input("video", tooltip="The video, from Load Video."),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1_000_000.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Where the clip begins: at a time in seconds, or at a frame, counted from 0.",
                ),
                io.Combo.Input(
                    "start_unit",
                    options=list(load_clip.UNITS),
                    default="seconds",
                    tooltip="What start counts: seconds, or frames of the video.",
                ),
                *_size_inputs(),
                io.Float.Input(
                    "resample_fps",
                    default=0.0,
                    min=0.0,
                    max=load_clip.MAX_FPS,
                    step=0.01,
                    tooltip="Bring the video to this many frames per second before stride counts, such as where its "
                    "frame rate varies. 0 keeps its own frames.",
                ),
            ],
            outputs=[
                *_clip_outputs(),
                io.String.Output("info", display_name="info", tooltip="What was taken, from which video, and how."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, video, start, start_unit, stride, count, width, height, fit, resample_fps) -> io.NodeOutput:
        wanted = load_clip.Wanted(start, start_unit, stride, count, width, height, fit, resample_fps)
        loaded = load_clip.load_clip(_opened(video), wanted)
        host.progress_text(cls.hidden and cls.hidden.unique_id, loaded.info)
        return io.NodeOutput(*loaded)


def _opened(given: Input.Video) -> video.File | video.Pictures:
    """What there is to read of a VIDEO."""
    if not isinstance(given, Input.Video):
        raise ValueError(f"this VIDEO is a {type(given).__name__}, not ComfyUI's own: connect Load Video.")
    if type(given).get_stream_source is Input.Video.get_stream_source:
        # Made of frames: as a stream, it would be encoded and lose by it.
        components = given.get_components()
        return video.Pictures(components.images, Fraction(components.frame_rate))
    if told := getattr(given, "get_active_trim_window", None):
        start, length = told()
    else:  # ComfyUI trims videos for longer than it tells of it
        start, length = (getattr(given, f"_VideoFromFile__{name}", 0.0) for name in ("start_time", "duration"))
    return video.File(given.get_stream_source(), (start, length), host.stop_if_interrupted)


class PrepareClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVPrepareClip",
            display_name="Prepare Clip",
            category=CATEGORY,
            **found_by("trim video", "cut video", "pick frames", "crop video", "video frames"),
            description="Picks the frames of one short clip from a video and fits them to the model's size.",
            inputs=[
                io.Image.Input("frames", tooltip="All frames of the video, from Get Video Components."),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="First frame to use, counted from 0."),
                *_size_inputs(),
                io.Float.Input(
                    "source_fps",
                    default=24.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second of the video: connect fps of Get Video Components.",
                ),
            ],
            outputs=_clip_outputs(),
        )

    @classmethod
    def execute(cls, frames, start, stride, count, width, height, fit, source_fps) -> io.NodeOutput:
        return io.NodeOutput(clip.prepare_clip(frames, start, stride, count, width, height, fit), source_fps / stride)
