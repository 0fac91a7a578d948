"""The method of Tune-A-Video (arXiv 2212.11565): inflate, tune on one clip, invert, sample.

`method` is the paper in plain torch, `host` alone knows ComfyUI, `pipeline` leads a MODEL through both, `store` keeps
what comes of it, and `pictures` needs no model at all.
"""
