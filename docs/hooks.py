"""What MkDocs is made to do: refuse undocumented names, and set formulas as MathML.

And lead links of notebooks to pages, which MkDocs does for Markdown only, and let
names in tables wrap where they have joints, for phones.
"""

import functools
import html
import logging
import pathlib
import posixpath
import re

import griffe
import latex2mathml.converter
from mkdocs.exceptions import PluginError

ROOT = pathlib.Path(__file__).parents[1]
_SOURCE = re.compile(r'href="(?!\w+:)([^"#]+\.(?:ipynb|md))(#[^"]*)?"')
# A warning in it fails a strict build.
_logger = logging.getLogger("mkdocs.hooks")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_NAME = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_JOINT = re.compile(r"(?<=[a-z)][._(=])(?=\w)")
_CODE = re.compile(r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>", re.DOTALL)
_FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</(?:span|div)>'
    r"|\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])",
    re.DOTALL,
)


def on_config(config):
    """Fail the build if a public name has no docstring, or is not in the reference."""
    problems = undocumented(ROOT, (ROOT / "docs" / "reference.md").read_text("utf-8"))
    if problems:
        raise PluginError("Undocumented: " + "; ".join(problems))
    return config


def undocumented(root: pathlib.Path, reference: str) -> list[str]:
    """Return what is wrong with the documentation of the public names.

    Args:
        root: Where the package `keras_mixprec` lies.
        reference: The text of the page that lists them.
    """
    # Read, not imported: the site builds without TensorFlow.
    package = griffe.load(
        "keras_mixprec",
        search_paths=[root],
        try_relative_path=False,
        resolve_aliases=True,
    )
    # Of a name that a module bears too, the module's path comes first.
    names = r"^::: keras_mixprec\.(?:\w+\.)*(\w+)$"
    listed = set(re.findall(names, reference, re.MULTILINE))
    public = {str(name) for name in package.exports}
    problems = [f"'{n}' is not in docs/reference.md" for n in sorted(public - listed)]
    problems += [f"'{n}' is not public" for n in sorted(listed - public)]
    for name in sorted(public):
        problems += _without_docstring(package[name], name)
    return problems


def _without_docstring(found, name):
    target = found.final_target if found.is_alias else found
    if target.is_module:
        target = target[name]
    problems = [] if target.docstring else [f"'{name}' has no docstring"]
    if target.is_class:
        for member in target.all_members.values():
            ours = member.is_function and member.is_public and not member.is_special
            if ours and not member.docstring:
                problems.append(f"'{name}.{member.name}' has no docstring")
    return problems


def on_page_content(text, page, config, files):
    """Set formulas as MathML, which browsers draw by themselves, and links right."""
    if page is not None and page.file.src_uri.endswith(".ipynb"):
        text = _SOURCE.sub(lambda match: _href(match, page.file, files), text)
    text = _TABLE.sub(lambda match: _with_joints(match[0]), text)
    if "$" not in text and "arithmatex" not in text:
        return text
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_FORMULA.sub(_mathml, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _FORMULA.sub(_mathml, text[end:])])


def _with_joints(table):
    return _NAME.sub(lambda name: _JOINT.sub("<wbr>", name[0]), table)


def _href(match, source, files):
    folder = posixpath.dirname(source.src_uri)
    path = posixpath.normpath(posixpath.join(folder, match[1]))
    target = files.get_file_from_path(path)
    if target is None:
        _logger.warning("'%s' links to '%s', which is not.", source.src_uri, match[1])
        return match[0]
    return f'href="{target.url_relative_to(source)}{match[2] or ""}"'


def _mathml(match):
    inline = match[0].startswith("<span") or match[3]
    latex = html.unescape(next(g for g in match.groups() if g)).strip()
    return _converted(latex, "inline" if inline else "block")


@functools.cache
def _converted(latex, display):
    return latex2mathml.converter.convert(latex, display=display)
