"""What is shipped, and what importing it costs."""

import importlib.metadata
import importlib.resources
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import keras
import pytest

import keras_mixprec as mp

ROOT = pathlib.Path(__file__).parents[1]
FRAMEWORKS = ("tensorflow", "jax", "torch")

# Whatever Keras loaded is hidden, so that importing it again would fail.
IMPORT = """
import sys
import keras
for name in {hidden}:
    sys.modules[name] = None
before = set(sys.modules)
import keras_mixprec
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print("NEW", *sorted(new - sys.stdlib_module_names))
"""


def test_import_loads_nothing_that_keras_did_not():
    others = [name for name in FRAMEWORKS if name != keras.backend.backend()]
    optional = ["matplotlib", "jinja2", "psutil", "pynvml", "rich", "sklearn", "pandas"]
    code = IMPORT.format(hidden=[*others, *optional])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(mp.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "NEW keras_mixprec"


def test_public_names_exist():
    assert list(mp.__all__) == sorted(mp.__all__)
    assert [name for name in mp.__all__ if not hasattr(mp, name)] == []


def test_public_names_are_documented():
    assert [name for name in mp.__all__ if not getattr(mp, name).__doc__] == []


def test_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("keras-mixprec")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("keras-mixprec is not installed, only on the path")
    assert installed == mp.__version__


def test_data_files_lie_beside_the_modules():
    package = importlib.resources.files("keras_mixprec")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("report", "page.html").is_file()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = shutil.copytree(
        ROOT,
        tmp_path / "source",
        ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"),
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {
        str(path.relative_to(source))
        for path in source.glob("keras_mixprec/**/*")
        if path.suffix in (".py", ".typed", ".html")
    }
    shipped = {name for name in names if ".dist-info/" not in name}
    assert wheel.name.startswith(f"keras_mixprec-{mp.__version__}-py3-none-any")
    assert shipped == modules
    assert any(name.endswith("licenses/LICENSE") for name in names)
