"""A procedural world and a tiny text-to-image model of it, in Stable Diffusion 1.x's architecture."""
