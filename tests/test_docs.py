"""README and docs/: commands parse and run, Python runs, links and paths exist, tables show the records."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
import runpy
import shlex
import shutil
import string
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

import pytest
import tiny
import trainings
from test_ground import make_targets

from ray_jobs import generate as generate_job
from ray_jobs import preprocess as preprocess_job
from ray_jobs import serve as serve_job
from ray_jobs import train_command
from tccp.cli import VERBS, main, parse
from tccp.clips.clip_table import ClipTable
from tccp.files import Folder
from tccp.inference.pipeline_folder import write_untrained
from tccp.media import VideoWriter, open_audio, probe, read_frames, write_audio_wav
from tccp.roundtable import identity_path, read_truth, truth_path, write_clips
from tccp.serving.api import Server, create_app
from tccp.serving.store import JobStore

ROOT = tiny.ROOT
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


# What the pages hold


@dataclass(frozen=True)
class Command:
    """One command of a page, without what the shell does: variables are replaced, redirections left out."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A fenced block of code; line is the number of its first line in the page."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    inside: tuple[str, int] | None = None
    held: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            held.append(line)
        elif inside is None:
            inside, held = (line[3:], number + 1), []
        else:
            yield Block(*inside, "\n".join(held))
            inside = None
    assert inside is None, f"{page}: an open block"


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page's bash blocks. Knows variables, `&&`, `|`, `&`, `>`, comments and continued lines."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        variables: dict[str, str] = {}
        line = block.line
        for logical in re.split(r"(?<!\\)\n", block.text):
            reader = shlex.shlex(logical.replace("\\\n", " "), posix=True, punctuation_chars="&|;<>")
            reader.whitespace_split = True
            words: list[str] = []
            for word in [*reader, ";"]:
                if not re.fullmatch("[&|;]+", word):
                    words.append(word)
                    continue
                if words and (command := _expanded(words, variables)):
                    yield Command(page, line, command)
                words = []
            line += 1 + logical.count("\n")


def _expanded(words: list[str], variables: dict[str, str]) -> tuple[str, ...]:
    """The command without assignments and redirections. Assignments that stand alone go into `variables`."""
    if ">" in words:
        words = words[: words.index(">")]
    assignment = re.compile(r"(\w+)=(.*)", re.DOTALL)
    if all(assignment.fullmatch(word) for word in words):
        variables.update(match.groups() for word in words if (match := assignment.fullmatch(word)))
        return ()
    while assignment.fullmatch(words[0]):
        words = words[1:]
    parts = [shlex.split(string.Template(word).substitute(variables)) if "$" in word else [word] for word in words]
    return tuple(part for split in parts for part in split)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def test_readme_is_short_and_shows_how_to_start() -> None:
    assert len(README.read_text().splitlines()) <= 200
    assert {("make", "demo"), ("make", "test")} <= {command.words for command in COMMANDS if command.page == README}


def test_every_block_of_code_is_of_a_known_kind() -> None:
    """No test would run a block of another language, or commands in a block without one."""
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("bash", "python", "csv", ""), f"{page}:{block.line}"
            if not block.language:
                programs = {line.split()[0] for line in block.text.splitlines() if line.split()}
                assert not programs & {"tccp", "make", "python", "ray", "$", "import"}, f"{page}:{block.line}"


def test_a_pages_commands_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    lines = ["Text.", "```bash", "make a && . b  # c", 'common="--x 1 --y"', "A=1 run $common '*.mp4' \\", "  --z > f"]
    page.write_text("\n".join([*lines, "end &", "```", ""]))
    words = [(command.line, *command.words) for command in commands_of(page)]
    assert words == [(3, "make", "a"), (3, ".", "b"), (5, "run", "--x", "1", "--y", "*.mp4", "--z"), (7, "end")]


# Commands parse


def check(words: tuple[str, ...]) -> None:
    """Fails unless the program exists and takes these arguments. Runs nothing."""
    program, *arguments = words
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets()
    elif program == "tccp":
        if arguments != ["--help"]:
            parse(arguments)
    elif program == "python" and arguments[0] == "ray_jobs/preprocess.py":
        parse(preprocess_job.arguments(arguments[1:]))
    elif program == "python" and (job := re.fullmatch(r"ray_jobs/(serve|generate)\.py", arguments[0])):
        parse({"serve": serve_job, "generate": generate_job}[job[1]].arguments(arguments[1:]))
    elif program == "python" and (job := re.fullmatch(r"ray_jobs/train_(\w+)\.py", arguments[0])):
        assert job[1] in get_args(train_command.Stage)
        train_command.parse(job[1], arguments[1:])
    elif program == "python":
        source = (ROOT / arguments[0]).read_text()
        assert arguments[0].startswith("benchmarks/")
        assert all(f'"{word.partition("=")[0]}"' in source for word in arguments if word.startswith("-"))
    elif program == "ray":
        _check_ray(arguments)
    elif program == ".":
        assert arguments == [".venv/bin/activate"], "only the environment that make creates"
    elif program == "curl":
        _check_curl(arguments)
    elif program == "kubectl":
        assert arguments[:2] == ["apply", "-f"]
        assert (ROOT / arguments[2]).is_file()
    else:
        assert program == "export", f"no test knows the program {program}"


