"""Runs the page's scripts of web/js in node.js, with the least of a page around them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "web" / "js"
PAGE = {"app": """export const app = {
    extensions: {}, nodeOutputs: {}, extensionManager: {},
    registerExtension(extension) { this.extensions[extension.name] = extension; extension.setup?.(); },
};
""", "api": """export const api = new EventTarget();
api.apiURL = (path) => path;
api.told = [];
api.dispatchCustomEvent = (name, detail) => {
    api.told.push(name);
    api.dispatchEvent(new CustomEvent(name, { detail }));
};
""", "widgets": """export const ComfyWidgets = { STRING(node, name) {
    const widget = { name, options: {} };
    node.widgets.push(widget);
    return { widget };
} };
"""}

in_node = pytest.mark.skipif(not shutil.which("node"), reason="needs node.js")


def evaluate(folder: Path, script: str, program: str):
    """What `program` gives to `show(value)`. It has the page's app and api.

    It loads the script itself, `await load()`, when the page has what the script looks for.
    """
    scripts, own = folder / "scripts", folder / "extensions" / "pack" / "js"
    shutil.copytree(SCRIPTS, own)
    scripts.mkdir()
    for name, text in PAGE.items():
        (scripts / f"{name}.js").write_text(text, encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    main = folder / "main.js"
    main.write_text(f"""import {{ app }} from "./scripts/app.js";
import {{ api }} from "./scripts/api.js";
const show = (value) => console.log(JSON.stringify(value));
const load = () => import("./extensions/pack/js/{script}");
{program}""", encoding="utf-8")
    done = subprocess.run(["node", str(main)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
