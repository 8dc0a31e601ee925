"""What is shipped, and what importing it costs."""

import functools
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import keras
import pytest
from processes import ROOT
from processes import search_path

import keras_mixprec as mp

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
    optional.append("click")
    code = IMPORT.format(hidden=[*others, *optional])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path(ROOT)},
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
    assert package.joinpath("reporting", "page.html").is_file()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and with the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = shutil.copytree(
        ROOT,
        folder / "source",
        ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "site"),
    )
    build = [sys.executable, "-m", "build", "--outdir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("keras_mixprec*/**/*")
        if path.suffix in (".py", ".typed", ".html")
    }
    shipped = {name for name in names if ".dist-info/" not in name}
    assert wheel.name.startswith(f"keras_mixprec-{mp.__version__}-py3-none-any")
    assert shipped == modules
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_holds_what_the_wheel_is_built_from(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    tops = {name.split("/")[1] for name in names if "/" in name}
    packages = {"keras_mixprec", "keras_mixprec_cli", "keras_mixprec.egg-info"}
    files = {"LICENSE", "README.md", "PKG-INFO", "setup.cfg", "pyproject.toml"}
    assert packages | files <= tops
    assert tops <= packages | files | {"tests"}


@pytest.mark.slow
def test_installed_wheel_runs_the_command_and_the_quickstart(built, tmp_path):
    """In an environment of its own, which borrows the dependencies of this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    borrowed = [p for p in sys.path if p.endswith("-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    (wheel,) = built.glob("*.whl")
    home = tmp_path / "venv" / "bin"
    run = functools.partial(
        subprocess.run,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    pip = [home / "python", "-m", "pip", "install", "-q", "--no-deps"]
    run([*pip, "--force-reinstall", wheel])
    where = run([home / "python", "-c", "import keras_mixprec as m; print(m.__file__)"])
    assert str(packages) in where.stdout
    version = run([home / "keras-mixprec", "--version"])
    assert version.stdout == f"keras-mixprec {mp.__version__}\n"
    run([home / "python", ROOT / "examples" / "quickstart.py", "--output", "out"])
    assert (tmp_path / "out" / "report.html").is_file()
