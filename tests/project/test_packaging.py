"""What a new user relies on: the two commands of the README, that the package needs torch alone, and its metadata."""

import ast
import configparser
import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from inner_optimizers import CASES
from versions import needs_muon

import zclip_optim

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf8")
VERSIONS = (ROOT / ".ci" / "versions").read_text(encoding="utf8")
DESCRIPTION = (ROOT / "DESCRIPTION.md").read_text(encoding="utf8")
VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
RELATIVE_LINK = r"\[[^\]]*\]\((?!https://)[^)]*\)"
REFERENCE = r" \(\[\w+\]\)"
EXTRAS = ["lightning", "accelerate", "transformers", "matplotlib", "tensorboard", "tqdm", "zclip", "torch_optimizer"]


def arguments():
    """Of ZClipOptimizer, with their defaults; what is left over is only there to be refused."""
    parameters = inspect.signature(zclip_optim.ZClipOptimizer).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in VARIADIC}


def setup_cfg():
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf8")
    return parser


def test_readme_has_exactly_the_two_commands():
    commands = re.findall(r"^ *(python3 -m venv .*)$", README, flags=re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e '.[bench]' && .venv/bin/python -m benchmarks",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest",
    ]
    extras = setup_cfg()["options.extras_require"]
    assert {"bench", "test", "dev"} <= set(extras)


def test_what_the_readmes_command_leaves_out_is_run_right_after_it():
    assert re.search(r'^bash -c "\$test_command"\n.*-m pytest -m thorough$', CI, flags=re.MULTILINE)
    assert re.search(r"-m pytest .*-m ''", VERSIONS)
    assert "`.venv/bin/python -m pytest -m thorough`" in README


def test_the_package_depends_on_torch_alone():
    assert setup_cfg()["options"]["install_requires"].split() == ["torch>=2.6"]


def test_importing_it_imports_no_extra():
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import zclip_optim
        print([name for name in {EXTRAS} if name in set(sys.modules) - before])"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        ("lightning", "import zclip_optim.integrations.lightning", "lightning"),
        ("transformers", "import zclip_optim.integrations.transformers", "transformers"),
        *(
            (stack, f"import zclip_optim.integrations.{stack}", stack)
            for stack in ("deepspeed", "megatron", "torchtitan")
        ),
        (
            "matplotlib",
            "import zclip_optim.plotting as p; p.plot_history([{'grad_norm': 1, 'clipped_norm': 1}])",
            "plot",
        ),
        ("matplotlib", "import zclip_optim.plotting as p; p.plot_norms_by_parameter([])", "plot"),
    ],
)
def test_a_missing_extra_is_named(package, use, extra, monkeypatch):
    for name in [name for name in sys.modules if re.match(rf"(zclip_optim\.integrations|{package})\.", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"pytorch_{package}", None)  # of Lightning, its older name
    with pytest.raises(ImportError) as error:
        exec(use)
    assert str(error.value) == f"{package} is not installed; install it with: pip install 'zclip_optim[{extra}]'"
    assert extra in setup_cfg()["options.extras_require"]


def test_help_is_enough_to_use_the_optimizer():
    text = pydoc.render_doc(zclip_optim.ZClipOptimizer, renderer=pydoc.plaintext)
    for name in arguments():
        assert re.search(rf"^ \|      {name}: ", text, flags=re.MULTILINE), name
    for part in (
        "Raises:",
        "Example:",
        "References:",
        "optimizer.step()",
        "metrics",
        "step_was_skipped",
        "load_state_dict",
    ):
        assert part in text


def test_the_signature_has_every_option_with_its_default():
    defaults = {name: value for name, value in arguments().items() if name not in ("base_optimizer", "process_group")}
    assert defaults == dataclasses.asdict(zclip_optim.ZClipConfig())


def test_every_argument_is_in_the_readme_with_its_default():
    for name, default in arguments().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        if default is not inspect.Parameter.empty:
            assert ast.literal_eval(row.split("|")[2].strip(" `")) == default


@needs_muon
def test_readme_counts_the_optimizers_that_are_tested():
    assert f"{len(CASES)} configurations of optimizers are tested." in README


def test_all_public_names_are_documented():
    for name in zclip_optim.__all__:
        assert name == "__version__" or getattr(zclip_optim, name).__doc__


def test_the_page_on_an_index_is_part_of_the_readme():
    """All but its last paragraph; a link into the repository, which leads nowhere from there, is left out."""
    readme = re.sub(rf" \({RELATIVE_LINK}\)|, {RELATIVE_LINK}|{REFERENCE}", "", README).strip().split("\n\n")
    *parts, _ = DESCRIPTION.split("\n\n")
    assert [part for part in parts if part not in readme] == []


def test_the_page_on_an_index_has_no_relative_links():
    assert setup_cfg()["metadata"]["long_description"] == "file: DESCRIPTION.md"
    assert re.findall(RELATIVE_LINK, "![loss](benchmarks/loss.png)") == ["[loss](benchmarks/loss.png)"]
    assert re.findall(RELATIVE_LINK, DESCRIPTION) == []
    assert re.findall(rf"^\[[^\]]*\]:|<\w+ [^>]*(?:src|href)=|{REFERENCE}", DESCRIPTION, flags=re.MULTILINE) == []


def test_project_urls_begin_with_the_homepage():
    text = setup_cfg()["metadata"]["project_urls"]
    urls = dict(line.split(" = ") for line in text.strip().splitlines() if not line.startswith("#"))
    homepage = urls.pop("Homepage")
    assert all(url.startswith(homepage + "/") for url in urls.values())


def test_the_oldest_python_is_the_same_everywhere():
    options, classifiers = setup_cfg()["options"], setup_cfg()["metadata"]["classifiers"]
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)$", classifiers, flags=re.MULTILINE)]
    assert minors == list(range(10, minors[-1] + 1))
    assert options["python_requires"] == ">=3.10"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert 'target-version = "py310"' in pyproject
    assert 'python_version = "3.10"' in pyproject
    assert re.search(r"vermin .*--target=3\.10- zclip_optim$", CI, flags=re.MULTILINE)
    assert "It needs Python 3.10 and PyTorch 2.6 or newer" in README
    assert re.search(r'^versions=\("3\.10 2\.6\.0" ', VERSIONS, flags=re.MULTILINE)


def test_the_readme_names_the_version_and_what_it_was_tested_with():
    assert f"> **Status: {zclip_optim.__version__}, " in README
    (versions,) = re.findall(r"^versions=\((.*)\)$", VERSIONS, flags=re.MULTILINE)
    (oldest, newest), (usual,) = re.findall(r'"(\S+) (\S+)"', versions), re.findall(r"torch==(\S+)", CI)
    named = re.findall(r"(3\.\d+) with (?:torch )?(\S+\d)", README)
    assert (named[0], named[1][1], named[2]) == (oldest, usual, newest)


def test_the_changelog_begins_with_what_is_to_come_or_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    first = re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)[0]
    version = re.escape(zclip_optim.__version__)
    assert re.fullmatch(rf"\[Unreleased\]|\[{version}\] - \d{{4}}-\d\d-\d\d", first)
