"""The documents: links lead somewhere, commands parse and run; messages, tree and settings are real."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from ray_jobs import submit
from ray_jobs.cli import app
from ray_jobs.command_line import one_value_per_option
from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.settings_reading import known_keys, load_train_settings
from tests.ray_jobs.random_model import save_random_model
from tests.training.test_runs import validation, write_run

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md"))]
RECGPT = typer.main.get_command(app)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_TREE_NAME = re.compile(r"[\w-]+(?:\.\w+|/)")
_SECTIONS = "|".join({key.partition(".")[0] for key in known_keys(TrainSettings) if "." in key})
_SETTING = re.compile(rf"((?:{_SECTIONS})\.[\w.]+)(?:=.*)?")
OF_OTHERS = re.compile("beauty|BUCKET")  # in commands that need a log or a store that is not here
NO_SETTINGS = {"model.json", "item_table.weight"}  # a file, and a tensor in a checkpoint


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def fences(path, *languages):
    return [text for language, text in _FENCE.findall(path.read_text()) if language in languages]


def spans(path):
    """What stands between backticks in a document's sentences."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", path.read_text()))


def command_in(words):
    """Verb and arguments of the recgpt command in a line of a shell, whatever stands before it; else None."""
    for place, word in enumerate(words):
        if word == "recgpt":
            return words[place + 1 :]
        if word.startswith("ray_jobs.") and words[place - 1] == "-m":
            return [word.removeprefix("ray_jobs.").replace("_", "-"), *words[place + 1 :]]
    return None


def commands_in_blocks(path):
    for block in fences(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := command_in(shlex.split(line, comments=True)):
                yield command


def parse(command, words):
    """Parse as the program does, also what is submitted; raises for an unknown verb, option or setting."""
    if verbs := getattr(command, "commands", None):
        return parse(verbs[words[0]], words[1:])
    context = command.make_context(command.name, one_value_per_option(words))
    if command.name == "submit":
        assert context.params["verb"] in submit.VERBS
        return parse(RECGPT, [context.params["verb"], *context.args])
    return load_train_settings(None, context.params.get("set_") or [])


def options_of(command):
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


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
    "command", [command for path in DOCUMENTS for command in commands_in_blocks(path)], ids=" ".join
)
def test_every_command_in_a_block_parses(command):
    parse(RECGPT, command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_in_a_sentence_has_a_real_verb_and_options(path):
    for words in filter(None, (command_in(span.split()) for span in spans(path))):
        command = RECGPT
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            command, words = command.commands[words[0]], words[1:]
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert named <= {*options_of(command), "--help"}, command.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_option_that_is_named_exists(path):
    options = {name for verb in RECGPT.commands.values() for name in options_of(verb)}
    named = [re.match(r"--[\w-]+", span) for span in spans(path)]
    assert {option[0] for option in named if option} <= {*options, "--help"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_setting_that_is_named_exists(path):
    keys = known_keys(TrainSettings)
    named = {found[1] for found in map(_SETTING.fullmatch, spans(path)) if found}
    unknown = {name for name in named if not any(f"{key}.".startswith(f"{name}.") for key in keys)}
    assert unknown <= NO_SETTINGS


def test_every_verb_has_an_example_in_the_readme():
    assert {verb for verb, *_ in commands_in_blocks(README)} == set(RECGPT.commands)


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


def texts_of_the_code():
    """Every string in the code, with … in the place of each value that is put in."""
    for package in ("recgpt", "ray_jobs"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_in_the_questions_is_one_of_the_code():
    messages = [line for block in fences(DOCS / "faq.md", "text") for line in block.splitlines()]
    texts = list(texts_of_the_code())
    assert [message for message in messages if not any(message in text for text in texts)] == []
    assert len(messages) > 20


def own_commands(*verbs, documents=(README,)):
    """The commands of these verbs for a log of one's own, each once."""
    commands = [command for path in documents for command in commands_in_blocks(path) if command[0] in verbs]
    chosen = [tuple(command) for command in commands if not OF_OTHERS.search(" ".join(command))]
    return [list(command) for command in dict.fromkeys(chosen)]


def run(command):
    RECGPT(one_value_per_option(command), standalone_mode=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, local_ray):
    """A folder in which the README's commands for a log of one's own are given; in place of training, random
    weights are exported."""
    folder = tmp_path_factory.mktemp("workplace")
    items = np.random.default_rng(0).permuted(np.tile(np.arange(50), (40, 1)), axis=1)[:, :6]
    users = [f"u{number}" for number in range(40) for _ in range(6)]
    times = 1_700_000_000 + np.arange(len(users))
    (folder / "logs").mkdir()
    pq.write_table(pa.table({"uid": users, "sku": items.ravel(), "ts": times}), folder / "logs" / "a.parquet")
    (folder / "mine.yaml").write_text(fences(DOCS / "training.md", "yaml")[0])
    (folder / "items.csv").write_text("item_id,title\n7,seven\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (prepare,), (generate,) = own_commands("prepare"), own_commands("generate")
        run(prepare)
        write_run(folder / "runs" / "mine", [validation(1, 0.1)], finished=True)
        for name in ("a", "b"):
            write_run(folder / "runs" / name, [validation(1, 0.1)])
        save_random_model(folder / "runs" / "mine", HistoryDataset.open("data/mine"))
        run(generate)
    return folder


@pytest.mark.ray
@pytest.mark.parametrize(
    "command",
    [
        *own_commands("verify-candidates", "show", "index", "runs", "validate", documents=DOCUMENTS),
        *own_commands("evaluate", "tune-quotas"),
        *own_commands("report", "export", "plan"),
    ],
    ids=" ".join,
)
def test_a_command_runs(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    run(command)
    assert capsys.readouterr().out


@pytest.mark.ray
def test_the_python_of_the_readme_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (block,) = fences(README, "python")
    names = {}
    exec(block, names)
    assert list(names["candidates"]) == ["user_id", "item_ids", "scores", "steps"]
    assert len(names["candidates"]) == 40
    assert len(names["item_table"]) == names["info"].num_items + 1
