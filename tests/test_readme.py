"""The README keeps its word: every command runs (at toy size), the snippet works, the counts are right. Of the pages of
experiments/, every flag exists and every link leads somewhere."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MODEL = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 32 --batch-size 2 --warmup 1 --device cpu"
TOY = f"{MODEL} --steps 2 --eval-every 2 --sample-tokens 2"
# Every command of the README, in its order, and what makes it a toy. None: the reason stands beside it.
COMMANDS = {
    "pip install -r requirements.txt": None,                                 # what .ci/run does first
    "python train_gpt.py": TOY,
    "python -m pytest": None,                                                # this very run
    "python train_gpt.py --attention softmax": TOY,
    "python experiments/benchmark.py": "--T 32 --heads 1 --dim 8 --repeats 1 --warmup 1 --decode 2 4 --decode-tokens 1 "
                                       "--threads 1 --out rows.json",
    "python data/prepare.py book.txt --tokenizer bytes --out data/book": "",
    "python train_gpt.py --data data/book --out runs/book": TOY,
    'python sample.py runs/book --prompt "Once"': "--tokens 3 --device cpu",
    "python convert_gpt2.py": "--steps 2 --distill-steps 2 --batch-size 2 --distill-batch-size 2 --eval-every 2 "
                              "--device cpu",
    "python convert_gpt2.py --preset gpt2": None,                            # tests/test_convert.py: a local server
    "torchrun --nproc-per-node 8 train_gpt.py …": None,                      # tests/test_train.py, with 2 processes
    "python data/prepare.py wikitext103": None,                              # tests/test_prepare.py: a local server
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    inline = re.findall(r"(?<!`)`((?:python|torchrun|pip) [^`]+)`(?!`)", README)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines + inline for part in line.split("&&")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_command_is_known_to_the_test_below():
    assert set(commands()) == set(COMMANDS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh copy of the project with a book beside it."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("experiments/*.py")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "book.txt").write_text("Once upon a time there was a hedgehog who read everything twice. \n" * 40)
    return folder


@pytest.mark.parametrize("command", [c for c, toy in COMMANDS.items() if toy is not None])
def test_every_command_runs(command, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    arguments = shlex.split(command)[1:] + shlex.split(COMMANDS[command])
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", [str((clone / arguments[0]).parent), *sys.path])
    try:
        runpy.run_path(str(clone / arguments[0]), run_name="__main__")
    except SystemExit as e:
        assert not e.code
    assert capsys.readouterr().out


def test_the_snippet_does_what_its_comments_say(tmp_path):
    import torch
    torch.manual_seed(0)
    (tmp_path / "snippet.py").write_text("\n".join(blocks("python")))
    names = runpy.run_path(str(tmp_path / "snippet.py"))
    whole = names["attention"](names["q"], names["k"], names["v"])
    assert names["y"].shape == (2, 12, 1, 64) and torch.allclose(whole[:, :, -1:], names["y"], atol=1e-5)


def test_line_counts_and_words_are_right():
    for name, count in re.findall(r"\| \[`([^`]+)`\]\([^)]*\) \| (\d+) \|", README):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(count)) <= 10, name
    assert len(README.split()) <= 1200


PAGES = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("experiments/*.md"))}


def flags_by_script():
    """{script: the flags that README.md and the pages of experiments/ give it, in a block or in a line}."""
    found = {}
    for text in PAGES.values():
        lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(r"`(python [^`\n]+)`", text))
        for line in lines.replace("\\\n", " ").splitlines():
            script = re.search(r"[\w/]+\.py", line)
            if script:
                arguments = line[script.end():].split("#")[0]
                found.setdefault(script[0], set()).update(re.findall(r"\s(--[\w-]+)", arguments))
    return found


@pytest.mark.parametrize("script, flags", flags_by_script().items(), ids=flags_by_script())
def test_every_flag_of_a_page_is_in_its_scripts_help(script, flags):
    if script.startswith("experiments/convert_"):
        pytest.importorskip("peft", reason="pip install -r requirements-experiments.txt")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert flags <= set(re.findall(r"--[\w-]+", done.stdout))


def test_links_between_the_pages_lead_somewhere():
    def anchors(text):
        headings = {re.sub(r"[^\w\- ]", "", h.lower()) for h in re.findall(r"^#+ (.*)$", text, re.M)}
        return {h.replace(" ", "-") for h in headings} | set(re.findall(r'<a id="(\w+)">', text))

    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
            path = page.parent / target if target else page
            assert path.exists(), (page.name, target)
            assert not anchor or anchor in anchors(path.read_text()), (page.name, target, anchor)
