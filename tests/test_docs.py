"""The site, the notebooks and both READMEs: links, names, languages, outputs."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from processes import ROOT
from processes import search_path
from site_links import dead_links

DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"
PAGES = [
    *ROOT.glob("*.md"),
    ROOT / "examples" / "README.md",
    *DOCS.glob("*.md"),
    *DOCS.glob("zh/*.md"),
    *TUTORIALS.glob("*.md"),
]
SOURCES = sorted((TUTORIALS / "source").glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    local = [link for link in links if not link.startswith(("http", "mailto"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_both_readmes_hold_the_same_code():
    def code(name):
        text = (ROOT / name).read_text("utf-8")
        return re.findall(r"```(?:python|bash)\n.*?```", text, re.DOTALL)

    assert code("README.zh.md") == code("README.md")
    assert "README.zh.md" in (ROOT / "README.md").read_text("utf-8")


def hooks():
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference():
    reference = (DOCS / "reference.md").read_text("utf-8")
    assert hooks().undocumented(ROOT, reference) == []


def test_an_undocumented_name_is_found(tmp_path):
    package = tmp_path / "keras_mixprec"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from keras_mixprec.things import Thing, told, untold, unlisted\n"
        "__all__ = ['Thing', 'told', 'unlisted', 'untold']\n"
    )
    (package / "things.py").write_text(
        "class Part:\n    def help(self): pass\n"
        'class Thing(Part):\n    """A thing."""\n    def do(self): pass\n'
        'def told():\n    """Tell."""\n'
        'def unlisted():\n    """Tell."""\n'
        "def untold(): pass\n"
    )
    names = ("Thing", "told", "untold", "gone")
    reference = "\n".join(f"::: keras_mixprec.{name}" for name in names)
    assert hooks().undocumented(tmp_path, reference) == [
        "'unlisted' is not in docs/reference.md",
        "'gone' is not public",
        "'Thing.help' has no docstring",
        "'Thing.do' has no docstring",
        "'untold' has no docstring",
    ]


def test_formulas_become_mathml_and_code_does_not():
    page = "<p>costs $x^2$ or</p><code>$HOME and $x$</code> $$a = b$$ and $5"
    made = hooks().on_page_content(page, None, None, None)
    assert made.count("<math") == 2
    assert "<code>$HOME and $x$</code>" in made
    assert made.endswith("and $5")


def test_names_in_tables_wrap_at_their_joints():
    page = "<code>a.b</code><table><td><code>my.one_name(x=2.0)</code> a.b</td></table>"
    made = hooks().on_page_content(page, None, None, None)
    wrapped = "my.<wbr>one_<wbr>name(<wbr>x=<wbr>2.0)"
    assert made == page.replace("my.one_name(x=2.0)", wrapped)


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").write_text('<h1 id="a"></h1>')
    links = ("there/", "there/#a", "there/#b", "gone/", "#", "#c", "https://x.org")
    text = "".join(f'<a href="{link}"></a>' for link in links)
    (tmp_path / "index.html").write_text(text)
    found = dead_links(tmp_path.resolve())
    assert found == [f"index.html: {link}" for link in ("#c", "gone/", "there/#b")]


def test_every_tutorial_was_executed_and_is_small():
    nbformat = pytest.importorskip("nbformat")
    made = sorted(TUTORIALS.glob("*.ipynb"))
    assert [p.stem for p in made] == [p.stem for p in SOURCES]
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in made:
        assert path.stat().st_size < 150_000
        assert f"tutorials/{path.name}" in nav
        notebook = nbformat.read(path, as_version=4)
        source = (TUTORIALS / "source" / f"{path.stem}.py").read_text("utf-8")
        code = [c for c in notebook.cells if c.cell_type == "code"]
        # Else the notebook is older than its source.
        assert [c.source for c in code if c.source not in source] == []
        outputs = [o for c in code for o in c.outputs]
        assert outputs
        # Else where a text is cut, and what the page shows, is the kernel's timing.
        kinds = [[o.output_type for o in c.outputs] for c in code]
        assert [
            k for k in kinds if ("stream", "stream") in zip(k, k[1:], strict=False)
        ] == []
        assert [o for o in outputs if o.output_type == "error"] == []
        texts = [o.get("text", "") for o in outputs]
        assert [t for t in texts if re.search(r"Warning|/tmp/|/home/", t)] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_tutorial_runs(path, tmp_path):
    for module in ("jupytext", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(module)
    run_python(TUTORIALS / "execute.py", path.stem, "--output", tmp_path)
    assert (tmp_path / f"{path.stem}.ipynb").is_file()


@pytest.mark.slow
def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    hooks()
    run_python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert dead_links((tmp_path / "site").resolve()) == []
    reference = (tmp_path / "site" / "reference" / "index.html").read_text("utf-8")
    # What users call on a class, whichever base of ours it is written in.
    assert 'id="keras_mixprec.LossScaleOptimizer.scale_loss"' in reference
    assert 'id="keras_mixprec.LossScaleOptimizer.overflow_counts"' in reference
    index = (tmp_path / "site" / "index.html").read_text("utf-8")
    # The reader's browser asks nobody else.
    assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', index)


def run_python(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path(ROOT)},
        # For what hangs: no bound for a busy machine.
        timeout=60 * 60,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
