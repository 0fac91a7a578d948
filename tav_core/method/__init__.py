"""The method of the paper (arXiv 2212.11565) in plain torch: nothing here knows a host."""
