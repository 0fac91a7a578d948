"""The steps of the way: a MODEL in, a value out."""
