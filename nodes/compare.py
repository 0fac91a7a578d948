from comfy_api.latest import io

from ..tav_core.pictures.compare import side_by_side
from .schema import CATEGORY, found_by

MORE = range(3, 7)


class CompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAVCompareVideos",
            display_name="Compare Videos",
            category=CATEGORY,
            **found_by("side by side", "comparison", "grid", "before after", "concatenate videos"),
            description="Puts up to six videos side by side, with labels.",
            inputs=[
                io.Image.Input("video_1", tooltip="A clip, or an edit of it. Its height is the height of all."),
                io.Image.Input("video_2", tooltip="Another one."),
                *(io.Image.Input(f"video_{i}", optional=True, tooltip="Another one.") for i in MORE),
                io.String.Input(
                    "labels",
                    multiline=True,
                    tooltip="One line for each video, drawn above it. A missing line: no label.",
                ),
            ],
            outputs=[io.Image.Output("comparison", display_name="comparison", tooltip="The clips side by side.")],
        )

    @classmethod
    def execute(cls, labels, **videos) -> io.NodeOutput:
        connected = {name: video for name, video in sorted(videos.items()) if video is not None}
        return io.NodeOutput(side_by_side(connected, labels.split("\n")))
