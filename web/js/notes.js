// Shows in a node what it reports and warns of (nodes/host/notes.py), and its error, as a text below its widgets.
//
// The text comes in two ways: as an output of the node when it is done, and as an event while it works. The event may
// also come from a node of ComfyUI's own, such as KSampler.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";
import { findNode } from "./find_node.js";

const PREFIX = "VideoLDM";
const PACK = "Video LDM";       // the type of the pack's errors
const EVENT = "video_ldm.note";
const NAME = "video_ldm_note";
const HEIGHT = 60;      // pixels of the text

function noteOf(node) {
    return node.widgets?.find((widget) => widget.name === NAME);
}

function addNote(node) {
    const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
    // A stored text would be read as the value of an input that a later version adds at this place.
    widget.serialize = false;
    Object.assign(widget.options, { serialize: false, read_only: true });
    // A fixed height: else the text takes the room of the video or the preview. Longer texts are scrolled.
    widget.computeLayoutSize = undefined;
    widget.computeSize = (width) => [width ?? 0, HEIGHT];
    if (widget.inputEl) {
        widget.inputEl.readOnly = true;
    }
    widget.label = "report";
    const [width, height] = node.size;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
    return widget;
}

function show(node, text) {
    if (text || noteOf(node)) {
        (noteOf(node) ?? addNote(node)).value = text;
        node.setDirtyCanvas(true, true);
    }
}

function textOf(output) {
    return [output?.text ?? []].flat().join("\n");
}

app.registerExtension({
    name: "VideoLDM.Notes",

    setup() {
        api.addEventListener(EVENT, ({ detail }) => {
            const node = findNode(detail.node);
            if (node) {
                show(node, detail.text);
            }
        });
        // A node that begins to work has said nothing yet.
        api.addEventListener("executing", ({ detail }) => {
            const node = detail && findNode(detail.node ?? detail);
            if (node && noteOf(node)) {
                show(node, "");
            }
        });
        // Newer pages say only that a node failed, and hide the sentence behind a button.
        api.addEventListener("execution_error", ({ detail }) => {
            const node = detail.exception_type === PACK && findNode(detail.node_id);
            if (node) {
                show(node, detail.exception_message);
            }
        });
    },

    nodeCreated(node) {
        if (!node.comfyClass?.startsWith(PREFIX)) {
            return;
        }
        const { onExecuted } = node;
        node.onExecuted = function (output) {
            show(this, textOf(output));
            return onExecuted?.apply(this, arguments);
        };
    },

    // A workflow that is opened again brings its outputs with it, and runs nothing.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) {
            const node = findNode(id);
            if (node?.comfyClass?.startsWith(PREFIX)) {
                show(node, textOf(output));
            }
        }
    },
});
