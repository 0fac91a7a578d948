"""What a node is where the host is not as this pack needs it."""

from comfy_api.latest import io


def refusing(node: type[io.ComfyNode], why: str) -> type[io.ComfyNode]:
    """A node of the same schema that takes any input and, when it is run, only says why it cannot."""

    class Refusing(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return node.define_schema()

        @classmethod
        def validate_inputs(cls, **_inputs) -> bool:
            return True  # or the host would complain first of a file that is in no list

        @classmethod
        def execute(cls, **_inputs) -> io.NodeOutput:
            raise RuntimeError(why)

    return Refusing
