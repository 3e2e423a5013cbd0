"""What goes to the package index: a README without its repository, and the sources."""

import email.parser
import fnmatch
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import optax_ev3

ROOT = pathlib.Path(__file__).parents[2]

# What only the repository has: its services, and the numbers behind stored tables.
LEFT_OUT = [".ci/*", ".github/*", ".*.yaml", "*/results.csv"]


def build(root, folder):
    """The wheel and the source distribution of the sources in a folder."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        return archive.read(name).decode()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def links(text):
    return re.findall(r"\]\(([^)\s]*)\)", text)


def code(text):
    return re.findall(r"```.*?```", text, re.DOTALL)


def test_links_hold_on_the_package_index(built):
    about = email.parser.Parser().parsestr(metadata(built[0]))
    text, readme = about.get_payload(), (ROOT / "README.md").read_text("utf-8")
    urls = dict(x.split(", ") for x in about.get_all("Project-URL"))
    assert len(links(text)) == len(links(readme)) > 0
    assert code(text) == code(readme)
    assert not re.search(r"<(a|img)\b|^\[[^\]]+\]:", text, re.MULTILINE)
    release = re.escape(urls["Source"]) + rf"/(blob|raw)/v{optax_ev3.__version__}/"
    for link in links(text):
        assert link.startswith("https://"), link
        file, found = re.subn(release, "", link.partition("#")[0])
        assert not found or (ROOT / file).is_file(), link
        assert not found or ("/raw/" in link) == file.endswith(".png"), link


def test_the_source_distribution_has_what_the_repository_has(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    [root] = tmp_path.iterdir()
    found = {str(x.relative_to(root)) for x in root.rglob("*") if x.is_file()}
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        names = {x for x in names.stdout.decode().splitlines() if (ROOT / x).exists()}
        names -= {x for x in names for glob in LEFT_OUT if fnmatch.fnmatch(x, glob)}
        assert found - {"PKG-INFO"} == names
    # Nothing is missing that the package is made of.
    again = build(root, tmp_path / "again")[0]
    assert metadata(again) == metadata(built[0])
    ours, theirs = (zipfile.ZipFile(x).namelist() for x in (again, built[0]))
    assert ours == theirs


def one(pattern, file):
    """What a pattern finds in a file: the first of one group."""
    return re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE)[1]


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert optax_ev3.__version__ == version
    assert one(r"^version: (\S+)$", "CITATION.cff") == version
    assert one(r"^## \[(\d[^\]]*)\]", "CHANGELOG.md") == version


def test_one_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    globs = ["*.cff", "*.md", "*.toml", "docs/*.md", ".github/**/*.*"]
    text = "\n".join(x.read_text("utf-8") for glob in globs for x in ROOT.glob(glob))
    found = set(re.findall(r"https://github\.com/[\w.-]+/optax_ev3\b", text))
    found |= set(re.findall(r"https://optax[-_]ev3[\w.-]*\.io\b", text))
    assert found == {project["urls"]["Source"], project["urls"]["Documentation"]}


@pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="a source distribution has no settings of Git"
)
def test_one_release_of_ruff():
    pinned = one(r"^ruff==(\S+)$", "requirements/constraints.txt")
    hook = r"ruff-pre-commit\n +rev: v(\S+)$"
    assert one(hook, ".pre-commit-config.yaml") == pinned
