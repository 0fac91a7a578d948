"""Prompts in the API's form, written and changed."""


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def change(prompt, **inputs):
    """Give every node that has an input of one of these names the value."""
    for entry in prompt.values():
        entry["inputs"] |= {name: value for name, value in inputs.items() if name in entry["inputs"]}
