"""Every command, link and error message that README.md and docs/ show exists. Read as a person copies them."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests import ROOT
from tests.processes import run_here

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENTED = [ROOT / "cluster.yaml", ROOT / "cluster-gcp.yaml", ROOT / "slurm" / "train.sbatch"]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(page: Path) -> list[str]:
    """The shell commands of a page, one text a fence."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command line; a quoted text that goes over several lines is one word."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|()"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def shown(page: Path) -> list[list[str]]:
    return [words for fence in fences(page) for words in commands(fence)]


def commented(page: Path) -> list[list[str]]:
    """The commands in a file's comments that start a job."""
    lines = "\n".join(re.findall(r"^# {2,}(.*)$", page.read_text("utf-8"), re.MULTILINE))
    return [words for words in commands(lines.replace("'", "")) if "job" in words]


@functools.cache
def help_of(program: str) -> str:
    """What a program of this project says about its options."""
    with mock.patch.dict(os.environ, COLUMNS="200", NO_COLOR="1"):
        done = run_here(str(ROOT / program), "--help")
    assert done.returncode == 0, f"{program}: {done.stderr}"
    return done.stdout


def unknown_flags(words: list[str]) -> list[str]:
    """The flags of a command that the program of this project that it starts does not have."""
    for place, word in enumerate(words[:-1]):
        module = re.fullmatch(r"(?:.*/)?(jobs/\w+)\.py|(tests\.[\w.]+)", word)
        if module is not None:
            text = help_of(f"{(module[1] or module[2]).replace('.', '/')}.py")
            flags = [given.partition("=")[0] for given in words[place + 1 :] if given.startswith("--")]
            return [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
    return []


@pytest.mark.parametrize("page", [*PAGES, *COMMENTED], ids=named)
def test_every_program_and_flag_shown_exists(page: Path) -> None:
    for words in shown(page) if page in PAGES else commented(page):
        assert unknown_flags(words) == [], shlex.join(words)


def test_a_flag_that_is_not_there_is_noticed() -> None:
    wrong = commands("ray job submit -- python jobs/doctor.py --worker 8 \\\n    --gpus")
    assert [unknown_flags(words) for words in wrong] == [["--worker"]]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_fence_is_shell_and_every_make_target_and_file_shown_exists(page: Path) -> None:
    done = subprocess.run(["bash", "-n"], input="\n".join(fences(page)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {words[1] for words in shown(page) if words[0] == "make" and len(words) > 1} <= targets
    for words in shown(page):
        if words[:2] == ["ray", "up"] or words[0] == "sbatch":
            file = next(word for word in words[1:] if word.endswith((".yaml", ".sbatch")))
            assert (ROOT / file).is_file(), file


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert link.startswith("https://") or target.exists(), link
        assert link.startswith("https://") or not anchor or anchor in anchors(target), link


def spoken() -> list[str]:
    """Every text in the code, an f-string's values as NUL, white space as one space."""
    texts = []
    for path in (path for folder in ("pipeline", "model", "jobs") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [" ".join(text.split()) for text in texts]


def test_every_message_explained_is_one_of_the_programs() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = [m for m in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) if "ModuleNotFoundError" not in m]
    assert len(messages) > 30
    texts = "\n".join(spoken())
    for message in messages:
        assert re.search(".*".join(re.escape(part.strip()) for part in message.split("...")), texts), message


@pytest.mark.parametrize(
    ("checker", "file"), [("shellcheck", "slurm/train.sbatch"), ("hadolint --failure-threshold warning", "Dockerfile")]
)
def test_the_linters_of_scripts_and_images_pass(checker: str, file: str) -> None:
    program, *options = checker.split()
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *options, file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/cluster-aws.md", "docs/cluster-gcp.md", "k8s/rayjob.yaml"])
def test_training_on_spot_nodes_writes_checkpoints_by_the_clock(page: str) -> None:
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ").replace("\n    --", " --")
    runs = [line for line in text.splitlines() if "jobs/train.py" in line and "/mnt/nvme" in line]
    assert runs
    assert all("--checkpoint-minutes" in line for line in runs)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
