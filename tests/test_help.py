"""Help pages: each names every input and output of its node, and quotes messages that the pack really gives."""

import asyncio
import re
from pathlib import Path

import pytest

from video_ldm import comfy_entrypoint

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
SOURCES = [*(ROOT / "temporal").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]


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
def test_a_help_page_lists_the_outputs_of_its_node(schema):
    named = first_column(section(page_of(schema), "Outputs"))
    assert named == [output.display_name or output.id for output in schema.outputs]


@each_node
def test_a_help_page_begins_with_the_name_that_the_node_shows(schema):
    assert page_of(schema).splitlines()[0] == f"# {schema.display_name}"


def test_every_help_page_belongs_to_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == {schema.node_id for schema in SCHEMAS}


@each_node
def test_messages_quoted_in_a_help_page_are_in_the_code(schema):
    """A quoted message is written as *... like this ...*, with dots for what varies; each part must be found."""
    code = squeezed(re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)))
    code = re.sub(r"\{[^{}]*\}", "...", code)
    parts = [part.strip(" .,:") for quoted in first_column(section(page_of(schema), "Common mistakes"))
             for message in re.findall(r"\*(.+?)\*", quoted) for part in message.split("...")]
    assert [part for part in parts if len(part) > 12 and part not in code] == []
