"""The demo's training, evaluation and pictures: nothing that a node needs."""
