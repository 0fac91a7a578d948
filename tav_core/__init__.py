"""The method of Tune-A-Video (arXiv 2212.11565): inflate, tune on one clip, invert, sample.

Everything here is pure torch except `host`, the only module that knows ComfyUI.
"""
