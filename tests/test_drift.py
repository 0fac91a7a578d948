"""A ComfyUI that lacks something this pack uses: its nodes are there all the same, and each says what and why not.

Every row of the table is taken away in turn, in the real host. That the table is complete is read off the source.
"""

import ast
import asyncio
import enum
import importlib
import inspect
import logging
import sys
import timeit
from dataclasses import replace

import comfyui_version
import pytest
import server  # noqa: F401  (where it is not loaded, what is used of it is not looked up)
import torch
import tune_a_video
from pack import PROJECT, load_pack
from tune_a_video.tav_core import drift, host
from tune_a_video.tav_core.host_symbols import SYMBOLS, TRIED

CHANGED = "tune_a_video_on_a_changed_host"


def nodes_of(pack):
    return asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())


@pytest.fixture
def reload():
    """Load the pack anew, as a ComfyUI does that is started now."""
    yield lambda: load_pack(CHANGED)
    for name in [name for name in sys.modules if name.partition(".")[0] == CHANGED]:
        del sys.modules[name]


def owner_of(name):
    """What holds the attribute of `module:path`, and the attribute's name."""
    module, _, path = name.partition(":")
    *classes, last = path.split(".")
    owner = importlib.import_module(module)
    for part in classes:
        owner = getattr(owner, part)
    return owner, last


def found(name):
    owner, last = owner_of(name)
    return getattr(owner, last)


# --- ways of a host to change, each with what must be said of it -------------------------------------------------


