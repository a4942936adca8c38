"""Help pages and documents.

They name every input and output. They quote messages that the pack really gives. They point to files and sections that
exist.
"""

import asyncio
import re
from pathlib import Path

import pytest
from PIL import Image

from video_ldm import comfy_entrypoint

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
SOURCES = [*(ROOT / "temporal").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("nodes", "temporal", "demo", "benchmarks", "tools", "tests", "docs", "web", "workflows", "models/demo")


def list_schemas():
    async def listed():
        return await (await comfy_entrypoint()).get_node_list()
    return [node.GET_SCHEMA() for node in asyncio.run(listed())]


SCHEMAS = list_schemas()
each_node = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)


def page_of(schema):
    return (PAGES / f"{schema.node_id}.md").read_text(encoding="utf-8")


def section(page, title):
    """Text below a heading, up to the next one."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return found[1] if found else ""


def first_column(text):
    """What stands in the first column of a section's table, below its heading."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]


def squeezed(text):
    return re.sub(r"\s+", " ", text)


@each_node
def test_a_help_page_lists_the_inputs_of_its_node(schema):
    required = [entry.id for entry in schema.inputs if not entry.optional]
    optional = [entry.id for entry in schema.inputs if entry.optional]
    cells = first_column(section(page_of(schema), "Inputs"))
    named = [name for cell in cells for name in cell.split(", ")]       # width and height share a row
    assert sorted(named) == sorted(required + optional)


@each_node
def test_the_range_that_a_help_page_gives_is_that_of_the_input(schema):
    """*0 to 20, ...* at the beginning of an input's row."""
    given = {}
    for line in section(page_of(schema), "Inputs").splitlines():
        if found := re.match(r"\| (\w+) \| \*(-?[\d.]+) to (-?[\d.]+)\b", line):
            given[found[1]] = float(found[2]), float(found[3])
    wanted = {entry.id: (entry.min, entry.max) for entry in schema.inputs if entry.id in given}
    assert given == wanted


@each_node
def test_a_help_page_lists_the_outputs_of_its_node(schema):
    named = first_column(section(page_of(schema), "Outputs"))
    assert named == [output.display_name or output.id for output in schema.outputs]


@each_node
def test_a_help_page_begins_with_the_name_that_the_node_shows(schema):
    assert page_of(schema).splitlines()[0] == f"# {schema.display_name}"


def test_every_help_page_belongs_to_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == {schema.node_id for schema in SCHEMAS}


# Pictures of help pages

PICTURES = PAGES / "pictures"
LARGEST, LARGEST_OF_ALL = 40_000, 1_000_000         # bytes
WIDTH = 700                                         # pixels: a help panel is narrower, and GitHub's page is wider


def pictures_of(page):
    """(what it shows, in words; its address) of each picture of a page."""
    return re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page)


@each_node
def test_a_help_page_has_a_picture_that_opens_is_small_and_is_described(schema):
    (words, address), = pictures_of(page_of(schema))
    assert address == f"pictures/{schema.node_id}.webp"     # relative: so the page and GitHub both find it
    assert len(words.split()) >= 5 and words.endswith(".") and not set(words) & set("<>\"&")
    assert schema.display_name in words
    path = PAGES / address
    assert path.stat().st_size <= LARGEST
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "WEBP" and picture.width == WIDTH and 100 <= picture.height <= WIDTH
        assert len(set(picture.convert("L").resize((32, 32)).tobytes())) > 8            # it is not blank


def test_no_picture_of_the_help_pages_is_left_over_and_they_are_small_together():
    files = [path for path in PICTURES.rglob("*") if path.is_file()]
    named = {(PAGES / address).resolve() for page in PAGES.glob("*.md") for _, address in pictures_of(text_of(page))}
    assert {path.resolve() for path in files} == named
    assert sum(path.stat().st_size for path in files) <= LARGEST_OF_ALL


