"""Brings the kernels that a GPU compiles, and compiles the CPU's where a C++ compiler is at hand.

The package works without them.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
MODULE = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
GPUS = ("metal", "cuda")  # folders of kernel bodies, which MLX compiles where they run


class NativeBuildHook(BuildHookInterface):
    """Builds ``mlx_flash._native`` against the MLX of the Python that runs the build."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add kernels to a wheel, or put the extension beside the sources of an editable one."""
        if version != "editable":  # that one finds its kernel bodies where they are
            for folder in filter(Path.is_dir, (ROOT / "custom_kernels" / gpu for gpu in GPUS)):
                build_data["force_include"][str(folder)] = f"mlx_flash/{folder.relative_to(ROOT)}"
        self.folder = tempfile.TemporaryDirectory()
        try:
            built = compile_in(Path(self.folder.name))
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stdout", None) or str(error)
            self.app.display_warning(
                f"mlx-flash: the native kernels were not built; it will be slower.\n{said}"
            )
            return
        if version == "editable":
            # In place of, not into: a process may be running the old one.
            target = ROOT / "mlx_flash" / MODULE
            shutil.copy(built, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)
        else:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["force_include"][str(built)] = f"mlx_flash/{MODULE}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built on the way."""
        self.folder.cleanup()


def compile_in(folder: Path) -> Path:
    """The extension, freshly built in ``folder``.

    Raises:
        OSError: If there is no CMake.
        subprocess.CalledProcessError: If it or the compiler fails.
    """
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "custom_kernels" / "cpu")]
    configure += ["-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / MODULE