def without_module(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    return f"its {module} cannot be imported ("


def without_name(monkeypatch, name):
    owner, last = owner_of(name)
    if isinstance(owner, type) and issubclass(owner, enum.Enum):  # they cannot lose a member
        rest = enum.Enum(owner.__name__, {member.name: member.value for member in owner if member.name != last})
        monkeypatch.setattr(*owner_of(name.rpartition(".")[0]), rest)
    else:
        monkeypatch.delattr(owner, last)
    return f" {name.replace(':', '.')} "  # not "it has no …": torch's own forward takes the place of a lost one


def without_attribute(monkeypatch, name, attribute):
    """As if it had another name in all of the class's code."""
    for base in found(name).__mro__:
        for value in list(vars(base).values()):
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            if function is not None and attribute in function.__code__.co_names:
                names = tuple("renamed" if known == attribute else known for known in function.__code__.co_names)
                monkeypatch.setattr(function, "__code__", function.__code__.replace(co_names=names))
        if attribute in vars(base):
            monkeypatch.delattr(base, attribute)
    return f"its {name.replace(':', '.')} has no attribute {attribute} ("


def without_parameter(monkeypatch, name, parameter):
    function = found(name)
    signature = inspect.signature(function)
    rest = [known for known in signature.parameters.values() if known.name != parameter]
    assert len(rest) < len(signature.parameters)
    monkeypatch.setattr(function, "__signature__", signature.replace(parameters=rest), raising=False)
    return f"its {name.replace(':', '.')} has no parameter {parameter} ("


def with_a_new_parameter(monkeypatch, name):
    function = found(name)
    signature = inspect.signature(function)
    new = inspect.Parameter("brand_new", inspect.Parameter.KEYWORD_ONLY)
    parameters = sorted([*signature.parameters.values(), new], key=lambda parameter: parameter.kind)
    monkeypatch.setattr(function, "__signature__", signature.replace(parameters=parameters), raising=False)
    return f"its {name.replace(':', '.')} cannot be called as it was (missing a required argument: 'brand_new')"


def parameters(call):
    return call.replace("/", " ").replace(",", " ").split()


MODULES = list(dict.fromkeys(symbol.name.partition(":")[0] for symbol in SYMBOLS))
LOST = [
    *(pytest.param(without_module, (module,), id=module) for module in MODULES),
    *(pytest.param(without_name, (symbol.name,), id=symbol.name) for symbol in SYMBOLS),
]


def changed_members():
    """Every way in which what is left of the host can be another than the table says."""
    for symbol in SYMBOLS:
        calls = {f"{symbol.name}.{method}": call for method, call in symbol.methods.items()}
        for name in calls:
            yield pytest.param(without_name, (name,), id=name)
        if symbol.call is not None:
            calls[symbol.name] = symbol.call
        for name, call in calls.items():
            for parameter in parameters(call):
                yield pytest.param(without_parameter, (name, parameter), id=f"{name}({parameter})")
            yield pytest.param(with_a_new_parameter, (name,), id=f"{name}(new)")
        for attribute in symbol.attributes:
            yield pytest.param(without_attribute, (symbol.name, attribute), id=f"{symbol.name}().{attribute}")


@pytest.mark.parametrize("change, what", LOST)
def test_every_node_registers_and_says_what_the_host_has_lost(change, what, monkeypatch, reload, caplog):
    with monkeypatch.context() as changed, caplog.at_level(logging.INFO):
        reason = change(changed, *what)
        nodes = nodes_of(reload())
    schemas = [node.GET_SCHEMA() for node in nodes]
    assert [schema.node_id for schema in schemas] == [node.GET_SCHEMA().node_id for node in nodes_of(tune_a_video)]
    said = [record for record in caplog.records if record.name.startswith(CHANGED)]
    assert [record.levelname for record in said] == ["ERROR"]
    for node, schema in zip(nodes, schemas, strict=True):
        with pytest.raises(RuntimeError) as refused:
            node.EXECUTE_NORMALIZED(**{entry.id: None for entry in schema.inputs})
        message = str(refused.value)
        assert message.startswith(f"ComfyUI {comfyui_version.__version__} does not fit this version of Tune-A-Video: ")
        assert reason in message and "Update" in message and TRIED in message and "\n" not in message
        assert message in said[0].getMessage()


@pytest.mark.parametrize("change, what", list(changed_members()))
def test_every_change_of_a_member_or_a_parameter_is_seen(change, what, monkeypatch):
    with monkeypatch.context() as changed:
        reason = change(changed, *what)
        message = drift.drift(SYMBOLS, TRIED)
    assert message is not None and reason in message


def test_what_a_changed_host_registers_is_what_it_always_was(monkeypatch, reload):
    usual = [node.GET_NODE_INFO_V1() for node in nodes_of(tune_a_video)]
    with monkeypatch.context() as changed:
        without_name(changed, "comfy.samplers:KSAMPLER")
        nodes = nodes_of(reload())
    lists = {"published", "file"}  # of files: empty, for the host is not asked
    for node, info in zip(nodes, usual, strict=True):
        mine = node.GET_NODE_INFO_V1()
        for description in (mine, info):
            description.pop("python_module")
            for entries in description["input"].values():
                for name in lists & entries.keys():
                    entries.pop(name)
        assert mine == info


def test_any_input_gets_as_far_as_the_reason(monkeypatch, reload, core):
    """The host looks at values before it runs anything: that a file is in no list must not hide why."""
    import execution

    with monkeypatch.context() as changed:
        without_name(changed, "folder_paths:get_filename_list")
        pack_nodes = {node.GET_SCHEMA().node_id: node for node in nodes_of(reload())}
    for name, node in pack_nodes.items():
        monkeypatch.setitem(core, name, node)
    prompt = {
        "1": {"class_type": "TAVLoadWeights", "inputs": {"file": "mine.safetensors"}},
        "2": {
            "class_type": "TAVSaveWeights",
            "inputs": {"weights": ["1", 0], "filename_prefix": "a", "precision": "fp32"},
        },
    }
    valid, error, _outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and error is None and not node_errors


def test_a_version_that_hides_its_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    lost = replace(SYMBOLS[0], name="comfy.samplers:Gone", call=None, methods={}, attributes=())
    assert "ComfyUI of an unknown version does not fit" in (drift.drift([lost], TRIED) or "")


def test_a_class_that_became_a_function(monkeypatch):
    monkeypatch.setattr("comfy.samplers.KSAMPLER", lambda sampler_function: None)
    monkeypatch.setattr("comfy.patcher_extension.WrapperExecutor", lambda: None)
    message = drift.drift(SYMBOLS, TRIED) or ""
    assert "its comfy.patcher_extension.WrapperExecutor has no attribute __call__ (used" in message
    assert "KSAMPLER" not in message  # it is called as it was


def test_a_module_that_fails_in_many_lines_is_told_in_one(tmp_path, monkeypatch):
    (tmp_path / "many_lines.py").write_text("raise OSError('first\\nsecond')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    message = drift.drift([drift.Symbol("many_lines:name", "to test")], TRIED) or ""
    assert ": its many_lines cannot be imported (OSError: first second). " in message


def test_many_changes_stay_one_short_line():
    lost = [replace(symbol, name=f"{symbol.name}Gone") for symbol in SYMBOLS]
    message = drift.drift(lost, TRIED) or ""
    assert message.count("it has no ") == drift.SHOWN and f"; and {len(lost) - drift.SHOWN} more. Update" in message


def test_the_versions_that_are_named_are_the_documented_ones():
    oldest, newest = TRIED.split(" to ")
    text = (PROJECT / "docs" / "host-compatibility.md").read_text(encoding="utf-8")
    assert f"**ComfyUI {oldest}**" in text and f"**{newest}**" in text
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={oldest}"' in project


def test_looking_costs_milliseconds():
    assert host.DRIFT is None
    assert min(timeit.repeat(lambda: drift.drift(SYMBOLS, TRIED), number=1, repeat=5)) < 0.05


# --- the table is complete ---------------------------------------------------------------------------------------

SOURCES = [path for folder in ("nodes", "tav_core", "demo") for path in sorted((PROJECT / folder).glob("*.py"))]
DEMO_TOOLS = "host_demo.py"  # no node needs what it imports
DOTTED = {symbol.name.replace(":", "."): symbol for symbol in SYMBOLS}
KNOWN = {
    *DOTTED,
    *(f"{name}{end}.{method}" for name, symbol in DOTTED.items() for method in symbol.methods for end in ("", "()")),
    *(f"{name}().{attribute}" for name, symbol in DOTTED.items() for attribute in symbol.attributes),
}
PATCHER, BASE = "comfy.model_patcher.ModelPatcher", "comfy.model_base.BaseModel"
UNET = "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"
# Of what type something of the host's is: "X()" is an X.
TYPES = {
    f"{PATCHER}().model": f"{BASE}()",
    f"{PATCHER}().clone()": f"{PATCHER}()",
    f"{BASE}().diffusion_model": f"{UNET}()",
    "latent_preview.Latent2RGBPreviewer()": "latent_preview.LatentPreviewer()",  # it is one
    "server.PromptServer.instance": "server.PromptServer()",
}
OPTIONAL = {f"{PATCHER}().cached_patcher_init"}  # of newer hosts; not asked of others
ROOTS = ("comfy", "folder_paths", "latent_preview", "server")


class Uses(ast.NodeVisitor):
    """Finds what a module uses of the host, following imports, annotations and assignments as far as they lead."""

    def __init__(self, ours=()):
        self.names = {}  # what a name stands for: "comfy.sd", or "comfy.sd.VAE()" for a VAE
        self.ours = dict(ours)  # the same of the names in `host`
        self.used = set()

    def meaning(self, node):
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "host":
                return self.ours.get(node.attr)
            return self.attribute(node.value, node.attr)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
                return self.attribute(node.args[0], node.args[1].value)
            called = self.meaning(node.func)
            is_class = called and called.rpartition(".")[2][:1].isupper() and not called.endswith("()")
            return TYPES.get(f"{called}()", f"{called}()" if is_class else None)
        return None

    def attribute(self, node, name):
        owner = self.meaning(node)
        return owner and TYPES.get(f"{owner}.{name}", f"{owner}.{name}")

    def visit_Import(self, node):
        for alias in node.names:
            if (root := alias.name.partition(".")[0]) in ROOTS:
                self.names[root] = root

    def visit_ImportFrom(self, node):
        for alias in node.names:
            if not node.level and str(node.module).partition(".")[0] in ROOTS:
                self.names[alias.name] = f"{node.module}.{alias.name}"
                self.used.add(self.names[alias.name])

    def visit_FunctionDef(self, node):
        outside = dict(self.names)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self.names.pop(argument.arg, None)
            if kind := self.meaning(argument.annotation):
                self.names[argument.arg] = f"{kind}()"
        self.generic_visit(node)
        self.names = outside
        if kind := self.meaning(node.returns):
            self.names[node.name] = kind  # called, it is an instance

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names[target.id] = self.meaning(node.value)

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and node.value is not None:
            self.names[node.target.id] = self.meaning(node.value)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if (owner := self.meaning(node.value)) and owner.partition(".")[0] in ROOTS:
            self.used.add(f"{owner}.{node.attr}")


def uses():
    """What each file uses of the host."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if path.name != DEMO_TOOLS}
    of_host = Uses()
    of_host.visit(trees.pop(PROJECT / "tav_core" / "host.py"))
    found = {"host.py": of_host.used}
    for path, tree in trees.items():
        others = Uses(of_host.names)
        others.visit(tree)
        found[path.name] = others.used
    return found


def known(use):
    """Whether a use is in the table: itself, the module of a row, or what a row's function or value holds."""
    kind, _, attribute = use.rpartition("().")
    if kind == UNET and hasattr(torch.nn.Module, attribute):
        return True
    values = (row for row in KNOWN if not row.rpartition(".")[2][:1].isupper())
    return (
        use in KNOWN
        or any(row.startswith(f"{use}.") for row in KNOWN)
        or any(use.startswith(f"{value}.") for value in values)
    )


def test_all_that_is_used_of_the_host_is_in_the_table():
    missing = {f"{name}: {use}" for name, found in uses().items() for use in found - OPTIONAL if not known(use)}
    assert not missing


def test_all_that_is_in_the_table_is_used():
    words = set()
    for path in SOURCES:
        if path.name not in ("host_symbols.py", DEMO_TOOLS):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                words |= {str(getattr(node, field, "")) for field in ("attr", "id", "name")}
                if isinstance(node, ast.Constant) and isinstance(node.value, str):  # "out.0", "latent_format"
                    words |= set(node.value.split("."))
                if isinstance(node, ast.ImportFrom):
                    words |= {alias.name for alias in node.names}
    unused = set()
    for name, symbol in DOTTED.items():
        members = {*symbol.methods, *symbol.attributes} - {"__call__", "forward"}  # called without their names
        unused |= {f"{name}.{member}" for member in members - words}
        if not members and name.rpartition(".")[2] not in words:
            unused.add(name)
    assert not unused


def test_the_source_is_read_right():
    """What the two tests above rest on finds what there is to find."""
    found = uses()
    assert {
        f"{PATCHER}().attachments",
        f"{BASE}().process_latent_in",
        f"{UNET}().num_classes",
        "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
        "comfy.samplers.CFGGuider().set_conds",
        "comfy.model_base.ModelType.V_PREDICTION",
        "server.PromptServer",
    } <= found["host.py"]
    assert f"{PATCHER}().add_patches" in found["apply.py"]
    assert f"{UNET}().channel_mult" in found["checks.py"]
