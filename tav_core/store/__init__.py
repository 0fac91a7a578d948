"""Values that outlive a run, and their files."""
