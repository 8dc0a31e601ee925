"""What the next developer is told is what is there."""

import configparser
import pathlib
import re

import pytest

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def extras():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(config["options.extras_require"])


def test_paths_in_contributing_and_the_checklist_exist():
    for name in ("CONTRIBUTING.md", "RELEASING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        paths = re.findall(r"\b(?:benchmarks|docs|tests|keras_mixprec)/[\w./]*\w", text)
        assert [p for p in paths if not (ROOT / p).exists()] == []


def test_the_workflow_installs_extras_that_exist_and_runs_all_backends():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    named = {
        e for group in re.findall(r"\[([a-z,]+)\]\"", text) for e in group.split(",")
    }
    assert named
    assert named <= extras()
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert matrix["backend"] == ["tensorflow", "jax", "torch"]
    classifiers = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r":: (3\.\d+)", classifiers)
    assert set(jobs["all"]["needs"]) == set(jobs) - {"all"}


def test_the_workflow_and_ci_run_the_same_slow_tests_on_other_backends():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    others = yaml.safe_load(text)["jobs"]["slow"]["env"]["OTHERS"].split()
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    _, slow = script.split('step "install what the slow tests need')
    (loop,) = re.findall(
        r"^for backend in jax torch; do\n(.*?)^done", slow, re.M | re.S
    )
    assert sorted(others) == sorted(re.findall(r"tests/\w+\.py", loop))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_whole(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0


def test_pre_commit_runs_the_linter_that_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format"} <= hooks