@functools.cache
def _operations() -> dict[str, Any]:
    """The paths of the server's API, with their operations."""

    async def unused(*given: Any) -> Any:
        raise AssertionError

    with tempfile.TemporaryDirectory() as place:
        store = JobStore(f"sqlite:///{place}/jobs.db")
        try:
            return create_app(Server(store, Folder(place), {}, unused, unused)).openapi()["paths"]
        finally:
            store.close()


def _check_curl(arguments: list[str]) -> None:
    """The server has the operation, and its fields."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("-X", "-o", "--json"):
        parser.add_argument(name)
    for name in ("-F", "-H"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("-N", action="store_true")
    parser.add_argument("url")
    given = parser.parse_args(arguments)
    url = urlsplit(given.url)
    fields = [part.partition("=")[0] for part in given.F]
    method = (given.X or ("POST" if given.json or fields else "GET")).lower()
    (operation,) = [
        operations[method]
        for path, operations in _operations().items()
        if method in operations and re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), url.path)
    ]
    names = {parameter["name"] for parameter in operation.get("parameters", [])}
    assert {name for name, _ in parse_qsl(url.query)} | {head.partition(":")[0] for head in given.H} <= names
    if not given.json and not fields:
        return
    kind = "application/json" if given.json else "multipart/form-data"
    schema = operation["requestBody"]["content"][kind]["schema"]
    assert {*fields, *json.loads(given.json or "{}")} <= schema["properties"].keys()
    assert set(schema.get("required", [])) <= {*fields, *json.loads(given.json or "{}")}


def _check_ray(arguments: list[str]) -> None:
    """By Ray's own parser; and what a job runs, as any command."""
    pytest.importorskip("ray")
    from ray.scripts.scripts import cli

    if "--" in arguments:
        inner = arguments.index("--")
        check(tuple(arguments[inner + 1 :]))
    command: Any = cli
    context = None
    while hasattr(command, "get_command"):
        command = command.get_command(context, arguments.pop(0))
    command.make_context("ray", arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_readme_or_docs_parses(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        check(command.words)
    except SystemExit as end:
        pytest.fail(f"{command}: exit code {end.code}: {capsys.readouterr().err}")


def test_options_targets_and_verbs_in_the_text_exist() -> None:
    """In `code` within sentences, where only a part of a command stands."""
    options = {"--help", "--working-dir"}
    for command in (*VERBS.values(), train_command.train):
        names = {name.replace("_", "-") for name in inspect.signature(command).parameters}
        options |= {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
    for source in (ROOT / "benchmarks").glob("*.py"):
        options |= set(re.findall(r'"(--[\w-]+)"', source.read_text()))
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", text):
            where = f"{page.name}: `{code}`"
            words = code.split()
            if words[0] in ("ray", "docker", "pip"):
                continue
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) <= options, where
            if words[0] == "make" and len(words) > 1:
                assert words[1] in make_targets(), where
            if words[0] == "tccp" and len(words) > 1 and words[1][0] != "-":
                assert words[1] in VERBS, where
            if words[:1] == ["python"] and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), where


# Commands run

PARSED_ONLY = {
    r"make |export |\. |tccp --help": "not a verb; tests/test_ground.py and tests/cli/ test make and --help",
    r"tccp weights fetch": "downloads weights; tests/test_weights.py fetches from a local server",
    r".*s3://": "needs a bucket",
    r"tccp preprocess .*--workers [2-9]": "starts Ray; tests/preprocessing/test_graph_on_ray.py runs it",
    r"python ray_jobs/": "starts Ray; tests/training/ and tests/preprocessing/test_graph_on_ray.py run it",
    r"ray |kubectl ": "needs a cluster",
    r"curl ": "needs a server; tests/serving/test_api_*.py talk to one",
    r"tccp train all --data DATA128": "made small, it is the same work as the training before it",
    r"tccp describe": "counts six networks of full size; tests/cli/test_cli.py runs it",
    r"tccp generate .*--detector lbp": "lbp finds few of RoundTable's faces; tests/faces/test_faces.py runs it",
    r"tccp (serve|submit|watch|fetch|cancel) ": "needs a server; tests/serving/ run one",
    r"tccp evaluate": "takes minutes; tests/evaluation/test_evaluation.py runs it on a tiny pipeline",
    r"python benchmarks/speed": "takes a quarter of an hour, or a GPU; tests/test_speed.py runs it at tiny size",
    r"python benchmarks/docs_tables\.py": "rewrites the pages; the test of the tables compares them",
}
"""Commands that are only parsed, by the beginning of their text, and why."""
TINY = ["--set", *trainings.OVERRIDES, "training.max_steps=1", "autoencoder.max_steps=1", "headbox.draws=1"]
SMALLER = {
    "synth": ["--clips", "2", "--seconds", "0.72"],
    "preprocess": ["--backend", "truth", *TINY],
    "train": ["--jobs", "1", "--device", "cpu", *TINY],
    "generate": ["--steps", "1", "--device", "cpu"],
    "films": ["--device", "cpu"],
}
"""What is added to a command of each verb. Later options win, so the command does the same work on less data."""
SOUND_S = 0.32
"""Length of speech.wav, and so of the films that are generated from it: one window and one frame."""


def only_parsed(command: Command) -> str | None:
    """The reason why a command is not run, or None if it is."""
    text = " ".join(command.words) + " "
    return next((reason for pattern, reason in PARSED_ONLY.items() if re.match(pattern, text)), None)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name: films/, film.mp4, speech.wav, face.png, mask.mp4, track.json, list.csv."""
    folder = tmp_path_factory.mktemp("footage")
    film, _ = write_clips(folder / "films", 2, 1.0, seed=0)
    for path, name in ((film, "film.mp4"), (truth_path(film), "film.truth.npz"), (identity_path(film), "face.png")):
        shutil.copy(path, folder / name)
    with open_audio(film) as sound:
        write_audio_wav(folder / "speech.wav", sound.samples[: round(SOUND_S * 16_000)])
    boxes = read_truth(film).head_box.round().astype(int)
    info = probe(film)
    with VideoWriter(folder / "mask.mp4", info.width, info.height, lossless=True) as mask:
        for picture, (x0, y0, x1, y1) in zip(read_frames(film), boxes.clip(0), strict=True):
            picture[:] = 0
            picture[y0:y1, x0:x1] = 255
            mask.write(picture)
    (folder / "track.json").write_text(json.dumps({"boxes": boxes.tolist(), "cuts": []}))
    (listed,) = (block.text for block in blocks(ROOT / "docs" / "generate.md") if block.language == "csv")
    (folder / "list.csv").write_text(listed + "\n")
    write_untrained(folder / "W", tiny.SETTINGS)
    return folder


def without_downloads(words: list[str]) -> list[str]:
    """Options for `tccp generate` in place of the default detector, which needs weights that are downloaded."""
    if {"--truth", "--detector"} & set(words):
        return []
    if words[words.index("--identity") + 1] != "face.png":
        return ["--truth"]
    return ["--identity-box", "whole"] if {"--mask", "--box"} & set(words) else ["--truth"]


def copied(footage: Path, folder: Path, page: Path) -> Path:
    """A page's own copy of the footage."""
    return Path(shutil.copytree(footage, folder / f"{page.parent.name}-{page.stem}"))


def test_every_reason_to_only_parse_is_needed() -> None:
    for pattern in PARSED_ONLY:
        assert any(re.match(pattern, " ".join(command.words) + " ") for command in COMMANDS), pattern


@pytest.mark.slow
def test_commands_of_readme_and_docs_run(
    footage: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Page by page, in order, on small data, in one process."""
    for page in PAGES:
        commands = [command for command in commands_of(page) if only_parsed(command) is None]
        if not commands:
            continue
        folder = copied(footage, tmp_path, page)
        monkeypatch.chdir(folder)
        if any(command.words[:2] == ("tccp", "train") for command in commands):
            shutil.rmtree("W")  # the page trains it
        for command in commands:
            words = list(command.words[1:])
            assert command.words[0] == "tccp"
            words += SMALLER.get(words[0], [])
            if words[0] == "generate":
                words += without_downloads(words)
            if "ID" in words:
                with ClipTable("DATA") as table:
                    words[words.index("ID")] = table.ids[0]
            try:
                main(words)
            except SystemExit as end:
                pytest.fail(f"{command}: exit code {end.code}: {capsys.readouterr().err}")
            for option in ("--out", "--save-landmarks"):
                if option in words:
                    assert (folder / words[words.index(option) + 1]).stat().st_size > 0, command


@pytest.mark.slow
def test_python_of_readme_and_docs_runs(
    footage: Path, shared_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page share their names, as in one session of a user."""
    monkeypatch.setenv("TCCP_WEIGHTS", str(shared_weights))
    run = 0
    for page in PAGES:
        monkeypatch.chdir(copied(footage, tmp_path, page))
        names: dict[str, Any] = {"__name__": page.stem}
        for block in blocks(page):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, str(page), "exec"), names)
                run += 1
        if "request" in names:
            assert probe(names["request"].out).num_frames == round(SOUND_S * 25)
    assert run >= 4


# Links, paths, tables


def test_links_lead_to_files_and_headings() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, heading = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_paths_in_the_text_exist() -> None:
    """Paths of the project in `code`."""
    for page in PAGES:
        for path in re.findall(
            r"`((?:tccp|preprocessing|ray_jobs|benchmarks|tests|docs|deploy|\.ci)/[\w./-]*)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_index_lists_every_page_and_record() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (ROOT / "docs" / "README.md").read_text()))
    files = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".json")}
    assert listed == files - {"README.md"}


def test_tables_of_the_pages_are_those_of_the_records() -> None:
    """`python benchmarks/docs_tables.py` writes them."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "docs_tables.py"))
    assert {"benchmark.md", "settings.md", "cluster.md", "speed.md"} == set(script["TABLES"])
    for page in script["TABLES"]:
        assert (ROOT / "docs" / page).read_text() == script["rendered"](page)
