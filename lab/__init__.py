"""What is needed to make and judge the demo's model, and is not shipped to nodes."""
