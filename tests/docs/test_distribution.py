"""What goes to the package index: a README without its repository, and the sources."""

import email.parser
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import optax_ev3

ROOT = pathlib.Path(__file__).parents[2]


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
