"""The documents: links lead somewhere, commands parse, the tree and the stated defaults are true."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from ray_jobs.cli import app
from ray_jobs.command_line import one_value_per_option
from recgpt.config import TrainSettings, known_keys, load_train_settings

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
TRAINING = REPOSITORY / "docs" / "training.md"
DOCUMENTS = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(?:recgpt |python -m ray_jobs\.)([\w-]+)(.*)")
_TREE_NAME = re.compile(r"[\w-]+(?:\.\w+|/)")
_SETTING = re.compile(r"^\| `([\w.]+)` \| `([^`]+)` \|", re.MULTILINE)


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def fences(path, *languages):
    return [text for language, text in _FENCE.findall(path.read_text()) if language in languages]


def commands_in_blocks(path):
    """(verb, arguments) of every recgpt command in a shell block."""
    for block in fences(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if match := _COMMAND.match(" ".join(words[:3])):
                first = words.index("recgpt") + 2 if "recgpt" in words else 3
                yield match[1], words[first:]


def links():
    for path in DOCUMENTS:
        for target in _LINK.findall(_FENCE.sub("", path.read_text())):
            if "://" not in target:
                yield path, target


def anchors(path):
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree_paths():
    """Every path that the README's tree names; two spaces of indentation are one folder deeper."""
    (tree,) = fences(README, "tree")
    folders = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for word in line.split():
            if not _TREE_NAME.fullmatch(word):
                break
            folders[depth:] = [word]
            yield "".join(folders)


@pytest.mark.parametrize(("path", "target"), links(), ids=lambda value: str(value).rpartition("/")[2])
def test_every_link_leads_somewhere(path, target):
    file, _, anchor = target.partition("#")
    linked = path.parent / file if file else path
    assert linked.exists()
    if anchor:
        assert anchor in anchors(linked)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [command for path in DOCUMENTS for command in commands_in_blocks(path)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_command_in_a_block_parses(verb, arguments):
    context = VERBS[verb].make_context(verb, one_value_per_option(arguments))  # raises for a mistake
    load_train_settings(None, context.params.get("set_") or [])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_in_a_sentence_has_real_options(path):
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", path.read_text()))
    for verb, rest in (match.groups() for match in map(_COMMAND.match, spans) if match):
        options = {name for option in VERBS[verb].params for name in (*option.opts, *option.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", rest)) <= {*options, "--help"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_option_that_is_named_exists(path):
    options = {
        name
        for verb in VERBS.values()
        for option in verb.params
        for name in (*option.opts, *option.secondary_opts)
    }
    spans = re.findall(r"`(--[\w-]+)", _FENCE.sub("", path.read_text()))
    assert set(spans) <= {*options, "--help"}


def test_every_verb_has_an_example_in_the_readme():
    assert {verb for verb, _ in commands_in_blocks(README)} == set(VERBS)


@pytest.mark.parametrize("path", tree_paths())
def test_the_tree_names_only_what_exists(path):
    assert (REPOSITORY / path).exists()


def test_the_tree_names_every_module():
    modules = {
        str(file.relative_to(REPOSITORY))
        for package in ("recgpt", "ray_jobs")
        for file in (REPOSITORY / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules - set(tree_paths()) == set()


@pytest.mark.parametrize(("key", "default"), _SETTING.findall(TRAINING.read_text()))
def test_the_stated_default_of_a_setting_is_its_default(key, default):
    assert key in known_keys(TrainSettings)
    # Stated among settings that are the defaults otherwise, the value changes nothing.
    assert load_train_settings(None, [f"{key}={default}"]) == TrainSettings()


def test_the_table_of_settings_is_found():
    stated = [key for key, _ in _SETTING.findall(TRAINING.read_text())]
    assert len(stated) > 20
    assert len(stated) == len(set(stated))
