"""Tune-A-Video for ComfyUI (arXiv 2212.11565): the extension, which says what nodes there are and nothing else."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"  # the help pages, web/docs/


class TuneAVideoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> TuneAVideoExtension:
    return TuneAVideoExtension()
