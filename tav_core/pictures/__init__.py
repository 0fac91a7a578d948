"""Frames and drawings: no model at all."""
