"""World 2: things in several looks, people who do things, a camera that moves; made to replace the demo's world."""