def messages_not_in_the_code(table):
    """The parts of quoted messages that the code does not hold.

    A quoted message is written as *... like this ...*, with dots for what varies.
    """
    texts = [path.read_text(encoding="utf-8") for path in [*SOURCES, ROOT / "__init__.py"]]
    code = squeezed(re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts)))
    code = re.sub(r"\{[^{}]*\}", "...", code)
    parts = [part.strip(" .,:") for quoted in first_column(table)
             for message in re.findall(r"\*(.+?)\*", quoted) for part in message.split("...")]
    return [part for part in parts if len(part) > 12 and part not in code]


@each_node
def test_messages_quoted_in_a_help_page_are_in_the_code(schema):
    assert messages_not_in_the_code(section(page_of(schema), "Common mistakes")) == []


# README and docs/

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors(path):
    """What a link to a section of a page may name: its headings as GitHub turns them into ids, and ids set by hand."""
    prose = re.sub(r"^(?:```.*?^```|    .*?$)", "", text_of(path), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    ids = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return ids | set(re.findall(r'<a id="([^"]+)">', prose))


def broken_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or anchor and anchor not in anchors(path):
            broken.append(target)
    return broken


def missing_files(text):
    """Files and folders of this repository, and bundled models, that a page names in `code` and that do not exist."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*|[\w-]+\.(?:py|md|toml))[`:#]", text)
    bundled = [f"models/demo/{name}" for name in re.findall(r"\bvideo_ldm_driving\w*\.safetensors", text)]
    return [name for name in named + bundled if not (ROOT / name).exists()]


@each_document
def test_links_between_documents_lead_to_files_and_sections_that_exist(document):
    assert broken_links(document) == []


@each_document
def test_a_document_names_no_file_that_does_not_exist(document):
    assert missing_files(text_of(document)) == []


@each_node
def test_a_help_page_names_no_file_that_does_not_exist(schema):
    assert missing_files(page_of(schema)) == [] == broken_links(PAGES / f"{schema.node_id}.md")


@pytest.mark.parametrize("text, found", [
    ("see `temporal/errors.py` and `docs/`", []), ("see `temporal/no_such.py`", ["temporal/no_such.py"]),
    ("`run.py`, `no_such.md`", ["no_such.md"]), ("`models/video_ldm`", []),
    ("video_ldm_driving_none.safetensors", ["models/demo/video_ldm_driving_none.safetensors"])])
def test_a_file_that_does_not_exist_is_noticed(text, found):
    assert missing_files(text) == found


@pytest.mark.parametrize("link, is_broken", [
    ("#install", False), ("page.md#a-b-c", False), ("page.md#l1", False), ("page.md#d", True), ("page.md#code", True),
    ("none.md", True), ("https://example.com", False)])
def test_a_link_that_leads_nowhere_is_noticed(monkeypatch, tmp_path, link, is_broken):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text('## A: b, `c`\n<a id="l1"></a>text\n```\n# code\n```\n', encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(f"# Install\n[a link]({link})\n", encoding="utf-8")
    assert broken_links(page) == ([link] if is_broken else [])


def test_every_section_of_docs_that_the_code_cites_exists():
    cited = [(path, *match) for folder in FOLDERS[:6] for path in (ROOT / folder).rglob("*.py")
             for match in re.findall(r"docs/([\w-]+\.md)#([\w-]+)", text_of(path))]
    assert [entry for entry in cited if entry[2] not in anchors(ROOT / "docs" / entry[1])] == []


def test_the_readme_has_a_row_for_every_node():
    assert sorted(first_column(section(text_of(ROOT / "README.md"), "Nodes"))) == sorted(
        schema.display_name for schema in SCHEMAS)


def test_sentences_of_the_readmes_troubleshooting_are_in_the_code():
    table = section(text_of(ROOT / "README.md"), "Troubleshooting")
    assert len(first_column(table)) >= 15
    assert messages_not_in_the_code(table) == []
