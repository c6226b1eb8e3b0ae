"""The rooms and which way imports point, read off the source with ``ast``."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mlx_flash"
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
PURE = ["checkpoint", "plan", "reader", "eviction", "spread"]
BANNED = ("Manager", "Engine", "Controller", "Handler", "Helper", "Proxy")

# What a room may not import. Below are the rooms; above are those who furnish them.
FORBIDDEN = {
    "streaming": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "architectures": {"opening", "loader", "hub", "machine", "cli", "demo"},
    "kernels": {"architectures", "streaming", "opening", "loader", "hub", "cli", "demo"},
    "errors.py": {"*"},
    "config.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "machine.py": {"architectures", "streaming", "opening", "loader", "hub", "cli", "demo"},
    "hub.py": {"architectures", "streaming", "opening", "loader", "cli", "demo"},
    "fingerprint.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "states.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "prefix.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "prompt_file.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "dense.py": {"architectures", "kernels", "opening", "loader", "hub", "cli", "demo"},
    "opening.py": {"kernels", "loader", "cli", "demo"},
    "weights.py": {"loader", "cli", "demo", "hub", "kernels"},
    "computing.py": {"loader", "budget", "weights", "cli", "demo", "hub"},
    "budget.py": {"loader", "weights", "cli", "demo", "hub"},
    "loader.py": {"cli", "demo"},
}


def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(), file)


def imports(file: str) -> set[str]:
    """Absolute names of what a file imports: ``mlx.core``, ``mlx_flash.streaming.plan.Plan``."""
    package = ["mlx_flash", *Path(file).parent.parts]
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")] if node.module else above
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def rooms(file: str) -> set[str]:
    """The top-level rooms of mlx_flash that a file imports."""
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("mlx_flash.")}
    return ours - {Path(file).parts[0].removesuffix(".py")}


def names_used(file: str) -> set[str]:
    """Every bare name and dotted name in the code of a file, such as ``os.environ``."""
    nodes = [n for n in ast.walk(tree(file)) if isinstance(n, (ast.Name, ast.Attribute))]
    return {ast.unparse(node) for node in nodes}


def test_imports_are_resolved() -> None:
    """The reader of imports itself: if it saw nothing, every test below would pass."""
    assert "mlx_flash.streaming.plan.LayerExperts" in imports("architectures/__init__.py")
    assert "mlx_flash.errors.ReadError" in imports("streaming/reader.py")
    assert "mlx_flash.architectures.Architecture" in imports("architectures/nemotron_h.py")
    assert "mlx.core" in imports("streaming/store.py")
    assert "streaming" in rooms("loader.py")


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    forbidden = FORBIDDEN.get(Path(file).parts[0], set())
    wrong = rooms(file) if "*" in forbidden else rooms(file) & forbidden
    assert not wrong, f"{file} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", PURE)
def test_pure_files_need_only_the_standard_library_and_numpy(name: str) -> None:
    siblings = {f"mlx_flash.streaming.{other}" for other in PURE}
    for imported in imports(f"streaming/{name}.py"):
        known = imported.split(".")[0] in sys.stdlib_module_names | {"numpy"}
        ours = imported.startswith("mlx_flash.errors.") or imported.rpartition(".")[0] in siblings
        assert known or ours, f"streaming/{name}.py imports {imported}"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("architectures/")])
def test_architectures_know_of_streaming_only_where_bytes_lie(file: str) -> None:
    streaming = {name.split(".")[2] for name in imports(file) if "mlx_flash.streaming." in name}
    assert streaming <= {"checkpoint", "plan"}


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("cli/")])
def test_only_the_command_prints(file: str) -> None:
    assert not names_used(file) & {"print", "sys.stdout", "sys.stderr", "rich.print"}
    assert not {name.split(".")[0] for name in imports(file)} & {"rich", "typer", "click"}


@pytest.mark.parametrize("file", FILES)
def test_no_knobs_in_the_environment(file: str) -> None:
    reads = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
    assert not (names_used(file) | imports(file)) & reads


@pytest.mark.parametrize("file", FILES)
def test_nouns_of_the_field(file: str) -> None:
    classes = [n.name for n in ast.walk(tree(file)) if isinstance(n, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(BANNED) or name.startswith(BANNED)]
