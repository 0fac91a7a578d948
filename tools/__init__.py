"""Programs beside ComfyUI: what loads the pack outside of it, and what talks to it over HTTP."""
